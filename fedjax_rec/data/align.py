"""Several sets of interactions brought onto one user id space and one item id space."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from fedjax_rec.data.interactions import Interactions


def align(parts: Sequence[Interactions]) -> tuple[Interactions, ...]:
    """Re-indexes every part by the union of all labels; rows, times and ratings stay.

    Titles, genres and user attributes stay only where every part has them: half a column would read as a fact.
    """
    user_labels = _union([part.user_labels for part in parts])
    item_labels = _union([part.item_labels for part in parts])
    user_places = [_places(user_labels, part.user_labels) for part in parts]
    item_places = [_places(item_labels, part.item_labels) for part in parts]

    def merged(columns: list[np.ndarray | None], places: list[np.ndarray], size: int) -> np.ndarray | None:
        if any(column is None for column in columns):
            return None
        result = np.zeros((size, *columns[0].shape[1:]), np.result_type(*columns))
        for column, place in zip(columns, places, strict=True):
            result[place] = column
        return result

    names = set.intersection(*(set(part.user_attributes) for part in parts))
    same_genres = len({part.genre_names for part in parts}) == 1
    titles = merged([part.item_titles for part in parts], item_places, len(item_labels))
    genres = merged([part.item_genres for part in parts], item_places, len(item_labels)) if same_genres else None
    attributes = {
        name: merged([part.user_attributes[name] for part in parts], user_places, len(user_labels))
        for name in sorted(names)
    }
    return tuple(
        dataclasses.replace(
            _moved(part, users, items, num_users=len(user_labels), num_items=len(item_labels)),
            user_labels=user_labels,
            item_labels=item_labels,
            item_titles=titles,
            item_genres=genres,
            genre_names=parts[0].genre_names if same_genres else (),
            user_attributes=attributes,
        )
        for part, users, items in zip(parts, user_places, item_places, strict=True)
    )


def _moved(part: Interactions, users: np.ndarray, items: np.ndarray, *, num_users: int, num_items: int) -> Interactions:
    """`part` with user `u` at `users[u]` and item `i` at `items[i]`, both ascending, so that row order is unchanged."""
    counts = np.zeros(num_users, np.int64)
    counts[users] = part.counts_per_user
    return Interactions(
        name=part.name,
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        item_ids=items[part.item_ids].astype(np.int32),
        file_rows=part.file_rows,
        num_items=num_items,
        timestamps=part.timestamps,
        ratings=part.ratings,
        user_labels=np.arange(num_users),
        item_labels=np.arange(num_items),
        repairs=part.repairs,
    )


def _union(labels: list[np.ndarray]) -> np.ndarray:
    """Ascending union; text, if any part has text."""
    as_text = any(part.dtype.kind != "i" for part in labels)
    return np.unique(np.concatenate([part.astype(str) if as_text else part for part in labels]))


def _places(union: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.searchsorted(union, labels.astype(union.dtype))

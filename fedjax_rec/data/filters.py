"""Filters that papers apply before they split, each with a note on what it does to privacy.

A filter is data-dependent when what happens to one user's rows can depend on other users' rows. The (epsilon, delta) of
what is trained afterwards then speaks about the filtered data only: one user more or less may change which items and
users of others remain. A filter that looks at one user at a time keeps neighbouring data neighbours, and is free. The
catalogue itself (which items exist) counts as public knowledge throughout.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedjax_rec.data.interactions import Interactions


@dataclass(frozen=True)
class FilterNote:
    """What a filter did.

    Attributes:
      name: the call, e.g. "k_core(k=5)".
      data_dependent: True if one user's rows can decide about another's: epsilon then does not cover the filter.
      dropped_rows: rows taken away.
      dropped_users: users without rows afterwards, out of those who had some.
      dropped_items: items without rows afterwards, out of those that had some.
      rounds: passes until nothing changed.
    """

    name: str
    data_dependent: bool
    dropped_rows: int
    dropped_users: int
    dropped_items: int
    rounds: int = 1


class Filtered(NamedTuple):
    """The interactions that remain, and the note."""

    interactions: Interactions
    note: FilterNote


def k_core(interactions: Interactions, k: int) -> Filtered:
    """Drops users and items with fewer than `k` rows, again and again until none is left; ids are then compacted.

    Data-dependent: whether my item survives depends on how many others touched it, so neighbouring data sets may differ
    in many users after the filter. With user-level privacy prefer `min_interactions_per_user`.

    Raises:
      ValueError: for `k` below 1, or if nothing is left.
    """
    if k < 1:
        raise ValueError(f"k_core needs k of at least 1, and got {k}.")
    users, items = interactions.user_ids, interactions.item_ids
    keep, rounds = np.ones(len(items), bool), 0
    while True:
        rounds += 1
        of_user = np.bincount(users[keep], minlength=interactions.num_users)
        of_item = np.bincount(items[keep], minlength=interactions.num_items)
        narrower = keep & (of_user >= k)[users] & (of_item >= k)[items]
        if np.array_equal(narrower, keep):
            break
        keep = narrower
    return _filtered(interactions, keep, name=f"k_core(k={k})", data_dependent=True, rounds=rounds, compact_items=True)


def min_interactions_per_user(interactions: Interactions, minimum: int) -> Filtered:
    """Drops users with fewer than `minimum` rows; user ids are compacted, the catalogue stays.

    Not data-dependent: a user's own rows alone decide, so neighbouring data sets stay neighbours.

    Raises:
      ValueError: for a minimum below 1, or if nobody is left.
    """
    if minimum < 1:
        raise ValueError(f"min_interactions_per_user needs a minimum of at least 1, and got {minimum}.")
    keep = (interactions.counts_per_user >= minimum)[interactions.user_ids]
    name = f"min_interactions_per_user(minimum={minimum})"
    return _filtered(interactions, keep, name=name, data_dependent=False, rounds=1, compact_items=False)


def binarize(interactions: Interactions, threshold: float) -> Filtered:
    """Implicit feedback out of ratings: rows rated `threshold` or more stay, without their rating.

    Unknown ratings (NaN) are dropped. Not data-dependent: each row decides for itself. Users without rows leave the id
    space, the catalogue stays.

    Raises:
      ValueError: without ratings, or if nothing is left.
    """
    if interactions.ratings is None:
        raise ValueError(f"{interactions.name} has no ratings to compare with the threshold {threshold:g}.")
    keep = interactions.ratings >= threshold  # False for NaN
    name = f"binarize(threshold={threshold:g})"
    filtered = _filtered(interactions, keep, name=name, data_dependent=False, rounds=1, compact_items=False)
    return filtered._replace(interactions=dataclasses.replace(filtered.interactions, ratings=None))


def _filtered(
    interactions: Interactions, keep: np.ndarray, *, name: str, data_dependent: bool, rounds: int, compact_items: bool
) -> Filtered:
    if not keep.any():
        raise ValueError(
            f"{name} leaves nothing of the {interactions.num_interactions} rows of {interactions.name}; ask for less."
        )
    kept = interactions.take(keep)
    had_users, had_items = interactions.counts_per_user > 0, interactions.item_counts > 0
    has_users, has_items = kept.counts_per_user > 0, kept.item_counts > 0
    note = FilterNote(
        name=name,
        data_dependent=data_dependent,
        dropped_rows=int(np.count_nonzero(~keep)),
        dropped_users=int(np.count_nonzero(had_users & ~has_users)),
        dropped_items=int(np.count_nonzero(had_items & ~has_items)),
        rounds=rounds,
    )
    return Filtered(_compacted(kept, items=has_items if compact_items else np.ones_like(has_items)), note)


def _compacted(interactions: Interactions, *, items: np.ndarray) -> Interactions:
    """Without users that have no rows, and with only the `items` (bool `[num_items]`)."""
    users = interactions.counts_per_user > 0
    new_ids = np.cumsum(items, dtype=np.int32) - np.int32(1)
    titles, genres = interactions.item_titles, interactions.item_genres
    return dataclasses.replace(
        interactions,
        offsets=np.concatenate([[0], np.cumsum(interactions.counts_per_user[users])]),
        item_ids=new_ids[interactions.item_ids],
        num_items=int(np.count_nonzero(items)),
        user_labels=interactions.user_labels[users],
        item_labels=interactions.item_labels[items],
        item_titles=None if titles is None else titles[items],
        item_genres=None if genres is None else genres[items],
        user_attributes={key: values[users] for key, values in interactions.user_attributes.items()},
    )

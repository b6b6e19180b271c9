"""Who is who when virtual users are judged: members, others, reference, and the popularity sampler beside them.

A generator saw the train users of a split, and nobody else: they are the *members*. Users that were held out whole
(`strong_generalization`) never met it: with all of their rows they are the control group of everything that is said
about risk. A seeded half of them are the *others*, who are attacked like members; the rest are the *reference*, real
users that an attacker may know.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.data.split import Split
from fedjax_rec.models.popularity import draw_by_popularity
from fedjax_rec.synthesis.virtual import from_histories


class Populations(NamedTuple):
    """The real users of a split by their role, each with all of their rows; ids are renumbered within a role.

    Attributes:
      members: train users, whom the generator saw.
      held_out: all users it never saw.
      others: half of those, attacked like members.
      reference: the other half, what an attacker knows of people in general.
    """

    members: Interactions
    held_out: Interactions
    others: Interactions
    reference: Interactions


def populations(split: Split, *, seed: int = 0) -> Populations:
    """The roles of a split's users.

    Args:
      split: by whole users, as `strong_generalization` cuts it.
      seed: of which held-out users are others and which reference.

    Raises:
      ValueError: if the split holds out no whole users, or fewer than four: then nobody can be a control.
    """
    parts = (split.history, split.validation, split.test)
    counts = sum(part.counts_per_user for part in parts)
    held_out = np.flatnonzero((counts > 0) & (split.train.counts_per_user == 0))
    members = np.flatnonzero(split.train.counts_per_user)
    if len(held_out) < 4 or len(members) < 4:
        raise ValueError(
            f"This split ({split.rule}) has {len(held_out)} users held out whole and {len(members)} train users; "
            "utility and risk of virtual users need four of each at least: cut it with strong_generalization(...)."
        )
    outside = take_users(_union(parts), held_out)
    order = np.random.default_rng([seed, 1]).permutation(len(held_out))
    half = len(held_out) // 2
    return Populations(
        members=take_users(split.train, members),
        held_out=outside,
        others=take_users(outside, np.sort(order[half:])),
        reference=take_users(outside, np.sort(order[:half])),
    )


def on_catalogue(virtual: Interactions, catalogue: Interactions) -> Interactions:
    """Virtual users on the item ids of a catalogue: a data set that was written and read again lacks unseen items.

    Raises:
      ValueError: without a virtual user that has a row, or with an item that the catalogue does not have.
    """
    if not np.any(virtual.counts_per_user):
        raise ValueError(f"{virtual.name} has no virtual user with a row; there is nothing to judge.")
    if virtual.num_items == catalogue.num_items and np.array_equal(virtual.item_labels, catalogue.item_labels):
        return virtual
    unknown = virtual.item_labels[~np.isin(virtual.item_labels, catalogue.item_labels)]
    if len(unknown):
        raise ValueError(
            f"{virtual.name} has {len(unknown)} items that the catalogue of {catalogue.name} has not, such as "
            f"{unknown[0]!r}: they were drawn from another catalogue. Judge them on the data set they stand for."
        )
    places = np.searchsorted(catalogue.item_labels, virtual.item_labels)  # labels ascend
    return dataclasses.replace(
        virtual,
        item_ids=places[virtual.item_ids].astype(np.int32),
        num_items=catalogue.num_items,
        item_labels=catalogue.item_labels,
        item_titles=catalogue.item_titles,
        item_genres=catalogue.item_genres,
        genre_names=catalogue.genre_names,
    )


def take_users(interactions: Interactions, user_ids: np.ndarray) -> Interactions:
    """Some users with all of their rows, renumbered 0, 1, ... in the order of ``user_ids`` (int, all different)."""
    counts = interactions.counts_per_user[user_ids]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    starts = interactions.offsets[:-1][user_ids]
    rows = np.repeat(starts - offsets[:-1], counts) + np.arange(offsets[-1])
    return dataclasses.replace(
        interactions,
        offsets=offsets,
        item_ids=interactions.item_ids[rows],
        file_rows=interactions.file_rows[rows],
        timestamps=None if interactions.timestamps is None else interactions.timestamps[rows],
        ratings=None if interactions.ratings is None else interactions.ratings[rows],
        user_labels=interactions.user_labels[user_ids],
        user_attributes={name: column[user_ids] for name, column in interactions.user_attributes.items()},
    )


def with_rows(users: Interactions) -> Interactions:
    """Only the users that have a row."""
    kept = np.flatnonzero(users.counts_per_user)
    if not len(kept):
        raise ValueError(f"{users.name} has no user with a row; there is nothing to learn from or to compare.")
    return users if len(kept) == users.num_users else take_users(users, kept)


def stack_users(first: Interactions, second: Interactions, *, name: str) -> Interactions:
    """Users of both, those of ``first`` before those of ``second``, with fresh labels; on one catalogue.

    Times stay where both have them; ratings and attributes are dropped.
    """
    timed = first.timestamps is not None and second.timestamps is not None
    item_ids = np.concatenate([first.item_ids, second.item_ids])
    return dataclasses.replace(
        first,
        name=name,
        offsets=np.concatenate([first.offsets, first.offsets[-1] + second.offsets[1:]]),
        item_ids=item_ids,
        file_rows=np.arange(len(item_ids)),
        timestamps=np.concatenate([first.timestamps, second.timestamps]) if timed else None,
        ratings=None,
        user_labels=np.arange(1, first.num_users + second.num_users + 1),
        user_attributes={},
    )


def dense_rows(interactions: Interactions) -> np.ndarray:
    """All users as 0/1 rows, float32 ``[users, items]``."""
    rows = np.zeros((interactions.num_users, interactions.num_items), np.float32)
    rows[interactions.user_ids, interactions.item_ids] = 1.0
    return rows


def popularity_sampler(real: Interactions, *, num_users: int, seed: int) -> Interactions:
    """Virtual users who know nothing but popularity: what any generator must beat. Not private.

    Each takes the length of a random real user, and items as `draw_by_popularity` draws them.

    Args:
      real: rows that popularity and lengths are taken from.
      num_users: drawn.
      seed: of the draws.
    """
    rng = np.random.default_rng([seed, 2])
    lengths = rng.choice(real.counts_per_user[real.counts_per_user > 0], num_users)
    drawn = draw_by_popularity(real.item_counts, lengths, rng=rng)
    return from_histories(drawn, catalogue=real, name="popularity sampler", ordered=False)


def _union(parts: Sequence[Interactions]) -> Interactions:
    """All rows of parts that share their id spaces, in time order within a user where they have times."""
    first = parts[0]
    users = np.concatenate([part.user_ids for part in parts])
    items = np.concatenate([part.item_ids for part in parts])
    files = np.concatenate([part.file_rows for part in parts])
    times = None if first.timestamps is None else np.concatenate([part.timestamps for part in parts])
    ratings = None if first.ratings is None else np.concatenate([part.ratings for part in parts])
    order = np.lexsort((files, users) if times is None else (files, times, users))
    counts = sum(part.counts_per_user for part in parts)
    return dataclasses.replace(
        first,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        item_ids=items[order],
        file_rows=files[order],
        timestamps=None if times is None else times[order],
        ratings=None if ratings is None else ratings[order],
    )

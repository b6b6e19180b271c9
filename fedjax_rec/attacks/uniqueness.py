"""How many users do a few of their own items single out? The question before every release of histories.

Somebody who knows m items of a person, and nothing else, looks for the records that have all of them. One such record
is the person's; the data set names her to everybody who has seen her watch m films.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse

from fedjax_rec.data.interactions import Interactions

_TARGETS_AT_A_TIME = 512  # bounds the counts of records held at once


class Uniqueness(NamedTuple):
    """Users whom their known items single out.

    Attributes:
      share: of the targets.
      error: standard error of the share over targets.
      num_targets: users with enough items.
    """

    share: float
    error: float
    num_targets: int


def uniqueness(
    interactions: Interactions,
    *,
    known_items: Sequence[int] = (4, 8, 12),
    released: Interactions | None = None,
    truth: np.ndarray | None = None,
    num_targets: int | None = None,
    seed: int = 0,
) -> dict[int, Uniqueness]:
    """Share of users for whom m random items of their own are all in exactly one record, and that record is theirs.

    Bare item sets: no ratings, no dates, no knowledge of what a user did *not* touch. Targets are the users with at
    least m items.

    Args:
      interactions: what is true, and what the known items are drawn from.
      known_items: values of m.
      released: the records that are searched; None = `interactions`.
      truth: int `[users]`, the record of each user in `released`, -1 = none; None = the record with the same number.
        A record that stands for several users singles out none of them.
      num_targets: at most so many random targets; None = all.
      seed: of targets and known items.

    Returns:
      `Uniqueness` by m; NaN where no user has m items.

    Raises:
      ValueError: for an m below 1, or a `truth` that does not fit.
    """
    if not known_items or min(known_items) < 1:
        raise ValueError(f"known_items must be numbers from 1 on, and is {tuple(known_items)}.")
    released = interactions if released is None else released
    truth = check_truth(interactions, released, truth)
    persons = np.bincount(truth[truth >= 0], minlength=released.num_users)
    records = sparse.csr_matrix(
        (np.ones(released.num_interactions, np.int32), released.item_ids, released.offsets),
        shape=(released.num_users, released.num_items),
    )
    by_item, places = records.T.tocsr(), item_places(interactions, released)
    found = {}
    for m in known_items:
        rng = np.random.default_rng([seed, m])
        targets = draw_targets(interactions, m, num_targets, rng)
        known = places[interactions.item_ids[draw_rows(interactions, targets, m, rng)]]
        alone = np.zeros(len(targets), bool)
        for start in range(0, len(targets), _TARGETS_AT_A_TIME):
            some = slice(start, start + _TARGETS_AT_A_TIME)
            alone[some] = _alone(known[some], by_item, truth[targets[some]], persons)
        found[m] = Uniqueness(*mean_and_error(alone), len(targets))
    return found


def _alone(known: np.ndarray, by_item: sparse.csr_matrix, mine: np.ndarray, persons: np.ndarray) -> np.ndarray:
    """bool ``[targets]``: exactly one record has all known items, and it is the target's and nobody else's."""
    num, m = known.shape
    real = known >= 0
    ends = np.concatenate([[0], np.cumsum(real.sum(1))])
    asked = sparse.csr_matrix((np.ones(ends[-1], np.int32), known[real], ends), shape=(num, by_item.shape[0]))
    shared = (asked @ by_item).tocoo()
    complete = shared.data == m
    targets, records = shared.row[complete], shared.col[complete]
    count = np.bincount(targets, minlength=num)
    own = np.zeros(num, bool)
    own[targets[(records == mine[targets]) & (persons[records] == 1)]] = True
    return own & (count == 1)


def check_truth(original: Interactions, released: Interactions, truth: np.ndarray | None) -> np.ndarray:
    """The record of each original user, int64 ``[users]``, -1 = none.

    Raises:
      ValueError: if it has another length, names records that are not there, or is missing where it is needed.
    """
    if truth is None:
        if original.num_users != released.num_users:
            raise ValueError(
                f"{original.name} has {original.num_users} users and the release {released.num_users} records; say "
                "with `truth` which record is whose."
            )
        return np.arange(original.num_users)
    truth = np.asarray(truth)
    inside = len(truth) == original.num_users and truth.dtype.kind == "i"
    if not inside or truth.min(initial=-1) < -1 or truth.max(initial=-1) >= released.num_users:
        raise ValueError(
            f"truth must be integers [{original.num_users}], each a record 0..{released.num_users - 1} or -1 for "
            f"none, and is {truth.dtype} {list(truth.shape)}."
        )
    return truth.astype(np.int64)


def item_places(original: Interactions, released: Interactions) -> np.ndarray:
    """Where each item of `original` stands in the catalogue of `released`, int64 ``[items]``, -1 = nowhere."""
    ours, theirs = original.item_labels, released.item_labels
    if ours.dtype.kind != theirs.dtype.kind:
        ours, theirs = ours.astype(str), theirs.astype(str)
    order = np.argsort(theirs, kind="stable")
    places = order[np.minimum(np.searchsorted(theirs, ours, sorter=order), len(theirs) - 1)]
    return np.where(theirs[places] == ours, places, -1)


def draw_targets(interactions: Interactions, m: int, num: int | None, rng: np.random.Generator) -> np.ndarray:
    """Users with at least m items, ascending int64; a random `num` of them if that is fewer."""
    users = np.flatnonzero(interactions.counts_per_user >= m)
    return users if num is None or num >= len(users) else np.sort(rng.choice(users, num, replace=False))


def draw_rows(interactions: Interactions, users: np.ndarray, m: int, rng: np.random.Generator) -> np.ndarray:
    """m different rows of each user, uniform, int64 ``[users, m]``."""
    shuffled = np.lexsort((rng.random(interactions.num_interactions), interactions.user_ids))
    return shuffled[interactions.offsets[users][:, None] + np.arange(m)]


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean over targets and its standard error; NaN for none."""
    if not len(values):
        return math.nan, math.nan
    return float(np.mean(values)), float(np.std(values) / math.sqrt(len(values)))

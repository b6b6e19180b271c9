"""Micro-aggregation: groups of k or more similar users, who all get the same released item set.

Domingo-Ferrer and Mateo-Sanz, 2002, "Practical Data-Oriented Microaggregation for Statistical Disclosure Control";
the grouping is MDAV, maximum distance to the average vector, a variant of theirs (Domingo-Ferrer and Torra, 2005,
"Ordinal, Continuous and Heterogeneous k-Anonymity Through Microaggregation"). Whatever an attacker knows of somebody's
items, ratings and dates, k records of the release fit it equally well, so that the right one is named with probability
at most 1/k.

Heuristic, no guarantee against background knowledge, unlike differential privacy: what a group shares is told of each
of its members, and an attacker who knows the other members learns what the last one added.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from fedjax_rec.anonymization.losses import mean_jaccard_distance
from fedjax_rec.anonymization.released import released
from fedjax_rec.data.interactions import Interactions

_OVERSAMPLE, _POWER_STEPS = 8, 2


class _GroupRows(NamedTuple):
    """What is released of each group, in the order of the groups, each ``[rows]``."""

    groups: np.ndarray
    items: np.ndarray
    members: np.ndarray  # who had the item
    ratings: np.ndarray | None  # means over those who rated it, NaN if nobody did
    timestamps: np.ndarray | None  # means over known ones, 0 if none is


class MicroAggregation(NamedTuple):
    """A release in groups.

    Attributes:
      interactions: rows of one group's members are identical; no user attributes.
      group_of: int64 ``[users]``, -1 for users without rows, who stay without. Secret: it links members.
      num_groups: groups, each of k to 2k - 1 users.
      information_loss: mean Jaccard distance of the users' item sets before and after.
      single_share: share of released rows of a group that only one member had; 0 unless ``min_members`` is 1.
      num_emptied: users that had rows and have none, as their group has no item in common.
    """

    interactions: Interactions
    group_of: np.ndarray
    num_groups: int
    information_loss: float
    single_share: float
    num_emptied: int


def microaggregate(
    interactions: Interactions, k: int, *, seed: int, times: str = "drop", dim: int = 16, min_members: int = 2
) -> MicroAggregation:
    """Groups similar users and releases one item set for each group, once for each member.

    Users are compared by their rows x / |x|, projected on the leading ``dim`` singular vectors. The released set holds
    the items that most members have, up to the median length of their records; among equals the popular ones. An item
    that one member alone had would be told of that member, with its rating, and stays out unless ``min_members`` is 1.
    Ratings are means over the members who rated the item, times (if asked for) means of the known ones. User attributes
    are dropped: with them the members of a group would differ again.

    Args:
      interactions: any; users without rows are in no group, and should be left out of a release with `keep_users`.
      k: smallest group, from 2 to the number of users with rows.
      seed: of the random start of the singular vectors.
      times: "drop", or "group" for means.
      dim: of the projection.
      min_members: items that fewer members had are not released, and sets may be shorter.

    Raises:
      ValueError: for arguments out of range.
    """
    active = np.flatnonzero(interactions.counts_per_user)
    if not 2 <= k <= len(active):
        raise ValueError(f"k must lie between 2 and the {len(active)} users with rows; got {k}.")
    if times not in ("drop", "group"):
        raise ValueError(f'times must be "drop" or "group"; got {times!r}.')
    if dim < 1 or not 1 <= min_members <= k:
        raise ValueError(f"dim must be positive and min_members from 1 to k; got {dim} and {min_members}.")
    group_of = np.full(interactions.num_users, -1)
    group_of[active] = mdav(_projection(interactions, dim, seed)[active], k)
    rows = _group_rows(interactions, group_of, min_members)
    users, places = _to_members(rows.groups, group_of, active)
    result = released(
        dataclasses.replace(interactions, user_attributes={}),
        users,
        rows.items[places],
        ratings=None if rows.ratings is None else rows.ratings[places],
        timestamps=None if rows.timestamps is None or times == "drop" else rows.timestamps[places],
        suffix=f"groups of {k}",
    )
    return MicroAggregation(
        interactions=result,
        group_of=group_of,
        num_groups=int(group_of.max()) + 1,
        information_loss=mean_jaccard_distance(interactions, result),
        single_share=float(np.mean(rows.members == 1)) if len(rows.members) else 0.0,
        num_emptied=int(np.count_nonzero(result.counts_per_user[active] == 0)),
    )


def mdav(points: np.ndarray, k: int) -> np.ndarray:
    """Groups of k to 2k - 1 near points, int64 ``[points]``: MDAV.

    While 3k points are left, the one farthest from their mean takes its k - 1 nearest, then so does the one farthest
    from that; of fewer than 3k, one more group is taken if that leaves k. Time grows with the square of the points.

    Args:
      points: float ``[points, dim]``, at least k of them.
      k: smallest group.
    """
    points = np.asarray(points, np.float64)
    group_of, left, group = np.full(len(points), -1), np.arange(len(points)), 0
    while len(left) >= 2 * k:
        rest = points[left]
        centre = rest[np.argmax(_squared(rest, rest.mean(0)))]
        for _ in range(2 if len(left) >= 3 * k else 1):
            rest = points[left]
            nearest = np.argsort(_squared(rest, centre), kind="stable")
            group_of[left[nearest[:k]]] = group
            centre = rest[nearest[-1]]
            left = left[np.sort(nearest[k:])]
            group += 1
    group_of[left] = group
    return group_of


def _squared(points: np.ndarray, centre: np.ndarray) -> np.ndarray:
    gap = points - centre
    return np.einsum("pd,pd->p", gap, gap)


def _projection(interactions: Interactions, dim: int, seed: int) -> np.ndarray:
    """Rows x / |x| on the leading right singular vectors, float64 ``[users, dim]``, by random projection.

    Halko, Martinsson and Tropp, 2011, "Finding Structure with Randomness".
    """
    values = np.repeat(1 / np.sqrt(np.maximum(interactions.counts_per_user, 1)), interactions.counts_per_user)
    x = sp.csr_matrix(
        (values, interactions.item_ids, interactions.offsets), (interactions.num_users, interactions.num_items)
    )
    dim = min(dim, *x.shape)
    start = np.random.default_rng(seed).normal(size=(x.shape[1], min(dim + _OVERSAMPLE, *x.shape)))
    basis = np.linalg.qr(x @ start)[0]
    for _ in range(_POWER_STEPS):
        basis = np.linalg.qr(x @ (x.T @ basis))[0]
    left, scale, _ = np.linalg.svd((x.T @ basis).T, full_matrices=False)
    return (basis @ left * scale)[:, :dim]


def _group_rows(interactions: Interactions, group_of: np.ndarray, min_members: int) -> _GroupRows:
    """The most common items of each group, up to the median length of its members' records."""
    num_items, lengths = interactions.num_items, interactions.counts_per_user
    codes = group_of[interactions.user_ids] * num_items + interactions.item_ids
    codes, of_row, members = np.unique(codes, return_inverse=True, return_counts=True)
    groups, items = np.divmod(codes, num_items)
    order = np.lexsort((items, -interactions.item_counts[items], -members, groups))
    sizes = np.bincount(groups)
    rank = np.empty(len(codes), np.int64)
    rank[order] = np.arange(len(codes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    medians = np.array([np.median(lengths[group_of == group]) for group in range(len(sizes))])
    chosen = (rank < np.floor(medians[groups])) & (members >= min_members)

    def means(values, known):
        counts = np.bincount(of_row[known], minlength=len(codes))[chosen]
        sums = np.bincount(of_row[known], weights=values[known], minlength=len(codes))[chosen]
        return sums / np.maximum(counts, 1), counts > 0

    ratings, timestamps = interactions.ratings, interactions.timestamps
    if ratings is not None:
        ratings, rated = means(ratings, ~np.isnan(ratings))
        ratings = np.where(rated, ratings, np.nan)
    if timestamps is not None:
        timestamps = np.rint(means(timestamps, timestamps > 0)[0]).astype(np.int64)
    return _GroupRows(groups[chosen], items[chosen], members[chosen], ratings, timestamps)


def _to_members(groups: np.ndarray, group_of: np.ndarray, active: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of its group for every active user: the user of each, and its place among the groups' rows."""
    starts = np.searchsorted(groups, np.arange(group_of.max() + 2))
    lengths = np.diff(starts)[group_of[active]]
    first = np.cumsum(lengths) - lengths
    places = np.repeat(starts[group_of[active]] - first, lengths) + np.arange(lengths.sum())
    return np.repeat(active, lengths), places

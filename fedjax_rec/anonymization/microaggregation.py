"""Micro-aggregation: groups of k or more similar users, who all get the same released item set.

Domingo-Ferrer and Mateo-Sanz, 2002, "Practical Data-Oriented Microaggregation for Statistical Disclosure Control";
the grouping is MDAV, maximum distance to the average vector. Whatever an attacker knows of somebody's items, ratings
and dates, k records of the release fit it equally well, so that the right one is named with probability at most 1/k.

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


class MicroAggregation(NamedTuple):
    """A release in groups.

    Attributes:
      interactions: rows of one group's members are identical; no user attributes.
      group_of: int64 ``[users]``, -1 for users without rows, who stay without. Secret: it links members.
      num_groups: groups, each of k to 2k - 1 users.
      information_loss: mean Jaccard distance of the users' item sets before and after.
      single_share: share of released rows of a group that only one member had.
    """

    interactions: Interactions
    group_of: np.ndarray
    num_groups: int
    information_loss: float
    single_share: float


def microaggregate(
    interactions: Interactions, k: int, *, seed: int, times: str = "drop", dim: int = 64, min_members: int = 1
) -> MicroAggregation:
    """Groups similar users and releases one item set for each group, once for each member.

    Users are compared by their rows x / |x|, projected on the leading ``dim`` singular vectors. The released set holds
    the items that most members have, as many as the median length of their records; among equals the popular ones.
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
    groups, items, members, ratings, timestamps = _group_rows(interactions, group_of, min_members)
    rows = np.argsort(groups, kind="stable")
    starts = np.searchsorted(groups[rows], np.arange(group_of.max() + 2))
    lengths = np.diff(starts)[group_of[active]]
    firsts = np.repeat(starts[group_of[active]] - np.cumsum(lengths) + lengths, lengths)
    chosen = rows[firsts + np.arange(lengths.sum())]
    result = released(
        dataclasses.replace(interactions, user_attributes={}),
        np.repeat(active, lengths),
        items[chosen],
        ratings=None if ratings is None else ratings[chosen],
        timestamps=None if timestamps is None or times == "drop" else timestamps[chosen],
        suffix=f"groups of {k}",
    )
    return MicroAggregation(
        interactions=result,
        group_of=group_of,
        num_groups=int(group_of.max()) + 1,
        information_loss=mean_jaccard_distance(interactions, result),
        single_share=float(np.mean(members == 1)) if len(members) else 0.0,
    )


def mdav(points: np.ndarray, k: int) -> np.ndarray:
    """Groups of k to 2k - 1 near points, int64 ``[points]``: MDAV.

    While 3k points are left, the one farthest from their mean takes its k - 1 nearest, then so does the one farthest
    from that; of fewer than 3k, one more group is taken if that leaves k. Time grows with the square of the points.

    Args:
      points: float ``[points, dim]``, at least k of them.
      k: smallest group.
    """
    group_of = np.full(len(points), -1)
    places, rest, group = np.arange(len(points)), np.asarray(points, np.float64), 0

    def take(centre, places, rest):
        """Gives the k points nearest to the centre the next group, and returns the others."""
        nonlocal group
        far = _squared(rest, centre)
        nearest = np.argsort(far, kind="stable")[:k]
        group_of[places[nearest]] = group
        group += 1
        stays = np.ones(len(rest), bool)
        stays[nearest] = False
        return places[stays], rest[stays]

    while len(rest) >= 3 * k:
        first = rest[np.argmax(_squared(rest, rest.mean(0)))]
        places, rest = take(first, places, rest)
        second = rest[np.argmax(_squared(rest, first))]
        places, rest = take(second, places, rest)
    if len(rest) >= 2 * k:
        places, rest = take(rest[np.argmax(_squared(rest, rest.mean(0)))], places, rest)
    group_of[places] = group
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


def _group_rows(interactions: Interactions, group_of: np.ndarray, min_members: int):
    """Rows released for each group: group, item, members who had it, mean rating and mean time of these."""
    num_items, groups = interactions.num_items, group_of[interactions.user_ids]
    pairs, of_row, members = np.unique(
        groups * num_items + interactions.item_ids, return_inverse=True, return_counts=True
    )
    pair_group, pair_item = np.divmod(pairs, num_items)
    order = np.lexsort((pair_item, -interactions.item_counts[pair_item], -members, pair_group))
    sizes = np.bincount(pair_group)
    rank = np.empty(len(pairs), np.int64)
    rank[order] = np.arange(len(pairs)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    in_group = np.argsort(group_of, kind="stable")[np.count_nonzero(group_of < 0) :]
    ends = np.cumsum(np.bincount(group_of[in_group]))[:-1]
    lengths = np.array([np.median(part) for part in np.split(interactions.counts_per_user[in_group], ends)])
    chosen = (rank < np.floor(lengths[pair_group])) & (members >= min_members)

    def means(values, known):
        if values is None:
            return None, None
        counts = np.bincount(of_row[known], minlength=len(pairs))
        sums = np.bincount(of_row[known], weights=values[known], minlength=len(pairs))
        return (sums / np.maximum(counts, 1))[chosen], counts[chosen] > 0

    ratings, rated = means(
        interactions.ratings, None if interactions.ratings is None else ~np.isnan(interactions.ratings)
    )
    times, _ = means(interactions.timestamps, None if interactions.timestamps is None else interactions.timestamps > 0)
    return (
        pair_group[chosen],
        pair_item[chosen],
        members[chosen],
        None if ratings is None else np.where(rated, ratings, np.nan),
        None if times is None else np.rint(times).astype(np.int64),
    )

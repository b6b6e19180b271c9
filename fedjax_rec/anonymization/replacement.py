"""Replacement: each user chooses what share of the record is given up for items of a virtual user.

Liu, Cheng, Chen, Wei, Nie and Kankanhalli, 2022, "Privacy-Preserving Synthetic Data Generation for Recommendation
Systems" (UPC-SDG), let users control their share. Differs from the paper: the items to give up are chosen at random,
not by what they tell, and their substitutes come from the record of a virtual user instead of a network that was
trained on the real data.

No guarantee: what is kept is kept as it is, and whoever knows some of that may find the record. Use virtual users of a
generator with user-level privacy; then the substitutes at least tell of nobody.
"""

from typing import NamedTuple

import numpy as np

from fedjax_rec.anonymization.losses import mean_jaccard_distance
from fedjax_rec.anonymization.released import released
from fedjax_rec.data.interactions import Interactions


class Replacement(NamedTuple):
    """A release with replaced items.

    Attributes:
      interactions: as long a record for every user as before.
      num_replaced: int64 ``[users]``, items given up. Public only if the users' choices are.
      virtual_user: int64 ``[users]``, who gave the most similar record; -1 where nothing was replaced.
      information_loss: mean Jaccard distance of the users' item sets before and after.
    """

    interactions: Interactions
    num_replaced: np.ndarray
    virtual_user: np.ndarray
    information_loss: float


def replace_items(
    interactions: Interactions,
    virtual: Interactions,
    *,
    share: float | np.ndarray,
    seed: int,
    match: str = "jaccard",
    num_candidates: int = 100,
) -> Replacement:
    """Replaces at least the chosen share of each user's items by items of virtual users; lengths stay.

    Of n items ``ceil(share n)``, chosen at random, are given up. ``num_candidates`` virtual users are drawn, and give
    their items in the order of their Jaccard index with what is kept, or in random order. None of them is an item the
    user had, so that the share is exact. A substitute takes over the time of the row it replaces, and its rating unless
    the virtual user has one: else a missing value would mark it.

    Args:
      interactions: any; users without rows stay so.
      virtual: virtual users over the same catalogue.
      share: between 0 and 1, for all or for each ``[users]``.
      seed: of all choices; a user's depend on nobody else's. Keep it secret.
      match: "jaccard" or "random".
      num_candidates: virtual users looked at for each user.

    Raises:
      ValueError: for arguments out of range, another catalogue, or virtual users without enough different items.
    """
    if virtual.num_items != interactions.num_items or not np.array_equal(virtual.item_labels, interactions.item_labels):
        raise ValueError(
            f"The {virtual.num_items} items of {virtual.name} are not the {interactions.num_items} of "
            f"{interactions.name}; make virtual users over the catalogue of the data."
        )
    shares = np.asarray(share, float)
    if shares.shape not in ((), (interactions.num_users,)):
        raise ValueError(f"share must be a number or [{interactions.num_users}], and is {list(shares.shape)}.")
    if not np.all((shares >= 0) & (shares <= 1)):
        raise ValueError(f"Shares must lie between 0 and 1; got {shares[~((shares >= 0) & (shares <= 1))].flat[0]}.")
    if match not in ("jaccard", "random") or num_candidates < 1:
        raise ValueError(f'match must be "jaccard" or "random", candidates positive; got {match!r}, {num_candidates}.')
    givers = np.flatnonzero(virtual.counts_per_user)
    lengths = interactions.counts_per_user
    num_replaced = np.ceil(np.broadcast_to(shares, lengths.shape) * lengths - 1e-9).astype(np.int64)
    items = interactions.item_ids.copy()
    ratings = None if interactions.ratings is None else interactions.ratings.copy()
    giver_of = np.full(interactions.num_users, -1)
    for user in np.flatnonzero(num_replaced):
        rng = np.random.default_rng([seed, int(user)])
        rows = slice(interactions.offsets[user], interactions.offsets[user + 1])
        leaves = rng.permutation(lengths[user])[: num_replaced[user]]
        mine = interactions.items_of(user)
        candidates = rng.choice(givers, min(num_candidates, len(givers)), replace=False) if len(givers) else givers
        if match == "jaccard":
            candidates = _by_similarity(virtual, candidates, np.delete(mine, leaves))
        places = _substitutes(virtual, candidates, givers, mine, num_replaced[user], rng)
        items[rows][leaves] = virtual.item_ids[places]
        if ratings is not None and virtual.ratings is not None:
            theirs = virtual.ratings[places]
            ratings[rows][leaves] = np.where(np.isnan(theirs), ratings[rows][leaves], theirs)
        giver_of[user] = candidates[0]
    result = released(
        interactions,
        interactions.user_ids,
        items,
        ratings=ratings,
        timestamps=interactions.timestamps,
        suffix="items replaced",
    )
    return Replacement(result, num_replaced, giver_of, mean_jaccard_distance(interactions, result))


def _by_similarity(virtual: Interactions, candidates: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The candidates, those whose items are most like the kept ones first."""
    places, owners = _rows_of(virtual, candidates)
    has = np.zeros(virtual.num_items, bool)
    has[kept] = True
    shared = np.bincount(owners[has[virtual.item_ids[places]]], minlength=len(candidates))
    either = len(kept) + virtual.counts_per_user[candidates] - shared
    return candidates[np.argsort(-shared / either, kind="stable")]


def _substitutes(virtual, candidates, givers, mine, number, rng) -> np.ndarray:
    """Rows of the virtual users, so many of different items that are not the user's, int64 ``[number]``."""
    free = np.ones(virtual.num_items, bool)
    free[mine] = False
    found: list[np.ndarray] = []
    for pool in (candidates, rng.permutation(givers)):  # all virtual users, should the candidates have too few items
        for giver in pool:
            places = rng.permutation(np.arange(virtual.offsets[giver], virtual.offsets[giver + 1]))
            places = places[free[virtual.item_ids[places]]][: number - sum(map(len, found))]
            free[virtual.item_ids[places]] = False
            found.append(places)
            if sum(map(len, found)) == number:
                return np.concatenate(found)
    raise ValueError(
        f"A user of {len(mine)} items gives up {number}, and the virtual users have only {sum(map(len, found))} "
        "others; make more virtual users, or lower the share."
    )


def _rows_of(virtual: Interactions, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of these users one after another, and whose (place in ``users``) each is."""
    lengths = virtual.counts_per_user[users]
    owners = np.repeat(np.arange(len(users)), lengths)
    starts = virtual.offsets[users] - np.cumsum(lengths) + lengths
    return starts[owners] + np.arange(len(owners)), owners

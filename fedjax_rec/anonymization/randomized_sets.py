"""Randomised response on item sets: every item of the catalogue is present or absent by a biased coin.

Warner, 1965, "Randomized Response: A Survey Technique for Eliminating Evasive Answer Bias", for each of the M bits of a
user's row, as `privacy.randomized_response` does for uploads. Of all that this package does to data it alone is
differentially private, and the epsilon that a whole user gets shows how little fits through M coins.
"""

import dataclasses
import math
import os
from typing import Any, NamedTuple

import numpy as np

from fedjax_rec.anonymization.losses import mean_jaccard_distance
from fedjax_rec.anonymization.released import released
from fedjax_rec.data.interactions import Interactions

_COIN = 2**32
_BLOCK_CELLS = 2**24


class RandomizedSets(NamedTuple):
    """Randomised item sets and what may be said of them.

    Attributes:
      interactions: without ratings, times and user attributes.
      statement: JSON values: probabilities, epsilons with their units, what was dropped, and counts. The counts under
        "measured" compare with the source, cost extra epsilon if told, and are for its holder.
    """

    interactions: Interactions
    statement: dict[str, Any]


def randomize_sets(
    interactions: Interactions, *, epsilon_per_item: float, seed: int | None, expected_items: float | None = None
) -> RandomizedSets:
    """Keeps each own item with probability p and adds each other with probability q, independently.

    Plain: ``p = e^eps / (1 + e^eps)``, ``q = 1 - p``; at a modest epsilon the q M added items drown the own ones. With
    ``expected_items`` = d, a public number, q falls until ``q (M - d) = (1 - p) d``, with ``p = e^eps q``: a record of
    d items has d in expectation afterwards. Sparse, and most of it random: ``p = e^eps d / (e^eps d + M - d)``.

    Guarantee: pure; replace-one; released is the item set of every user, once; no sampling. With ``eps`` =
    ``epsilon_per_item``: adding or removing one interaction changes one bit and costs
    ``eps = max(log p/q, log (1-q)/(1-p))``; swapping one for another ``log p(1-q) / q(1-p)``, at most 2 eps; another
    history altogether, the user-level number, M eps.
    Ratings and times are dropped, as only real items have them, and attributes, which no coin covers. Labels are the
    users' own: a release wants pseudonyms as well. Coins are integers of 32 bits, rounded towards less information.

    Args:
      interactions: whose item sets; users without rows get random items too.
      epsilon_per_item: positive.
      seed: None for coins of the operating system, as a release needs; a number for studies, where whoever knows it
        can take the noise off.
      expected_items: length of a record that stays as long, above 0 and at most M / 2; chosen without the data, or
        released under privacy before.

    Raises:
      ValueError: for arguments out of range, or an epsilon too small for coins of 32 bits.
    """
    num_items = interactions.num_items
    keep_coin, add_coin = _coins(epsilon_per_item, num_items, expected_items)
    users, items = _flip(interactions, keep_coin, add_coin, seed)
    bare = dataclasses.replace(interactions, user_attributes={})
    result = released(bare, users, items, ratings=None, timestamps=None, suffix="randomised item sets")
    add, swap = bit_epsilons(keep_coin / _COIN, add_coin / _COIN)
    codes = [part.user_ids * np.int64(num_items) + part.item_ids for part in (interactions, result)]
    kept = len(np.intersect1d(*codes, assume_unique=True))
    statement = {
        "mechanism": "randomised response on every bit of the item sets",
        "keep_prob": keep_coin / _COIN,
        "add_prob": add_coin / _COIN,
        "delta": 0.0,
        "epsilon": {
            "interaction added or removed": add,
            "interaction swapped for another": swap,
            "user, another history altogether": num_items * add,
        },
        "num_items": num_items,
        "expected_items": expected_items,
        "coins": "operating system" if seed is None else "seeded: for studies, not for a release",
        "dropped": ["ratings", "timestamps", "user attributes"],
        "not_covered": ["user labels", "the number of users"],
        "measured": {
            "items_kept": kept,
            "items_removed": interactions.num_interactions - kept,
            "items_added": result.num_interactions - kept,
            "information_loss": mean_jaccard_distance(interactions, result),
        },
    }
    return RandomizedSets(result, statement)


def bit_epsilons(keep_prob: float, add_prob: float) -> tuple[float, float]:
    """The pure epsilon of one bit, and of one bit that goes while another comes.

    Args:
      keep_prob: p, of presence where the item is present.
      add_prob: q, of presence where it is not; 0 < q < p < 1.
    """
    present = math.log(keep_prob / add_prob)
    absent = math.log1p(-add_prob) - math.log1p(-keep_prob)
    return max(present, absent), present + absent


def _coins(epsilon: float, num_items: int, expected_items: float | None) -> tuple[int, int]:
    """Keep and add probabilities in parts of 2^32, rounded so that no likelihood ratio exceeds e^eps."""
    if not 0 < epsilon < math.inf:
        raise ValueError(f"The epsilon of randomised response must be positive and finite; got {epsilon}.")
    add = 1 / (1 + math.exp(min(epsilon, 700)))
    if expected_items is not None:
        if not 0 < expected_items <= num_items / 2:
            raise ValueError(
                f"expected_items must be above 0 and at most half of the {num_items} items; got {expected_items}."
            )
        add = min(add, expected_items / (math.exp(min(epsilon, 700)) * expected_items + num_items - expected_items))
    add_coin = max(1, math.ceil(add * _COIN))
    # p <= e^eps q and (1 - p) >= e^-eps (1 - q), both for the q that the coins really have.
    q = add_coin / _COIN
    keep = min(math.exp(min(epsilon, 700)) * q, 1 - math.exp(-epsilon) * (1 - q))
    keep_coin = min(math.floor(keep * _COIN), _COIN - 1)
    if keep_coin <= add_coin:
        raise ValueError(f"An epsilon of {epsilon} is too small for coins of 32 bits: nothing would be said.")
    return keep_coin, add_coin


def _flip(interactions: Interactions, keep_coin: int, add_coin: int, seed: int | None):
    """Users and items of all bits that are set afterwards; coins are drawn user by user, in blocks."""
    num_items = interactions.num_items
    block = max(1, _BLOCK_CELLS // max(num_items, 1))
    rng = None if seed is None else np.random.default_rng(seed)
    users, items = [], []
    for start in range(0, interactions.num_users, block):
        stop = min(start + block, interactions.num_users)
        shape = (stop - start, num_items)
        if rng is None:
            coins = np.frombuffer(os.urandom(4 * shape[0] * shape[1]), np.uint32).reshape(shape)
        else:
            coins = rng.integers(0, _COIN, shape, np.uint32)
        present = coins < add_coin
        rows = slice(interactions.offsets[start], interactions.offsets[stop])
        here, own = interactions.user_ids[rows] - start, interactions.item_ids[rows]
        present[here, own] = coins[here, own] < keep_coin
        found = np.nonzero(present)
        users.append(found[0] + start)
        items.append(found[1])
    return np.concatenate(users), np.concatenate(items)

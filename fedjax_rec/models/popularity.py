"""Popularity: the floor that every recommender must clear, plain and released with user-level privacy."""

import math
from typing import NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.evaluation.scorers import Scorer, constant_scorer

_DRAWN_AT_A_TIME = 1024  # users; bounds the noise that is held at once


class DpPopularity(NamedTuple):
    """A released popularity vector and what its release costs."""

    counts: jax.Array  # float32 [items], noised; negative entries are noise
    dp_event: dp_accounting.DpEvent  # for the ledger
    noise_stddev: float  # standard deviation of the noise in each count


def popularity_scores(train: Interactions) -> np.ndarray:
    """Train users of each item, float32 `[items]`."""
    return train.item_counts.astype(np.float32)


def popularity_scorer(train: Interactions) -> Scorer:
    """Ranks every item by its number of train users, the same for everybody."""
    return constant_scorer(popularity_scores(train))


def dp_popularity(
    train: Interactions,
    *,
    noise_multiplier: float,
    key: jax.Array,
    normalize: str = "clip",
    max_items_per_user: int = 1,
) -> DpPopularity:
    """Popularity released once with user-level differential privacy.

    Each user contributes a vector over items of L2 norm at most sqrt(k), k = `max_items_per_user`:

    - "clip": every item it touched, scaled down to that norm if it touched more than k. With k = 1 that is a
      row-normalised history, so that a user with n items gives each 1 / sqrt(n). The default: it wastes no row, and
      a k up to the shortest history changes nothing but the unit.
    - "sample": k of its items chosen uniformly at random, with weight 1. Good only if k is tuned to the data.

    Guarantee: user-level, adding or removing one user with all of its rows. Released is the sum of the contributions
    of all users plus Gaussian noise of standard deviation `noise_multiplier * sqrt(k)` in each of `num_items` entries:
    one Gaussian mechanism of L2 sensitivity sqrt(k) without amplification by sampling, which `dp_event` states. The
    catalogue itself is public. `key` must be secret and used for nothing else.

    Args:
      train: rows; repeated user-item pairs count once.
      noise_multiplier: noise standard deviation over sensitivity; 0 releases exact counts, whose epsilon is infinite.
      key: of the noise and, for "sample", of the choice.
      normalize: "clip" or "sample".
      max_items_per_user: k, at least 1.

    Raises:
      ValueError: for a negative noise multiplier, k < 1 or another `normalize`.
    """
    if not (noise_multiplier >= 0 and math.isfinite(noise_multiplier)):
        raise ValueError(
            f"noise_multiplier must be 0 or more, and is {noise_multiplier}; see calibrate_noise_multiplier."
        )
    if max_items_per_user < 1:
        raise ValueError(f"max_items_per_user must be at least 1, and is {max_items_per_user}.")
    noise_key, choice_key = jax.random.split(key)
    pairs = np.unique(train.user_ids.astype(np.int64) * train.num_items + train.item_ids)
    user_ids, item_ids = pairs // train.num_items, pairs % train.num_items
    counts = np.bincount(user_ids, minlength=train.num_users)
    if normalize == "clip":
        weights = np.minimum(1.0, np.sqrt(max_items_per_user / counts[user_ids]))
    elif normalize == "sample":
        order = np.lexsort([np.asarray(_random_bits(choice_key, user_ids, item_ids)), user_ids])
        place = np.arange(len(pairs)) - np.repeat(np.cumsum(counts) - counts, counts)
        weights = np.zeros(len(pairs))
        weights[order[place < max_items_per_user]] = 1.0
    else:
        raise ValueError(f'Unknown normalize={normalize!r}; choose "clip" or "sample".')
    exact = np.bincount(item_ids, weights, minlength=train.num_items)
    stddev = noise_multiplier * math.sqrt(max_items_per_user)
    noise = stddev * jax.random.normal(noise_key, (train.num_items,), jnp.float32)
    return DpPopularity(
        counts=jnp.asarray(exact, jnp.float32) + noise,
        dp_event=dp_accounting.GaussianDpEvent(noise_multiplier),
        noise_stddev=stddev,
    )


def draw_by_popularity(item_counts: np.ndarray, lengths: np.ndarray, *, rng: np.random.Generator) -> np.ndarray:
    """Histories that know nothing but popularity, int32 ``[users, longest]``, padded with the number of items.

    A history is drawn item by item without repeats, with odds in proportion to the counts: the top ones of
    ``log count + Gumbel noise``. Not private: the counts are those of the data.

    Args:
      item_counts: ``[items]``.
      lengths: int ``[users]``; longer ones are cut to the number of items that occur.
      rng: of the draws.
    """
    num_items = len(item_counts)
    lengths = np.minimum(lengths, np.count_nonzero(item_counts))
    with np.errstate(divide="ignore"):
        logits = np.log(item_counts)
    drawn = np.full((len(lengths), int(lengths.max(initial=0))), num_items, np.int32)
    places = np.arange(drawn.shape[1])
    for start in range(0, len(lengths), _DRAWN_AT_A_TIME):
        own = lengths[start : start + _DRAWN_AT_A_TIME, None]
        noisy = logits[None, :] + rng.gumbel(size=(len(own), num_items))
        best = np.argsort(-noisy, axis=1)[:, : len(places)]
        drawn[start : start + len(own)] = np.where(places < own, best, num_items)
    return drawn


@jax.jit
def _random_bits(key: jax.Array, user_ids: jax.Array, item_ids: jax.Array) -> jax.Array:
    """One random uint32 for each pair that depends on nothing but the key and the pair: no user moves another's."""

    def bits(user, item):
        return jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, user), item))

    return jax.vmap(bits)(user_ids, item_ids)

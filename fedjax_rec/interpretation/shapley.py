"""Shapley values of the items of a history: what an item adds, averaged over all orders in which items could come.

    phi_i = mean over orders of F(items before i, and i) - F(items before i)

Shapley, 1953, "A Value for n-Person Games"; sampled as in Strumbelj and Kononenko, 2014, "Explaining Prediction Models
and Individual Predictions with Feature Contributions", each order followed by its reverse (antithetic pairs). They sum
to F(all) - F(none), and sampled ones do so exactly, since each order's do.
"""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.interpretation.value import Value

MOST_EXACT = 10


class SampledShapley(NamedTuple):
    """Sampled Shapley values.

    Attributes:
      values: float32 ``[L]``, 0 on padding.
      errors: standard errors of the values, float32 ``[L]``.
      total: F(all) - F(none).
    """

    values: jax.Array
    errors: jax.Array
    total: jax.Array


def sampled_shapley(
    value: Value, real: jax.Array, key: jax.Array, *, num_pairs: int = 64, batch_size: int = 4
) -> SampledShapley:
    """Shapley values from random orders; takes 2 num_pairs (L + 1) evaluations of F.

    Args:
      value: F: from `by_deletion` (or `by_presence`, for what the model says of items that leave their place behind).
      real: bool ``[L]``, the players.
      key: of the orders.
      num_pairs: orders, each with its reverse; at least 2.
      batch_size: pairs evaluated at a time; no result depends on it.

    Raises:
      ValueError: for fewer than 2 pairs, from which no error can be told.
    """
    if num_pairs < 2:
        raise ValueError(f"num_pairs must be at least 2, to tell how sure the values are; got {num_pairs}.")
    steps = jnp.arange(len(real) + 1)

    def of_pair(pair_key):
        lots = jnp.where(real, jax.random.uniform(pair_key, real.shape), 2.0)  # padding comes last, and adds nothing
        rank = jnp.argsort(jnp.argsort(lots))
        return (_additions(value, real, rank, steps) + _additions(value, real, real.sum() - 1 - rank, steps)) / 2

    pairs = jax.lax.map(of_pair, jax.random.split(key, num_pairs), batch_size=batch_size)
    errors = pairs.std(axis=0, ddof=1) / math.sqrt(num_pairs)
    return SampledShapley(pairs.mean(axis=0), errors, value(real.astype(jnp.float32)) - value(jnp.zeros(len(real))))


def _additions(value, real, rank, steps):
    """What each real place adds in one order, ``[L]``; `rank` is its place in the order."""
    present = (real[None, :] & (rank[None, :] < steps[:, None])).astype(jnp.float32)
    after = jax.vmap(value)(present)
    return jnp.where(real, after[rank + 1] - after[rank], 0.0)


def exact_shapley(value: Value, real: np.ndarray) -> np.ndarray:
    """Shapley values by going through all sets of up to ten items, float64 ``[L]``.

    Args:
      value: F.
      real: bool ``[L]``, with at most ten True.

    Raises:
      ValueError: for more players.
    """
    players = np.flatnonzero(real)
    n = len(players)
    if n > MOST_EXACT:
        raise ValueError(f"{n} items have 2^{n} sets; exact_shapley takes up to {MOST_EXACT}, sampled_shapley any.")
    present = np.array(list(itertools.product((0, 1), repeat=n)), np.float32).reshape(2**n, n)
    presence = np.zeros((2**n, len(real)), np.float32)
    presence[:, players] = present
    found = np.asarray(jax.vmap(value)(jnp.asarray(presence)), np.float64)
    values = np.zeros(len(real))
    for place, player in enumerate(players):
        bit = 2 ** (n - 1 - place)  # its weight in the number of a set
        lacking = np.flatnonzero(present[:, place] == 0)
        sizes = present[lacking].sum(axis=1).astype(int)
        weights = np.array([1 / (n * math.comb(n - 1, size)) for size in sizes])
        values[player] = weights @ (found[lacking + bit] - found[lacking])
    return values

"""How long histories are, released once: a histogram over public bins, one count a user."""

import math
from typing import NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.data.interactions import Interactions


class DpLengths(NamedTuple):
    """A released histogram of history lengths.

    Attributes:
      edges: int64 ``[bins + 1]``, public; bin b holds lengths ``edges[b] .. edges[b + 1] - 1``.
      weights: float64 ``[bins]``, not negative, with sum 1.
      dp_event: for the ledger.
      noise_stddev: of the noise in each count.
    """

    edges: np.ndarray
    weights: np.ndarray
    dp_event: dp_accounting.DpEvent
    noise_stddev: float


def length_edges(num_items: int, *, per_doubling: int = 2) -> np.ndarray:
    """Edges of bins that grow by a factor, int64, from 1 to above ``num_items``: a function of the catalogue alone."""
    steps = math.ceil(per_doubling * math.log2(num_items + 1)) + 1
    edges = np.unique(np.round(2.0 ** (np.arange(steps) / per_doubling)).astype(np.int64))
    return np.append(edges[edges <= num_items], num_items + 1)


def dp_lengths(
    train: Interactions, *, noise_multiplier: float, key: jax.Array, edges: np.ndarray | None = None
) -> DpLengths:
    """Counts users by the length of their history, with Gaussian noise.

    Counts below 2 standard deviations of the noise are taken for empty bins: with two bins a doubling most bins of a
    catalogue are, and noise in them would make a crowd of users with enormous histories.

    Guarantee: user-level, adding or removing one user with all of its rows. One user moves one count by one, so the sum
    has L2 sensitivity 1: one Gaussian mechanism without amplification by sampling, which `dp_event` states. The bins
    must be public. ``key`` must be secret and used for nothing else.

    Args:
      train: rows; users without any are not counted.
      noise_multiplier: noise standard deviation; 0 releases exact counts, whose epsilon is infinite.
      key: of the noise.
      edges: int ``[bins + 1]``, rising from 1; None = `length_edges` of the catalogue. A length of the last edge or
        above is counted in the last bin.

    Raises:
      ValueError: for a negative noise multiplier, or edges that do not rise from 1.
    """
    if not (noise_multiplier >= 0 and math.isfinite(noise_multiplier)):
        raise ValueError(f"noise_multiplier must be 0 or more, and is {noise_multiplier}.")
    edges = length_edges(train.num_items) if edges is None else np.asarray(edges, np.int64)
    if len(edges) < 2 or edges[0] != 1 or np.any(np.diff(edges) < 1):
        raise ValueError(f"edges must rise from 1, with two or more of them; got {edges.tolist()[:8]}.")
    lengths = train.counts_per_user[train.counts_per_user > 0]
    places = np.searchsorted(edges, lengths, side="right") - 1
    counts = np.bincount(np.minimum(places, len(edges) - 2), minlength=len(edges) - 1)
    noised = counts + noise_multiplier * np.asarray(jax.random.normal(key, counts.shape, jnp.float32), np.float64)
    kept = np.where(noised >= 2 * noise_multiplier, np.maximum(noised, 0.0), 0.0)
    if not kept.sum() > 0:  # all is noise: no bin is more likely than another
        kept = np.ones(len(counts))
    return DpLengths(edges, kept / kept.sum(), dp_accounting.GaussianDpEvent(noise_multiplier), noise_multiplier)


def draw_lengths(lengths: DpLengths, num: int, *, key: jax.Array) -> np.ndarray:
    """Lengths of ``num`` virtual users, int32: a bin by its weight, and within it evenly in the logarithm, as a long
    tail falls within a bin too. Post-processing."""
    bin_key, place_key = jax.random.split(key)
    uniform = np.asarray(jax.random.uniform(bin_key, (num,)), np.float64)
    bins = np.searchsorted(np.cumsum(lengths.weights), uniform, side="right").clip(0, len(lengths.weights) - 1)
    low, high = lengths.edges[bins], lengths.edges[bins + 1]
    within = np.asarray(jax.random.uniform(place_key, (num,)), np.float64)
    return np.clip(np.floor(low * (high / low) ** within), low, high - 1).astype(np.int32)

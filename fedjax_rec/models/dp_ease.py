"""DP-EASE: the linear autoencoder EASE on a Gram matrix that was released with noise.

Everything here is post-processing of a `DpGram`, or happens on a client with its own history: nothing adds to epsilon.
Steck (2019), "Embarrassingly Shallow Autoencoders for Sparse Data", gives B of a Gram matrix (`models.ease`). Noise
makes that matrix indefinite, and fills all of its directions: the noise of `dp_gram` alone has eigenvalues up to
s sqrt(2 m), those of a symmetric matrix with off-diagonal standard deviation s / sqrt(2). So eigenvalues are lowered by
a multiple of that edge, and the negative ones dropped, before EASE.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.evaluation.scorers import Scorer
from fedjax_rec.models.dp_gram import DpGram
from fedjax_rec.models.ease import weights_from_gram


class RecentHistory(NamedTuple):
    """Parameters of a linear item-to-item scorer over the newest part of each history."""

    starts: jax.Array  # int32 [users]
    counts: jax.Array  # int32 [users]
    columns: jax.Array  # int32 [rows + 1], column of each history item in `weights`, m for others
    positions: jax.Array  # int32 [longest history], 0, 1, 2, ...: its length is the static bound on a history
    recency: jax.Array  # float32 scalar
    weights: jax.Array  # float32 [m, m]
    column_of: jax.Array  # int32 [items], m for items without a column


def noise_edge(released: DpGram) -> float:
    """The largest eigenvalue, about, that the noise in a released Gram matrix has by itself."""
    return released.noise_stddev * math.sqrt(2 * len(released.gram))


def denoised_gram(released: DpGram, *, threshold: float = 1.0) -> np.ndarray:
    """The released matrix with each eigenvalue v replaced by max(v - threshold * `noise_edge`, 0), float64 `[m, m]`.

    With threshold 0 this is the nearest positive semi-definite matrix. Takes time cubic in m.
    """
    values, vectors = scipy.linalg.eigh(released.gram, check_finite=False)
    values = values - threshold * noise_edge(released)
    kept = vectors[:, values > 0]
    return (kept * values[values > 0]) @ kept.T


def dp_ease_weights(released: DpGram, *, l2: float, threshold: float = 1.0) -> np.ndarray:
    """EASE's B of the denoised Gram matrix, float32 `[m, m]` with a zero diagonal.

    Args:
      released: of `dp_gram`.
      l2: weight of |B|^2, > 0. It stands beside a Gram matrix of normalised users, whose trace is at most their number:
        about 3 to 30 on MovieLens.
      threshold: in units of `noise_edge`. Choose it, and `l2`, without the private data, or charge the choice.

    Raises:
      ValueError: for l2 <= 0 or a negative threshold.
    """
    if not l2 > 0 or not threshold >= 0:
        raise ValueError(f"dp_ease_weights needs l2 > 0 and threshold >= 0; got l2={l2} and threshold={threshold}.")
    return weights_from_gram(denoised_gram(released, threshold=threshold), l2=l2)


def dp_ease_scorer(
    weights: np.ndarray, item_ids: np.ndarray, history: Interactions, *, recency: float = math.inf
) -> Scorer:
    """Scores the sum of weights of the items in a user's history, as each client can for itself.

    Args:
      weights: float32 `[m, m]`, row i = what item `item_ids[i]` in a history adds.
      item_ids: int `[m]`; the catalogue's other items score -inf, and count for nothing in a history.
      history: what each user shows, in time order.
      recency: the item that a user met j items before its last one weighs exp(-j / recency); infinite = all the same.

    Raises:
      ValueError: for a recency that is not positive.
    """
    if not recency > 0:
        raise ValueError(f"recency must be positive, in items; got {recency}.")
    num_columns = len(weights)
    column_of = np.full(history.num_items, num_columns, np.int32)
    column_of[item_ids] = np.arange(num_columns, dtype=np.int32)
    counts = np.diff(history.offsets)
    params = RecentHistory(
        starts=jnp.asarray(history.offsets[:-1], jnp.int32),
        counts=jnp.asarray(counts, jnp.int32),
        columns=jnp.asarray(np.append(column_of[history.item_ids], num_columns), jnp.int32),
        positions=jnp.arange(max(int(counts.max(initial=0)), 1), dtype=jnp.int32),
        recency=jnp.float32(recency),
        weights=jnp.asarray(weights, jnp.float32),
        column_of=jnp.asarray(column_of),
    )
    return Scorer(_recent_scores, params)


def _recent_scores(params: RecentHistory, user_ids: jax.Array) -> jax.Array:
    num_columns = len(params.weights)
    places = params.starts[user_ids][:, None] + params.positions[None, :]
    age = params.counts[user_ids][:, None] - 1 - params.positions[None, :]
    shown = age >= 0
    columns = jnp.where(shown, params.columns.at[places].get(mode="clip"), num_columns)
    fresh = jnp.where(shown, jnp.exp(-age / params.recency), 0.0)
    rows = jnp.zeros((len(user_ids), num_columns), jnp.float32)
    rows = rows.at[jnp.arange(len(user_ids))[:, None], columns].add(fresh, mode="drop")
    scores = jnp.matmul(rows, params.weights, precision="highest")
    return scores.at[:, params.column_of].get(mode="fill", fill_value=-jnp.inf)

"""iALS: implicit alternating least squares, the centralised matrix factorisation to measure against.

Hu, Koren, Volinsky (2008), "Collaborative Filtering for Implicit Feedback Datasets", in the form and with the tuning
advice of Rendle, Krichene, Zhang, Koren (2022), "Revisiting the Performance of iALS on Item Recommendation
Benchmarks". With observed pairs S, user vectors w_u, item vectors h_i and unobserved weight a:

    L = sum_{(u,i) in S} (<w_u, h_i> - 1)^2 + a sum_{all u,i} <w_u, h_i>^2
        + l2 (sum_u (|I_u| + a |I|)^nu ||w_u||^2 + sum_i (|U_i| + a |U|)^nu ||h_i||^2)

Each half sweep solves every user (item) exactly by Cholesky, given the other side.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.evaluation.scorers import Scorer, factor_scorer

_ROWS_AT_A_TIME = 32  # normal equations held at a time: 4.7 MB at dim 192, which stays in a CPU's cache
_PIECE = 64  # columns gathered at a time for each row


class IalsFactors(NamedTuple):
    """Vectors of a trained model, float32."""

    user_vectors: jax.Array  # [users, dim]
    item_vectors: jax.Array  # [items, dim]


class _Side(NamedTuple):
    """Interactions grouped by the side to solve (users or items), its rows ordered by length and cut into chunks."""

    row_ids: jax.Array  # int32 [chunks, rows], padded with the number of rows
    starts: jax.Array  # int32 [chunks, rows], where each row's columns start
    counts: jax.Array  # int32 [chunks, rows]
    column_ids: jax.Array  # int32 [interactions, rounded up]


def train_ials(
    train: Interactions,
    *,
    dim: int = 64,
    num_sweeps: int = 12,
    l2: float = 0.01,
    unobserved_weight: float = 0.1,
    frequency_exponent: float = 1.0,
    init_stddev: float = 0.1,
    seed: int = 0,
) -> IalsFactors:
    """Trains iALS by alternating exact solves, users first.

    Args:
      train: rows, read as 0/1; users without rows end at zero vectors.
      dim: length of the vectors.
      num_sweeps: times both sides are solved.
      l2: regularisation; multiplied by (|I_u| + a |I|)^nu for a user, likewise for an item.
      unobserved_weight: a, weight of every pair as a zero.
      frequency_exponent: nu; 1 as recommended by Rendle et al. (2022), 0 for the same l2 for everybody.
      init_stddev: initial item vectors have entries of standard deviation `init_stddev / sqrt(dim)`.
      seed: of the initial vectors.

    Raises:
      ValueError: for settings without a unique solution.
    """
    if dim < 1 or num_sweeps < 1 or not l2 > 0 or not unobserved_weight >= 0:
        raise ValueError(
            f"iALS needs dim >= 1, num_sweeps >= 1, l2 > 0 and unobserved_weight >= 0, and got dim={dim}, "
            f"num_sweeps={num_sweeps}, l2={l2}, unobserved_weight={unobserved_weight}."
        )
    by_user = _side(train.offsets, train.item_ids)
    order = np.argsort(train.item_ids, kind="stable")
    by_item = _side(np.concatenate([[0], np.cumsum(train.item_counts)]), train.user_ids[order])
    items = init_stddev / np.sqrt(dim) * jax.random.normal(jax.random.key(seed), (train.num_items, dim))
    weights = {"l2": l2, "unobserved_weight": unobserved_weight, "frequency_exponent": frequency_exponent}
    for _ in range(num_sweeps):
        users = _solve(items, by_user, num_rows=train.num_users, **weights)
        items = _solve(users, by_item, num_rows=train.num_items, **weights)
    return IalsFactors(users, items)


def fold_in(
    item_vectors: jax.Array,
    history: Interactions,
    *,
    l2: float = 0.01,
    unobserved_weight: float = 0.1,
    frequency_exponent: float = 1.0,
) -> jax.Array:
    """Vectors of users that training never saw, float32 ``[users, dim]``: the exact half sweep on what they show.

    Args:
      item_vectors: ``[items, dim]``, trained.
      history: rows that users show, on the same catalogue; users without rows get zero vectors.
      l2, unobserved_weight, frequency_exponent: as in training.
    """
    by_user = _side(history.offsets, history.item_ids)
    weights = {"l2": l2, "unobserved_weight": unobserved_weight, "frequency_exponent": frequency_exponent}
    return _solve(item_vectors, by_user, num_rows=history.num_users, **weights)


def ials_scorer(factors: IalsFactors) -> Scorer:
    """Scores `<w_u, h_i>`."""
    return factor_scorer(factors.user_vectors, factors.item_vectors)


def _side(offsets: np.ndarray, column_ids: np.ndarray) -> _Side:
    counts = np.diff(offsets)
    order = np.argsort(counts, kind="stable")
    order = order[counts[order] > 0]
    # Powers of two, so that data sets of about one size share compiled solves; an empty chunk costs next to nothing.
    num_chunks = 1 << max(-(-len(order) // _ROWS_AT_A_TIME) - 1, 0).bit_length()
    padded_ids = np.zeros(1 << max(len(column_ids) - 1, 0).bit_length(), np.int32)
    padded_ids[: len(column_ids)] = column_ids

    def chunked(values, padding):
        padded = np.full(num_chunks * _ROWS_AT_A_TIME, padding, np.int32)
        padded[: len(order)] = values
        return jnp.asarray(padded.reshape(num_chunks, _ROWS_AT_A_TIME))

    return _Side(
        row_ids=chunked(order, len(counts)),
        starts=chunked(offsets[order], 0),
        counts=chunked(counts[order], 0),
        column_ids=jnp.asarray(padded_ids),
    )


@partial(jax.jit, static_argnames="num_rows")
def _solve(fixed: jax.Array, side: _Side, *, num_rows, l2, unobserved_weight, frequency_exponent) -> jax.Array:
    """The exact minimum over one side's vectors `[rows, dim]`, given the other side's."""
    dim = fixed.shape[1]
    gram = unobserved_weight * jnp.matmul(fixed.T, fixed, precision="highest")

    def solve_chunk(chunk):
        _, starts, counts = chunk
        scale = (counts + unobserved_weight * len(fixed)) ** frequency_exponent
        ridge = (l2 * scale)[:, None, None] * jnp.eye(dim)[None, :, :]

        def add_piece(piece, sums):
            left, right = sums
            place = piece * _PIECE + jnp.arange(_PIECE)[None, :]
            columns = side.column_ids.at[starts[:, None] + place].get(mode="clip")
            real = place < counts[:, None]
            vectors = jnp.where(real[:, :, None], fixed.at[columns].get(mode="clip"), 0.0)
            outer = jnp.einsum("rld,rle->rde", vectors, vectors, precision="highest")
            return left + outer, right + vectors.sum(axis=1)

        # The trip count is that of the longest row of this chunk: rows are ordered, so little of it is padding.
        sums = gram[None, :, :] + ridge, jnp.zeros((len(counts), dim))
        left, right = jax.lax.fori_loop(0, -(-counts.max() // _PIECE), add_piece, sums)
        cholesky = jax.lax.linalg.cholesky(left, symmetrize_input=False)
        return jax.scipy.linalg.cho_solve((cholesky, True), right[..., None])[..., 0]

    rows = jax.lax.map(solve_chunk, (side.row_ids, side.starts, side.counts))
    # Rows without interactions are best at zero: nothing but the penalties is left of their loss.
    return jnp.zeros((num_rows, dim)).at[side.row_ids].set(rows, mode="drop")

"""The item Gram matrix released once with user-level privacy: what every linear item-to-item model is made of.

A user u with items p = 1 .. n_u in time order contributes, with X_u their 0/1 incidence [n_u, items],

    C_u = X_u^T T X_u    T_pq = exp(-|p - q| / decay)    G = sum_u C_u min(1, k / |C_u|_F).

An infinite decay gives x_u x_u^T, all pairs of a user alike, and |C_u|_F = n_u. A finite one is about items met near
each other, so that a user's budget is not spread over n_u^2 pairs. T is a positive definite kernel, so G stays positive
semi-definite.
"""

import itertools
import math
from typing import NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.data.interactions import Interactions

_USERS_AT_A_TIME = 4096  # bounds the dense rows that are held at once


class DpGram(NamedTuple):
    """A released Gram matrix and what its release costs."""

    gram: np.ndarray  # float64 [m, m], symmetric, noised
    item_ids: np.ndarray  # int32 [m], the catalogue's items behind rows and columns
    dp_event: dp_accounting.DpEvent  # for the ledger
    noise_stddev: float  # of the noise on the diagonal; off it, it is this over sqrt(2)


def dp_gram(
    train: Interactions,
    *,
    noise_multiplier: float,
    key: jax.Array,
    item_ids: np.ndarray | None = None,
    decay: float = math.inf,
    max_items_per_user: float = 1.0,
) -> DpGram:
    """G of the items `item_ids`, plus Gaussian noise.

    The noise is white in the coordinates svec(G): the upper triangle, off-diagonal entries times sqrt(2). They carry
    the same information as G, and |svec(C)|_2 = |C|_F, so one user moves them by at most k. Noise of standard deviation
    s = noise_multiplier * k in each means s on the diagonal of G and s / sqrt(2) off it. Releasing the triangle as it
    stands would also be of sensitivity k, with noise s everywhere; noise on all m^2 entries, averaged over the two
    halves, is the same as this.

    Guarantee: user-level, adding or removing one user with all of its rows. Released is G of L2 sensitivity k in those
    coordinates plus that noise: one Gaussian mechanism without amplification by sampling, which `dp_event` states.
    `item_ids` must be public or released, and then charged as well (`dp_popularity`). `key` must be secret and used for
    nothing else.

    Args:
      train: rows of each user in time order; repeated user-item pairs count once, where they come first.
      noise_multiplier: noise standard deviation over sensitivity; 0 releases exact numbers, whose epsilon is infinite.
      key: of the noise.
      item_ids: int `[m]`, distinct; None = all. Users' other items are dropped before anything else, so that a smaller
        m also means a larger share of a user's budget for each pair.
      decay: in items; infinite = all pairs of a user alike.
      max_items_per_user: k, >= 1, the largest Frobenius norm of a contribution. 1 normalises every user's: nothing is
        wasted. Users with |C_u|_F < k give less than they could.

    Raises:
      ValueError: for numbers out of range, or ids that repeat or are not in the catalogue.
    """
    if not (noise_multiplier >= 0 and math.isfinite(noise_multiplier)):
        raise ValueError(
            f"noise_multiplier must be 0 or more, and is {noise_multiplier}; see calibrate_noise_multiplier."
        )
    if not decay > 0 or not 1 <= max_items_per_user < math.inf:
        raise ValueError(
            f"dp_gram needs decay > 0 and a finite max_items_per_user >= 1; got {decay} and {max_items_per_user}."
        )
    item_ids = np.arange(train.num_items) if item_ids is None else np.asarray(item_ids)
    if len(np.unique(item_ids)) < len(item_ids) or np.any((item_ids < 0) | (item_ids >= train.num_items)):
        raise ValueError(f"item_ids must be distinct and in 0 .. {train.num_items - 1}.")
    columns, offsets = columns_by_user(train, item_ids)
    build = _plain_gram if decay == math.inf else _decayed_gram
    exact = build(columns, offsets, len(item_ids), decay, max_items_per_user)
    stddev = noise_multiplier * max_items_per_user
    return DpGram(
        gram=exact + stddev * svec_noise(key, len(item_ids)),
        item_ids=item_ids.astype(np.int32),
        dp_event=dp_accounting.GaussianDpEvent(noise_multiplier),
        noise_stddev=stddev,
    )


def svec(matrix: np.ndarray) -> np.ndarray:
    """The upper triangle of a symmetric `[m, m]`, off-diagonal entries times sqrt(2): `[m (m + 1) / 2]`."""
    rows, columns = np.triu_indices(len(matrix))
    return matrix[rows, columns] * np.where(rows == columns, 1.0, math.sqrt(2.0))


def svec_noise(key: jax.Array, size: int) -> np.ndarray:
    """Symmetric Gaussian noise, float64 `[size, size]`, that is white with variance 1 in the coordinates of `svec`."""
    noise = np.asarray(jax.random.normal(key, (size, size), jnp.float32), np.float64)
    return (noise + noise.T) / 2  # variance 1 on the diagonal, 1/2 off it


def columns_by_user(train: Interactions, item_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns of every user's distinct items in time order, one user after the other, and where each starts."""
    pairs = train.user_ids.astype(np.int64) * train.num_items + train.item_ids
    first = np.sort(np.unique(pairs, return_index=True)[1])
    column_of = np.full(train.num_items, -1)
    column_of[item_ids] = np.arange(len(item_ids))
    columns, user_ids = column_of[train.item_ids[first]], train.user_ids[first]
    counts = np.bincount(user_ids[columns >= 0], minlength=train.num_users)
    return columns[columns >= 0], np.concatenate([[0], np.cumsum(counts)])


def _plain_gram(columns, offsets, num_columns, decay, largest) -> np.ndarray:
    del decay
    counts = np.diff(offsets)
    scale = np.sqrt(np.minimum(1.0, largest / np.maximum(counts, 1)))  # of x_u, so that x_u x_u^T gets its square
    user_ids = np.repeat(np.arange(len(counts)), counts)
    gram = np.zeros((num_columns, num_columns))
    for start in range(0, len(counts), _USERS_AT_A_TIME):
        stop = min(start + _USERS_AT_A_TIME, len(counts))
        rows = slice(offsets[start], offsets[stop])
        dense = np.zeros((stop - start, num_columns), np.float32)
        dense[user_ids[rows] - start, columns[rows]] = scale[user_ids[rows]]
        gram += dense.T @ dense
    return gram


def _decayed_gram(columns, offsets, num_columns, decay, largest) -> np.ndarray:
    most = int(np.diff(offsets).max(initial=0))
    gaps = np.exp(-np.arange(max(most, 1)) / decay)
    kernel = gaps[np.abs(np.subtract.outer(np.arange(most), np.arange(most)))]
    # |T|_F^2 of the first n rows and columns grows by 1 + 2 sum_{g < n} gaps_g^2 with each n.
    norms = np.sqrt(np.cumsum(1.0 + 2.0 * (np.cumsum(np.square(gaps)) - 1.0)))
    gram = np.zeros((num_columns, num_columns))
    for start, stop in itertools.pairwise(offsets):
        own, size = columns[start:stop], stop - start
        if size:
            gram[own[:, None], own[None, :]] += kernel[:size, :size] * min(1.0, largest / norms[size - 1])
    return gram

"""DPALS: alternating least squares with user-level differential privacy, one release a sweep.

Users S_u x items, targets y_ui (1 for implicit feedback, a centred rating otherwise), weights w_ui of what u has and
weight a of every pair as a zero:

    L = sum_u sum_{i in S_u} w_ui (<x_u, h_i> - y_ui)^2 + a sum_{all u,i} <x_u, h_i>^2 + l2 sum_u |x_u|^2
        + l2_items sum_i |h_i|^2.

A round is a sweep in which all clients take part. Each solves for its own x_u exactly, from the item vectors it
receives, and never sends it; it sends what the server needs to solve for every h_i, the sufficient statistics

    A_i = sum_u w_ui x_u x_u^T    b_i = sum_u w_ui y_ui x_u    K = sum_u x_u x_u^T
    h_i = (A_i + a K + l2_items I)^-1 b_i.

Chien, Jain, Krichene, Rendle, Song, Thakurta, Zhang, 2021, "Private Alternating Least Squares: Practical Private Matrix
Completion with Tighter Rates"; weights by item frequency of Krichene, Jain, Song, Sundararajan, Thakurta, Zhang, 2023,
"Multi-Task Differential Privacy Under Distribution Skew".

Sensitivity. Before it sends, a client clips x_u to |x_u| <= R, and scales its weights so that sum_i w_ui^2 <= k. A
symmetric matrix is sent as its upper triangle with the off-diagonal entries times sqrt(2), which keeps the norm:
|svec(x x^T)| = |x x^T|_F = |x|^2. Then, with |y_ui| <= Y,

    |(w_ui svec(x_u x_u^T))_i| = sqrt(sum_i w_ui^2) |x_u|^2 <= sqrt(k) R^2    |(w_ui y_ui x_u)_i| <= sqrt(k) Y R
    |x_u x_u^T|_F <= R^2,

so each part over its bound, times the root of its share of the budget (shares add up to 1), has a joint L2 norm of at
most 1, whatever the data: one Gaussian release a sweep. sqrt(k) is the norm of k numbers, one an item; one number that
adds up k items would move by k, so a released count of interactions is charged with k and not with sqrt(k).

Guarantee: user-level, adding or removing one user with all of its rows, for the sequence of the server's states under
``user_level_dp(l2_clip_norm=1.0, noise_multiplier=z)`` and full participation: each sweep is a Gaussian mechanism with
noise multiplier z, T sweeps one with z / sqrt(T). Not covered, and to be charged by themselves: item weights or head
items that come from data. User vectors stay with the clients; what a client computes from the released items and its
own data is its own.

Differs from the papers: a client weighs all of its items, scaled down to the budget, where the papers cut a user to k
items (``max_rows`` draws some). The form without A_i, ``Shares(gram=0)``, is not theirs.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.algorithms.fcf import with_gram
from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.federated.rows import Rows
from fedjax_rec.models.base import Shared
from fedjax_rec.models.user_solve import RatingScale, UserSolve, own_items, targets_of, user_vector

_BELOW_ONE = 1.0 - 1e-5  # so that rounding does not make the joint norm of an update exceed 1


class Shares(NamedTuple):
    """Parts of the privacy budget, >= 0; only their ratios count. ``gram`` 0 sends no A_i: see `dpals`."""

    gram: float = 1.0
    right: float = 1.0
    total: float = 1.0


def dpals(
    num_items: int,
    *,
    cohort_size: float,
    dim: int = 32,
    l2: float = 1.0,
    l2_items: float | None = None,
    unobserved_weight: float = 0.1,
    max_user_norm: float = 1.0,
    max_items_per_user: float = 50,
    max_rows: int | None = None,
    item_weights: jax.Array | None = None,
    shares: Shares | None = None,
    ratings: RatingScale | None = None,
    observed_weight: float = 1.0,
    recency: float = math.inf,
    init_stddev: float = 0.1,
) -> Algorithm:
    """DPALS; a client's private state is its vector as of its last round, ``{"user": [dim]}``.

    Args:
      num_items: catalogue size.
      cohort_size: expected clients a round, to undo the round's division; l2_items stands beside sums over clients.
      dim: length of the vectors. A client sends dim (dim + 3) / 2 numbers an item, or dim without A_i.
      l2: of users, positive.
      l2_items: of items, positive; `l2` by default. More noise wants more of it.
      unobserved_weight: a; 0 for explicit feedback.
      max_user_norm: R, to which the vectors that statistics are made of are clipped.
      max_items_per_user: k. With equal weights a client of n items weighs each by min(1, sqrt(k / n)).
      max_rows: most items that a client sends statistics of, drawn uniformly with its key; None = all.
      item_weights: float ``[num_items]``, >= 0, relative weights, public or released: see `frequency_weights` and
        `head_weights`. An item of weight 0 is outside: it gets a zero vector, and clients ignore it.
      shares: of the budget; all three parts the same by default. With ``gram=0`` no A_i is sent, and h_i =
        (a K + l2_items I)^-1 b_i: what an item's own users weigh beyond a is left out of the quadratic part. That costs
        accuracy without noise, and is far better where dim (dim + 1) / 2 noised numbers an item would drown it.
      ratings: targets from explicit ratings; by default every item of a client has target 1.
      observed_weight, recency: of a client's own equations, see `UserSolve`.
      init_stddev: initial item vectors have entries of standard deviation ``init_stddev / sqrt(dim)``.

    Raises:
      ValueError: for numbers out of range, or shares that do not fit.
    """
    l2_items = l2 if l2_items is None else l2_items
    shares = Shares() if shares is None else shares
    shares = shares._replace(total=shares.total if unobserved_weight > 0 else 0.0)
    _check(
        shares, l2, l2_items, unobserved_weight, max_user_norm, max_items_per_user, cohort_size, num_items, item_weights
    )
    weights = jnp.ones(num_items) if item_weights is None else jnp.asarray(item_weights, jnp.float32)
    inside = weights > 0
    bound = 1.0 if ratings is None else ratings.bound
    solve = UserSolve(l2, unobserved_weight, observed_weight, recency, ratings)
    root = math.sqrt(max_items_per_user)
    part = {name: _BELOW_ONE * math.sqrt(share / sum(shares)) for name, share in shares._asdict().items()}
    # What each part is multiplied by on the client, and divided by on the server once the noise is in.
    scales = {
        "gram": part["gram"] / (root * max_user_norm**2),
        "right": part["right"] / (root * bound * max_user_norm),
        "total": part["total"] / max_user_norm**2,
    }

    def shared(items, item_gram=None):
        """The server's parameters: tables and matrices of the shapes that clients send."""
        tables = {"item": items} | ({} if shares.gram == 0 else {"item_gram": item_gram})
        return Shared(tables, with_gram(items).dense if shares.total else {})

    def init(key):
        items = init_stddev / np.sqrt(dim) * jax.random.normal(key, (num_items, dim))
        items = jnp.where(inside[:, None], items, 0.0)
        return ServerState(jnp.zeros((), jnp.int32), shared(items, jnp.zeros((num_items, dim * (dim + 1) // 2))), ())

    def client_update(received, private, client, num_steps, key):
        del private, num_steps
        user = user_vector(received, client, solve)
        clipped = user * _clip_factor(jnp.linalg.norm(user), max_user_norm)
        ids, targets, own = _weighed_items(client, weights, ratings, max_items_per_user, max_rows, key)
        tables = {"item": Rows(ids, (scales["right"] * own * targets)[:, None] * clipped[None, :], num_items)}
        if shares.gram:
            packed = pack(jnp.outer(clipped, clipped))
            tables["item_gram"] = Rows(ids, (scales["gram"] * own)[:, None] * packed[None, :], num_items)
        dense = {"gram": scales["total"] * jnp.outer(clipped, clipped)} if shares.total else {}
        items, labels, real = own_items(received, client, solve)
        loss = jnp.sum(jnp.where(real, jnp.square(items @ user - labels), 0.0))
        return ClientOutput(Shared(tables, dense), {"user": user}, {"loss": loss})

    def server_update(state, aggregate):
        right = aggregate.tables["item"] * (cohort_size / scales["right"])
        left = jnp.zeros((dim, dim))
        if shares.total:
            left = unobserved_weight * cohort_size / scales["total"] * aggregate.dense["gram"]
            left = (left + left.T) / 2
        item_gram = None
        if shares.gram:
            item_gram = aggregate.tables["item_gram"] * (cohort_size / scales["gram"])
            items = _solve_psd(unpack(item_gram, dim) + left[None, :, :], right, l2_items)
        else:
            items = _solve_psd(left, right, l2_items)
        return state._replace(shared=shared(jnp.where(inside[:, None], items, 0.0), item_gram))

    return Algorithm(
        init=init,
        init_private=lambda key: {"user": jnp.zeros(dim)},
        client_update=client_update,
        num_steps=lambda client: jnp.int32(1),
        server_update=server_update,
    )


def dpals_score(shared: Shared, private: Any) -> jax.Array:
    """<x_u, h_i> for every item, float32 ``[num_items]``; with explicit ratings, the rating less the mean."""
    return shared.tables["item"] @ private["user"]


def frequency_weights(counts: jax.Array, *, exponent: float, least: float = 1.0) -> jax.Array:
    """Relative weights of items from their frequency, ``max(count, least)^exponent``, largest 1.

    A negative exponent (Krichene et al. use -1/3 and -1/4) moves budget from items that many users have to rare ones.

    Args:
      counts: float ``[items]``, public or released (`dp_popularity`): weights are as private as their counts.
      exponent: mu; 0 weighs all items the same.
      least: counts below, negative ones that noise made among them, count as this.
    """
    powers = jnp.maximum(jnp.asarray(counts, jnp.float32), least) ** exponent
    return powers / powers.max()


def head_weights(item_ids: jax.Array, num_items: int, *, weights: jax.Array | None = None) -> jax.Array:
    """`weights` (all 1 by default) for the head items, 0 for the rest; ``[num_items]``. Ids are public or released."""
    weights = jnp.ones(num_items) if weights is None else weights
    head = jnp.zeros(num_items, bool).at[jnp.asarray(item_ids)].set(True)
    return jnp.where(head, weights, 0.0)


def pack(matrix: jax.Array) -> jax.Array:
    """The upper triangle of a symmetric ``[dim, dim]``, off-diagonal entries times sqrt(2): its norm is Frobenius's."""
    rows, columns = np.triu_indices(matrix.shape[-1])
    return matrix[rows, columns] * np.where(rows == columns, 1.0, math.sqrt(2.0)).astype(np.float32)


def unpack(packed: jax.Array, dim: int) -> jax.Array:
    """The inverse of `pack` over leading axes: ``[..., dim (dim + 1) / 2]`` to symmetric ``[..., dim, dim]``."""
    rows, columns = np.triu_indices(dim)
    place = np.zeros((dim, dim), np.int32)
    place[rows, columns] = place[columns, rows] = np.arange(len(rows))
    scale = np.where(np.eye(dim, dtype=bool), 1.0, math.sqrt(0.5)).astype(np.float32)
    matrices = packed[..., place]
    return matrices * scale.reshape((1,) * (matrices.ndim - 2) + scale.shape)


def _weighed_items(client, weights, ratings, max_items, max_rows, key):
    """Ids, targets and weights w_ui of the items that a client sends statistics of; sum w_ui^2 <= max_items."""
    real = jnp.arange(len(client.item_ids)) < client.length
    own = jnp.where(real, weights.at[client.item_ids].get(mode="fill", fill_value=0.0), 0.0)
    targets = targets_of(client, ratings)
    targets, ids = jnp.where(own > 0, targets, 0.0), jnp.where(own > 0, client.item_ids, client.num_items)
    if max_rows is not None and max_rows < len(ids):
        chance = jnp.where(own > 0, jax.random.uniform(key, own.shape), -1.0)
        chosen = jax.lax.top_k(chance, max_rows)[1]
        ids, targets, own = ids[chosen], targets[chosen], own[chosen]
    return ids, targets, own * _clip_factor(jnp.linalg.norm(own), math.sqrt(max_items))


def _clip_factor(norm, largest):
    over = norm > largest
    return jnp.where(over, largest / jnp.where(over, norm, 1.0), 1.0)


def _solve_psd(left, right, l2):
    """(max(left, 0) + l2 I)^-1 right: `left` ``[dim, dim]`` or ``[items, dim, dim]`` loses what noise made negative."""
    values, vectors = jnp.linalg.eigh(left)
    inverse = 1.0 / (jnp.maximum(values, 0.0) + l2)
    if left.ndim == 2:
        return jnp.matmul(jnp.matmul(right, vectors, precision="highest") * inverse[None, :], vectors.T)
    turned = jnp.einsum("ide,id->ie", vectors, right, precision="highest")
    return jnp.einsum("ide,ie->id", vectors, turned * inverse, precision="highest")


def _check(shares, l2, l2_items, unobserved_weight, max_user_norm, max_items, cohort_size, num_items, item_weights):
    positive = {
        "l2": l2,
        "l2_items": l2_items,
        "max_user_norm": max_user_norm,
        "max_items_per_user": max_items,
        "cohort_size": cohort_size,
        "shares.right": shares.right,
    }
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise ValueError(f"DPALS needs a positive, finite {name}; got {value}.")
    if not unobserved_weight >= 0 or min(shares) < 0:
        raise ValueError(f"unobserved_weight and shares must not be negative; got {unobserved_weight} and {shares}.")
    if shares.gram == 0 and shares.total == 0:
        raise ValueError(
            "With neither A_i nor K the items' equations have no left side: give shares.gram or, with a positive "
            "unobserved_weight, shares.total a part of the budget."
        )
    if item_weights is not None and np.shape(item_weights) != (num_items,):
        raise ValueError(
            f"item_weights must have shape [{num_items}], one an item; got {list(np.shape(item_weights))}."
        )

"""How a trained model meets evaluation: a function from user ids to scores, and the arrays it reads."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.data.interactions import Interactions


class Scorer(NamedTuple):
    """A model as evaluation sees it.

    `fn` is static and `params` are traced: scoring again with new params of the same shapes compiles nothing, as long
    as `fn` is the same function object (a module-level function, not a fresh lambda).

    Attributes:
      fn: `(params, user_ids int32 [B]) -> float32 [B, items]`, traceable by JAX. -inf means "never recommend".
      params: pytree of arrays.
      take_items: `(params, start, size) -> params` that score only items `start .. start + size - 1` (`start` is
        traced, `size` static), or None. With it, large catalogues are scored block by block.
    """

    fn: Callable[[Any, jax.Array], jax.Array]
    params: Any
    take_items: Callable[[Any, jax.Array, int], Any] | None = None


class Factors(NamedTuple):
    """Parameters of a factorised scorer, float32."""

    user_vectors: jax.Array  # [users, dim]
    item_vectors: jax.Array  # [items, dim]
    item_bias: jax.Array  # [items]


class HistoryLinear(NamedTuple):
    """Parameters of a linear item-to-item scorer: rows of history in CSR form, and weights."""

    starts: jax.Array  # int32 [users]
    counts: jax.Array  # int32 [users]
    item_ids: jax.Array  # int32 [rows + 1], the last one padding
    positions: jax.Array  # int32 [longest history], 0, 1, 2, ...: its length is the static bound on a history
    weights: jax.Array  # float32 [items, items]


class _ForClients(NamedTuple):
    """A one-client score over a batch of clients. A value, so that equal ones share a compilation."""

    score: Callable[[Any, Any], jax.Array]

    def __call__(self, params: tuple[Any, Any], user_ids: jax.Array) -> jax.Array:
        shared, private = params
        batch = jax.tree.map(lambda leaf: leaf[user_ids], private)
        with jax.default_matmul_precision("highest"):
            scores = jax.vmap(self.score, in_axes=(None, 0), axis_size=len(user_ids))(shared, batch)
        return scores


def client_scorer(score: Callable[[Any, Any], jax.Array], *, shared: Any, private: Any) -> Scorer:
    """Scores with the model of one client: what each client would compute from its own private parameters.

    Args:
      score: `(shared, private of one client) -> [items]`, e.g. `model.score`.
      shared: parameters that everybody receives.
      private: pytree with leading axis `[clients]`, row u for user id u; `()` if clients have none.
    """
    return Scorer(_ForClients(score), (shared, private))


def factor_scorer(user_vectors: jax.Array, item_vectors: jax.Array, *, item_bias: jax.Array | None = None) -> Scorer:
    """Scores `user_vectors @ item_vectors.T + item_bias`, in float32 also where the default would be TF32 or bfloat16.

    Args:
      user_vectors: `[users, dim]`.
      item_vectors: `[items, dim]`.
      item_bias: `[items]`, or None for zeros.
    """
    if item_bias is None:
        item_bias = jnp.zeros(len(item_vectors), jnp.float32)
    return Scorer(_factor_scores, Factors(user_vectors, item_vectors, item_bias), _take_factor_items)


def history_scorer(weights: jax.Array, history: Interactions) -> Scorer:
    """Scores `x_u @ weights`, where `x_u` is the 0/1 row of the items a user shows in `history`.

    Args:
      weights: `[items, items]`, `weights[i, j]` = what item i in a history adds to the score of item j.
      history: rows of every user, e.g. `split.train`.
    """
    longest = int(history.counts_per_user.max(initial=1))
    params = HistoryLinear(
        starts=jnp.asarray(history.offsets[:-1].astype(np.int32)),
        counts=jnp.asarray(history.counts_per_user.astype(np.int32)),
        item_ids=jnp.asarray(np.append(history.item_ids, np.int32(history.num_items))),  # never empty
        positions=jnp.arange(max(longest, 1), dtype=jnp.int32),
        weights=jnp.asarray(weights, jnp.float32),
    )
    return Scorer(_history_scores, params)


def constant_scorer(scores: jax.Array) -> Scorer:
    """The same scores `[items]` for everybody, as popularity gives."""
    return Scorer(_same_scores, jnp.asarray(scores, jnp.float32), _take_same_items)


def _factor_scores(factors: Factors, user_ids: jax.Array) -> jax.Array:
    users = factors.user_vectors[user_ids]
    return jnp.matmul(users, factors.item_vectors.T, precision="highest") + factors.item_bias[None, :]


def _take_factor_items(factors: Factors, start: jax.Array, size: int) -> Factors:
    return factors._replace(
        item_vectors=jax.lax.dynamic_slice_in_dim(factors.item_vectors, start, size),
        item_bias=jax.lax.dynamic_slice_in_dim(factors.item_bias, start, size),
    )


def _history_scores(params: HistoryLinear, user_ids: jax.Array) -> jax.Array:
    num_items = len(params.weights)
    places = params.starts[user_ids][:, None] + params.positions[None, :]
    shown = params.positions[None, :] < params.counts[user_ids][:, None]
    items = jnp.where(shown, params.item_ids.at[places].get(mode="clip"), num_items)
    rows = jnp.zeros((len(user_ids), num_items), jnp.float32)
    rows = rows.at[jnp.arange(len(user_ids))[:, None], items].set(1.0, mode="drop")
    return jnp.matmul(rows, params.weights, precision="highest")


def _same_scores(scores: jax.Array, user_ids: jax.Array) -> jax.Array:
    return jnp.broadcast_to(scores[None, :], (len(user_ids), len(scores)))


def _take_same_items(scores: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(scores, start, size)

"""What a sequence recommender is: pure functions of one history, in time order.

A history is int32 ``[L]``, oldest item first, padded *behind* with ``num_items``; L is static and may be any number.
Only its last ``max_length`` items count. The model asks for what comes next by a query vector, and an item's score is
the product of the query with the item's vector.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.evaluation.scorers import Scorer
from fedjax_rec.models.base import Shared
from fedjax_rec.models.user_rows import UserRows, user_rows


class SequenceModel(NamedTuple):
    """A recommender of the next item, as pure functions of one client's history.

    Attributes:
      init: ``key -> Shared``. Item tables in ``tables``, the rest in ``dense``.
      loss: ``(params, history int32 [L], key) -> float32 scalar``, the mean over the history's targets; 0 for a history
        that has none. ``key`` is for dropout, masks and drawn negatives.
      query: ``(params, history int32 [L], presence float32 [L] or None) -> float32 [dim]``, for what comes after the
        history, without dropout. ``presence`` scales what each place of the history puts into the model: 1 is the item
        as it is, 0 is its place without it, and what lies between is what integrated gradients walk along.
      catalogue: ``params -> float32 [num_items, dim]``, what queries are multiplied with.
      num_items: catalogue size.
      max_length: most items of a history that count.
      places: ``(params, history int32 [L]) -> float32 [L, dim]`` for L up to ``max_length``: queries for what comes
        after each place, as in training but without dropout, all in one pass. None for a model that looks both ways.
    """

    init: Callable[[jax.Array], Shared]
    loss: Callable[[Shared, jax.Array, jax.Array], jax.Array]
    query: Callable[[Shared, jax.Array, jax.Array | None], jax.Array]
    catalogue: Callable[[Shared], jax.Array]
    num_items: int
    max_length: int
    places: Callable[[Shared, jax.Array], jax.Array] | None = None

    def score(self, params: Shared, history: jax.Array) -> jax.Array:
        """Scores of all items after one history, float32 ``[num_items]``."""
        return jnp.matmul(self.catalogue(params), self.query(params, history, None), precision="highest")


def last_items(history: jax.Array, max_length: int, num_items: int) -> jax.Array:
    """The last ``max_length`` real items of a padded history, int32 ``[min(L, max_length)]``, padded behind."""
    width = history.shape[0]
    if width <= max_length:
        return history
    length = jnp.sum(history < num_items)
    start = jnp.maximum(length - max_length, 0)
    return jax.lax.dynamic_slice_in_dim(history, start, max_length)


def last_items_of(values: jax.Array, history: jax.Array, max_length: int, num_items: int) -> jax.Array:
    """Numbers ``[L]`` that go with a history, at its `last_items`."""
    start = jnp.maximum(jnp.sum(history < num_items) - max_length, 0)
    width = min(len(history), max_length)
    return jax.lax.dynamic_slice_in_dim(values, start, width)


def padded_histories(histories: Interactions, user_ids: np.ndarray, max_length: int) -> np.ndarray:
    """The last items of some users, int32 ``[len(user_ids), max_length]``, padded behind with ``num_items``."""
    out = np.full((len(user_ids), max_length), histories.num_items, np.int32)
    for row, user in enumerate(user_ids):
        items = histories.items_of(user)[-max_length:]
        out[row, : len(items)] = items
    return out


class _Parameters(NamedTuple):
    shared: Any
    catalogue: jax.Array
    rows: UserRows


class _SequenceScores(NamedTuple):
    """A value, so that scorers of one model share a compilation."""

    model: SequenceModel

    def __call__(self, params: _Parameters, user_ids: jax.Array) -> jax.Array:
        rows, num_items = params.rows, self.model.num_items
        width = min(self.model.max_length, len(rows.positions))
        counts = rows.counts[user_ids]
        first = rows.starts[user_ids] + jnp.maximum(counts - width, 0)
        places = first[:, None] + jnp.arange(width)[None, :]
        real = jnp.arange(width)[None, :] < counts[:, None]
        histories = jnp.where(real, rows.item_ids.at[places].get(mode="clip"), num_items)
        with jax.default_matmul_precision("highest"):
            queries = jax.vmap(lambda history: self.model.query(params.shared, history, None))(histories)
            return queries @ params.catalogue.T


def sequence_scorer(model: SequenceModel, params: Shared, histories: Interactions) -> Scorer:
    """Scores what comes after each user's history.

    Args:
      model: of the next item.
      params: trained.
      histories: rows of every user in time order: `split.train`, or `shown_at_test(split)`
        for the test item of leave-one-out, as papers on sequences do.
    """
    return Scorer(_SequenceScores(model), _Parameters(params, model.catalogue(params), user_rows(histories)))

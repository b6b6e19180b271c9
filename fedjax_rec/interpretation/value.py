"""What is explained: a recommender as a function of one history, and one number of its answer.

An explanation asks a *value* F: ``float32 [L] -> float32``, one entry for each place of the history, 1 = the item is
there, 0 = it is not. Two values are of use, and they differ for a model that reads an order:

- `by_deletion`: items whose entry is 0 are deleted and the rest moves up, so F is what the model says of a history that
  could have been. Entries are 0 or 1. Counterfactuals, Shapley values and deletion curves ask this one.
- `by_presence`: entries scale what each place puts into the model; an absent item leaves its place behind. Entries may
  be anything between 0 and 1, and F has a gradient. Integrated gradients ask this one.

With all entries 1 both are the model's own answer. For a model without places, such as a linear one, they are the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_rec.models.base import Shared
from fedjax_rec.models.sequence import SequenceModel

Value = Callable[[jax.Array], jax.Array]
Quantity = Callable[[jax.Array, jax.Array], jax.Array]


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["fn", "num_items"])
@dataclass(frozen=True)
class HistoryModel:
    """A trained recommender as a function of one history.

    Attributes:
      fn: ``(params, history int32 [L], presence float32 [L]) -> float32 [num_items]``, scores of the whole catalogue.
        Histories are in time order, oldest first, padded behind with ``num_items``; presence is 0 on padding. A value,
        such as a module-level function: models with equal ones share compilations.
      params: pytree of arrays.
      num_items: catalogue size.
    """

    fn: Callable[[Any, jax.Array, jax.Array], jax.Array]
    params: Any
    num_items: int

    def scores(self, history: jax.Array, presence: jax.Array | None = None) -> jax.Array:
        """Scores of all items, float32 ``[num_items]``; with everything present by default."""
        real = history < self.num_items
        presence = real.astype(jnp.float32) if presence is None else jnp.where(real, presence, 0.0)
        with jax.default_matmul_precision("highest"):
            return self.fn(self.params, history, presence)


def score(scores: jax.Array, item: jax.Array) -> jax.Array:
    """The score of an item as it is."""
    return scores[item]


def margin(scores: jax.Array, item: jax.Array) -> jax.Array:
    """How far an item's score lies above the mean over the catalogue: what lifts all items alike explains none."""
    return scores[item] - scores.mean()


def log_prob(scores: jax.Array, item: jax.Array) -> jax.Array:
    """The item's log-softmax, for models trained with a softmax over the catalogue."""
    return jax.nn.log_softmax(scores)[item]


def by_presence(model: HistoryModel, history: jax.Array, item: jax.Array, quantity: Quantity = margin) -> Value:
    """F of presences between 0 and 1; absent items keep their place."""
    return lambda presence: quantity(model.scores(history, presence), item)


def by_deletion(model: HistoryModel, history: jax.Array, item: jax.Array, quantity: Quantity = margin) -> Value:
    """F of the history without the places whose entry is 0."""
    return lambda presence: quantity(model.scores(without(history, presence < 0.5, model.num_items)), item)


def without(history: jax.Array, deleted: jax.Array, num_items: int) -> jax.Array:
    """The history after a deletion: what is left in its old order, moved up, padded behind; int32 ``[L]``.

    Args:
      history: int32 ``[L]``.
      deleted: bool ``[L]``.
      num_items: what pads.
    """
    gone = deleted | (history >= num_items)
    return jnp.where(gone, num_items, history)[jnp.argsort(gone, stable=True)]


class _SequenceParams(NamedTuple):
    shared: Shared
    catalogue: jax.Array  # [num_items, dim]: made once, since an item side may be a text encoder


class _SequenceScores(NamedTuple):
    model: SequenceModel

    def __call__(self, params: _SequenceParams, history: jax.Array, presence: jax.Array) -> jax.Array:
        return params.catalogue @ self.model.query(params.shared, history, presence)


def sequence_history_model(model: SequenceModel, params: Shared) -> HistoryModel:
    """A trained recommender of the next item. Histories may be longer than its ``max_length``: deleting one of the
    items that count lets the newest of the others move in."""
    return HistoryModel(_SequenceScores(model), _SequenceParams(params, model.catalogue(params)), model.num_items)


def linear_history_model(weights: jax.Array) -> HistoryModel:
    """A linear one, such as EASE or item neighbours.

    Args:
      weights: float32 ``[items, items]``, ``weights[i, j]`` = what item i in a history adds to the score of item j.
    """
    return HistoryModel(_linear_scores, jnp.asarray(weights, jnp.float32), len(weights))


def _linear_scores(weights: jax.Array, history: jax.Array, presence: jax.Array) -> jax.Array:
    return presence @ weights.at[history].get(mode="fill", fill_value=0.0)

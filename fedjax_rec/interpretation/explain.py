"""One recommendation explained: what each item of the history adds, and what the list would be without it."""

import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.interpretation.gradients import integrated_gradients
from fedjax_rec.interpretation.removal import Removed, candidates_of, pushed_out, removal_values, removals
from fedjax_rec.interpretation.shapley import sampled_shapley
from fedjax_rec.interpretation.value import HistoryModel, Quantity, Value, by_deletion, by_presence, margin

Method = Literal["integrated_gradients", "shapley", "removal"]
METHODS: dict[Method, str] = {
    "integrated_gradients": "integrated gradients",
    "shapley": "Shapley values",
    "removal": "removal of one item at a time",
}


@dataclass(frozen=True, eq=False)
class Explanation:
    """Why an item stands where it stands in a list.

    Attributes:
      item: the recommended item.
      place: in the list, 1 = first.
      method: of the values.
      history: int32 ``[n]``, oldest first.
      values: float32 ``[n]``, what each item of the history adds to the quantity explained.
      places_without: int ``[n]``, where the item would stand if the user had never met that one item.
      out: items without which it would leave the top `k`, or None if none were found.
      k: length of the list.
      total: the quantity with the whole history less the quantity without any.
      remainder: total less the sum of the values.
      error: largest standard error of a sampled value; 0 if nothing was sampled.
      seconds: that it took, compilation included.
    """

    item: int
    place: int
    method: Method
    history: np.ndarray
    values: np.ndarray
    places_without: np.ndarray
    out: Removed | None
    k: int
    total: float
    remainder: float
    error: float
    seconds: float


def padded(history: np.ndarray, num_items: int, *, multiple: int = 8) -> jax.Array:
    """A history padded behind to a multiple of some length, so that few lengths are compiled; int32 ``[L]``."""
    length = max(-(-len(history) // multiple), 1) * multiple
    out = np.full(length, num_items, np.int32)
    out[: len(history)] = history
    return jnp.asarray(out)


def recommend(model: HistoryModel, history: np.ndarray, *, top: int) -> np.ndarray:
    """The best items that are not in the history, best first, int ``[top]``; of equal scores the smaller id first."""
    shown = padded(history, model.num_items)
    scores = _scores(model, shown)
    ranked = np.argsort(np.where(candidates_of(shown, model.num_items), -scores, np.inf), kind="stable")
    return ranked[: min(top, model.num_items - len(history))]


def explain(
    model: HistoryModel,
    history: np.ndarray,
    item: int,
    *,
    method: Method = "integrated_gradients",
    quantity: Quantity = margin,
    k: int = 10,
    most_removed: int = 5,
    key: jax.Array | None = None,
    num_pairs: int = 16,
) -> Explanation:
    """Explains one item of a list.

    Args:
      model: what is explained.
      history: int ``[n]``, in time order, at least one item.
      item: the recommended one, not in the history.
      method: of the values. Integrated gradients scale presences and ask `by_presence`; the others delete.
      quantity: what is explained of the scores.
      k: length of the list that the item might leave.
      most_removed: largest set to look for that pushes it out.
      key: of the orders that Shapley values are sampled from; needed for these alone.
      num_pairs: of these orders.

    Raises:
      ValueError: for an empty history, an item of it, or no key where one is needed.
    """
    history = np.asarray(history, np.int32)
    if not len(history):
        raise ValueError("There is nothing to explain a recommendation with: the history is empty.")
    if item in history:
        raise ValueError(f"Item {item} is in the history, so no list holds it; explain another one.")
    start = time.perf_counter()
    shown, n = padded(history, model.num_items), len(history)
    values, total, error = attribute(model, shown, item, method=method, quantity=quantity, key=key, num_pairs=num_pairs)
    alone = removals(model, shown, item, quantity=quantity, k=k)
    return Explanation(
        item=int(item),
        place=int(alone.place),
        method=method,
        history=history,
        values=np.asarray(values)[:n],
        places_without=np.asarray(alone.places)[:n],
        out=pushed_out(model, shown, item, quantity=quantity, k=k, most=most_removed)
        if int(alone.place) <= k
        else None,
        k=k,
        total=float(total),
        remainder=float(total - values.sum()),
        error=float(error),
        seconds=time.perf_counter() - start,
    )


@partial(jax.jit, static_argnames=("method", "quantity", "num_pairs"))
def attribute(
    model: HistoryModel,
    history: jax.Array,
    item: jax.Array,
    *,
    method: Method,
    quantity: Quantity = margin,
    key: jax.Array | None = None,
    num_pairs: int = 16,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Values ``[L]`` of a padded history, the total that they explain, and the largest standard error among them."""
    real = history < model.num_items
    if method == "integrated_gradients":
        found = integrated_gradients(by_presence(model, history, item, quantity), real)
        return found.values, found.total, jnp.float32(0)
    value = by_deletion(model, history, item, quantity)
    if method == "removal":
        return removal_values(value, real), _total(value, real), jnp.float32(0)
    if key is None:
        raise ValueError("Shapley values are sampled from random orders: give a key.")
    found = sampled_shapley(value, real, key, num_pairs=num_pairs)
    return found.values, found.total, found.errors.max()


def _total(value: Value, real: jax.Array) -> jax.Array:
    return value(real.astype(jnp.float32)) - value(jnp.zeros(len(real)))


@jax.jit
def _scores(model: HistoryModel, history: jax.Array) -> jax.Array:
    return model.scores(history)

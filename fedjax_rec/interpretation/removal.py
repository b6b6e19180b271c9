"""Counterfactuals: where an item would be in the list if the user had never met some item of the history.

Removal is true deletion: the history closes up, and a model that reads an order reads another one. The other items that
an item is ranked among stay the same: the whole catalogue but the user's whole history, removed items too.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.interpretation.value import HistoryModel, Quantity, Value, margin, without

_AT_A_TIME = 32  # histories scored at once: bounds memory to so many rows of the catalogue


class Removals(NamedTuple):
    """The effect of removing each place of a history alone.

    Attributes:
      values: F(all) - F(all but this one), float32 ``[L]``, 0 on padding.
      places: where the item would be in the list, 1 = first, int32 ``[L]``.
      place: where it is, int32.
    """

    values: jax.Array
    places: jax.Array
    place: jax.Array


class Removed(NamedTuple):
    """Places of a history without which an item leaves the top k.

    Attributes:
      history_places: in the order in which they were found; empty if there are none.
      place: where the item then is.
    """

    history_places: tuple[int, ...]
    place: int


def removal_values(value: Value, real: jax.Array) -> jax.Array:
    """F(all) - F(all but this one) for each place, float32 ``[L]``, 0 on padding."""
    full = real.astype(jnp.float32)
    alone = jax.lax.map(value, full[None, :] - jnp.eye(len(real)) * full[None, :], batch_size=_AT_A_TIME)
    return jnp.where(real, value(full) - alone, 0.0)


def place_of(scores: jax.Array, item: jax.Array, candidates: jax.Array) -> jax.Array:
    """Where an item stands in a list of the candidates, 1 = first; of equal scores the smaller id comes first.

    Args:
      scores: ``[items]``.
      item: its id.
      candidates: bool ``[items]``, who is in the list beside it.
    """
    before = (scores > scores[item]) | ((scores == scores[item]) & (jnp.arange(len(scores)) < item))
    return 1 + jnp.sum(before & candidates)


def candidates_of(history: jax.Array, num_items: int) -> jax.Array:
    """Items that a list may hold: all but the history, bool ``[num_items]``."""
    return jnp.ones(num_items, bool).at[history].set(False, mode="drop")


@partial(jax.jit, static_argnames="quantity")
def removals(model: HistoryModel, history: jax.Array, item: jax.Array, *, quantity: Quantity = margin) -> Removals:
    """Removes each item of a history alone.

    Args:
      model: what is explained.
      history: int32 ``[L]``, padded behind.
      item: the recommended one.
      quantity: of the scores.
    """
    candidates = candidates_of(history, model.num_items)

    def after(deleted):
        scores = model.scores(without(history, deleted, model.num_items))
        return quantity(scores, item), place_of(scores, item, candidates)

    none = jnp.zeros(len(history), bool)
    values, places = jax.lax.map(after, jnp.eye(len(history), dtype=bool), batch_size=_AT_A_TIME)
    value, place = after(none)
    return Removals(jnp.where(history < model.num_items, value - values, 0.0), places, place)


def pushed_out(
    model: HistoryModel, history: jax.Array, item: int, *, k: int = 10, most: int | None = None
) -> Removed | None:
    """A small set of items without which an item would not be in the top k; None if none was found.

    Greedy: in each step goes the item whose removal brings the recommended one furthest down against the k-th of the
    others. Then every member that turns out not to be needed is put back, so that no smaller part of the set would do
    by leaving out one member; a set of other members may still be smaller.

    Args:
      model: what is explained.
      history: int32 ``[L]``, padded behind.
      item: the recommended one.
      k: length of the list.
      most: items to remove before giving up; None = all.
    """
    real = np.asarray(history) < model.num_items
    deleted: list[int] = []
    place = int(_place_without(model, history, item, _mask(deleted, len(real))))
    most = int(real.sum()) if most is None else min(most, int(real.sum()))
    while place <= k and len(deleted) < most:
        leads, places = _leads(model, history, item, _mask(deleted, len(real)), k=k)
        leads = np.where(real & ~_mask(deleted, len(real)), np.asarray(leads), np.inf)
        deleted.append(int(np.argmin(leads)))
        place = int(places[deleted[-1]])
    if place <= k:
        return None
    for one in deleted[:-1]:
        fewer = [other for other in deleted if other != one]
        found = int(_place_without(model, history, item, _mask(fewer, len(real))))
        if found > k:
            deleted, place = fewer, found
    return Removed(tuple(deleted), place)


def _mask(places: list[int], length: int) -> np.ndarray:
    mask = np.zeros(length, bool)
    mask[places] = True
    return mask


@jax.jit
def _place_without(model, history, item, deleted):
    scores = model.scores(without(history, deleted, model.num_items))
    return place_of(scores, item, candidates_of(history, model.num_items))


@partial(jax.jit, static_argnames="k")
def _leads(model, history, item, deleted, *, k):
    """The item's score over the k-th best of the others, and its place, after deleting one place more: each ``[L]``."""
    candidates = candidates_of(history, model.num_items)
    others = candidates & (jnp.arange(model.num_items) != item)

    def after(one):
        scores = model.scores(without(history, deleted | one, model.num_items))
        best, _ = jax.lax.top_k(jnp.where(others, scores, -jnp.inf), min(k, model.num_items))
        return scores[item] - best[-1], place_of(scores, item, candidates)

    return jax.lax.map(after, jnp.eye(len(history), dtype=bool), batch_size=_AT_A_TIME)

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


def removals(
    model: HistoryModel, history: jax.Array, item: int, *, quantity: Quantity = margin, k: int = 10
) -> Removals:
    """Removes each item of a history alone.

    Args:
      model: what is explained.
      history: int32 ``[L]``, padded behind.
      item: the recommended one.
      quantity: of the scores.
      k: as for `pushed_out`, which asks the same compiled program; no result here depends on it.
    """
    values, places, _ = _after_each(model, history, item, np.zeros(len(history), bool), quantity=quantity, k=k)
    none = len(history)
    return Removals(
        jnp.where(history < model.num_items, values[none] - values[:none], 0.0), places[:none], places[none]
    )


def pushed_out(
    model: HistoryModel,
    history: jax.Array,
    item: int,
    *,
    quantity: Quantity = margin,
    k: int = 10,
    most: int | None = None,
) -> Removed | None:
    """A small set of items without which an item would not be in the top k; None if none was found.

    Greedy: in each step goes the item whose removal brings the recommended one furthest down against the k-th of the
    others. Then every member that turns out not to be needed is put back, so that no smaller part of the set would do
    by leaving out one member; a set of other members may still be smaller.

    Args:
      model: what is explained.
      history: int32 ``[L]``, padded behind.
      item: the recommended one.
      quantity: as for `removals`; the set does not depend on it.
      k: length of the list.
      most: items to remove before giving up; None = all.
    """
    real = np.asarray(history) < model.num_items

    def after_each(deleted):
        gone = np.isin(np.arange(len(real)), deleted)
        _, places, leads = _after_each(model, history, item, gone, quantity=quantity, k=k)
        return int(places[len(real)]), np.where(real & ~gone, np.asarray(leads)[: len(real)], np.inf)

    most = int(real.sum()) if most is None else min(most, int(real.sum()))
    deleted: list[int] = []
    place, leads = after_each(deleted)
    while place <= k and len(deleted) < most:
        deleted.append(int(np.argmin(leads)))
        place, leads = after_each(deleted)
    if place <= k:
        return None
    for one in deleted[:-1]:
        fewer = [other for other in deleted if other != one]
        found, _ = after_each(fewer)
        if found > k:
            deleted, place = fewer, found
    return Removed(tuple(deleted), place)


@partial(jax.jit, static_argnames=("quantity", "k"))
def _after_each(model, history, item, deleted, *, quantity, k):
    """After one deletion more, of each place in turn, and then after none more: the quantity, the item's place, and its
    score over the k-th best of the others; each ``[L + 1]`` or longer."""
    candidates = candidates_of(history, model.num_items)
    others = candidates & (jnp.arange(model.num_items) != item)

    def after(one):
        scores = model.scores(without(history, deleted | one, model.num_items))
        best, _ = jax.lax.top_k(jnp.where(others, scores, -jnp.inf), min(k, model.num_items))
        return quantity(scores, item), place_of(scores, item, candidates), scores[item] - best[-1]

    num = len(history) + 1
    if num > _AT_A_TIME:  # whole batches: a last one of another size would be compiled by itself
        num = -(-num // _AT_A_TIME) * _AT_A_TIME
    return jax.lax.map(after, jnp.eye(num, len(history), dtype=bool), batch_size=_AT_A_TIME)

"""Sparse updates of item tables: the rows that one client touched, instead of the whole table.

A client sees a few hundred of up to millions of items, so its update of a ``[num_rows, dim]`` table is a list of row
ids and a ``[n, dim]`` block. Gather and scatter carry their own batching rule: under ``vmap`` JAX would lower a
scatter into per-client tables to one with batch dimensions, which is about ten times slower on CPU than a single
scatter over the flattened tables.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


@partial(jax.tree_util.register_dataclass, data_fields=["ids", "values"], meta_fields=["num_rows", "unique", "whole"])
@dataclasses.dataclass(frozen=True)
class Rows:
    """One client's update of a table.

    Attributes:
      ids: int32 ``[n]``, the rows touched; padding is ``num_rows``.
      values: float32 ``[n, dim]``, what to add to those rows; zero on padding.
      num_rows: rows of the whole table.
      unique: True if no real id occurs twice. If False, duplicates are merged before any norm is taken.
      whole: True if ``ids`` are ``0 .. num_rows - 1`` in order: then ``values`` is added as it stands, which is several
        times faster than a scatter.
    """

    ids: jax.Array
    values: jax.Array
    num_rows: int
    unique: bool = True
    whole: bool = False


def is_rows(x: Any) -> bool:
    """True for a `Rows` node; the ``is_leaf`` of every tree operation on updates."""
    return isinstance(x, Rows)


@custom_vmap
def take_rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns ``table[ids]``; ids out of range (padding) give the last row, so mask what comes of them.

    Args:
      table: ``[num_rows, dim]``.
      ids: int32 of any shape.

    Returns:
      ``ids.shape + [dim]``.
    """
    return jnp.take(table, ids, axis=0, mode="clip")


@take_rows.def_vmap
def _take_rows_batched(axis_size, in_batched, table, ids):
    table_batched, ids_batched = in_batched
    if not table_batched:
        return take_rows(table, ids), True
    if not ids_batched:
        return jnp.take(table, ids, axis=1, mode="clip"), True
    num_rows, dim = table.shape[1:]
    first = (jnp.arange(axis_size, dtype=ids.dtype) * num_rows).reshape(axis_size, *[1] * (ids.ndim - 1))
    flat = jnp.minimum(ids, num_rows - 1) + first
    return jnp.take(table.reshape(axis_size * num_rows, dim), flat, axis=0, mode="clip"), True


@custom_vmap
def add_rows(table: jax.Array, ids: jax.Array, values: jax.Array) -> jax.Array:
    """Returns ``table`` with ``values`` added at ``ids``; duplicates accumulate, ids out of range are dropped.

    Args:
      table: ``[num_rows, dim]``.
      ids: int32 of any shape.
      values: ``ids.shape + [dim]``.
    """
    return table.at[ids.reshape(-1)].add(values.reshape(-1, table.shape[-1]), mode="drop")


@add_rows.def_vmap
def _add_rows_batched(axis_size, in_batched, table, ids, values):
    table, ids, values = (
        x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
        for x, batched in zip((table, ids, values), in_batched, strict=True)
    )
    num_rows, dim = table.shape[1:]
    ids = ids.reshape(axis_size, -1)
    first = (jnp.arange(axis_size, dtype=ids.dtype) * num_rows).reshape(axis_size, 1)
    flat = jnp.where(ids < num_rows, ids + first, axis_size * num_rows)
    return add_rows(table.reshape(axis_size * num_rows, dim), flat, values).reshape(table.shape), True


@custom_vmap
def _last_places(places: jax.Array, ids: jax.Array) -> jax.Array:
    return places.at[ids].max(jnp.arange(len(ids), dtype=places.dtype), mode="drop")


@_last_places.def_vmap
def _last_places_batched(axis_size, in_batched, places, ids):
    places, ids = (
        x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
        for x, batched in zip((places, ids), in_batched, strict=True)
    )
    num_rows, num_ids = places.shape[1], ids.shape[1]
    first = (jnp.arange(axis_size, dtype=ids.dtype) * num_rows)[:, None]
    flat = jnp.where(ids < num_rows, ids + first, axis_size * num_rows)
    place = jnp.broadcast_to(jnp.arange(num_ids, dtype=places.dtype), ids.shape)
    return places.reshape(-1).at[flat].max(place, mode="drop").reshape(places.shape), True


def distinct_rows(ids: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """A row for each distinct id, at the place of its last occurrence, without a sort.

    Args:
      ids: int32 ``[n]``, repeats allowed, padded with ``num_rows``.
      num_rows: rows of the whole table.

    Returns:
      row_ids int32 ``[n]``: the id where it occurs last, ``num_rows`` elsewhere; slots int32 ``[n]``: the place in
      ``row_ids`` of each id, n on padding.
    """
    last = _last_places(jnp.zeros(num_rows, jnp.int32), ids)
    slots = jnp.where(ids < num_rows, last.at[ids].get(mode="clip"), len(ids))
    return jnp.where(slots == jnp.arange(len(ids)), ids, num_rows), slots


def find_rows(sorted_ids: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where each id stands in ``sorted_ids``, and whether it does; both of the shape of ``ids``."""
    place = jnp.minimum(jnp.searchsorted(sorted_ids, ids), len(sorted_ids) - 1)
    return place, sorted_ids[place] == ids


def merge_duplicates(rows: Rows) -> Rows:
    """Sums the values of equal ids, so that a norm over ``values`` is the norm of the table's update.

    Sorts, which is slow on CPU; `Rows` that are unique by construction pass through untouched.
    """
    if rows.unique:
        return rows
    order = jnp.argsort(rows.ids)
    ids, values = rows.ids[order], rows.values[order]
    first = jnp.concatenate([jnp.ones(1, bool), ids[1:] != ids[:-1]])
    segment = jnp.cumsum(first) - 1
    merged = jax.ops.segment_sum(values, segment, num_segments=len(ids), indices_are_sorted=True)
    merged_ids = jnp.full_like(ids, rows.num_rows).at[segment].set(ids)
    merged = jnp.where((merged_ids < rows.num_rows)[:, None], merged, 0)
    return Rows(merged_ids, merged, rows.num_rows)


def add_update(table: jax.Array, update: Any) -> jax.Array:
    """Returns ``table`` with one client's `Rows`, or an array like it, added."""
    if not is_rows(update):
        return table + update
    return table + update.values if update.whole else add_rows(table, update.ids, update.values)


def zero_total(update: Any) -> Any:
    """Returns the empty sum of such updates: a dense table for each `Rows`, zeros for the rest.

    Args:
      update: one client's update (arrays or ``jax.ShapeDtypeStruct``, without a client axis).
    """

    def zeros(leaf):
        if is_rows(leaf):
            return jnp.zeros((leaf.num_rows, leaf.values.shape[-1]), leaf.values.dtype)
        return jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(zeros, update, is_leaf=is_rows)


def add_to_total(total: Any, updates: Any) -> Any:
    """Adds a chunk of updates (leaves with a leading ``[clients]`` axis) to a total from `zero_total`."""

    def add(leaf, table):
        if is_rows(leaf) and not leaf.whole:
            return add_rows(table, leaf.ids, leaf.values)
        return table + (leaf.values if is_rows(leaf) else leaf).sum(0)

    return jax.tree.map(add, updates, total, is_leaf=is_rows)


def to_dense(update: Any) -> Any:
    """One client's update with every `Rows` written out as its whole table: the slow, obvious form, for tests."""
    return add_to_total(zero_total(update), jax.tree.map(lambda x: x[None], update))


def whole_size(update: Any) -> int:
    """How many numbers an update has when each of its `Rows` is written out as its whole table."""
    leaves = jax.tree.leaves(update, is_leaf=is_rows)
    return sum(leaf.num_rows * leaf.values.shape[-1] if is_rows(leaf) else math.prod(leaf.shape) for leaf in leaves)


def whole_tables(update: Any) -> Any:
    """The same update of one client with each `Rows` written out as all rows of its table, which hides who is zero.

    Args:
      update: float32 leaves and `Rows`; repeated ids add up.
    """

    def whole(leaf):
        if not is_rows(leaf):
            return leaf
        zeros = jnp.zeros((leaf.num_rows, leaf.values.shape[-1]), jnp.float32)
        values = leaf.values if leaf.whole else add_rows(zeros, leaf.ids, leaf.values)
        return Rows(jnp.arange(leaf.num_rows, dtype=jnp.int32), values, leaf.num_rows, whole=True)

    return jax.tree.map(whole, update, is_leaf=is_rows)

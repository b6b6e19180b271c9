"""Padded uploads: rows of items that the client never touched, sent along so that the ids say less.

A heuristic: it makes a reader of one upload less sure, by a share one can measure, and promises nothing.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_rec.federated.rows import Rows, is_rows, merge_duplicates
from fedjax_rec.federated.transforms import UpdateTransform, Wire


def pad_rows(num_fake: int, *, key: jax.Array, weights: jax.Array | None = None) -> UpdateTransform:
    """Every client adds ``num_fake`` rows of items that it did not touch.

    A fake row holds the values of one of the client's own rows, drawn at random, with a random sign: one upload's real
    and fake rows then look alike, and the fakes of many clients add up to zero in expectation. They cost accuracy (the
    sum is noisier) and bytes.

    What it hides: which of the rows sent are real, in one upload, up to what the attacker expects anyway: uniform
    fakes among popular items are told apart by popularity, hence ``weights``. What it does not hide: how many items
    there are, as ``num_fake`` is public; values, which real rows still carry exactly; and over rounds, rows whose
    values agree with one rating. A client picks the same fakes whenever it sends the same rows, as fresh ones would be
    gone after intersecting two rounds; clients that draw new negatives in every round have no such rows, and an
    intersection of their uploads is as good as without padding.

    Guarantee: none. It is no differential privacy, and it bounds nothing: put a clip after it.

    Args:
      num_fake: rows, at least 1; where the rest of the catalogue is smaller, all of it.
      key: the clients' secret, folded with what each sends; a server that knows it can undo the padding.
      weights: float ``[rows]``, public; fakes are drawn in proportion, without replacement. None = uniform.

    Raises:
      ValueError: for fewer than 1; from the round, for an update whose tables differ in their row ids.
    """
    if num_fake < 1:
        raise ValueError(f"num_fake must be at least 1; got {num_fake}. Leave pad_rows out to add none.")

    def client(update, state, round_key):
        del state
        leaves, structure = jax.tree.flatten(update, is_leaf=is_rows)
        tables = [merge_duplicates(leaf) for leaf in leaves if is_rows(leaf)]
        if not tables or any(t.ids.shape != tables[0].ids.shape or t.num_rows != tables[0].num_rows for t in tables):
            raise ValueError("pad_rows needs an update with tables of the same rows, such as item vectors and biases.")
        ids, num_rows = tables[0].ids, tables[0].num_rows
        if tables[0].whole:
            return update, {}
        fakes = _fake_ids(jax.random.fold_in(key, _digest(ids, num_rows)), ids, num_rows)
        row_key, sign_key = jax.random.split(round_key)
        model = jax.random.categorical(row_key, jnp.where(ids < num_rows, 0.0, -jnp.inf), shape=fakes.shape)
        sign = jnp.where((fakes < num_rows) & jnp.any(ids < num_rows), jax.random.rademacher(sign_key, fakes.shape), 0)
        padded = iter(_padded(table, fakes, model, sign.astype(jnp.float32)) for table in tables)
        return jax.tree.unflatten(structure, [next(padded) if is_rows(leaf) else leaf for leaf in leaves]), {}

    def _fake_ids(secret, ids, num_rows):
        chances = jnp.zeros(num_rows) if weights is None else jnp.log(jnp.asarray(weights, jnp.float32))
        luck = (chances + jax.random.gumbel(secret, (num_rows,))).at[ids].set(-jnp.inf, mode="drop")
        best, fakes = jax.lax.top_k(luck, min(num_fake, num_rows))
        return jnp.where(best > -jnp.inf, fakes.astype(ids.dtype), num_rows)

    def upload(wire: Wire, update: Any) -> Wire:
        tables = [leaf for leaf in jax.tree.leaves(update, is_leaf=is_rows) if is_rows(leaf) and not leaf.whole]
        num = sum(min(num_fake, table.num_rows) * table.values.shape[-1] for table in tables)
        ids = sum(min(num_fake, table.num_rows) for table in tables)
        return wire._replace(numbers=wire.numbers + num, side_bits=wire.side_bits + 32.0 * ids)

    return UpdateTransform(
        client=client,
        sensitivity=lambda bound: bound._replace(l1=math.inf, l2=math.inf),
        upload=upload,
    )


def _digest(ids: jax.Array, num_rows: int) -> jax.Array:
    """A number of the set of real ids, whatever their order: uint32."""
    mixed = (ids.astype(jnp.uint32) + 1) * jnp.uint32(0x9E3779B1)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x85EBCA6B)
    return jnp.sum(jnp.where(ids < num_rows, mixed ^ (mixed >> 13), 0), dtype=jnp.uint32)


def _padded(table: Rows, fakes: jax.Array, model: jax.Array, sign: jax.Array) -> Rows:
    values = jnp.where(sign[:, None] != 0, table.values[model] * sign[:, None], 0.0)
    return Rows(jnp.concatenate([table.ids, fakes]), jnp.concatenate([table.values, values]), table.num_rows)

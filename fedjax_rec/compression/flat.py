"""One client's update as one vector, and back: what compressors work on."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_rec.federated.rows import is_rows


def update_size(update: Any) -> int:
    """Numbers in one client's update, padding rows included and row ids not; reads shapes only."""
    return sum(math.prod(_values(leaf).shape) for leaf in jax.tree.leaves(update, is_leaf=is_rows))


def ravel_update(update: Any) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
    """The values of all leaves of one client's update end to end.

    Row ids are not in the vector. Padding rows are, as zeros, so that its length is known when the round is compiled.
    Rows that occur twice stay twice; merge them before anything that is not linear in the vector.

    Args:
      update: any pytree of arrays and `Rows`, without a client axis.

    Returns:
      vector float32 ``[update_size(update)]``, and ``unravel(vector) -> update`` with the same ids, shapes and dtypes,
      whose padding rows are zero whatever the vector holds there.
    """
    leaves, structure = jax.tree.flatten(update, is_leaf=is_rows)
    parts = [_values(leaf).astype(jnp.float32).reshape(-1) for leaf in leaves]
    vector = jnp.concatenate(parts) if parts else jnp.zeros(0)

    def unravel(vector):
        first, new = 0, []
        for leaf in leaves:
            old = _values(leaf)
            values = vector[first : first + old.size].reshape(old.shape).astype(old.dtype)
            first += old.size
            if is_rows(leaf):
                real = (leaf.ids < leaf.num_rows).reshape(-1, *[1] * (old.ndim - 1))
                values = dataclasses.replace(leaf, values=jnp.where(real, values, 0))
            new.append(values)
        return jax.tree.unflatten(structure, new)

    return vector, unravel


def _values(leaf):
    return leaf.values if is_rows(leaf) else leaf

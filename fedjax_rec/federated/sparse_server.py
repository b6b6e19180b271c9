"""The server's step where a sum holds few rows of a large table: the other rows are neither read nor written.

A link of the chain may leave a `Rows` in the place of a table's total: the rows that it let through, zero elsewhere.
Written out, that is a pass over the table to clear it, one to divide and one to step, which at a million items take
longer than all that the few rows need.
"""

import dataclasses
from typing import Any

import jax

from fedjax_rec.federated.algorithm import Algorithm
from fedjax_rec.federated.rows import add_update, is_rows, to_dense
from fedjax_rec.federated.transforms import scale_update


def as_tables(total: Any) -> Any:
    """The total with every `Rows` written out as its whole table."""
    return jax.tree.map(lambda leaf: to_dense(leaf) if is_rows(leaf) else leaf, total, is_leaf=is_rows)


def divide(total: Any, divisor: float) -> Any:
    """The total over a number; ids of `Rows` stay what they are."""

    def by_divisor(leaf):
        if is_rows(leaf):
            return dataclasses.replace(leaf, values=leaf.values / divisor)
        return leaf / divisor

    return jax.tree.map(by_divisor, total, is_leaf=is_rows)


def sparse_sgd(algorithm: Algorithm, *, learning_rate: float = 1.0) -> Algorithm:
    """The method with the server step ``w <- w + learning_rate * aggregate``, taken on the rows that the aggregate has.

    The same step as ``optax.sgd(learning_rate)`` in `fedavg` and `fedsgd`, up to rounding, for every chain. There is
    none for momentum or Adam, which move a row after the rounds that touched it too.

    Args:
      algorithm: its update has the structure of the shared parameters, and its server optimizer is replaced.
      learning_rate: of the server.
    """

    def server_update(state, aggregate):
        step = scale_update(aggregate, learning_rate)
        shared = jax.tree.map(lambda change, w: add_update(w, change), step, state.shared, is_leaf=is_rows)
        return state._replace(shared=shared)

    return algorithm._replace(server_update=server_update, takes_rows=True)

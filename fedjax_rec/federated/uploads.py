"""Whole item tables sent to a server that looks at each by itself: what GPFedRec and CoFedRec have in common.

The round sums updates. A table of clients, of which each client adds its own row, makes that sum the stack of uploads,
``[clients, num_items * dim]``. The server's answer for each client lies in a table of the same shape, "personal".
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_rec.federated.local import Epoch
from fedjax_rec.federated.rows import Rows
from fedjax_rec.models.base import Model, Shared


def own_score(shared: Shared, private: Any) -> jax.Array:
    """float32 ``[num_items]``: what a client scored items with the table that it trained last; zeros before that."""
    del shared
    return private["scores"]


def item_table(model: Model) -> jax.ShapeDtypeStruct:
    """The shape of a model's item table.

    Raises:
      ValueError: if the model shares anything else.
    """
    shared = jax.eval_shape(model.init_shared, jax.random.key(0))
    if set(shared.tables) != {"item"} or jax.tree.leaves(shared.dense):
        names = ", ".join([*shared.tables, *(["dense parameters"] if jax.tree.leaves(shared.dense) else [])])
        raise ValueError(f"The model must share one table, 'item', and nothing else; it shares {names}.")
    return shared.tables["item"]


def with_uploads(table: jax.Array, num_clients: int) -> dict[str, jax.Array]:
    """The server's tables at first: one for all, ``[clients, num_items * dim]`` for each, and who has sent."""
    each = jnp.broadcast_to(table.reshape(1, -1), (num_clients, table.size))
    return {"item": table, "personal": each, "present": jnp.zeros((num_clients, 1))}


def upload(table: jax.Array, client_id: jax.Array, num_clients: int) -> dict[str, Rows]:
    """One client's whole table as one row of a table of clients: the sum over clients is then the stack of uploads.

    A padding client's id is past the last row, so it adds to none.
    """
    ids = client_id[None]
    return {
        "item": Rows(jnp.zeros(0, jnp.int32), jnp.zeros((0, table.shape[1])), table.shape[0]),
        "personal": Rows(ids, table.reshape(1, -1), num_clients),
        "present": Rows(ids, jnp.ones((1, 1)), num_clients),
    }


def received_uploads(aggregate: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The stack of uploads, and who has sent: the 1 beside each upload undoes the division by the cohort's size."""
    sent = aggregate["present"][:, 0]
    return aggregate["personal"] / jnp.where(sent > 0, sent, 1.0)[:, None], sent > 0


def on_whole_table(epoch: Epoch, num_items: int) -> Epoch:
    """The same examples for a client that holds every row, where it would hold those of its examples alone."""
    return Epoch(epoch.examples, epoch.examples.ids, jnp.arange(num_items, dtype=jnp.int32), whole=True)

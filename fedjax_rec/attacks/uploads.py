"""What the server sees of single clients: their uploads as they leave the chain's client side, before any sum.

An attack on uploads starts here. It reads the very code that a round runs, so a link that forgets to protect something
shows, and it never sees private parameters, data or keys.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.data.clients import ClientData
from fedjax_rec.federated.algorithm import Algorithm, ServerState
from fedjax_rec.federated.round import _one_client, _sent_to_clients
from fedjax_rec.federated.rows import add_rows, is_rows
from fedjax_rec.federated.transforms import UpdateTransform

CLIENTS_AT_ONCE = 64
# Attacks compile a program for each chain and run it once or twice.
COMPILE_FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Uploads(NamedTuple):
    """What arrived at the server, one entry a client (or a secure sum).

    Attributes:
      tables: ``{name: float32 [uploads, rows, dim]}``, each update written out as its whole table.
      sent: bool ``[uploads, rows]``, which rows were on the wire, zero or not: row ids are read before any value.
    """

    tables: dict[str, np.ndarray]
    sent: np.ndarray

    def take(self, which: np.ndarray) -> "Uploads":
        """Some of them, by place or by a bool mask."""
        return Uploads({name: table[which] for name, table in self.tables.items()}, self.sent[which])


def observed_uploads(
    algorithm: Algorithm,
    transforms: UpdateTransform,
    clients: ClientData,
    state: ServerState,
    private: Any,
    key: jax.Array,
    client_ids: np.ndarray | None = None,
) -> Uploads:
    """Runs the client side of one round for each client by itself.

    Args:
      algorithm: a method that trains one table of items or several with a row an item.
      transforms: the chain whose client side runs.
      clients: the population, laid out for one device.
      state: of ``make_rounds(...).init`` or a later round.
      private: of all clients, as there.
      key: the round's client key, ``fold_in(keys.client, state.round)``: then these uploads are the round's own.
      client_ids: int ``[uploads]``, whose; everybody's by default.

    Raises:
      ValueError: if the chain takes a secure sum (no server sees these uploads then) or updates have no tables.
    """
    if transforms.summation is not None and not transforms.summation.individual:
        raise ValueError(
            "The chain takes a secure sum, so nobody sees single uploads; take secure_sums of a plain one."
        )
    wanted = np.arange(clients.num_clients) if client_ids is None else np.asarray(client_ids)
    in_cohort = jnp.zeros(clients.num_clients, bool).at[wanted].set(True)
    sent = _sent_to_clients(transforms, state, in_cohort, key)
    found, owners = [], []
    for bucket in clients.buckets:
        places = np.flatnonzero(np.isin(np.asarray(bucket.client_id), wanted))
        if len(places):
            batch = min(len(places), CLIENTS_AT_ONCE)
            filled = np.resize(places, (-(-len(places) // batch), batch))  # the last batch repeats the first clients
            some = jax.tree.map(lambda x, filled=filled: jnp.asarray(x)[filled], bucket)
            seen = jax.device_get(_bucket_uploads(algorithm, transforms, sent, private, some, key))
            found.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), seen))
            owners.append(np.asarray(bucket.client_id)[filled.reshape(-1)])
    order = {int(owner): place for place, owner in enumerate(np.concatenate(owners))}
    stacked = jax.tree.map(lambda *parts: np.concatenate(parts), *found)
    return Uploads(*stacked).take(np.array([order[int(client)] for client in wanted]))


@partial(jax.jit, static_argnums=(0, 1), compiler_options=COMPILE_FAST)
def _bucket_uploads(algorithm, transforms, sent, private, batches, key):
    """Uploads with two leading axes, those of the batches of clients."""

    def one(client, num_steps):
        own = jax.tree.map(lambda x: x[client.client_id], private)
        update, _, _ = _one_client(algorithm, transforms, sent, own, client, num_steps, key)
        if not getattr(update, "tables", None):
            raise ValueError(f"Uploads have no item tables to read: the update is a {type(update).__name__}.")
        written = {name: _as_table(leaf) for name, leaf in update.tables.items()}
        seen = jnp.stack([mask for _, mask in written.values()]).any(0)
        return {name: table for name, (table, _) in written.items()}, seen

    def batch(some):
        return jax.vmap(one, (0, None))(some, jnp.max(jax.vmap(algorithm.num_steps)(some)))

    return jax.lax.map(batch, batches)


def _as_table(leaf) -> tuple[jax.Array, jax.Array]:
    """A leaf as its whole table, and which of its rows were sent."""
    if not is_rows(leaf) or leaf.whole:
        values = leaf.values if is_rows(leaf) else leaf
        return values, jnp.ones(values.shape[0], bool)
    empty = jnp.zeros((leaf.num_rows, leaf.values.shape[-1]), jnp.float32)
    times = add_rows(jnp.zeros((leaf.num_rows, 1)), leaf.ids, jnp.ones((*leaf.ids.shape, 1)))
    return add_rows(empty, leaf.ids, leaf.values), times[:, 0] > 0


def secure_sums(uploads: Uploads, groups: np.ndarray) -> Uploads:
    """What the server sees where each group's uploads reach it as their sum alone.

    A secure sum is this plain sum, computed so that nobody sees a term: an exact protocol shows the same numbers. The
    rows of a sum that are not zero are visible, and with them the union of the group's items.

    Args:
      uploads: of single clients.
      groups: int ``[sums, members]``, places in ``uploads``.
    """
    tables = {name: np.stack([table[group].sum(0) for group in groups]) for name, table in uploads.tables.items()}
    touched = np.stack([np.any(table != 0, axis=2) for table in tables.values()]).any(0)
    return Uploads(tables, touched)


def joined_rows(uploads: Uploads) -> np.ndarray:
    """All tables side by side, float32 ``[uploads, rows, numbers]``: the tables in the order of their names.

    Of matrix factorisation that is ``[bias | item vector]`` for each item.
    """
    return np.concatenate([uploads.tables[name] for name in sorted(uploads.tables)], axis=2)


def leading_direction(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The best rank-one fit ``e v^T`` of one upload: e float32 ``[rows]``, v of norm 1 with ``v[0] >= 0``.

    One full-batch step of matrix factorisation moves row i, bias first, by ``e_i (1, u)``: all rows are multiples of
    one vector, so e holds the residuals, with their signs, up to one positive factor.

    Args:
      rows: float32 ``[rows, numbers]``.
    """
    gram = jnp.matmul(rows.T, rows, precision="highest")
    vector = jnp.linalg.eigh(gram)[1][:, -1]
    vector = jnp.where(vector[0] < 0, -vector, vector)
    return jnp.matmul(rows, vector, precision="highest"), vector

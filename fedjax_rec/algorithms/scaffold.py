"""SCAFFOLD: local steps corrected by the difference of two running gradients, the client's and everybody's.

Client i starts from the server's x and takes K local steps of size eta_l, with the server's control variate c and its
own c_i,

    y <- y - eta_l (g_i(y) - c_i + c),

then renews c_i by the paper's option II and sends two differences:

    c_i+ = c_i - c + (x - y) / (K eta_l),   Delta y_i = y - x,   Delta c_i = c_i+ - c_i;

the server takes x <- x + eta_g mean(Delta y_i) and c <- c + |S|/N mean(Delta c_i) over the cohort S of N clients.

Karimireddy et al., 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning" (ICML).

Rows. An item that a client did not touch this round has gradient 0, so c_i+ is 0 there and y drifts by -K eta_l c.
Clients therefore send u_i = Delta y_i + K eta_l c, zero but on the rows of this round and of c_i, and the server adds
the drift that all have in common. Hence c_i is kept exactly as rows, and Delta c_i = -u_i / (K eta_l).

Privacy. A round releases two sums, of u_i and of Delta c_i, twice FedAvg's. They are one update: a clip bounds their
joint norm, so one event covers both. Delta c_i is sent times the public mean of K eta_l, in the units of u_i. Under DP
the noise of every round stays in c.

Memory. A client keeps `private_bytes`, at most a whole table: on MovieLens 100K (1,682 items, dim 32 and a bias)
0.23 MB, for all 943 clients 216 MB.

Differs from the paper: K is the client's own number of batches, and the common drift is taken at its public mean; means
are over the expected cohort size; private parameters (user vectors) take plain steps, for nobody averages them.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_rec.data.clients import ClientData
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated import local
from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.federated.rows import Rows, find_rows, take_rows
from fedjax_rec.federated.transforms import scale_update
from fedjax_rec.models.base import Model, Shared


class Controlled(NamedTuple):
    """A model's shared parameters with c, a `Shared` like them; `Model.score` takes it as it takes a `Shared`."""

    tables: dict[str, jax.Array]
    dense: Any
    control: Shared


class ControlledPrivate(NamedTuple):
    """What one client keeps.

    Attributes:
      model: the model's private parameters; what `Model.score` takes.
      ids: int32 ``[control_rows]``, items where c_i is not zero, sorted, padded with ``num_items``.
      rows: ``{table: [control_rows, dim]}``, c_i there.
      dense: c_i of the dense leaves.
    """

    model: Any
    ids: jax.Array
    rows: dict[str, jax.Array]
    dense: Any


def control_rows(clients: ClientData, *, batch_size: int | None = None, negatives: Negatives | None = None) -> int:
    """Rows that c_i needs so that no client's round is too large for it; the catalogue's size at most."""

    def touched(bucket):
        one = jax.tree.map(lambda x: x[0], bucket)
        draw = partial(local.draw_epoch, negatives=negatives, batch_size=batch_size)
        return local.row_ids(jax.eval_shape(draw, one, key=jax.random.key(0))).size

    return min(clients.num_items, max(touched(bucket) for bucket in clients.buckets))


def private_bytes(model: Model, num_rows: int) -> int:
    """Bytes of one client's c_i with this many rows (`control_rows`, or the catalogue's size for a whole table)."""
    shared = jax.eval_shape(model.init_shared, jax.random.key(0))
    row = 4 + sum(table.shape[1] * table.dtype.itemsize for table in shared.tables.values())
    return num_rows * row + sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shared.dense))


def scaffold(
    model: Model,
    *,
    lr: float,
    num_control_rows: int,
    mean_local_steps: float,
    sampling_prob: float,
    private_optimizer: optax.GradientTransformation | None = None,
    server_optimizer: optax.GradientTransformation | None = None,
    local_epochs: int = 1,
    batch_size: int | None = None,
    negatives: Negatives | None = None,
) -> Algorithm:
    """SCAFFOLD with option II. Evaluate with ``private.model`` for a client's parameters.

    Args:
      model: a recommender; every table has a row an item.
      lr: eta_l, of SGD on the shared parameters.
      num_control_rows: rows that a client keeps of c_i, from `control_rows`; public.
      mean_local_steps: mean of K over clients, epochs times batches (see `local.mean_steps`); a public constant.
      sampling_prob: |S|/N, the sampler's; public.
      private_optimizer: for the model's private parameters; ``optax.sgd(lr)`` by default.
      server_optimizer: applied to minus the mean of Delta y_i; ``optax.sgd(1.0)``, so eta_g = 1, by default.
      local_epochs: passes over the client's examples of the round.
      batch_size: interactions a step; None takes the client's whole data in one step, and K = local_epochs.
      negatives: how to draw negatives; None trains on the given labels alone.

    Raises:
      ValueError: for constants that are not positive; in the round, for clients that touch too many rows.
    """
    if not min(lr, num_control_rows, mean_local_steps, sampling_prob, local_epochs) > 0:
        numbers = f"{lr=}, {num_control_rows=}, {mean_local_steps=}, {sampling_prob=}, {local_epochs=}"
        raise ValueError(f"All of these must be positive; got {numbers}.")
    client_optimizer = optax.partition(
        {"shared": optax.sgd(lr), "private": optax.sgd(lr) if private_optimizer is None else private_optimizer},
        {"rows": "shared", "dense": "shared", "private": "private"},
    )
    server_optimizer = optax.sgd(1.0) if server_optimizer is None else server_optimizer
    mean_drift = mean_local_steps * lr

    def init(key):
        shared = model.init_shared(key)
        controlled = Controlled(*shared, control=jax.tree.map(jnp.zeros_like, shared))
        return ServerState(jnp.zeros((), jnp.int32), controlled, server_optimizer.init(shared))

    def init_private(key):
        shared = jax.eval_shape(model.init_shared, jax.random.key(0))
        num_items = next(table.shape[0] for table in shared.tables.values())
        rows = {name: jnp.zeros((num_control_rows, table.shape[1])) for name, table in shared.tables.items()}
        dense = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shared.dense)
        return ControlledPrivate(model.init_private(key), jnp.full(num_control_rows, num_items, jnp.int32), rows, dense)

    def client_update(shared, private, client, num_steps, key):
        draw_key, train_key = jax.random.split(key)
        epoch = local.draw_epoch(client, negatives, batch_size, draw_key)
        ids, num_items = local.row_ids(epoch), client.num_items
        place, has = find_rows(private.ids, ids)
        own = {name: jnp.where(has[..., None], take_rows(rows, place), 0.0) for name, rows in private.rows.items()}
        common = {name: take_rows(table, ids) for name, table in shared.control.tables.items()}
        correction = jax.tree.map(jnp.subtract, Shared(common, shared.control.dense), Shared(own, private.dense))
        trained = local.train(
            *(model, client_optimizer, Shared(shared.tables, shared.dense), private.model, epoch),
            num_steps=num_steps,
            num_epochs=local_epochs,
            key=train_key,
            extra_gradient=lambda moved: correction,
        )
        # Of this client, and not num_steps, which is the chunk's.
        drift = lr * local_epochs * local.num_batches(client, batch_size).astype(jnp.float32)
        per_step = 1 / jnp.where(drift > 0, drift, 1.0)  # a client without data stays where it is, with c_i = 0
        flat = ids.reshape(-1)
        by_id = jnp.argsort(flat)[:num_control_rows]
        if num_control_rows < min(len(flat), num_items):
            raise ValueError(f"A client touches up to {len(flat)} rows and keeps {num_control_rows}; see control_rows.")
        unfilled = num_control_rows - len(by_id)
        kept_ids = jnp.pad(flat[by_id], (0, unfilled), constant_values=num_items)
        _, again = find_rows(kept_ids, private.ids)
        sent_ids = jnp.concatenate([flat, jnp.where(again, num_items, private.ids)])
        tables, kept = {}, {}
        for name, rows in trained.rows.items():
            old, dim = private.rows[name], rows.values.shape[1]
            u = rows.values + jnp.where((flat < num_items)[:, None], drift * common[name].reshape(-1, dim), 0.0)
            elsewhere = jnp.where(again[:, None], 0.0, drift * old)  # gradient 0, so u = K eta_l c_i
            tables[name] = Rows(sent_ids, jnp.concatenate([u, elsewhere]), num_items)
            kept[name] = jnp.pad((own[name].reshape(-1, dim) - per_step * u)[by_id], ((0, unfilled), (0, 0)))
        dense = jax.tree.map(lambda moved, c: moved + drift * c, trained.dense, shared.control.dense)
        kept_dense = jax.tree.map(lambda c_i, u: c_i - per_step * u, private.dense, dense)
        moved = Shared(tables, dense)
        update = Controlled(*moved, control=scale_update(moved, -mean_drift * per_step))
        private = ControlledPrivate(trained.private, kept_ids, kept, kept_dense)
        return ClientOutput(update, private, {"loss": trained.loss})

    def server_update(state, aggregate):
        model_params, control = Shared(state.shared.tables, state.shared.dense), state.shared.control
        moved = Shared(aggregate.tables, aggregate.dense)
        pseudo_gradient = jax.tree.map(lambda u, c: mean_drift * c - u, moved, control)
        updates, opt_state = server_optimizer.update(pseudo_gradient, state.opt_state, model_params)
        rate = sampling_prob / mean_drift  # undoes the scale that Delta c_i was sent with
        control = jax.tree.map(lambda c, change: c + rate * change, control, aggregate.control)
        shared = Controlled(*optax.apply_updates(model_params, updates), control=control)
        return state._replace(shared=shared, opt_state=opt_state)

    return Algorithm(
        init=init,
        init_private=init_private,
        client_update=client_update,
        num_steps=lambda client: local.num_batches(client, batch_size),
        server_update=server_update,
    )

"""A round as a loop over clients on whole tables: slow, obvious, and what the engine must agree with to 1e-5."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_rec.federated.local import draw_epoch, num_batches
from fedjax_rec.models.base import Shared, View


def one_by_one(clients):
    """Every client of a population laid out in one bucket, in order of id."""
    (bucket,) = clients.buckets
    for row in np.argsort(bucket.client_id):
        yield jax.tree.map(lambda x, row=row: jnp.asarray(x[row]), bucket)


def reference_rounds(
    model, clients, sampler, *, optimizer, server_optimizer, negatives=None, batch_size=None, local_epochs=1, clip=np.inf
):
    """Returns ``one_round(state, private, keys) -> (state, private, mean loss)``: no vmap, no Rows, no chunks."""

    def loss(params, batch, key):
        rows = {name: jnp.take(table, batch.ids, axis=0, mode="clip") for name, table in params["rows"].items()}
        return model.loss(View(rows, params["dense"]), params["private"], batch, key)

    value_and_grad = jax.jit(jax.value_and_grad(loss))
    draw = jax.jit(lambda client, key: draw_epoch(client, negatives, batch_size, key).examples)

    def one_round(state, private, keys):
        cohort_key, clients_key, _ = (jax.random.fold_in(key, state.round) for key in keys)
        in_cohort = np.asarray(sampler.draw(cohort_key))
        total, losses = jax.tree.map(jnp.zeros_like, state.shared), []
        for client in one_by_one(clients):
            if not in_cohort[client.client_id]:
                continue
            train_key, _ = jax.random.split(jax.random.fold_in(clients_key, client.client_id))
            draw_key, loss_key = jax.random.split(train_key)
            examples, steps = draw(client, draw_key), int(num_batches(client, batch_size))
            own = jax.tree.map(lambda x, client=client: x[client.client_id], private)
            params = {"rows": state.shared.tables, "dense": state.shared.dense, "private": own}
            opt_state, values = optimizer.init(params), []
            for epoch, step in np.ndindex(local_epochs, steps):
                batch = jax.tree.map(lambda x, step=step: x[step], examples)
                key = jax.random.fold_in(jax.random.fold_in(loss_key, epoch), step)
                value, gradient = value_and_grad(params, batch, key)
                change, opt_state = optimizer.update(gradient, opt_state, params)
                params = optax.apply_updates(params, change)
                values.append(value)
            update = jax.tree.map(jnp.subtract, Shared(params["rows"], params["dense"]), state.shared)
            norm = np.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in jax.tree.leaves(update)))
            total = jax.tree.map(lambda t, x, f=min(1, clip / max(norm, 1e-30)): t + f * x, total, update)
            private = jax.tree.map(lambda x, new, i=client.client_id: x.at[i].set(new), private, params["private"])
            losses.append(np.mean(values[:steps]) if steps else 0.0)
        gradient = jax.tree.map(lambda x: -x / sampler.expected_size, total)
        change, opt_state = server_optimizer.update(gradient, state.opt_state, state.shared)
        shared = optax.apply_updates(state.shared, change)
        state = state._replace(round=state.round + 1, shared=shared, opt_state=opt_state)
        return state, private, np.mean(losses) if losses else 0.0

    return one_round

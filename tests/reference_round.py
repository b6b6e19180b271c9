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
    return [jax.tree.map(lambda x, row=row: x[row], bucket) for row in np.argsort(bucket.client_id)]


def reference_rounds(
    model,
    clients,
    sampler,
    *,
    optimizer,
    server_optimizer,
    negatives=None,
    batch_size=None,
    local_epochs=1,
    clip=np.inf,
):
    """Returns ``one_round(state, private, keys) -> (state, private, mean loss)``: no vmap, no Rows, no chunks."""

    def loss(params, batch, key):
        rows = {name: jnp.take(table, batch.ids, axis=0, mode="clip") for name, table in params["rows"].items()}
        return model.loss(View(rows, params["dense"]), params["private"], batch, key)

    @jax.jit
    def step(params, opt_state, batch, key):
        value, gradient = jax.value_and_grad(loss)(params, batch, key)
        change, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, change), opt_state, value

    draw = jax.jit(lambda client, key: draw_epoch(client, negatives, batch_size, key).examples)

    def one_round(state, private, keys):
        clients_key = jax.random.fold_in(keys.client, state.round)
        shared, losses = jax.device_get(state.shared), []
        total, private = jax.tree.map(np.zeros_like, shared), jax.tree.map(np.array, private)
        for client_id in np.flatnonzero(sampler.draw(keys.cohort, state.round)):
            client = one_by_one(clients)[client_id]
            train_key, _ = jax.random.split(jax.random.fold_in(clients_key, client_id))
            draw_key, loss_key = jax.random.split(train_key)
            examples, num_steps = jax.device_get(draw(client, draw_key)), int(num_batches(client, batch_size))
            own = jax.tree.map(lambda x, i=client_id: x[i], private)
            params = {"rows": shared.tables, "dense": shared.dense, "private": own}
            opt_state, values = optimizer.init(params), []
            for epoch, index in np.ndindex(local_epochs, num_steps):
                batch = jax.tree.map(lambda x, index=index: x[index], examples)
                key = jax.random.fold_in(jax.random.fold_in(loss_key, epoch), index)
                params, opt_state, value = step(params, opt_state, batch, key)
                values.append(value)
            params = jax.device_get(params)
            update = jax.tree.map(np.subtract, Shared(params["rows"], params["dense"]), shared)
            norm = np.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in jax.tree.leaves(update)))
            factor = min(1.0, clip / max(norm, 1e-30))
            total = jax.tree.map(lambda t, x, factor=factor: t + factor * x, total, update)
            jax.tree.map(lambda x, new, i=client_id: x.__setitem__(i, new), private, params["private"])
            losses.append(np.mean(values[:num_steps]) if num_steps else 0.0)
        gradient = jax.tree.map(lambda x: jnp.asarray(-x / sampler.expected_size, jnp.float32), total)
        change, opt_state = server_optimizer.update(gradient, state.opt_state, state.shared)
        state = state._replace(shared=optax.apply_updates(state.shared, change), opt_state=opt_state)
        return state._replace(round=state.round + 1), private, np.mean(losses or [0.0])

    return one_round

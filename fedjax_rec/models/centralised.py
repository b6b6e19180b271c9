"""A client's model, trained in one place on everybody's data: what federation is compared with.

All users' interactions lie in one heap. In each epoch each of them gets its negatives as on its client, the heap is
shuffled, and mini-batches of it take steps of an optimizer on all parameters, the users' own included:

    min_{w, p_1 ... p_U}  mean over (u, i) of  loss(w, p_u; i and its negatives)

The model is the very `Model` that clients train, so a difference to a federated result is that of the training. He et
al., 2017, "Neural Collaborative Filtering" (WWW) train so with Adam and batches of 256 or more.

Nothing here is private: this is no `Algorithm`, it has no client updates and no guarantee.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_rec.data.clients import ClientData
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.evaluation.scorers import Scorer, client_scorer
from fedjax_rec.federated.algorithm import client_key
from fedjax_rec.federated.local import draw_epoch
from fedjax_rec.models.base import Examples, Model, Shared, View


class CentralisedState(NamedTuple):
    """All parameters and the optimizer's state.

    Attributes:
      epoch: int32 scalar, epochs done.
      shared: what federated training would hold on the server.
      private: what it would leave to clients; leaves ``[users, ...]``.
      opt_state: of one optimizer over both.
    """

    epoch: jax.Array
    shared: Shared
    private: Any
    opt_state: Any


class Centralised(NamedTuple):
    """A compiled training procedure.

    Attributes:
      init: ``key -> CentralisedState``.
      run_epoch: ``(state, key) -> (state, loss)``; loss is a float32 scalar, the mean over the epoch's batches before
        their steps. ``state`` is donated. The epoch's number is folded into the key.
      scorer: ``state -> Scorer`` for `evaluation.evaluate`; scoring after another epoch compiles nothing.
    """

    init: Callable[[jax.Array], CentralisedState]
    run_epoch: Callable[[CentralisedState, jax.Array], tuple[CentralisedState, jax.Array]]
    scorer: Callable[[CentralisedState], Scorer]


def centralised(
    model: Model,
    clients: ClientData,
    *,
    optimizer: optax.GradientTransformation | None = None,
    batch_size: int = 256,
    negatives: Negatives | None = None,
) -> Centralised:
    """Compiles the training of a model on all users together.

    An epoch of a stateful optimizer such as Adam costs ``batches * parameters``: it moves every row in every step.

    Args:
      model: a recommender.
      clients: the population, from `client_data`, whose ``exclusion`` says what negatives avoid ("strict" or "paper").
      optimizer: ``optax.adam(1e-3)`` by default.
      batch_size: interactions a step; negatives come on top.
      negatives: four, uniform, by default; clients of ready-made examples draw none.

    Raises:
      ValueError: for a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    optimizer = optax.adam(1e-3) if optimizer is None else optimizer
    negatives = Negatives(4) if negatives is None else negatives
    total = clients.num_interactions
    num_steps = -(-total // batch_size)
    lengths = [np.asarray(bucket.length) for bucket in clients.buckets]
    widths = [bucket.item_ids.shape[-1] for bucket in clients.buckets]
    is_real = [np.arange(width) < length[:, None] for length, width in zip(lengths, widths, strict=True)]
    heap = np.flatnonzero(np.concatenate([real.reshape(-1) for real in is_real])).astype(np.int32)
    buckets = jax.device_put(clients.buckets)

    def init(key):
        shared_key, private_key = jax.random.split(key)
        keys = jax.vmap(partial(client_key, private_key))(jnp.arange(clients.num_clients))
        shared, private = model.init_shared(shared_key), jax.vmap(model.init_private)(keys)
        shared, private = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), (shared, private))
        return CentralisedState(jnp.zeros((), jnp.int32), shared, private, optimizer.init((shared, private)))

    def drawn(buckets, key):
        """Every interaction with its negatives, ``[total, 1 + negatives]``, and its user, ``[total]``."""
        parts = []
        for bucket in buckets:
            keys = jax.vmap(partial(client_key, key))(bucket.client_id)
            examples = jax.vmap(lambda client, key: draw_epoch(client, negatives, None, key).examples)(bucket, keys)
            users = jnp.broadcast_to(bucket.client_id[:, None], bucket.item_ids.shape)
            parts.append((jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), examples), users.reshape(-1)))
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[heap], *parts)

    def batch_loss(params, users, examples, key):
        shared, private = params

        def one(user, example):
            example = jax.tree.map(lambda x: x[None], example)
            rows = {name: jnp.take(table, example.ids, axis=0, mode="clip") for name, table in shared.tables.items()}
            own = jax.tree.map(lambda x: x[user], private)
            return model.loss(View(rows, shared.dense), own, example, key)

        real = (examples.weights > 0).any(-1)
        losses = jnp.where(real, jax.vmap(one)(users, examples), 0.0)
        return losses.sum() / jnp.maximum(real.sum(), 1)

    def run_epoch(state, buckets, key):
        draw_key, order_key, loss_key = jax.random.split(jax.random.fold_in(key, state.epoch), 3)
        examples, users = drawn(buckets, draw_key)
        order = jax.random.permutation(order_key, total)
        order = jnp.pad(order, (0, num_steps * batch_size - total), constant_values=total).reshape(
            num_steps, batch_size
        )
        fill = Examples(clients.num_items, 0.0, 0.0)

        def step(carry, index):
            params, opt_state, loss_sum = carry
            places = order[index]
            batch = jax.tree.map(lambda x, x0: x.at[places].get(mode="fill", fill_value=x0), examples, fill)
            own = users.at[places].get(mode="clip")
            loss, gradient = jax.value_and_grad(batch_loss)(params, own, batch, jax.random.fold_in(loss_key, index))
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state, loss_sum + loss), None

        carry = ((state.shared, state.private), state.opt_state, jnp.zeros(()))
        ((shared, private), opt_state, loss_sum), _ = jax.lax.scan(step, carry, jnp.arange(num_steps))
        return CentralisedState(state.epoch + 1, shared, private, opt_state), loss_sum / num_steps

    compiled = jax.jit(run_epoch, donate_argnums=0)

    return Centralised(
        init=init,
        run_epoch=lambda state, key: compiled(state, buckets, key),
        scorer=lambda state: client_scorer(model.score, shared=state.shared, private=state.private),
    )

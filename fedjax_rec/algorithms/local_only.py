"""Local training only: every client has its own item table and score function, and nothing is ever shared.

Each client k minimises the binary cross-entropy of its own interactions,

    L_k(theta_k, V_k) = - sum_{(i, y) in D_k} y log p_ki + (1 - y) log(1 - p_ki),   p_ki = sigmoid(theta_k(v_ki)),

over its score function theta_k and its whole item table V_k, both private and kept from round to round. Its update is
empty, the server's state holds no parameter and learns nothing. This is what federation has to beat (the local models
of Smith et al., 2017, "Federated Multi-Task Learning"), and an alarm: it cannot know an item that its client never
touched, so a score above chance on held-out items comes from the protocol. With ``exclusion="paper"`` the held-out item
is the one that is never drawn as a negative, and a private table remembers all that were.

Local steps are those of PFedRec (Zhang et al., 2023, "Dual Personalization on Federated Recommendation"): a batch moves
theta_k, then, the loss computed again, V_k.

Memory: ``num_clients * num_items * dim * 4`` bytes for the private tables, in float32: 0.2 GB for MovieLens 100K
and 2.9 GB for 1M at dim 32. The round changes them in place, a chunk of clients at a time.

Differs from the paper: there is no paper of this method alone; negatives of a round are distinct; clients outside a
cohort do not train.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjax_rec.algorithms.pfedrec import PERSONAL_FIRST
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated import local
from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.federated.private_tables import MAX_PRIVATE_BYTES, add_to_tables, check_private_bytes
from fedjax_rec.models.base import Model, Shared


def local_score(model: Model) -> Callable[[Shared, Any], jax.Array]:
    """``(Shared, private) -> float32 [num_items]`` of a client of `local_only`; the server's part is empty."""
    return lambda shared, private: model.score(private["shared"], private["own"])


def local_only(
    model: Model,
    *,
    num_clients: int,
    num_items: int,
    lr: float = 0.1,
    item_lr_factor: float = 80.0,
    batch_size: int | None = 51,
    local_epochs: int = 1,
    negatives: Negatives | None = None,
    max_private_bytes: int = MAX_PRIVATE_BYTES,
) -> Algorithm:
    """Local training only; the arguments and their defaults are those of `pfedrec`.

    Args:
      model: `personal_scorer`, or any other: what it shares elsewhere is private here. Score with `local_score`.
      num_clients: clients in the population, for the refusal below.
      num_items: catalogue size |V|.
      lr: learning rate of theta_k.
      item_lr_factor: c; the item table's learning rate is ``lr * num_items * c``.
      batch_size: interactions a step; None takes the client's whole data.
      local_epochs: passes over the client's examples of a round.
      negatives: four, uniform, by default.
      max_private_bytes: most bytes for the private tables of all clients together.

    Raises:
      ValueError: if the private tables would take more than ``max_private_bytes``, or ``local_epochs`` is below 1.
    """
    received = jax.eval_shape(model.init_shared, jax.random.key(0))
    check_private_bytes(num_clients, received.tables, max_private_bytes)
    if local_epochs < 1:
        raise ValueError(f"local_epochs must be at least 1; got {local_epochs}.")
    negatives = Negatives(4) if negatives is None else negatives
    item_lr = lr * num_items * item_lr_factor
    optimizer = optax.partition(
        {"own": optax.sgd(lr), "table": optax.sgd(item_lr)}, {"rows": "table", "dense": "table", "private": "own"}
    )

    def init(key):
        del key
        return ServerState(jnp.zeros((), jnp.int32), Shared({}, {}), ())

    def init_private(key):
        shared_key, own_key = jax.random.split(key)
        return {"shared": model.init_shared(shared_key), "own": model.init_private(own_key)}

    def client_update(shared, private, client, num_steps, key):
        draw_key, train_key = jax.random.split(key)
        before = private["shared"]
        trained = local.train(
            model,
            optimizer,
            before,
            private["own"],
            local.draw_epoch(client, negatives, batch_size, draw_key),
            num_steps=num_steps,
            num_epochs=local_epochs,
            key=train_key,
            phases=PERSONAL_FIRST,
        )
        tables = add_to_tables(before.tables, trained.rows)
        after = Shared(tables, optax.apply_updates(before.dense, trained.dense))
        # The update has the structure of what the server holds: nothing.
        return ClientOutput(shared, {"shared": after, "own": trained.private}, {"loss": trained.loss})

    return Algorithm(
        init=init,
        init_private=init_private,
        client_update=client_update,
        num_steps=lambda client: local.num_batches(client, batch_size),
        server_update=lambda state, aggregate: state,
    )

"""FedProx: local training held near the parameters that the server sent.

Each client k of the cohort starts from the server's w^t and takes local steps on

    h_k(w; w^t) = F_k(w) + mu/2 ||w - w^t||^2,

so that many steps, or strange data, do not carry it far from the others. The server averages as FedAvg does.

Li et al., 2020, "Federated Optimization in Heterogeneous Networks" (MLSys).

Differs from the paper: private parameters (user vectors) are not held back, since nobody averages them; the work is a
number of epochs and not a gamma-inexact solution; every client of a cohort counts the same, over the expected cohort
size, where the paper samples clients in proportion to their data.
"""

import jax
import jax.numpy as jnp
import optax

from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated import local
from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.models.base import Model, Shared


def fedprox(
    model: Model,
    *,
    mu: float,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    local_epochs: int = 1,
    batch_size: int | None = None,
    negatives: Negatives | None = None,
) -> Algorithm:
    """Federated averaging with a proximal term on the client.

    The term's gradient, mu (w - w^t), acts in every step on dense leaves and on all rows that the client holds this
    round; other rows stay at w^t, where it is zero. It is also zero in the first step, so with one full batch and one
    epoch FedProx is FedAvg.

    Args:
      model: a recommender.
      mu: strength of the term, >= 0; 0 is FedAvg, bit for bit. Plain SGD is stable while learning rate * mu < 2.
      client_optimizer: stateless on item rows; ``optax.sgd``.
      server_optimizer: applied to minus the mean update; ``optax.sgd(1.0)``, plain averaging, by default.
      local_epochs: passes over the client's examples of the round.
      batch_size: interactions a step (negatives come on top); None takes the client's whole data in one step.
      negatives: how to draw negatives; None trains on the given labels alone.

    Raises:
      ValueError: for a negative mu, no epochs, or a client optimizer that keeps state for rows.
    """
    local.check_client_optimizer(client_optimizer, model)
    if not 0 <= mu < float("inf"):
        raise ValueError(f"mu must be finite and not negative; got {mu}.")
    if local_epochs < 1:
        raise ValueError(f"local_epochs must be at least 1; got {local_epochs}.")
    server_optimizer = optax.sgd(1.0) if server_optimizer is None else server_optimizer

    def pull(moved):
        return jax.tree.map(lambda x: mu * x, moved)

    def init(key):
        shared = model.init_shared(key)
        return ServerState(jnp.zeros((), jnp.int32), shared, server_optimizer.init(shared))

    def client_update(shared, private, client, num_steps, key):
        draw_key, train_key = jax.random.split(key)
        trained = local.train(
            model,
            client_optimizer,
            shared,
            private,
            local.draw_epoch(client, negatives, batch_size, draw_key),
            num_steps=num_steps,
            num_epochs=local_epochs,
            key=train_key,
            extra_gradient=pull if mu else None,
        )
        return ClientOutput(Shared(trained.rows, trained.dense), trained.private, {"loss": trained.loss})

    def server_update(state, aggregate):
        pseudo_gradient = jax.tree.map(jnp.negative, aggregate)
        updates, opt_state = server_optimizer.update(pseudo_gradient, state.opt_state, state.shared)
        return state._replace(shared=optax.apply_updates(state.shared, updates), opt_state=opt_state)

    return Algorithm(
        init=init,
        init_private=model.init_private,
        client_update=client_update,
        num_steps=lambda client: local.num_batches(client, batch_size),
        server_update=server_update,
    )

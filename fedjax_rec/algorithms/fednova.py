"""FedNova: every client's update counts as one direction, however many local steps it took.

Client i takes tau_i local SGD steps of size eta from the server's x to x_i and sends its mean gradient

    d_i = (x - x_i) / (eta ||a_i||_1),   a_i = [1, ..., 1],   ||a_i||_1 = tau_i;

the server takes one step that is as long as FedAvg's, in the direction of the true objective sum_i p_i F_i:

    x <- x - tau_eff sum_i p_i eta d_i,   tau_eff = sum_i p_i tau_i.

FedAvg weighs client i by p_i tau_i instead, and so stops at the optimum of another objective.

Wang et al., 2020, "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization" (NeurIPS).

Differs from the paper: p_i is 1 or min(n_i, b) / b over the expected cohort size instead of n_i / n; clients take plain
SGD steps on shared parameters (no momentum or proximal term, whose a_i would differ); tau_eff may be a public number.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated import local
from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.federated.transforms import scale_update
from fedjax_rec.models.base import Model, Shared

NO_PUBLIC_STEPS = "A client's number of local steps has no public bound, and each client sends it. Set effective_steps."


class Normalized(NamedTuple):
    """What a client sends if tau_eff is the cohort's.

    Attributes:
      weight: float32 scalar in proportion to p_i, 0 without data.
      steps: weight * tau_i.
      direction: `Shared`, -weight * eta d_i.
    """

    weight: Any
    steps: Any
    direction: Any


def fednova(
    model: Model,
    *,
    lr: float,
    private_optimizer: optax.GradientTransformation | None = None,
    server_optimizer: optax.GradientTransformation | None = None,
    local_epochs: int = 1,
    batch_size: int | None = None,
    negatives: Negatives | None = None,
    effective_steps: float | None = None,
    max_examples: int | None = None,
) -> Algorithm:
    """Normalised averaging.

    Args:
      model: a recommender.
      lr: eta, of SGD on the shared parameters.
      private_optimizer: for the private parameters; ``optax.sgd(lr)`` by default.
      server_optimizer: applied to minus the scaled mean direction; ``optax.sgd(1.0)``, the paper's, by default.
      local_epochs: passes over the client's examples; tau_i is epochs times batches.
      batch_size: interactions a step. None makes every tau_i equal: that is FedAvg.
      negatives: how to draw negatives; None trains on the given labels alone.
      effective_steps: tau_eff as a public constant; the sensitivity is then that of the normalised updates. None takes
        the cohort's own: each client also sends its weight and tau_i, which has no public bound, so DP is refused.
      max_examples: public bound b; p_i is then in proportion to min(n_i, b), and otherwise the same for all.

    Raises:
      ValueError: for a learning rate, a number of steps, of examples or of epochs that is not positive.
    """
    public = {"lr": lr, "effective_steps": effective_steps, "max_examples": max_examples, "local_epochs": local_epochs}
    for name, value in public.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite; got {value}.")
    client_optimizer = optax.partition(
        {"shared": optax.sgd(lr), "private": optax.sgd(lr) if private_optimizer is None else private_optimizer},
        {"rows": "shared", "dense": "shared", "private": "private"},
    )
    server_optimizer = optax.sgd(1.0) if server_optimizer is None else server_optimizer

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
        )
        num = client.length.astype(jnp.float32)
        bound = 1.0 if max_examples is None else max_examples
        weight = jnp.minimum(num, bound) / bound  # without a bound 1, and 0 for a client without data
        # Of this client, and not num_steps, which is the chunk's.
        steps = local_epochs * local.num_batches(client, batch_size).astype(jnp.float32)
        # A client without data has taken no step and moved nowhere.
        update = scale_update(Shared(trained.rows, trained.dense), weight / jnp.maximum(steps, 1.0))
        if effective_steps is None:
            update = Normalized(weight, weight * steps, update)
        return ClientOutput(update, trained.private, {"loss": trained.loss})

    def server_update(state, aggregate):
        direction, steps = aggregate, effective_steps
        if effective_steps is None:
            empty = aggregate.weight == 0  # a cohort without data: no direction either
            direction, steps = aggregate.direction, aggregate.steps / jnp.where(empty, 1.0, aggregate.weight)
        pseudo_gradient = jax.tree.map(lambda x: -steps * x, direction)
        updates, opt_state = server_optimizer.update(pseudo_gradient, state.opt_state, state.shared)
        return state._replace(shared=optax.apply_updates(state.shared, updates), opt_state=opt_state)

    return Algorithm(
        init=init,
        init_private=model.init_private,
        client_update=client_update,
        num_steps=lambda client: local.num_batches(client, batch_size),
        server_update=server_update,
        no_dp=NO_PUBLIC_STEPS if effective_steps is None else "",
    )

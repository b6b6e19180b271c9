"""FedAvg and FedSGD with any server optimizer.

Each client k of the cohort starts from the server's parameters w, takes local steps on its own loss F_k to w_k, and
sends w_k - w. The server takes the mean over the expected cohort as a pseudo-gradient:

    w <- server_optimizer(w, -(1/m) sum_k (w_k - w))

McMahan et al., 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data"; server optimizers
after Reddi et al., 2021, "Adaptive Federated Optimization" (FedAdam, FedYogi, FedAvgM).

Differs from the paper: private parameters (user vectors) stay on the client; the sum is divided by the expected
cohort size and not by the realised number of examples, which would not be public.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from fedjax_rec.data.clients import ClientData
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated import local
from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.federated.transforms import scale_update
from fedjax_rec.models.base import Model, Shared

NO_PUBLIC_WEIGHTS = (
    "Weights by number of examples have no public bound, so the divisor would reveal data. Set max_examples, or weigh "
    "uniformly."
)


def fedavg(
    model: Model,
    *,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    local_epochs: int = 1,
    batch_size: int | None = None,
    negatives: Negatives | None = None,
    phases: Sequence[Sequence[str]] = local.ONE_PHASE,
    weigh_by_examples: bool = False,
    max_examples: int | None = None,
    mean_examples: float | None = None,
) -> Algorithm:
    """Federated averaging.

    Args:
      model: a recommender.
      client_optimizer: stateless on item rows; ``optax.sgd``.
      server_optimizer: applied to minus the mean update; ``optax.sgd(1.0)``, plain averaging, by default.
      local_epochs: passes over the client's examples of the round.
      batch_size: interactions a step (negatives come on top); None takes the client's whole data in one step.
      negatives: how to draw negatives; None trains on the given labels alone.
      phases: what moves in which step of a batch, see `local.train`; by default everything in one.
      weigh_by_examples: weight n_k instead of 1 for a client with n_k interactions.
      max_examples: public bound b; the weight is then min(n_k, b) / b, which DP allows.
      mean_examples: without a bound the weight is n_k / mean_examples, which DP refuses.

    Raises:
      ValueError: for a client optimizer that keeps state for rows, or weights without a scale.
    """
    local.check_client_optimizer(client_optimizer, model, phases)
    if weigh_by_examples and max_examples is None and mean_examples is None:
        raise ValueError("Weighting by examples needs max_examples (a public bound) or mean_examples (not for DP).")
    if local_epochs < 1:
        raise ValueError(f"local_epochs must be at least 1; got {local_epochs}.")
    server_optimizer = optax.sgd(1.0) if server_optimizer is None else server_optimizer

    def init(key):
        shared = model.init_shared(key)
        return ServerState(jnp.zeros((), jnp.int32), shared, server_optimizer.init(shared))

    def client_update(shared, private, client, num_steps, key):
        draw_key, train_key = jax.random.split(key)
        epoch = local.draw_epoch(client, negatives, batch_size, draw_key)
        trained = local.train(
            model,
            client_optimizer,
            shared,
            private,
            epoch,
            num_steps=num_steps,
            num_epochs=local_epochs,
            key=train_key,
            phases=phases,
        )
        update = Shared(trained.rows, trained.dense)
        if weigh_by_examples:
            num = client.length.astype(jnp.float32)
            weight = num / mean_examples if max_examples is None else jnp.minimum(num, max_examples) / max_examples
            update = scale_update(update, weight)
        return ClientOutput(update, trained.private, {"loss": trained.loss})

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
        no_dp=NO_PUBLIC_WEIGHTS if weigh_by_examples and max_examples is None else "",
    )


def fedsgd(
    model: Model,
    *,
    server_optimizer: optax.GradientTransformation,
    negatives: Negatives | None = None,
    private_optimizer: optax.GradientTransformation | None = None,
) -> Algorithm:
    """One full-batch gradient a round: FedAvg with a single local step of size one.

    Args:
      model: a recommender.
      server_optimizer: applied to the mean gradient over the expected cohort.
      negatives: how to draw negatives.
      private_optimizer: for the private parameters; ``optax.sgd(1.0)`` by default.
    """
    optimizer = optax.sgd(1.0)
    if private_optimizer is not None:
        optimizer = optax.partition(
            {"shared": optax.sgd(1.0), "private": private_optimizer},
            {"rows": "shared", "dense": "shared", "private": "private"},
        )
    return fedavg(model, client_optimizer=optimizer, server_optimizer=server_optimizer, negatives=negatives)


def mean_interactions(clients: ClientData) -> float:
    """Mean interactions a client, the usual scale of FedAvg's weights; computed from data, so not for DP."""
    return clients.num_interactions / clients.num_clients

"""Ditto: each client keeps a whole model of its own, pulled towards the one that all share.

The shared w is trained as by FedAvg. Beside it each client k solves, for its personal v_k,

    min_{v_k}  h_k(v_k; w*) = F_k(v_k) + (lambda/2) ||v_k - w*||^2,    w* = argmin_w G(F_1(w), ..., F_K(w)),

so that lambda = 0 is training alone and lambda = infinity is the shared model. In each round a client takes steps on
h_k with w held at what it received, w^t, on the batches that also train its copy of w. It sends the update of w and
nothing of v_k, and is scored with v_k (see `ditto_score`).

Li et al., 2021, "Ditto: Fair and Robust Federated Learning Through Personalization" (ICML).

A client's model is w and its private parameters together (in matrix factorisation: item vectors, biases, and the user's
vector). v_k is a copy of all of it, and all of it is pulled. It starts as what the client receives in its first round;
a client without data has none, and is scored with w.
Rows that a client never touches have no gradient: they follow the shared ones with a lag.

Memory: the tables of all v_k take ``num_clients * num_items * dim * 4`` bytes, in float32.

Differs from the paper: the pull is split from the gradient. In place of T steps v <- v - eta (grad F_k(v) + lambda
(v - w^t)), T steps follow the gradient alone, and then v <- w^t + (v - w^t) / (1 + eta lambda)^T. Both agree to first
order in eta lambda, and this is stable at any lambda, where the paper's needs eta lambda < 2 (learning rates of item
rows are in the tens here). Rows outside a batch would otherwise have to be pulled in each of its steps. Sums are
divided by the expected cohort size.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated import local
from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.federated.private_tables import MAX_PRIVATE_BYTES, add_to_tables, check_private_bytes
from fedjax_rec.models.base import Model, Shared


def ditto_score(model: Model) -> Callable[[Shared, Any], jax.Array]:
    """``(Shared, private) -> float32 [num_items]`` of a client of `ditto`: by v_k, or by w before its first steps."""

    def score(shared, private):
        return model.score(*_personal(shared, private))

    return score


def _personal(shared: Shared, private: Any) -> tuple[Shared, Any]:
    """v_k as a model's shared and private parameters; a client without one takes what it receives."""
    received = (shared, private["own"])
    return jax.tree.map(lambda w, v: jnp.where(private["started"], v, w), received, private["personal"])


def ditto(
    model: Model,
    *,
    num_clients: int,
    pull: float,
    lr: float = 10.0,
    item_lr: float = 10.0,
    dense_lr: float = 0.3,
    server_optimizer: optax.GradientTransformation | None = None,
    local_epochs: int = 1,
    batch_size: int | None = 51,
    negatives: Negatives | None = None,
    max_private_bytes: int = MAX_PRIVATE_BYTES,
) -> Algorithm:
    """Ditto with plain gradient steps for w and for v_k, at the same learning rates.

    Args:
      model: a recommender, with or without private parameters.
      num_clients: clients in the population, for the refusal below.
      pull: lambda, >= 0, against the mean loss of a batch; each parameter feels its learning rate times lambda a step.
      lr: of private parameters (user vectors).
      item_lr: of item rows.
      dense_lr: of dense parameters.
      server_optimizer: applied to minus the mean update of w; ``optax.sgd(1.0)``, plain averaging, by default. Few
        clients touch a row, so a larger step on tables is usual; see `fedncf`.
      local_epochs: passes over the client's examples of a round.
      batch_size: interactions a step; None takes the client's whole data.
      negatives: four, uniform, by default.
      max_private_bytes: most bytes for the personal tables of all clients together.

    Raises:
      ValueError: if the personal tables would take more than ``max_private_bytes``, for a negative pull, or no epochs.
    """
    shapes = jax.eval_shape(model.init_shared, jax.random.key(0))
    check_private_bytes(num_clients, shapes.tables, max_private_bytes)
    if not pull >= 0:
        raise ValueError(f"pull (lambda) must not be negative; got {pull}.")
    if local_epochs < 1:
        raise ValueError(f"local_epochs must be at least 1; got {local_epochs}.")
    negatives = Negatives(4) if negatives is None else negatives
    server_optimizer = optax.sgd(1.0) if server_optimizer is None else server_optimizer
    rates = {"rows": item_lr, "dense": dense_lr, "private": lr}
    optimizer = optax.partition({name: optax.sgd(rate) for name, rate in rates.items()}, {name: name for name in rates})

    def init(key):
        shared = model.init_shared(key)
        return ServerState(jnp.zeros((), jnp.int32), shared, server_optimizer.init(shared))

    def init_private(key):
        own = model.init_private(key)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes, own))
        return {"own": own, "personal": nothing, "started": jnp.zeros((), bool)}

    def client_update(shared, private, client, num_steps, key):
        draw_key, train_key = jax.random.split(key)
        epoch = local.draw_epoch(client, negatives, batch_size, draw_key)

        def trained_from(received, own):
            steps = {"num_steps": num_steps, "num_epochs": local_epochs, "key": train_key}
            return local.train(model, optimizer, received, own, epoch, **steps)

        trained = trained_from(shared, private["own"])
        before, before_own = _personal(shared, private)
        mine = trained_from(before, before_own)
        after = Shared(add_to_tables(before.tables, mine.rows), optax.apply_updates(before.dense, mine.dense))
        own_steps = local_epochs * local.num_batches(client, batch_size)

        def pulled(group, towards, params):
            left = (1.0 / (1.0 + rates[group] * pull)) ** own_steps
            return jax.tree.map(lambda w, v: w + left * (v - w), towards, params)

        personal = Shared(pulled("rows", shared.tables, after.tables), pulled("dense", shared.dense, after.dense))
        personal_own = pulled("private", private["own"], mine.private)
        private = {
            "own": trained.private,
            "personal": (personal, personal_own),
            "started": private["started"] | (client.length > 0),
        }
        metrics = {"loss": trained.loss, "personal_loss": mine.loss}
        return ClientOutput(Shared(trained.rows, trained.dense), private, metrics)

    def server_update(state, aggregate):
        pseudo_gradient = jax.tree.map(jnp.negative, aggregate)
        updates, opt_state = server_optimizer.update(pseudo_gradient, state.opt_state, state.shared)
        return state._replace(shared=optax.apply_updates(state.shared, updates), opt_state=opt_state)

    return Algorithm(
        init=init,
        init_private=init_private,
        client_update=client_update,
        num_steps=lambda client: local.num_batches(client, batch_size),
        server_update=server_update,
    )

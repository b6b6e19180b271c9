"""APFL: each client scores with a mixture of the shared model and one of its own, and learns how much of each.

The shared w is trained as by FedAvg. Client k keeps a personal model v_k and a weight alpha_k in [0, 1], and minimises

    F_k(vbar_k),    vbar_k = alpha_k v_k + (1 - alpha_k) w.

In each batch of a round, from the same examples and at the same time,

    w_k     <- w_k - eta grad F_k(w_k)
    v_k     <- v_k - eta grad_v F_k(vbar_k)                          = v_k - eta alpha_k grad F_k(vbar_k)
    alpha_k <- alpha_k - eta_alpha <v_k - w_k, grad F_k(vbar_k)>     clipped to [0, 1]

with w_k its copy of w. It sends the update of w_k and nothing of v_k or alpha_k, and is scored with vbar_k (see
`apfl_score`). alpha = 0 is FedAvg, alpha = 1 is training alone.

Deng et al., 2020, "Adaptive Personalized Federated Learning" (arXiv 2003.13461).

A client's model is w and its private parameters together (in matrix factorisation: item vectors, biases, and the user's
vector), and all of it is mixed. v_k starts as what the client receives in its first round; its rows that the client
never touches stay that way. A client without data has none, and is scored with w.

Memory: the tables of all v_k take ``num_clients * num_items * dim * 4`` bytes, in float32.

Differs from the paper: alpha_k takes a step with each batch, where the authors' code takes one a round; it has a
learning rate of its own; sums are divided by the expected cohort size.
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
from fedjax_rec.models.base import Model, Shared, View

PERSONAL = "personal "  # prefix of v_k's tables where they stand beside w's, on the client only


def apfl_score(model: Model) -> Callable[[Shared, Any], jax.Array]:
    """``(Shared, private) -> float32 [num_items]`` of a client of `apfl`, by vbar_k."""

    def score(shared, private):
        received = (shared, private["own"])
        return model.score(*_mixed(private["alpha"], received, _personal(shared, private)))

    return score


def _personal(shared: Shared, private: Any) -> tuple[Shared, Any]:
    """v_k as a model's shared and private parameters; a client without one takes what it receives."""
    received = (shared, private["own"])
    return jax.tree.map(lambda w, v: jnp.where(private["started"], v, w), received, private["personal"])


def _mixed(alpha: jax.Array, received: Any, personal: Any) -> Any:
    return jax.tree.map(lambda w, v: alpha * v + (1 - alpha) * w, received, personal)


def _within_unit_interval() -> optax.GradientTransformation:
    """Cuts an update so that the parameter stays in [0, 1]."""

    def update(updates, state, params):
        return jax.tree.map(lambda u, x: jnp.clip(x + u, 0.0, 1.0) - x, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def apfl(
    model: Model,
    *,
    num_clients: int,
    alpha: float = 0.5,
    alpha_lr: float = 0.1,
    lr: float = 10.0,
    item_lr: float = 10.0,
    dense_lr: float = 0.3,
    server_optimizer: optax.GradientTransformation | None = None,
    local_epochs: int = 1,
    batch_size: int | None = 51,
    negatives: Negatives | None = None,
    max_private_bytes: int = MAX_PRIVATE_BYTES,
) -> Algorithm:
    """APFL with plain gradient steps.

    Args:
      model: a recommender, with or without private parameters.
      num_clients: clients in the population, for the refusal below.
      alpha: every client's initial weight of its own model, in [0, 1].
      alpha_lr: learning rate of alpha; 0 keeps it fixed.
      lr: of private parameters (user vectors), w's and v_k's.
      item_lr: of item rows.
      dense_lr: of dense parameters.
      server_optimizer: applied to minus the mean update of w; ``optax.sgd(1.0)``, plain averaging, by default. Few
        clients touch a row, so a larger step on tables is usual; see `fedncf`.
      local_epochs: passes over the client's examples of a round.
      batch_size: interactions a step; None takes the client's whole data.
      negatives: four, uniform, by default.
      max_private_bytes: most bytes for the personal tables of all clients together.

    Raises:
      ValueError: if the personal tables would take more than ``max_private_bytes``, for an alpha outside [0, 1], or no
        epochs.
    """
    shapes = jax.eval_shape(model.init_shared, jax.random.key(0))
    check_private_bytes(num_clients, shapes.tables, max_private_bytes)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie between 0 and 1; got {alpha}.")
    if local_epochs < 1:
        raise ValueError(f"local_epochs must be at least 1; got {local_epochs}.")
    negatives = Negatives(4) if negatives is None else negatives
    server_optimizer = optax.sgd(1.0) if server_optimizer is None else server_optimizer
    steps = {"rows": optax.sgd(item_lr), "dense": optax.sgd(dense_lr), "private": optax.sgd(lr)}
    steps["alpha"] = optax.chain(optax.sgd(alpha_lr), _within_unit_interval())
    private_steps = {"own": "private", "dense": "dense", "personal": "private", "alpha": "alpha"}
    optimizer = optax.partition(steps, {"rows": "rows", "dense": "dense", "private": private_steps})

    def both_losses(view: View, private, examples, key):
        """F_k(w_k) + F_k(vbar_k): w_k is moved by the first term, v_k and alpha_k by the second."""
        own = private["own"]
        received = (View({name: view.rows[name] for name in shapes.tables}, view.dense), own)
        personal_rows = {name: view.rows[PERSONAL + name] for name in shapes.tables}
        personal = (View(personal_rows, private["dense"]), private["personal"])
        mixture = _mixed(private["alpha"], jax.lax.stop_gradient(received), personal)
        return model.loss(*received, examples, key) + model.loss(*mixture, examples, key)

    def init(key):
        shared = model.init_shared(key)
        return ServerState(jnp.zeros((), jnp.int32), shared, server_optimizer.init(shared))

    def init_private(key):
        own = model.init_private(key)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes, own))
        return {
            "own": own,
            "personal": nothing,
            "alpha": jnp.full((), alpha, jnp.float32),
            "started": jnp.zeros((), bool),
        }

    def client_update(shared, private, client, num_steps, key):
        draw_key, train_key = jax.random.split(key)
        personal, personal_own = _personal(shared, private)
        named = {PERSONAL + name: table for name, table in personal.tables.items()}
        trained = local.train(
            model._replace(loss=both_losses),
            optimizer,
            Shared(shared.tables | named, shared.dense),
            {"own": private["own"], "dense": personal.dense, "personal": personal_own, "alpha": private["alpha"]},
            local.draw_epoch(client, negatives, batch_size, draw_key),
            num_steps=num_steps,
            num_epochs=local_epochs,
            key=train_key,
        )
        rows, mine = trained.rows, trained.private
        tables = add_to_tables(personal.tables, {name: rows[PERSONAL + name] for name in shared.tables})
        update = Shared({name: rows[name] for name in shared.tables}, trained.dense)
        private = {
            "own": mine["own"],
            "personal": (Shared(tables, mine["dense"]), mine["personal"]),
            "alpha": mine["alpha"],
            "started": private["started"] | (client.length > 0),
        }
        # Half of the sum, so that it compares with other methods' mean loss.
        return ClientOutput(update, private, {"loss": trained.loss / 2, "alpha": mine["alpha"]})

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

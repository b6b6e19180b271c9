"""Prediction exchange: clients and server send each other scores on public slates of items, and no parameter.

In round t, with two public slates A_t and B_t of m items each, every client k of the cohort

 1. receives the server's scores of the items in A_t for it, and trains its private model f_k on its own interactions
    and then on those scores as soft labels,
        min over f_k of  L_k(f_k; own data and drawn negatives),    then    sum_{i in A_t} BCE(f_k(i), s_k(i));
 2. sends its model's scores on B_t, sigmoid(f_k(i)): what it touched is not to be seen from which items it scores.

The server fits a factorisation of its own, which nobody else ever sees, to the stack of scores by some optimizer steps
on

    mean_{k present, i in B_t} BCE(p_k . q_i + b_i, sigmoid(f_k(i))) + (l2 / 2m) (|p|^2 + |q|^2),

and scores A_{t+1} for every client. PTF-FedRec of Yuan et al., 2024, "Hide Your Model: A Parameter Transmission-free
Federated Recommender System".

The scores are themselves private data: the server knows each client's, so central DP and secure sums are refused.
Traffic is m numbers a client each way and a few beside them, whatever the models' sizes; slates follow from public
randomness. What a client receives is counted as its own row of the server's table of scores.

Memory: ``num_clients * num_items * dim * 4`` bytes for the clients' private tables, in float32.

Differs from the paper: there a client scores the items that it touched and some that it did not, and perturbs that
choice and the scores, and the server picks confident and hard items for its answer; here both slates are public draws,
alike for all clients. The server's model is a factorisation, where the paper has graph networks too.
"""

import jax
import jax.numpy as jnp
import optax

from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated import local
from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.federated.private_tables import MAX_PRIVATE_BYTES, add_to_tables, check_private_bytes
from fedjax_rec.federated.rows import Rows
from fedjax_rec.models.base import Examples, Model, Shared

ASKED, ANSWERED = 0, 1  # slates that clients score, and that the server scores


def prediction_exchange(
    model: Model,
    *,
    num_clients: int,
    num_items: int,
    slate_size: int,
    lr: float = 0.1,
    item_lr: float = 10.0,
    batch_size: int | None = None,
    local_epochs: int = 1,
    distill_epochs: int = 1,
    negatives: Negatives | None = None,
    server_dim: int = 16,
    server_optimizer: optax.GradientTransformation | None = None,
    server_steps: int = 10,
    server_l2: float = 0.01,
    slate_seed: int = 0,
    max_private_bytes: int = MAX_PRIVATE_BYTES,
) -> Algorithm:
    """Prediction exchange. Score with `local_only.local_score`: clients answer with models of their own.

    Args:
      model: the clients', with a logistic loss, such as `matrix_factorization`. What it shares elsewhere is private.
      num_clients: clients in the population.
      num_items: catalogue size.
      slate_size: m, items scored in a round each way, at most ``num_items``.
      lr: a client's learning rate of its vectors and layers.
      item_lr: a client's learning rate of its item table; a mean over examples makes the gradient of a row small.
      batch_size: interactions a step; None takes the client's whole data.
      local_epochs: passes over a client's own examples in a round.
      distill_epochs: steps on the server's scores in a round, of full slates.
      negatives: four, uniform, by default.
      server_dim: length of the server's vectors p and q.
      server_optimizer: of the server's model; ``optax.adam(0.02)`` by default.
      server_steps: its steps in a round, on all received scores at once.
      server_l2: weight l2 of the server's squared norms.
      slate_seed: of the public draws of slates.
      max_private_bytes: most bytes for the clients' private tables together.

    Raises:
      ValueError: for a slate that is empty or larger than the catalogue, steps or epochs below 1, or private tables
        that would take more than ``max_private_bytes``.
    """
    if not 1 <= slate_size <= num_items:
        raise ValueError(f"slate_size must be between 1 and num_items={num_items}; got {slate_size}.")
    if min(local_epochs, distill_epochs, server_steps) < 1:
        raise ValueError(
            f"local_epochs, distill_epochs and server_steps must be at least 1; got {local_epochs}, {distill_epochs} "
            f"and {server_steps}."
        )
    check_private_bytes(num_clients, jax.eval_shape(model.init_shared, jax.random.key(0)).tables, max_private_bytes)
    negatives = Negatives(4) if negatives is None else negatives
    server_optimizer = optax.adam(0.02) if server_optimizer is None else server_optimizer
    optimizer = optax.partition(
        {"own": optax.sgd(lr), "table": optax.sgd(item_lr)}, {"rows": "table", "dense": "own", "private": "own"}
    )

    def slate(kind: int, round_index: jax.Array) -> jax.Array:
        """int32 ``[m]``, distinct items: public, and the same for all."""
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(slate_seed), kind), round_index.astype(jnp.int32))
        return jax.random.permutation(key, num_items)[:slate_size]

    def init(key):
        user_key, item_key = jax.random.split(key)
        own = {
            "user": 0.1 * jax.random.normal(user_key, (num_clients, server_dim)),
            "item": 0.1 * jax.random.normal(item_key, (num_items, server_dim)),
            "bias": jnp.zeros(num_items),
        }
        # Scores of the answered slate on the way down, of the asked one on the way up.
        tables = {"scores": jnp.zeros((num_clients, slate_size)), "present": jnp.zeros((num_clients, 1))}
        shared = Shared(tables, {"round": jnp.zeros(())})
        return ServerState(jnp.zeros((), jnp.int32), shared, (own, server_optimizer.init(own)))

    def init_private(key):
        shared_key, own_key = jax.random.split(key)
        return {"shared": model.init_shared(shared_key), "own": model.init_private(own_key)}

    def train(private, epoch, num_steps, num_epochs, key):
        trained = local.train(
            model,
            optimizer,
            private["shared"],
            private["own"],
            epoch,
            num_steps=num_steps,
            num_epochs=num_epochs,
            key=key,
        )
        tables = add_to_tables(private["shared"].tables, trained.rows)
        dense = optax.apply_updates(private["shared"].dense, trained.dense)
        return {"shared": Shared(tables, dense), "own": trained.private}, trained.loss

    def client_update(shared, private, client, num_steps, key):
        draw_key, own_key, distill_key = jax.random.split(key, 3)
        round_index = shared.dense["round"]
        labels = shared.tables["scores"].at[client.client_id].get(mode="clip")
        epoch = local.draw_epoch(client, negatives, batch_size, draw_key)
        private, loss = train(private, epoch, num_steps, local_epochs, own_key)
        heard = jnp.broadcast_to((round_index > 0).astype(jnp.float32), (slate_size,))  # in the first round, nothing
        answered = Examples(slate(ANSWERED, round_index), labels, heard)
        answered = local.Epoch(jax.tree.map(lambda x: x[None, :, None], answered), None, None)
        private, _ = train(private, answered, jnp.int32(1), distill_epochs, distill_key)
        scores = jax.nn.sigmoid(model.score(private["shared"], private["own"]))[slate(ASKED, round_index)]
        ids = client.client_id[None]
        sent = {
            "scores": Rows(ids, scores[None], num_clients),
            "present": Rows(ids, jnp.ones((1, 1)), num_clients),
        }
        return ClientOutput(Shared(sent, {"round": jnp.zeros(())}), private, {"loss": loss})

    def server_loss(own, asked, labels, present):
        scores = jnp.matmul(own["user"], own["item"][asked].T, precision="highest") + own["bias"][asked][None, :]
        losses = (jnp.logaddexp(0.0, scores) - labels * scores).mean(1)
        norms = (jnp.square(own["user"]).sum() + jnp.square(own["item"]).sum()) / slate_size
        return jnp.where(present, losses, 0.0).sum() / jnp.maximum(present.sum(), 1) + 0.5 * server_l2 * norms

    def server_update(state, aggregate):
        sent = aggregate.tables["present"]
        present = sent[:, 0] > 0
        labels = aggregate.tables["scores"] / jnp.where(sent > 0, sent, 1.0)
        round_index = state.shared.dense["round"]
        asked = slate(ASKED, round_index)

        def step(_, carry):
            own, opt_state = carry
            updates, opt_state = server_optimizer.update(
                jax.grad(server_loss)(own, asked, labels, present), opt_state, own
            )
            # Who has sent nothing stays where it is, whatever an optimizer remembers.
            updates["user"] = jnp.where(present[:, None], updates["user"], 0.0)
            return optax.apply_updates(own, updates), opt_state

        own, opt_state = jax.lax.fori_loop(0, server_steps, step, state.opt_state)
        answered = slate(ANSWERED, round_index + 1)
        scores = jnp.matmul(own["user"], own["item"][answered].T, precision="highest") + own["bias"][answered][None, :]
        tables = {"scores": jax.nn.sigmoid(scores), "present": present[:, None].astype(jnp.float32)}
        return state._replace(shared=Shared(tables, {"round": round_index + 1}), opt_state=(own, opt_state))

    return Algorithm(
        init=init,
        init_private=init_private,
        client_update=client_update,
        num_steps=lambda client: local.num_batches(client, batch_size),
        server_update=server_update,
        individual=True,
    )

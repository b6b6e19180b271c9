"""FedSequence: a recommender of the next item, each client with its one history.

    min_w  mean_u  loss(w; history of u)

for the loss of any `SequenceModel` (SASRec, BERT4Rec, HSTU). In a round a client takes ``local_steps`` of gradient
descent on its own history, draws its own dropout, masks and negatives in each, and sends trained minus received
parameters; the server takes the mean for a gradient with its sign turned. The model is of Kang and McAuley, 2018,
"Self-Attentive Sequential Recommendation", or another; the averaging of McMahan et al., 2017, "Communication-Efficient
Learning of Deep Networks from Decentralized Data".

With one local step and everybody in each round this is centralised gradient descent. A client's loss is the mean over
its targets, so a long history weighs as much as a short one, and under a clip every user has the same bound.

What is shared is what the model's ``init`` gives: of a model with adapters (`with_lora`) only these, and what they are
added to is public and never sent in a round. A softmax over the catalogue touches every item; then an update holds
whole tables, and a chunk of c clients takes c x items x dim numbers for each.
"""

import jax
import jax.numpy as jnp
import optax

from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.federated.rows import Rows
from fedjax_rec.models.base import Shared
from fedjax_rec.models.sequence import SequenceModel


def fedsequence(
    model: SequenceModel,
    *,
    local_steps: int = 1,
    client_lr: float = 1.0,
    server_optimizer: optax.GradientTransformation | None = None,
) -> Algorithm:
    """Federated training of a sequence recommender.

    Private: "query" ``[dim]``, what the client's history asks for under the parameters that it received last, which
    training never reads; `fedsequence_score` ranks with it.

    Args:
      model: of the next item.
      local_steps: of gradient descent on the client.
      client_lr: their learning rate; with one step it only scales the update, which a clip norm is in units of.
      server_optimizer: ``optax.adam(1e-3, b2=0.98)`` by default, that of Kang and McAuley.

    Raises:
      ValueError: for numbers out of range.
    """
    if local_steps < 1 or not client_lr > 0:
        raise ValueError(
            f"local_steps must be at least 1 and client_lr positive; got local_steps={local_steps}, "
            f"client_lr={client_lr}."
        )
    server_optimizer = optax.adam(1e-3, b2=0.98) if server_optimizer is None else server_optimizer

    def init(key):
        shared = model.init(key)
        return ServerState(jnp.zeros((), jnp.int32), shared, server_optimizer.init(shared))

    def client_update(shared, private, client, num_steps, key):
        del private, num_steps

        def step(params, index):
            loss, gradient = jax.value_and_grad(model.loss)(params, client.item_ids, jax.random.fold_in(key, index))
            return jax.tree.map(lambda w, g: w - client_lr * g, params, gradient), loss

        params, losses = jax.lax.scan(step, shared, jnp.arange(local_steps))
        update = jax.tree.map(jnp.subtract, params, shared)
        private = {"query": model.query(shared, client.item_ids, None)}
        return ClientOutput(Shared(whole_tables(update.tables), update.dense), private, {"loss": losses[0]})

    def server_update(state, aggregate):
        gradient = jax.tree.map(jnp.negative, aggregate)
        change, opt_state = server_optimizer.update(gradient, state.opt_state, state.shared)
        return state._replace(shared=optax.apply_updates(state.shared, change), opt_state=opt_state)

    return Algorithm(
        init=init,
        init_private=lambda key: {"query": jnp.zeros(query_size(model))},
        client_update=client_update,
        num_steps=lambda client: jnp.int32(1),
        server_update=server_update,
    )


def whole_tables(changes: dict[str, jax.Array]) -> dict[str, Rows]:
    """Changes of whole tables ``[rows, dim]`` as an update."""
    return {
        name: Rows(jnp.arange(len(change), dtype=jnp.int32), change, len(change), whole=True)
        for name, change in changes.items()
    }


def fedsequence_score(model: SequenceModel):
    """``(shared, private) -> float32 [num_items]``, scores of one client, for `client_scorer`."""
    return lambda shared, private: jnp.matmul(model.catalogue(shared), private["query"], precision="highest")


def query_size(model: SequenceModel) -> int:
    """Length of a query of the model."""
    return jax.eval_shape(model.catalogue, jax.eval_shape(model.init, jax.random.key(0))).shape[1]

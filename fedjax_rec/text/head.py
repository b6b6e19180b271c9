"""A linear classifier on frozen vectors, trained by the clients who hold them.

    min_W  mean_u  mean_j  -log softmax(t (W x_uj + b))_{y_uj}

over the rows j of each client u. In a round a client takes ``local_steps`` of gradient descent on its own rows and
sends trained minus received W and b; the server takes their mean for a gradient with its sign turned (McMahan et al.,
2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data"). The encoder behind x is public and
frozen, so a round moves classes x (dim + 1) numbers and nothing of it.

W may start at vectors of the classes' names, which is a classifier before anybody has sent anything. Rows that it gets
right with confidence have next to no gradient, so that a clip of the whole client leaves the budget to the other rows.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.models.base import Shared
from fedjax_rec.models.labelled_vectors import empty


def linear_head(
    init_weights: np.ndarray,
    *,
    num_slots: int,
    inverse_temperature: float = 1.0,
    bias: bool = True,
    local_steps: int = 1,
    client_lr: float = 1.0,
    server_optimizer: optax.GradientTransformation | None = None,
) -> Algorithm:
    """Federated softmax regression. Shared: dense "weights" ``[classes, dim]`` and "bias" ``[classes]``, which starts
    at 0, or no "bias". Private: the client's `LabelledVectors`, which no round changes.

    Args:
      init_weights: public W to start from, float ``[classes, dim]``.
      num_slots: rows that a client has room for.
      inverse_temperature: t, of the scores in the softmax.
      bias: whether there is a b; without one, a clip leaves more to W.
      local_steps: of gradient descent on the client, all its rows in each.
      client_lr: their learning rate; with one step it only scales the update, which a clip norm is in units of.
      server_optimizer: ``optax.sgd(1.0)`` by default, which takes the mean update as it is.

    Raises:
      ValueError: for numbers out of range.
    """
    if local_steps < 1 or not client_lr > 0 or not inverse_temperature > 0:
        raise ValueError(
            "local_steps must be at least 1, client_lr and inverse_temperature positive; got "
            f"local_steps={local_steps}, client_lr={client_lr}, inverse_temperature={inverse_temperature}."
        )
    server_optimizer = optax.sgd(1.0) if server_optimizer is None else server_optimizer
    num_classes, dim = init_weights.shape

    def init(key):
        del key
        dense = {"weights": jnp.array(init_weights, jnp.float32)}
        shared = Shared({}, dense | ({"bias": jnp.zeros(num_classes)} if bias else {}))
        return ServerState(jnp.zeros((), jnp.int32), shared, server_optimizer.init(shared))

    def loss(shared, data):
        logits = inverse_temperature * head_scores(shared, data.vectors)
        real = data.labels >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(real, data.labels, 0))
        return jnp.sum(jnp.where(real, losses, 0.0)) / jnp.maximum(real.sum(), 1)

    def client_update(shared, private, client, num_steps, key):
        del client, num_steps, key

        def step(params, _):
            value, gradient = jax.value_and_grad(loss)(params, private)
            return jax.tree.map(lambda w, g: w - client_lr * g, params, gradient), value

        params, losses = jax.lax.scan(step, shared, length=local_steps)
        return ClientOutput(jax.tree.map(jnp.subtract, params, shared), private, {"loss": losses[0]})

    def server_update(state, aggregate):
        gradient = jax.tree.map(jnp.negative, aggregate)
        change, opt_state = server_optimizer.update(gradient, state.opt_state, state.shared)
        return state._replace(shared=optax.apply_updates(state.shared, change), opt_state=opt_state)

    return Algorithm(
        init=init,
        init_private=lambda key: empty(num_slots, dim),
        client_update=client_update,
        num_steps=lambda client: jnp.int32(1),
        server_update=server_update,
    )


def head_scores(shared: Shared, vectors: jax.Array) -> jax.Array:
    """``W x + b`` for rows ``[n, dim]``: float32 ``[n, classes]``."""
    scores = jnp.matmul(vectors, shared.dense["weights"].T, precision="highest")
    return scores + shared.dense["bias"][None, :] if "bias" in shared.dense else scores

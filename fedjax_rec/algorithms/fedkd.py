"""FedKD: each client keeps a large mentor and shares a small mentee, and the two teach each other.

With the client's losses L_s of the mentee s and L_t of the mentor t, and their distributions y over the next item,

    mentee:  L_s + KL(y_t || y_s) / (L_s + L_t)        mentor:  L_t + KL(y_s || y_t) / (L_s + L_t)

in which each takes the other's distribution, and the divisor, as given: the two trust each other less while they are
bad at the task. A client sends the change of its mentee alone. Wu, Wu, Lyu, Huang and Xie, 2022,
"Communication-efficient federated learning via knowledge distillation".

Here both are sequence recommenders, and the divergence is the mean over the places of the client's history. The chain's
clip and noise are of the mentee's update: all that the server sees of a mentor is what its mentee has learned from it.

Memory: the mentors' tables take ``num_clients * num_items * dim * 4`` bytes, in float32.

Differs from the paper: no loss of hidden states, which needs layers of one width; updates are not compressed here but
by a link of the chain (`low_rank`, or another); a client's whole history is one batch; mentors start untrained; the
divisor is at least `LEAST_LOSS`, or two models that know a history by heart would move each other without bound.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjax_rec.algorithms.fedsequence import whole_tables
from fedjax_rec.distillation.losses import divergence
from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.federated.private_tables import MAX_PRIVATE_BYTES, check_private_bytes
from fedjax_rec.models.base import Shared
from fedjax_rec.models.sequence import SequenceModel, last_items
from fedjax_rec.models.sequence_losses import mean_over

LEAST_LOSS = 0.1  # nats


def fedkd(
    mentor: SequenceModel,
    mentee: SequenceModel,
    *,
    num_clients: int,
    local_steps: int = 1,
    mentor_lr: float = 1.0,
    mentee_lr: float = 1.0,
    temperature: float = 1.0,
    server_optimizer: optax.GradientTransformation | None = None,
    max_private_bytes: int = MAX_PRIVATE_BYTES,
) -> Algorithm:
    """FedKD with plain gradient steps.

    Private: "mentor", its parameters, and "query" ``[mentor's dim]``, what the history asks the mentor for after the
    round; `fedkd_score` ranks with these.

    Args:
      mentor: large; stays with each client. One that gives queries of all places, such as `sasrec`.
      mentee: small, of the same catalogue; likewise.
      num_clients: clients in the population, for the refusal below.
      local_steps: of gradient descent in a round.
      mentor_lr: the mentor's learning rate.
      mentee_lr: the mentee's.
      temperature: of both distributions.
      server_optimizer: applied to minus the mean update; ``optax.adam(1e-3, b2=0.98)`` by default.
      max_private_bytes: most bytes for the mentors' tables of all clients together.

    Raises:
      ValueError: for numbers out of range, different catalogues, a model without queries of all places, or mentors that
        would take more than ``max_private_bytes``.
    """
    if local_steps < 1 or not min(mentor_lr, mentee_lr, temperature) > 0:
        raise ValueError(
            "local_steps must be at least 1, learning rates and temperature positive; got "
            f"{local_steps}, {mentor_lr}, {mentee_lr} and {temperature}."
        )
    if mentor.num_items != mentee.num_items:
        raise ValueError(f"The mentor knows {mentor.num_items} items and the mentee {mentee.num_items}.")
    if mentor.places is None or mentee.places is None:
        raise ValueError("fedkd compares two models at every place: use models that have `places`, such as sasrec.")
    check_private_bytes(num_clients, jax.eval_shape(mentor.init, jax.random.key(0)).tables, max_private_bytes)
    server_optimizer = optax.adam(1e-3, b2=0.98) if server_optimizer is None else server_optimizer
    num_items, max_length = mentor.num_items, min(mentor.max_length, mentee.max_length)

    def init(key):
        shared = mentee.init(key)
        return ServerState(jnp.zeros((), jnp.int32), shared, server_optimizer.init(shared))

    def init_private(key):
        params = mentor.init(key)
        dim = jax.eval_shape(mentor.catalogue, params).shape[1]
        return {"mentor": params, "query": jnp.zeros(dim)}

    def total(both, history, key):
        """The sum of both objectives; each model's gradient is that of its own."""
        large, small = both
        mentor_key, mentee_key = jax.random.split(key)
        own = mentor.loss(large, history, mentor_key), mentee.loss(small, history, mentee_key)
        recent = last_items(history, max_length, num_items)
        told = _scores(mentor, large, recent), _scores(mentee, small, recent)
        apart = jax.vmap(lambda p, q: divergence(p, q, jnp.zeros(num_items), temperature=temperature))
        given = jax.lax.stop_gradient
        real = recent < num_items
        mutual = mean_over(apart(given(told[1]), told[0]), real) + mean_over(apart(given(told[0]), told[1]), real)
        both_losses = given(sum(own))
        # A history without a next item has no loss, and its two models nothing to teach.
        mutual = jnp.where(both_losses > 0, mutual / jnp.maximum(both_losses, LEAST_LOSS), 0.0)
        return sum(own) + mutual, {"mentor_loss": own[0], "loss": own[1]}

    def client_update(shared, private, client, num_steps, key):
        del num_steps

        def step(both, index):
            step_key = jax.random.fold_in(key, index)
            (_, losses), gradients = jax.value_and_grad(total, has_aux=True)(both, client.item_ids, step_key)
            rates = mentor_lr, mentee_lr
            both = tuple(
                jax.tree.map(lambda w, g, rate=rate: w - rate * g, params, gradient)
                for params, gradient, rate in zip(both, gradients, rates, strict=True)
            )
            return both, losses

        (large, small), losses = jax.lax.scan(step, (private["mentor"], shared), jnp.arange(local_steps))
        update = jax.tree.map(jnp.subtract, small, shared)
        private = {"mentor": large, "query": mentor.query(large, client.item_ids, None)}
        first = {name: values[0] for name, values in losses.items()}
        return ClientOutput(Shared(whole_tables(update.tables), update.dense), private, first)

    def server_update(state, aggregate):
        gradient = jax.tree.map(jnp.negative, aggregate)
        change, opt_state = server_optimizer.update(gradient, state.opt_state, state.shared)
        return state._replace(shared=optax.apply_updates(state.shared, change), opt_state=opt_state)

    return Algorithm(
        init=init,
        init_private=init_private,
        client_update=client_update,
        num_steps=lambda client: jnp.int32(1),
        server_update=server_update,
    )


def fedkd_score(mentor: SequenceModel) -> Callable[[Shared, Any], jax.Array]:
    """``(shared, private) -> float32 [num_items]``, what a client's mentor says of its history, for `client_scorer`."""
    return lambda shared, private: jnp.matmul(
        mentor.catalogue(private["mentor"]), private["query"], precision="highest"
    )


def _scores(model: SequenceModel, params: Shared, history: jax.Array) -> jax.Array:
    """After each place, float32 ``[L, num_items]``."""
    return jnp.matmul(model.places(params, history), model.catalogue(params).T, precision="highest")

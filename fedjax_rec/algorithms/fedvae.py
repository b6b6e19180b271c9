"""FedVAE: a variational autoencoder of histories, each client with its one row.

    min_w  mean_u  loss(w; x_u),     loss = -E_q sum_i x_ui log softmax_i(f(z)) + beta KL(q(z | x_u) || p(z))

as of `mult_vae` or `rec_vae`. In a round a client takes ``local_steps`` of gradient descent on the loss of its own row,
draws its own z and its own dropout in each, and sends trained minus received parameters; the server takes the mean for
a gradient with its sign turned. beta rises linearly over the first ``anneal_rounds`` of the server's rounds.

The model is of Liang, Krishnan, Hoffman, Jebara, 2018, "Variational Autoencoders for Collaborative Filtering", the
averaging of McMahan et al., 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data". With one
local step and everybody in each round this is centralised gradient descent on all rows at once.

A softmax over the catalogue touches every item, so an update holds whole tables and not a client's rows: it does not
show by itself what a client touched, and a chunk of c clients takes c x items x width numbers for each table. The tied
variants keep that small, and the noise of a private sum with it.

What the loss of one row gives a long history is proportional to its length; under a clip every user weighs about alike.
"""

import jax
import jax.numpy as jnp
import optax

from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.federated.rows import Rows, add_rows
from fedjax_rec.models.base import Shared
from fedjax_rec.models.mult_vae import Vae, decode


def fedvae(
    vae: Vae,
    *,
    beta: float = 1.0,
    anneal_rounds: int = 0,
    local_steps: int = 1,
    client_lr: float = 1.0,
    server_optimizer: optax.GradientTransformation | None = None,
) -> Algorithm:
    """Federated training of an autoencoder.

    Shared: the autoencoder's parameters (`vae_params`), and dense "beta", the weight of the divergence in the coming
    round. Private: "mean" ``[latent]``, that of q(z | x_u) under the parameters that the client received last, which
    training never reads; `fedvae_score` ranks with it.

    Args:
      vae: from `mult_vae` or `rec_vae`.
      beta: weight of the divergence after annealing.
      anneal_rounds: over which it rises from 0; 0 = none.
      local_steps: of gradient descent on the client.
      client_lr: their learning rate; with one step it only scales the update, which a clip norm is in units of.
      server_optimizer: ``optax.adam(0.01)`` by default.

    Raises:
      ValueError: for numbers out of range.
    """
    if not beta >= 0 or anneal_rounds < 0 or local_steps < 1 or not client_lr > 0:
        raise ValueError(
            "FedVAE needs beta >= 0, anneal_rounds >= 0, local_steps >= 1 and client_lr > 0, and got "
            f"beta={beta}, anneal_rounds={anneal_rounds}, local_steps={local_steps}, client_lr={client_lr}."
        )
    server_optimizer = optax.adam(0.01) if server_optimizer is None else server_optimizer

    def weight(round_index):
        share = jnp.minimum(round_index / anneal_rounds, 1.0) if anneal_rounds else 1.0
        return jnp.float32(beta) * share

    def init(key):
        params = vae.init(key)
        shared = Shared(params.tables, params.dense | {"beta": weight(jnp.zeros(()))})
        return ServerState(jnp.zeros((), jnp.int32), shared, server_optimizer.init(params))

    def client_update(shared, private, client, num_steps, key):
        del private, num_steps
        received, beta_now = vae_params(shared), shared.dense["beta"]
        row = own_row(client)

        def step(params, index):
            step_key = jax.random.fold_in(key, index)
            (_, loss), gradient = jax.value_and_grad(objective, has_aux=True)(params, step_key)
            return jax.tree.map(lambda w, g: w - client_lr * g, params, gradient), loss

        def objective(params, step_key):
            loss = vae.loss(params, received, row, step_key, beta_now)
            return loss.total, loss

        params, losses = jax.lax.scan(step, received, jnp.arange(local_steps))
        update = jax.tree.map(jnp.subtract, params, received)
        ids = jnp.arange(client.num_items, dtype=jnp.int32)
        tables = {name: Rows(ids, change, client.num_items, whole=True) for name, change in update.tables.items()}
        own = {"mean": vae.encode(received, row).mean}
        metrics = {"loss": losses.total[0], "nll": losses.nll[0], "divergence": losses.divergence[0]}
        dense = update.dense | {"beta": jnp.zeros(())}
        return ClientOutput(Shared(tables, dense), own, metrics)

    def server_update(state, aggregate):
        params = vae_params(state.shared)
        gradient = jax.tree.map(jnp.negative, vae_params(aggregate))
        change, opt_state = server_optimizer.update(gradient, state.opt_state, params)
        params = optax.apply_updates(params, change)
        shared = Shared(params.tables, params.dense | {"beta": weight(state.round + 1)})
        return state._replace(shared=shared, opt_state=opt_state)

    return Algorithm(
        init=init,
        init_private=lambda key: {"mean": jnp.zeros(vae.latent)},
        client_update=client_update,
        num_steps=lambda client: jnp.int32(1),
        server_update=server_update,
    )


def fedvae_score(shared: Shared, private) -> jax.Array:
    """f(mu(x_u)) for every item, float32 ``[num_items]``; the whole of x_u is behind it, dropout or not."""
    return decode(shared, private["mean"])


def vae_params(shared: Shared) -> Shared:
    """The autoencoder's parameters of what `fedvae` shares, for `mult_vae_scorer` and the like."""
    return Shared(shared.tables, {name: leaf for name, leaf in shared.dense.items() if name != "beta"})


def own_row(client) -> jax.Array:
    """A client's 0/1 row, float32 ``[num_items]``; repeated items count once."""
    ones = jnp.ones((len(client.item_ids), 1), jnp.float32)
    row = add_rows(jnp.zeros((client.num_items, 1), jnp.float32), client.item_ids, ones)
    return jnp.minimum(row[:, 0], 1.0)

"""Training of variational autoencoders in one place, on everybody's rows: what federated training is compared with.

    min over params of  mean over users of  loss(params, x_u),

by Adam on mini-batches of users. Rows are written out densely on the device, a batch at a time. The weight of the
divergence rises linearly to ``beta`` over the first share of all steps, as in Liang et al., 2018, "Variational
Autoencoders for Collaborative Filtering": at full weight from the start, the posterior stays at the prior.

Nothing here is private. For privacy, `fedvae` trains the same `Vae` in rounds.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.models.base import Shared
from fedjax_rec.models.mult_vae import Vae, mult_vae
from fedjax_rec.models.user_rows import UserRows, dense_rows, user_rows

Report = Callable[[int, int, str], None]
"""``(step, total, text)``: how far training is."""


class VaeState(NamedTuple):
    """Of a training run.

    Attributes:
      step: int32 scalar, optimizer steps done.
      params: the autoencoder's.
      opt_state: the optimizer's.
      received: parameters at the start of the epoch, for priors that are made of them.
    """

    step: jax.Array
    params: Shared
    opt_state: Any
    received: Shared


class VaeTraining(NamedTuple):
    """A compiled training procedure.

    Attributes:
      init: ``key -> VaeState``.
      run_epoch: ``(state, key) -> (state, losses)``; losses are the means over the epoch, ``{"nll", "divergence"}`` in
        nats a user. ``state`` is donated; the step's number is folded into the key.
    """

    init: Callable[[jax.Array], VaeState]
    run_epoch: Callable[[VaeState, jax.Array], tuple[VaeState, dict[str, jax.Array]]]


def train_mult_vae(
    train: Interactions,
    *,
    seed: int,
    num_epochs: int = 60,
    beta: float = 1.0,
    latent: int = 64,
    width: int | None = None,
    tied: bool = True,
    dropout: float = 0.0,
    learning_rate: float = 0.01,
    batch_size: int = 100,
    report: Report | None = None,
) -> Shared:
    """A Mult-VAE recommender, for `mult_vae_scorer`.

    The defaults are a small tied autoencoder with a linear decoder, which is faster than the paper's and, on MovieLens,
    ranks better after as many epochs. The paper's: ``latent=200, width=600, tied=False, dropout=0.5, beta=0.2,
    learning_rate=1e-3``.

    Args:
      train: rows of all users, read as 0/1.
      seed: of the initial parameters, the order of users, dropout and z.
      num_epochs: passes over all users.
      beta: weight of the divergence after annealing; see `mult_vae` for the rest.
      latent: length of z.
      width: columns of the item tables; None = those of z, which the decoder multiplies them by as it is.
      tied: one item table for both ends.
      dropout: chance that the encoder misses an item.
      learning_rate: of Adam.
      batch_size: users a step.
      report: after each epoch.

    Raises:
      ValueError: for settings out of range, or no users.
    """
    shape = {"width": latent if width is None else width, "latent": latent, "tied": tied, "linear": width is None}
    vae = mult_vae(train.num_items, dropout=dropout, **shape)
    settings = {"num_epochs": num_epochs, "beta": beta, "batch_size": batch_size, "learning_rate": learning_rate}
    return train_vae(vae, train, key=jax.random.key(seed), report=report, **settings)


def train_vae(
    vae: Vae,
    train: Interactions,
    *,
    key: jax.Array,
    num_epochs: int,
    beta: float = 1.0,
    annealed_share: float = 0.5,
    batch_size: int = 100,
    learning_rate: float = 1e-3,
    report: Report | None = None,
) -> Shared:
    """Trains for a number of epochs; see `vae_training` for one epoch at a time."""
    training = vae_training(
        vae,
        train,
        num_epochs=num_epochs,
        beta=beta,
        annealed_share=annealed_share,
        batch_size=batch_size,
        learning_rate=learning_rate,
    )
    init_key, run_key = jax.random.split(key)
    state = training.init(init_key)
    for epoch in range(num_epochs):
        state, losses = training.run_epoch(state, run_key)
        if report is not None:
            report(epoch + 1, num_epochs, f"nll {float(losses['nll']):.1f}, KL {float(losses['divergence']):.2f}")
    return state.params


def vae_training(
    vae: Vae,
    train: Interactions,
    *,
    num_epochs: int,
    beta: float = 1.0,
    annealed_share: float = 0.5,
    batch_size: int = 100,
    learning_rate: float = 1e-3,
) -> VaeTraining:
    """Compiles training.

    Args:
      vae: from `mult_vae` or `rec_vae`.
      train: rows of all users; those without any are left out.
      num_epochs: that will run, which the annealing is spread over.
      beta: weight of the divergence after annealing.
      annealed_share: of all steps, over which that weight rises from 0; 0 = none.
      batch_size: users a step, at most all.
      learning_rate: of Adam.

    Raises:
      ValueError: for settings out of range, or no users.
    """
    users = np.flatnonzero(train.counts_per_user).astype(np.int32)
    if not len(users):
        raise ValueError(f"{train.name} has no user with a row; there is nothing to train on.")
    if num_epochs < 1 or batch_size < 1 or not beta >= 0 or not 0 <= annealed_share <= 1:
        raise ValueError(
            "Training needs num_epochs and batch_size of at least 1, beta >= 0 and annealed_share in [0, 1]; got "
            f"num_epochs={num_epochs}, batch_size={batch_size}, beta={beta}, annealed_share={annealed_share}."
        )
    batch_size = min(batch_size, len(users))
    num_steps = -(-len(users) // batch_size)
    anneal_steps = max(annealed_share * num_epochs * num_steps, 1e-9)
    rows, users = jax.device_put((user_rows(train), users))

    def init(key):
        params = vae.init(key)
        # Copies, since the state is donated and no buffer can be given away twice.
        return VaeState(
            jnp.zeros((), jnp.int32), params, optax.adam(learning_rate).init(params), jax.tree.map(jnp.array, params)
        )

    def run_epoch(state, key):
        settings = (beta, 1.0 / anneal_steps, learning_rate)
        return _run_epoch(state, rows, users, key, settings, loss=vae.loss, batch_size=batch_size)

    return VaeTraining(init, run_epoch)


@partial(jax.jit, static_argnames=("loss", "batch_size"), donate_argnums=0)
def _run_epoch(state, rows: UserRows, users, key, settings, *, loss: Callable, batch_size: int):
    beta, per_step, learning_rate = settings
    optimizer = optax.adam(learning_rate)
    num_steps = -(-len(users) // batch_size)
    received = state.params
    order_key, step_key = jax.random.split(jax.random.fold_in(key, state.step))
    order = jax.random.permutation(order_key, users)
    order = jnp.pad(order, (0, num_steps * batch_size - len(users)), constant_values=len(rows.starts))

    def batch_loss(params, batch, keys, weight):
        own = jax.vmap(lambda row, key: loss(params, received, row, key, weight))(
            dense_rows(rows, batch, len(params.tables["item"])), keys
        )
        real = batch < len(rows.starts)
        means = jax.tree.map(lambda x: jnp.where(real, x, 0.0).sum() / jnp.maximum(real.sum(), 1), own)
        return means.total, means

    def one_step(carry, batch):
        step, params, opt_state = carry
        keys = jax.random.split(jax.random.fold_in(step_key, step), batch_size)
        weight = beta * jnp.minimum(step * per_step, 1.0)
        gradient, means = jax.grad(batch_loss, has_aux=True)(params, batch, keys, weight)
        change, opt_state = optimizer.update(gradient, opt_state, params)
        return (step + 1, optax.apply_updates(params, change), opt_state), means

    carry = (state.step, state.params, state.opt_state)
    (step, params, opt_state), means = jax.lax.scan(one_step, carry, order.reshape(num_steps, batch_size))
    losses = {"nll": means.nll.mean(), "divergence": means.divergence.mean()}
    return VaeState(step, params, opt_state, received), losses

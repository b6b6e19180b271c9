"""CFGAN: a generator that completes a user's row, with a discriminator of completed rows, as a recommender.

Chae, Kang, Kim, Lee (2018), "CFGAN: A Generic Collaborative Filtering Framework based on Generative Adversarial
Networks". For a user with 0/1 row c, the generator gives a number in (0, 1) to each item, r = G(c), and the
discriminator sees them on the user's items and on some others only:

    D        min  -log D(c * c, c) - log(1 - D(r * (c + k), c))
    G        min  adversarial_weight  log(1 - D(r * (c + k), c))
                  + sum_i w_i (r_i - c_i)^2,    w_i = zero_weight on the items of z, positive_weight on the user's own

where k are random items that the user did not touch, a share ``mask_share`` of all such items (partial masking), and z
others, a share ``zero_share``, whose numbers are pulled to zero (zero reconstruction). In the paper the user's own
items have no weight: that their numbers should be near one is for the discriminator to say.

Without ``adversarial_weight`` there is nobody to say so. The ablation gives the user's own items a weight instead, and
is then an autoencoder with sampled zeros, nothing more. Every table that shows CFGAN shows it too.

Differs from the paper: Adam for both; the generator minimises -log D, which has the same fixed point and a gradient
where D is sure (Goodfellow et al., 2014, "Generative Adversarial Nets"); users that training never saw are asked with
what they show. Nothing here is private.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.evaluation.scorers import Scorer
from fedjax_rec.models.user_rows import UserRows, dense_rows, user_rows

Net = dict[str, jax.Array]


class CfganParams(NamedTuple):
    """Both nets, each of one hidden layer.

    Attributes:
      generator: "in" ``[items, hidden]``, "in_bias", "out" ``[hidden, items]``, "out_bias".
      discriminator: "row" and "condition" ``[items, hidden]``, "in_bias", "out" ``[hidden]``, "out_bias".
    """

    generator: Net
    discriminator: Net


class CfganLoss(NamedTuple):
    """How the game is weighed; static. See `train_cfgan`."""

    adversarial_weight: float
    positive_weight: float
    zero_weight: float
    zero_share: float
    mask_share: float


def train_cfgan(
    train: Interactions,
    *,
    seed: int,
    adversarial_weight: float = 1.0,
    positive_weight: float | None = None,
    zero_weight: float = 0.1,
    zero_share: float = 0.7,
    mask_share: float = 0.7,
    num_epochs: int = 100,
    batch_size: int = 64,
    hidden_size: int = 256,
    generator_lr: float = 3e-3,
    discriminator_lr: float = 1e-3,
    l2: float = 1e-4,
) -> CfganParams:
    """Trains CFGAN on everybody's rows in one place.

    Args:
      train: rows of all users, read as 0/1.
      seed: of the nets, the order of users and the sampled items.
      adversarial_weight: of the discriminator's word; 0 is the ablation, which trains no discriminator.
      positive_weight: of the user's own items in the reconstruction; None = as in the paper, 0, and 1 in the ablation.
      zero_weight: of the sampled other items; alpha in the paper.
      zero_share: share of a user's other items that are sampled for it.
      mask_share: share of a user's other items that the discriminator sees.
      num_epochs: passes over all users.
      batch_size: users a step.
      hidden_size: of both nets.
      generator_lr: of Adam.
      discriminator_lr: of Adam.
      l2: weight decay of both.

    Raises:
      ValueError: for a share outside [0, 1], a negative weight, nothing to train on, or weights that leave no reason to
        score a user's own items above others.
    """
    if positive_weight is None:
        positive_weight = 1.0 if adversarial_weight == 0 else 0.0
    if not (0 <= zero_share <= 1 and 0 <= mask_share <= 1):
        raise ValueError(f"zero_share and mask_share must lie in [0, 1]; got {zero_share} and {mask_share}.")
    if min(adversarial_weight, positive_weight, zero_weight) < 0:
        raise ValueError(
            f"Weights must not be negative; got adversarial_weight={adversarial_weight}, positive_weight="
            f"{positive_weight} and zero_weight={zero_weight}."
        )
    if adversarial_weight == 0 and positive_weight == 0:
        raise ValueError(
            "With adversarial_weight=0 and positive_weight=0 nothing pulls a user's own items up, and zero everywhere "
            "is the best answer; leave positive_weight out."
        )
    users = np.flatnonzero(train.counts_per_user)
    if not len(users) or num_epochs < 1 or batch_size < 1 or hidden_size < 1:
        raise ValueError(
            f"train_cfgan needs users with rows, and num_epochs, batch_size and hidden_size of at least 1; got "
            f"{len(users)} users, {num_epochs}, {batch_size} and {hidden_size}."
        )
    loss = CfganLoss(adversarial_weight, positive_weight, zero_weight, zero_share, mask_share)
    optimizers = tuple(optax.adamw(lr, weight_decay=l2 / lr) for lr in (generator_lr, discriminator_lr))
    init_key, run_key = jax.random.split(jax.random.key(seed))
    params = init_cfgan(init_key, train.num_items, hidden_size)
    states = tuple(optimizer.init(net) for optimizer, net in zip(optimizers, params, strict=True))
    rows = user_rows(train)
    batch_size = min(batch_size, len(users))
    epoch = jax.jit(partial(_epoch, optimizers=optimizers, loss=loss, num_items=train.num_items))
    rng = np.random.default_rng(seed)
    for index in range(num_epochs):
        # A short last batch would be another shape; who it would hold is in another epoch's.
        order = rng.permutation(users)[: len(users) // batch_size * batch_size].reshape(-1, batch_size)
        params, states = epoch(params, states, rows, jnp.asarray(order), jax.random.fold_in(run_key, index))
    return params


def init_cfgan(key: jax.Array, num_items: int, hidden_size: int) -> CfganParams:
    """Both nets at random."""

    def matrix(key, num_in, num_out):
        limit = np.sqrt(6 / (num_in + num_out))
        return jax.random.uniform(key, (num_in, num_out), minval=-limit, maxval=limit)

    keys = jax.random.split(key, 5)
    generator = {
        "in": matrix(keys[0], num_items, hidden_size),
        "in_bias": jnp.zeros(hidden_size),
        "out": matrix(keys[1], hidden_size, num_items),
        "out_bias": jnp.zeros(num_items),
    }
    discriminator = {
        "row": matrix(keys[2], num_items, hidden_size),
        "condition": matrix(keys[3], num_items, hidden_size),
        "in_bias": jnp.zeros(hidden_size),
        "out": matrix(keys[4], hidden_size, 1)[:, 0],
        "out_bias": jnp.zeros(()),
    }
    return CfganParams(generator, discriminator)


def completed_logits(generator: Net, rows: jax.Array) -> jax.Array:
    """What the generator makes of rows float32 ``[B, items]``, before the sigmoid."""
    hidden = jax.nn.sigmoid(rows @ generator["in"] + generator["in_bias"][None])
    return hidden @ generator["out"] + generator["out_bias"][None]


def real_logits(discriminator: Net, rows: jax.Array, condition: jax.Array) -> jax.Array:
    """How real rows look for these users, before the sigmoid, ``[B]``."""
    inputs = rows @ discriminator["row"] + condition @ discriminator["condition"] + discriminator["in_bias"][None]
    return jax.nn.sigmoid(inputs) @ discriminator["out"] + discriminator["out_bias"]


def reconstruction(completed: jax.Array, rows: jax.Array, zeros: jax.Array, loss: CfganLoss) -> jax.Array:
    """The weighted squared error on the user's own items and on the sampled zeros, a mean over users.

    Args:
      completed: float32 ``[B, items]`` in (0, 1).
      rows: 0/1.
      zeros: bool ``[B, items]``, items sampled for zero reconstruction.
      loss: the weights.
    """
    weights = loss.positive_weight * rows + loss.zero_weight * zeros
    return jnp.mean(jnp.sum(weights * jnp.square(completed - rows), axis=1))


def sampled_items(key: jax.Array, rows: jax.Array, share: float) -> jax.Array:
    """Each item that a user did not touch with probability ``share``, bool ``[B, items]``."""
    return (jax.random.uniform(key, rows.shape) < share) & (rows == 0)


def _epoch(params, states, rows: UserRows, order, key, *, optimizers, loss: CfganLoss, num_items: int) -> Any:
    def step(i, carry):
        params, (generator_state, discriminator_state) = carry
        batch = dense_rows(rows, order[i], num_items)
        zero_key, *mask_keys = jax.random.split(jax.random.fold_in(key, i), 3)
        if loss.adversarial_weight > 0:
            seen = batch + sampled_items(mask_keys[0], batch, loss.mask_share)
            fake = jax.nn.sigmoid(completed_logits(params.generator, batch)) * seen

            def discriminator_loss(net):
                real = jax.nn.softplus(-real_logits(net, batch, batch))
                return jnp.mean(real + jax.nn.softplus(real_logits(net, fake, batch)))

            gradient = jax.grad(discriminator_loss)(params.discriminator)
            change, discriminator_state = optimizers[1].update(gradient, discriminator_state, params.discriminator)
            params = params._replace(discriminator=optax.apply_updates(params.discriminator, change))
        zeros = sampled_items(zero_key, batch, loss.zero_share)
        seen = batch + sampled_items(mask_keys[1], batch, loss.mask_share)

        def generator_loss(net):
            completed = jax.nn.sigmoid(completed_logits(net, batch))
            value = reconstruction(completed, batch, zeros, loss)
            if loss.adversarial_weight > 0:
                looks = real_logits(params.discriminator, completed * seen, batch)
                value += loss.adversarial_weight * jnp.mean(jax.nn.softplus(-looks))
            return value

        gradient = jax.grad(generator_loss)(params.generator)
        change, generator_state = optimizers[0].update(gradient, generator_state, params.generator)
        params = params._replace(generator=optax.apply_updates(params.generator, change))
        return params, (generator_state, discriminator_state)

    return jax.lax.fori_loop(0, len(order), step, (params, states))


def cfgan_scorer(params: CfganParams, history: Interactions) -> Scorer:
    """Scores what the generator makes of the items that a user shows in ``history``."""
    return Scorer(_scores, (params.generator, user_rows(history)))


def _scores(params: tuple[Net, UserRows], user_ids: jax.Array) -> jax.Array:
    generator, rows = params
    with jax.default_matmul_precision("highest"):
        return completed_logits(generator, dense_rows(rows, user_ids, len(generator["in"])))

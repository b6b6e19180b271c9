"""RecVAE: a Mult-VAE with a residual encoder, a linear decoder, a prior that remembers, and a weight per user.

For a user with row x of n items, and the parameters phi_old of the epoch before,

    p(z | x) = 3/20 N(0, I) + 3/4 q_phi_old(z | x) + 1/10 N(0, e^10 I)
    loss = -E_q sum_i x_i log pi_i(z) + gamma n E_q [log q(z | x) - log p(z | x)],     f(z) = out z + bias.

Shenbin, Alekseev, Tutubalina, Malykh, Nikolenko, 2020, "RecVAE: A New Variational Autoencoder for Top-N Recommendations
with Implicit Feedback". The second component holds an encoder near the one that the decoder was trained for; the weight
is per item, so that a short history is regularised as much as it says.

The encoder reads x / |x|, with items dropped in training, through layers that each see the sum of all before them:
h_1 = swish(norm(x W_1 + b_1)), h_j = swish(norm(h_(j-1) W_j + b_j + sum_(i<j) h_i)), then mu and log sigma^2 linearly.

Differs from the paper: fewer and narrower layers by default; encoder and decoder take their steps together, where the
paper alternates three epochs of the encoder with one of the decoder; phi_old is what an epoch, or a federated round,
starts with.

As a generator of histories the encoder is not there: z is drawn from N(0, I), the first component.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.evaluation.scorers import Scorer
from fedjax_rec.models.base import Shared
from fedjax_rec.models.mult_vae import (
    Loss,
    Posterior,
    Vae,
    check_sizes,
    decode,
    draw_latent,
    drop_items,
    init_layers,
    negative_log_likelihood,
    unit,
)
from fedjax_rec.models.user_rows import UserRows, dense_rows, user_rows

COMPONENT_WEIGHTS = (3 / 20, 3 / 4, 1 / 10)  # of the authors' code: standard, old posterior, wide
WIDE_LOG_VARIANCE = 10.0


def rec_vae(
    num_items: int,
    *,
    width: int = 200,
    latent: int = 200,
    num_layers: int = 2,
    gamma: float = 0.005,
    tied: bool = False,
    dropout: float = 0.5,
    init_stddev: float | None = None,
) -> Vae:
    """RecVAE. The ``beta`` of training multiplies gamma n: leave it at 1.

    Args:
      num_items: catalogue size.
      width: columns of the encoder's item table and units of its layers.
      latent: length of z, and columns of the decoder's item table.
      num_layers: of the encoder, the one on items included.
      gamma: weight of the divergence per item of a history; the paper's is 0.005.
      tied: one item table for both ends; then ``width`` must be ``latent``.
      dropout: chance that the encoder misses an item in training, in [0, 1).
      init_stddev: of the item tables' first entries; None = that of Glorot.

    Raises:
      ValueError: for numbers out of range, or tied tables of different widths.
    """
    check_sizes(num_items, width=width, latent=latent, dropout=dropout)
    if num_layers < 1 or not gamma >= 0:
        raise ValueError(f"RecVAE needs num_layers >= 1 and gamma >= 0; got {num_layers} and {gamma}.")
    if tied and width != latent:
        raise ValueError(f"A tied RecVAE has one item table, so width {width} must be latent {latent}.")

    def init(key):
        table_key, out_key, layer_key, last_key = jax.random.split(key, 4)

        def table(key, columns):
            stddev = (2.0 / (num_items + columns)) ** 0.5 if init_stddev is None else init_stddev
            return stddev * jax.random.normal(key, (num_items, columns))

        tables = {"item": table(table_key, width), "bias": jnp.zeros((num_items, 1))}
        if not tied:
            tables["out"] = table(out_key, latent)
        dense = {
            "encoder_bias": jnp.zeros(width),
            "residual": init_layers(layer_key, (width,) * num_layers),
            "norms": [(jnp.ones(width), jnp.zeros(width)) for _ in range(num_layers)],
            "encoder": init_layers(last_key, (width, 2 * latent)),
            "decoder": [],
        }
        return Shared(tables, dense)

    return Vae(init, _RecVaeLoss(gamma, dropout), rec_vae_encode, decode, latent)


class _RecVaeLoss(NamedTuple):
    """A value, so that equal settings share a compilation."""

    gamma: float
    dropout: float

    def __call__(self, params: Shared, received: Shared, row: jax.Array, key: jax.Array, beta: jax.Array) -> Loss:
        drop_key, latent_key = jax.random.split(key)
        posterior = rec_vae_encode(params, drop_items(row, self.dropout, drop_key))
        z = draw_latent(posterior, latent_key)
        old = jax.tree.map(jax.lax.stop_gradient, rec_vae_encode(received, row))
        divergence = log_normal(z, posterior) - log_prior(z, old)
        nll = negative_log_likelihood(decode(params, z), row)
        return Loss(nll + beta * self.gamma * row.sum() * divergence, nll, divergence)


def rec_vae_encode(params: Shared, rows: jax.Array) -> Posterior:
    """q(z | x) for 0/1 (or dropped) rows ``[..., items]``."""
    dense = params.dense
    layers = [(params.tables["item"], dense["encoder_bias"]), *dense["residual"]]
    hidden, seen = unit(rows), None
    for (weights, bias), (gain, shift) in zip(layers, dense["norms"], strict=True):
        raw = hidden @ weights
        raw = raw + _along(bias, raw) + (0.0 if seen is None else seen)
        centred = raw - raw.mean(-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
        hidden = jax.nn.swish(normal * _along(gain, raw) + _along(shift, raw))
        seen = hidden if seen is None else seen + hidden
    ((weights, bias),) = dense["encoder"]
    out = hidden @ weights
    return Posterior(*jnp.split(out + _along(bias, out), 2, axis=-1))


def log_normal(z: jax.Array, normal: Posterior) -> jax.Array:
    """log N(z; mean, exp(log_variance)) of one user."""
    mean, log_variance = normal
    squares = jnp.square(z - mean) * jnp.exp(-log_variance)
    return -0.5 * jnp.sum(jnp.log(2 * jnp.pi) + log_variance + squares)


def log_prior(z: jax.Array, old: Posterior) -> jax.Array:
    """log p(z | x) of the composite prior, for one user."""
    zeros = jnp.zeros_like(z)
    parts = (Posterior(zeros, zeros), old, Posterior(zeros, zeros + WIDE_LOG_VARIANCE))
    logs = jnp.stack([log_normal(z, part) for part in parts])
    return jax.nn.logsumexp(logs, b=jnp.asarray(COMPONENT_WEIGHTS))


def rec_vae_scorer(params: Shared, history: Interactions) -> Scorer:
    """Scores all items for users from what they show in `history`: f(mu(x))."""
    return Scorer(_rec_vae_scores, (params, user_rows(history)))


def _rec_vae_scores(params: tuple[Shared, UserRows], user_ids: jax.Array) -> jax.Array:
    model, rows = params
    with jax.default_matmul_precision("highest"):
        return decode(model, rec_vae_encode(model, dense_rows(rows, user_ids, len(model.tables["item"]))).mean)


def _along(vector: jax.Array, x: jax.Array) -> jax.Array:
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)

"""Mult-VAE: a variational autoencoder of whole histories, with a multinomial likelihood.

For a user with the 0/1 row x over items, of n items,

    q(z | x) = N(mu(x), diag sigma^2(x))    pi(z) = softmax(f(z))    p(z) = N(0, I)
    loss = -E_q sum_i x_i log pi_i(z) + beta KL(q(z | x) || p(z)).

Liang, Krishnan, Hoffman, Jebara, 2018, "Variational Autoencoders for Collaborative Filtering". The encoder reads
x / |x|, with items dropped at random in training; beta below 1 ranks better than the bound, 1 is the bound.

Item tables lie in `Shared.tables`, so that a federated round treats them like any other item table:

    mu, log sigma^2 = encoder(tanh(x / |x| @ item + b))    f(z) = out @ decoder(z) + bias

with dense layers in between, tanh after each but the encoder's last. Untied, "item" and "out" are two tables
``[items, width]``. Tied, ``out`` is ``item``: half the numbers, which is what noise for privacy is proportional to.
Parameters tell by their structure which of these they are, so no setting goes with them.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.evaluation.scorers import Scorer
from fedjax_rec.models.base import Shared
from fedjax_rec.models.user_rows import UserRows, dense_rows, user_rows


class Posterior(NamedTuple):
    """q(z | x) of one user or of a batch, each ``[..., latent]``."""

    mean: jax.Array
    log_variance: jax.Array


class Loss(NamedTuple):
    """Of one user: ``total`` is what training minimises, ``nll`` and ``divergence`` in nats."""

    total: jax.Array
    nll: jax.Array
    divergence: jax.Array


class Vae(NamedTuple):
    """A variational autoencoder of histories, as pure functions.

    Attributes:
      init: ``key -> Shared``.
      loss: ``(params, received, row [items], key, beta) -> Loss`` of one user. ``received`` are earlier parameters, for
        a prior that is made of them; the loss has no gradient in them.
      encode: ``(params, rows [..., items]) -> Posterior``.
      decode: ``(params, z [..., latent]) -> logits [..., items]``.
      latent: length of z.
    """

    init: Callable[[jax.Array], Shared]
    loss: Callable[[Shared, Shared, jax.Array, jax.Array, jax.Array], Loss]
    encode: Callable[[Shared, jax.Array], Posterior]
    decode: Callable[[Any, jax.Array], jax.Array]
    latent: int


def mult_vae(
    num_items: int,
    *,
    width: int = 600,
    latent: int = 200,
    tied: bool = False,
    linear: bool = False,
    dropout: float = 0.5,
    init_stddev: float | None = None,
) -> Vae:
    """Mult-VAE. The defaults are the paper's items-600-200-600-items.

    Args:
      num_items: catalogue size.
      width: columns of an item table.
      latent: length of z.
      tied: whether encoder and decoder share one item table.
      linear: no layer between z and the item table; then ``width`` must be ``latent``.
      dropout: chance that the encoder misses an item in training, in [0, 1).
      init_stddev: of the item tables' first entries; None = that of Glorot, sqrt(2 / (items + width)).

    Raises:
      ValueError: for sizes below 1, dropout out of range, or a linear decoder of another width than z.
    """
    check_sizes(num_items, width=width, latent=latent, dropout=dropout)
    if linear and width != latent:
        raise ValueError(f"A linear decoder multiplies z by the item table: width {width} must be latent {latent}.")

    def init(key):
        table_key, out_key, encoder_key, decoder_key = jax.random.split(key, 4)
        stddev = (2.0 / (num_items + width)) ** 0.5 if init_stddev is None else init_stddev
        tables = {"item": stddev * jax.random.normal(table_key, (num_items, width)), "bias": jnp.zeros((num_items, 1))}
        if not tied:
            tables["out"] = stddev * jax.random.normal(out_key, (num_items, width))
        dense = {
            "encoder_bias": jnp.zeros(width),
            "encoder": init_layers(encoder_key, (width, 2 * latent)),
            "decoder": init_layers(decoder_key, (latent,) if linear else (latent, width)),
        }
        return Shared(tables, dense)

    return Vae(init, _MultVaeLoss(dropout), encode, decode, latent)


class _MultVaeLoss(NamedTuple):
    """A value, so that equal settings share a compilation."""

    dropout: float

    def __call__(self, params: Shared, received: Shared, row: jax.Array, key: jax.Array, beta: jax.Array) -> Loss:
        del received
        drop_key, latent_key = jax.random.split(key)
        posterior = encode(params, drop_items(row, self.dropout, drop_key))
        nll = negative_log_likelihood(decode(params, draw_latent(posterior, latent_key)), row)
        divergence = kl_to_standard_normal(posterior)
        return Loss(nll + beta * divergence, nll, divergence)


def encode(params: Shared, rows: jax.Array) -> Posterior:
    """q(z | x) for 0/1 (or dropped and rescaled) rows ``[..., items]``."""
    hidden = jnp.tanh(unit(rows) @ params.tables["item"] + _along(params.dense["encoder_bias"], rows))
    *layers, (weights, bias) = params.dense["encoder"]
    hidden = apply_layers(layers, hidden)
    return Posterior(*jnp.split(hidden @ weights + _along(bias, hidden), 2, axis=-1))


def decode(params: Shared, z: jax.Array) -> jax.Array:
    """Logits f(z) over items, float32 ``[..., items]``, for z ``[..., latent]``; reads nothing of the encoder's own."""
    tables = params.tables
    hidden = apply_layers(params.dense["decoder"], z)
    logits = hidden @ tables["out" if "out" in tables else "item"].T
    return logits + _along(tables["bias"][:, 0], logits)


def mult_vae_scorer(params: Shared, history: Interactions) -> Scorer:
    """Scores all items for users from what they show in `history`: f(mu(x)). New users need no training."""
    return Scorer(_mult_vae_scores, (params, user_rows(history)))


def _mult_vae_scores(params: tuple[Shared, UserRows], user_ids: jax.Array) -> jax.Array:
    model, rows = params
    with jax.default_matmul_precision("highest"):
        return decode(model, encode(model, dense_rows(rows, user_ids, len(model.tables["item"]))).mean)


# What variants share.


def unit(rows: jax.Array) -> jax.Array:
    """Rows over their L2 norm; a zero row stays zero."""
    squares = jnp.square(rows).sum(-1, keepdims=True)
    return rows * jax.lax.rsqrt(jnp.where(squares > 0, squares, 1.0))


def drop_items(row: jax.Array, dropout: float, key: jax.Array) -> jax.Array:
    """The row with each item missing by chance. The encoder takes it to unit length, so nothing else is rescaled."""
    if dropout == 0:
        return row
    return row * jax.random.bernoulli(key, 1.0 - dropout, row.shape)


def draw_latent(posterior: Posterior, key: jax.Array) -> jax.Array:
    """z = mu + sigma * noise, so that gradients pass through both."""
    return posterior.mean + jnp.exp(0.5 * posterior.log_variance) * jax.random.normal(key, posterior.mean.shape)


def negative_log_likelihood(logits: jax.Array, row: jax.Array) -> jax.Array:
    """-sum_i x_i log softmax(logits)_i of one user, in nats."""
    return row.sum() * jax.nn.logsumexp(logits) - row @ logits


def kl_to_standard_normal(posterior: Posterior) -> jax.Array:
    """KL(N(mu, sigma^2) || N(0, I)) of one user, in nats."""
    mean, log_variance = posterior
    return 0.5 * jnp.sum(jnp.exp(log_variance) + jnp.square(mean) - 1.0 - log_variance)


def init_layers(key: jax.Array, sizes: Sequence[int]) -> list[tuple[jax.Array, jax.Array]]:
    """Dense layers ``sizes[0] -> sizes[1] -> ...`` as (weights, bias), Glorot normal."""
    keys = jax.random.split(key, max(len(sizes) - 1, 1))
    shapes = itertools.pairwise(sizes)
    return [
        (jnp.sqrt(2.0 / (a + b)) * jax.random.normal(k, (a, b)), jnp.zeros(b))
        for k, (a, b) in zip(keys[: len(sizes) - 1], shapes, strict=True)
    ]


def apply_layers(layers: Sequence[tuple[jax.Array, jax.Array]], x: jax.Array) -> jax.Array:
    """Each layer with tanh after it."""
    for weights, bias in layers:
        x = x @ weights
        x = jnp.tanh(x + _along(bias, x))
    return x


def check_sizes(num_items: int, *, width: int, latent: int, dropout: float) -> None:
    """Raises a ValueError for sizes below 1 or dropout outside [0, 1)."""
    for name, size in {"num_items": num_items, "width": width, "latent": latent}.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), or no item is left to read; got {dropout}.")


def _along(vector: jax.Array, x: jax.Array) -> jax.Array:
    """The vector with leading axes like those of ``x``: broadcasting said, not left to chance."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)

"""A generator of implicit rows and a critic of them, as pure functions over plain pytrees.

    z ~ N(0, I)                              latent of one virtual user
    s = [C tanh(B z), 1] V^T + g             scores, V [items, rank + 1], g ~ Gumbel noise, one number an item
    x = top_n(s) / sqrt(n)                   the row of the n items of highest score, of norm 1
    D(x) = v^T a(W a(A^T x + a0) + w0)       critic, A [items, critic_rank], a = leaky ReLU

The last column of V is a bias: with logarithms of popularity there, and zeros elsewhere, items are sampled by
popularity (Gumbel top-n). What z adds to a score is odd in z, so of mean zero: tastes come on top of popularity, and a
generator that is told little keeps the popularity that it started with. Two low-rank tables keep both nets small, which
is what noise on their gradients asks for. There is no batch norm: a critic's value at one row must not depend on the
other rows, or no client's gradient would be its own.

The two play the game of Arjovsky, Chintala, Bottou (2017), "Wasserstein Generative Adversarial Networks", with the
gradient penalty of Gulrajani, Ahmed, Arjovsky, Dumoulin, Courville (2017), "Improved Training of Wasserstein GANs":

    critic     min  D(x~) - D(x) + w (|grad D(x^)| - 1)^2,   x^ = u x + (1 - u) x~,  u ~ U(0, 1)
    generator  min  -D(x~)

for a real row x and a fake one x~. Rows are discrete: the generator's gradient goes through the top n as if they were
a sigmoid around the n-th score (straight through: Bengio, Leonard, Courville, 2013, "Estimating or Propagating
Gradients Through Stochastic Neurons").
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

_SLOPE = 0.2  # of the leaky ReLU below zero
Params = dict[str, jax.Array]


class GanSizes(NamedTuple):
    """How large the two nets are.

    Attributes:
      latent_dim: numbers in z.
      hidden_size: of the generator's hidden layer.
      rank: columns of its item table, the bias not counted.
      critic_rank: columns of the critic's item table.
      critic_hidden_size: of the critic's second layer.
    """

    latent_dim: int = 32
    hidden_size: int = 64
    rank: int = 16
    critic_rank: int = 16
    critic_hidden_size: int = 32


SMALL = GanSizes()


def init_generator(key: jax.Array, sizes: GanSizes, log_popularity: jax.Array) -> tuple[jax.Array, Params]:
    """A generator that samples by popularity, but for a small start in every direction.

    Args:
      key: of the weights.
      sizes: of the net.
      log_popularity: float32 ``[num_items]``, released or public; zeros sample evenly.

    Returns:
      The item table, float32 ``[num_items, rank + 1]``, and the rest.
    """
    table_key, in_key, out_key = jax.random.split(key, 3)
    table = 0.02 * jax.random.normal(table_key, (len(log_popularity), sizes.rank))
    dense = {
        "in": _fan_in(in_key, sizes.latent_dim, sizes.hidden_size),
        "out": _fan_in(out_key, sizes.hidden_size, sizes.rank),
    }
    return jnp.concatenate([table, jnp.asarray(log_popularity, jnp.float32)[:, None]], axis=1), dense


def init_critic(key: jax.Array, sizes: GanSizes, item_weights: jax.Array) -> tuple[jax.Array, Params]:
    """The critic's item table, float32 ``[num_items, critic_rank]``, and the rest, at random.

    The table starts so small that the critic's slope is about 1, where the gradient penalty wants it: at unit entries
    the slope would be the root of the catalogue's size, and all training would go into taking it down.

    Args:
      key: of the weights.
      sizes: of the net.
      item_weights: float32 ``[num_items]``, how strongly the critic will see each item.
    """
    table_key, hidden_key, out_key = jax.random.split(key, 3)
    dense = {
        "in_bias": jnp.zeros(sizes.critic_rank),
        "hidden": _fan_in(hidden_key, sizes.critic_rank, sizes.critic_hidden_size),
        "hidden_bias": jnp.zeros(sizes.critic_hidden_size),
        "out": _fan_in(out_key, sizes.critic_hidden_size, 1)[:, 0],
    }
    table = jax.random.normal(table_key, (len(item_weights), sizes.critic_rank))
    return table / jnp.linalg.norm(item_weights), dense


def _fan_in(key: jax.Array, num_in: int, num_out: int) -> jax.Array:
    return jax.random.normal(key, (num_in, num_out)) / np.sqrt(num_in)


def fixed_popularity(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer of a generator (item table, rest) whose bias column keeps the popularity that it started with."""

    def update(gradient, state, params=None):
        (table, dense), state = optimizer.update(gradient, state, params)
        return (table.at[:, -1].set(0.0), dense), state

    return optax.GradientTransformation(optimizer.init, update)


def item_logits(table: jax.Array, dense: Params, latent: jax.Array) -> jax.Array:
    """The generator's scores without Gumbel noise, float32 ``[num_items]``, of one latent ``[latent_dim]``."""
    hidden = jnp.tanh(latent @ dense["in"])
    return table[:, :-1] @ (hidden @ dense["out"]) + table[:, -1]


def virtual_scores(table: jax.Array, dense: Params, key: jax.Array) -> jax.Array:
    """Scores of one virtual user, float32 ``[num_items]``, whose top n are its items: z and Gumbel noise are drawn."""
    latent_key, noise_key = jax.random.split(key)
    logits = item_logits(table, dense, jax.random.normal(latent_key, dense["in"].shape[:1]))
    return logits + jax.random.gumbel(noise_key, logits.shape)


def critic_value(table: jax.Array, dense: Params, row: jax.Array) -> jax.Array:
    """D of one row, float32 ``[num_items]``: a scalar."""
    hidden = jax.nn.leaky_relu(row @ table + dense["in_bias"], _SLOPE)
    hidden = jax.nn.leaky_relu(hidden @ dense["hidden"] + dense["hidden_bias"], _SLOPE)
    return hidden @ dense["out"]


def top_n(scores: jax.Array, n: jax.Array | int) -> jax.Array:
    """The n largest of the scores, bool ``[num_items]``: exactly n, ties by place; ``n`` may be traced.

    A search by halves over the 32 bits of the n-th largest number: n need not be known when compiling, and on a CPU it
    is several times as fast as a sort.
    """
    bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    order = jnp.where(bits & sign, ~bits, bits | sign)  # unsigned integers in the order of the numbers

    def halve(i, threshold):
        probe = threshold | (sign >> i.astype(jnp.uint32))
        return jnp.where((order >= probe).sum() >= n, probe, threshold)

    threshold = jax.lax.fori_loop(0, 32, halve, jnp.uint32(0))
    above, tied = order > threshold, order == threshold
    return above | (tied & (jnp.cumsum(tied) <= n - above.sum()))


def relaxed_top_n(scores: jax.Array, n: jax.Array | int, *, temperature: float = 1.0) -> jax.Array:
    """Ones at the n largest scores and zeros elsewhere, float32, with the gradient of a sigmoid around the n-th.

    Args:
      scores: float32 ``[num_items]``.
      n: how many ones, at least 1.
      temperature: of the sigmoid, which is in the gradient alone; large ones reach items far from the n-th.
    """
    chosen = top_n(jax.lax.stop_gradient(scores), n)
    nth = jnp.min(jnp.where(chosen, jax.lax.stop_gradient(scores), jnp.inf))
    soft = jax.nn.sigmoid((scores - nth) / temperature)
    # Whole numbers first, so that the forward value is one or zero to the last bit.
    return chosen.astype(jnp.float32) + (soft - jax.lax.stop_gradient(soft))


def virtual_row(
    table: jax.Array, dense: Params, n: jax.Array | int, key: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    """A fake row of n items and norm 1, float32 ``[num_items]``, through which gradients reach the generator."""
    return relaxed_top_n(virtual_scores(table, dense, key), n, temperature=temperature) / jnp.sqrt(jnp.float32(n))


def critic_loss(
    table: jax.Array, dense: Params, row: jax.Array, fake_row: jax.Array, mix: jax.Array, penalty_weight: float
) -> jax.Array:
    """``D(x~) - D(x) + w (|grad D(x^)| - 1)^2`` of one real and one fake row, a scalar.

    Args:
      table: of the critic.
      dense: of the critic.
      row: x, float32 ``[num_items]``.
      fake_row: x~.
      mix: u in [0, 1]; ``x^ = u x + (1 - u) x~``.
      penalty_weight: w.
    """
    slope = jax.grad(critic_value, argnums=2)(table, dense, mix * row + (1 - mix) * fake_row)
    squared = jnp.sum(jnp.square(slope))
    # The norm has no gradient at zero, where a critic that is constant would be.
    steep = squared > 0
    norm = jnp.where(steep, jnp.sqrt(jnp.where(steep, squared, 1.0)), 0.0)
    gap = critic_value(table, dense, fake_row) - critic_value(table, dense, row)
    return gap + penalty_weight * jnp.square(norm - 1)

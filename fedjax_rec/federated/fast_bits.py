"""Random words at the price of a few instructions: for rounding and for simulated masks, never for noise or secrets."""

import math

import jax
import jax.numpy as jnp

_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B  # odd multipliers whose product mixes 32 bits well


def fast_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Words that look random: a number's place, mixed with 64 bits of the key.

    Elementwise, so it fuses with what uses it and never touches memory: on a CPU a hundred times as fast as JAX's
    generator, which costs more than a client's training. Means and correlations are those of chance to what tests can
    see; whoever knows some words can find the rest, so there is no secrecy in it.

    Args:
      key: of these words and no others.
      shape: any.

    Returns:
      uint32 of that shape.
    """
    first, second = seed_words(key)
    return mix(jnp.arange(math.prod(shape), dtype=jnp.uint32), first, second).reshape(shape)


def seed_words(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two uint32 scalars for `mix`, from a key."""
    words = jax.random.bits(key, (2,), jnp.uint32)
    return words[0], words[1]


def mix(counter: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """uint32 words of ``counter``'s shape, from a seed of two words.

    Two rounds of multiply and shift with the seed put in before each, after the finalisers of hash functions.
    """
    x = (counter ^ first) * jnp.uint32(_FIRST)
    x = ((x ^ (x >> 16)) + second) * jnp.uint32(_SECOND)
    return x ^ (x >> 15)

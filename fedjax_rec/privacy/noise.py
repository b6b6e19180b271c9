"""Gaussian numbers for whole tables, as fast as the processor's cache allows."""

import math

import jax
import jax.numpy as jnp

# Parts of a table drawn side by side, so that up to as many devices can share the work without moving a number.
_PARTS = 16
# Numbers of one part drawn at a time: on a CPU, all that the generator has in hand then stays in its cache.
_PIECE = 1 << 12


def standard_normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Independent standard normal numbers, float32.

    A large table is drawn piece by piece, each piece from a key of its own. JAX's generator makes some 20 passes over
    its numbers on a CPU, so drawing 3.2 million at once takes twice as long. Other backends draw all pieces at
    once; the numbers are the same.

    Args:
      key: of these numbers and no others.
      shape: any.
    """
    if len(shape) < 2 or math.prod(shape) <= _PARTS * _PIECE:
        return jax.random.normal(key, shape)
    parts = math.gcd(shape[0], _PARTS)
    part_size = math.prod(shape) // parts
    num_pieces = -(-part_size // _PIECE)
    part_keys = jax.vmap(lambda part: jax.random.fold_in(key, part))(jnp.arange(parts))

    def piece(index):
        return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, index), (_PIECE,)))(part_keys)

    if jax.default_backend() == "cpu":
        numbers = jnp.zeros((parts, num_pieces, _PIECE))
        numbers = jax.lax.fori_loop(0, num_pieces, lambda i, x: x.at[:, i].set(piece(i)), numbers)
    else:
        numbers = jax.vmap(piece, out_axes=1)(jnp.arange(num_pieces))
    return numbers.reshape(parts, -1)[:, :part_size].reshape(shape)

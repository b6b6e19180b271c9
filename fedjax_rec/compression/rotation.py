"""The randomised Hadamard rotation: spreads a vector's energy evenly over its numbers, and is undone exactly.

    rotate(x) = H S pad(x) / sqrt(B)        rotate_back(y) = unpad(S H y) / sqrt(B)

S is a diagonal of random signs and H the Walsh-Hadamard matrix of size B, a block of the vector; the product is
orthonormal, so norms and inner products stay. Whatever the vector was, each number of the rotated one is close to a
normal one of variance ||x||^2 / B, which few bits describe well (Suresh et al., 2017, "Distributed Mean Estimation
with Limited Communication").
"""

import math

import jax
import jax.numpy as jnp

LARGEST_BLOCK = 256
"""Largest block. Blocks of 1,024 take twice the time on a CPU, where updates of 10,000 numbers leave short runs."""

_SMALLEST_BLOCK = 64
_RADIX = 4  # numbers that one pass over memory combines; eight at a time do not stay in a CPU's registers


def block_size(num_numbers: int) -> int:
    """The size of the blocks that a vector is rotated in, a power of two.

    One block holds all of a short vector. Otherwise it is the largest, of at most `LARGEST_BLOCK` and at least 64, for
    which padding adds no more than a quarter to the vector. From 1,024 numbers on that is `LARGEST_BLOCK`.

    Args:
      num_numbers: length of the vector, at least 1.

    Raises:
      ValueError: if there are none.
    """
    if num_numbers < 1:
        raise ValueError(f"A rotation needs at least one number; got {num_numbers}.")
    block = min(LARGEST_BLOCK, 1 << (num_numbers - 1).bit_length())
    while block > _SMALLEST_BLOCK and -num_numbers % block > num_numbers / 4:
        block //= 2
    return block


def rotated_size(num_numbers: int) -> int:
    """The length of the rotated vector: whole blocks of `block_size`."""
    block = block_size(num_numbers)
    return -(-num_numbers // block) * block


def rotate(vector: jax.Array, key: jax.Array) -> jax.Array:
    """Rotates a vector, block by block.

    The blocks are interleaved: number i is in block ``i mod (m / B)``, so the columns of ``rotated.reshape(B, m / B)``
    are the blocks. Each is then a sample of the whole vector, and all butterflies are between runs of m / B numbers.

    Args:
      vector: float32 ``[n]``.
      key: of the signs; public, and the same for all who are to be in one basis.

    Returns:
      float32 ``[m]``, with ``m = rotated_size(n)``, of the same norm.
    """
    size, block = vector.shape[0], block_size(vector.shape[0])
    # An update in place: XLA makes a pad a choice for each number, in every pass that it is fused with.
    padded = jnp.zeros(rotated_size(size)).at[:size].set(vector)
    return _hadamard(padded * random_signs(key, padded.size), block) / math.sqrt(block)


def rotate_back(rotated: jax.Array, key: jax.Array, num_numbers: int) -> jax.Array:
    """The inverse of `rotate`, and its transpose.

    Args:
      rotated: float32 ``[m]``.
      key: the one that it was rotated with.
      num_numbers: n, the length before rotation.

    Returns:
      float32 ``[n]``.

    Raises:
      ValueError: if no vector of that length has m numbers when rotated.
    """
    if rotated.shape != (rotated_size(num_numbers),):
        raise ValueError(
            f"A vector of {num_numbers} numbers has {rotated_size(num_numbers)} when rotated; got {rotated.shape}."
        )
    block = block_size(num_numbers)
    signs = random_signs(key, rotated.size) / math.sqrt(block)
    return (_hadamard(rotated, block) * signs)[:num_numbers]


def random_signs(key: jax.Array, num_numbers: int) -> jax.Array:
    """Plus and minus one as float32 ``[num_numbers]``, 32 from each random word: the generator costs most otherwise.

    The first bits of all words come first, then the second ones, in long runs.
    """
    key = jax.random.clone(key)  # the same signs there and back, which is no accident
    words = jax.random.bits(key, (-(-num_numbers // 32),), jnp.uint32)
    planes = [(words << shift) & jnp.uint32(1 << 31) for shift in range(32)]
    one = jax.lax.bitcast_convert_type(jnp.float32(1), jnp.uint32)
    return jax.lax.bitcast_convert_type(jnp.concatenate(planes)[:num_numbers] | one, jnp.float32)


def _hadamard(vector: jax.Array, block: int) -> jax.Array:
    """The Walsh-Hadamard transform of each block, unscaled, in additions only.

    A product with a small matrix in place of the first passes is no faster on a CPU, and rounds in an order that
    depends on how many vectors run side by side. The last pass writes one flat vector: a reshape that XLA fuses with
    what reads it costs a division for each number.
    """
    size, x = vector.shape[0], vector
    stride = size // block
    while stride < size:
        radix = min(_RADIX, size // stride)
        if radix * stride == size:
            return jnp.concatenate(_butterflies(jnp.split(x, radix)))
        x = x.reshape(-1, radix, stride)
        x = jnp.stack(_butterflies([x[:, i] for i in range(radix)]), axis=1).reshape(size)
        stride *= radix
    return x


def _butterflies(parts: list[jax.Array]) -> list[jax.Array]:
    """The unscaled transform across a list of arrays, whose length is a power of two."""
    parts, step = list(parts), 1
    while step < len(parts):
        for i in range(len(parts)):
            if not i & step:
                parts[i], parts[i + step] = parts[i] + parts[i + step], parts[i] - parts[i + step]
        step *= 2
    return parts

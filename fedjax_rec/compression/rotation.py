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
import numpy as np

LARGEST_BLOCK = 1024
"""Largest block. On a CPU, blocks of 4,096 take a third longer."""

_SMALLEST_BLOCK = 64
_MATMUL_SIZE = 32  # the strides below the width of a vector register, as a product with a small Hadamard matrix
_RADIX = 8  # butterflies done in one pass over memory


def block_size(num_numbers: int) -> int:
    """The size of the blocks that a vector is rotated in, a power of two.

    One block holds all of a short vector. Otherwise it is the largest, of at most `LARGEST_BLOCK` and at least 64, for
    which padding adds no more than a quarter to the vector. From 4,096 numbers on that is `LARGEST_BLOCK`.

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

    Args:
      vector: float32 ``[n]``.
      key: of the signs; public, and the same for all who are to be in one basis.

    Returns:
      float32 ``[m]``, with ``m = rotated_size(n)``, of the same norm.
    """
    size = vector.shape[0]
    padded = jnp.pad(vector.astype(jnp.float32), (0, rotated_size(size) - size))
    return _hadamard(_flip(padded, key), block_size(size))


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
    return _flip(_hadamard(rotated, block_size(num_numbers)), key)[:num_numbers]


def _flip(vector: jax.Array, key: jax.Array) -> jax.Array:
    """Random signs, 32 from each random word: the generator costs more than all butterflies otherwise."""
    key = jax.random.clone(key)  # the same signs there and back, which is no accident
    words = jax.random.bits(key, (-(-vector.shape[0] // 32),), jnp.uint32)
    signs = (words[:, None] << jnp.arange(32, dtype=jnp.uint32)[None]).reshape(-1)[: vector.shape[0]]
    bits = jax.lax.bitcast_convert_type(vector, jnp.uint32)
    return jax.lax.bitcast_convert_type(bits ^ (signs & jnp.uint32(1 << 31)), jnp.float32)


def _hadamard(vector: jax.Array, block: int) -> jax.Array:
    """The orthonormal Walsh-Hadamard transform of each block: log2(block) additions a number."""
    size = vector.shape[0]
    stride = min(block, _MATMUL_SIZE)
    matrix = jnp.asarray(_hadamard_matrix(stride) / math.sqrt(block), jnp.float32)
    x = jnp.matmul(vector.reshape(-1, stride), matrix, precision=jax.lax.Precision.HIGHEST)
    while stride < block:
        radix = min(_RADIX, block // stride)
        x = x.reshape(-1, radix, stride)
        x = jnp.stack(_butterflies([x[:, i] for i in range(radix)]), axis=1)
        stride *= radix
    return x.reshape(size)


def _butterflies(parts: list[jax.Array]) -> list[jax.Array]:
    """The unscaled transform across a list of arrays, whose length is a power of two."""
    step = 1
    while step < len(parts):
        for i in range(len(parts)):
            if not i & step:
                parts[i], parts[i + step] = parts[i] + parts[i + step], parts[i] - parts[i + step]
        step *= 2
    return parts


def _hadamard_matrix(size: int) -> np.ndarray:
    """float64 ``[size, size]`` of plus and minus one; ``size`` is a power of two."""
    index = np.arange(size)
    return 1.0 - 2.0 * (np.bitwise_count(index[:, None] & index[None]) % 2)

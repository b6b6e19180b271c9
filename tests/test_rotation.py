"""Risk: the rotation changes a norm or cannot be undone, so that every compressor behind it is biased."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_rec.compression.rotation import block_size, random_signs, rotate, rotate_back, rotated_size

KEY = jax.random.key(3)


def test_padding_stays_small():
    for size in range(1, 6000):
        block, padded = block_size(size), rotated_size(size)
        assert block == 1 << (block.bit_length() - 1)
        assert padded % block == 0
        assert size <= padded < 2 * size
        assert padded <= 1.25 * size or block <= 64
    assert rotated_size(16_384) == 16_384
    with pytest.raises(ValueError, match="at least one number"):
        block_size(0)


@pytest.mark.parametrize("size", [1, 5, 130])
def test_orthonormal_and_undone(size):
    """The whole matrix: within a block all its entries have one magnitude, and its rows are orthonormal."""
    matrix = jax.jit(jax.vmap(rotate, (0, None)))(jnp.eye(size), KEY)
    back = jax.jit(jax.vmap(lambda y: rotate_back(y, KEY, size)))(matrix)
    block, num_blocks = block_size(size), rotated_size(size) // block_size(size)
    inside = np.arange(rotated_size(size))[None] % num_blocks == np.arange(size)[:, None] % num_blocks
    np.testing.assert_allclose(np.abs(matrix), inside / np.sqrt(block), atol=1e-6)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-6)
    np.testing.assert_allclose(back, np.eye(size), atol=1e-6)


def test_side_by_side_as_alone():
    """1,400 numbers take six blocks of 256, several passes and padding; bits must not depend on the chunk."""
    x = jax.random.normal(jax.random.key(0), (3, 1400)) * 10.0 ** jnp.arange(-1, 2)[:, None]
    alone = jax.jit(rotate)
    together = jax.jit(jax.vmap(rotate, (0, None)))(x, KEY)
    np.testing.assert_array_equal(together, np.stack([alone(row, KEY) for row in x]))
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), np.linalg.norm(x, axis=1), rtol=1e-6)
    spike = alone(jnp.zeros(1400).at[700].set(5.0), KEY)
    np.testing.assert_allclose(np.max(np.abs(spike)), 5 / np.sqrt(256), rtol=1e-6)  # spread over its block


def test_signs_are_fair_coins():
    """All 32 bits of a word are used, and neighbours and other keys have nothing to do with one another."""
    signs, others = (np.asarray(random_signs(jax.random.key(seed), 32 * 400)) for seed in (0, 1))
    assert set(np.unique(signs)) == {-1.0, 1.0}
    limit = 4.5 / np.sqrt(400)  # 4.5 standard errors, 32 places at once
    assert np.all(np.abs(signs.reshape(32, 400).mean(1)) < limit)
    for shift in (1, 2, 7, 400, 800):
        assert abs(np.mean(signs[shift:] * signs[:-shift])) < 4.5 / np.sqrt(len(signs))
    assert abs(np.mean(signs * others)) < 4.5 / np.sqrt(len(signs))
    np.testing.assert_array_equal(signs, random_signs(jax.random.key(0), 32 * 400))


def test_wrong_length():
    with pytest.raises(ValueError, match="has 128 when rotated"):
        rotate_back(jnp.zeros(100), KEY, 100)

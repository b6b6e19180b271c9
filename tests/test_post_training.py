"""Risk: a served model in integers is another model than the one that was trained, or is not smaller."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_rec.compression.post_training import dequantize, num_bytes, quantize_params
from fedjax_rec.models.base import Shared

pytest.importorskip("qwix", reason="pip install 'fedjax-rec[int8]' brings qwix")
RNG = np.random.default_rng(0)
SIZES = 10.0 ** RNG.uniform(-3, 2, size=(30, 1))  # items whose vectors differ in length by five powers of ten
PARAMS = Shared(
    {"item": jnp.asarray(SIZES * RNG.normal(size=(30, 16)), jnp.float32)},
    {"kernel": jnp.asarray(RNG.normal(size=(16, 8)) * np.arange(1, 9), jnp.float32), "bias": jnp.ones(8)},
)


@pytest.mark.parametrize(("bits", "levels"), [(8, 127.5), (4, 7.5)])
def test_every_number_is_within_half_a_step_of_its_channel(bits, levels):
    again = dequantize(quantize_params(PARAMS, bits=bits))
    table, kernel = PARAMS.tables["item"], PARAMS.dense["kernel"]
    step = np.abs(table).max(axis=1, keepdims=True) / levels  # a row's own
    assert np.all(np.abs(again.tables["item"] - table) <= 0.5001 * step)
    assert np.abs(again.tables["item"] - table).max() > 0.3 * step.max()  # or nothing was rounded
    step = np.abs(kernel).max(axis=0, keepdims=True) / levels  # a column's own
    assert np.all(np.abs(again.dense["kernel"] - kernel) <= 0.5001 * step)
    assert np.array_equal(again.dense["bias"], PARAMS.dense["bias"])
    assert jax.tree.structure(again) == jax.tree.structure(PARAMS)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(again))


def test_zeros_stay_zeros():
    assert np.all(np.asarray(dequantize(quantize_params({"w": jnp.zeros((3, 4))}))["w"]) == 0)


def test_bytes():
    assert num_bytes(PARAMS) == 4 * (30 * 16 + 16 * 8 + 8)
    scales = 4 * (30 + 8)
    assert num_bytes(quantize_params(PARAMS)) == 30 * 16 + 16 * 8 + scales + 4 * 8
    assert num_bytes(quantize_params(PARAMS, bits=4)) == (30 * 16 + 16 * 8) // 2 + scales + 4 * 8


def test_integers_are_served_in_one_compiled_function():
    def score(params, query):
        return jnp.matmul(params.tables["item"], query, precision="highest")

    query = jnp.asarray(RNG.normal(size=16), jnp.float32)
    served = jax.jit(lambda params, query: score(dequantize(params), query))(quantize_params(PARAMS), query)
    np.testing.assert_allclose(served, score(dequantize(quantize_params(PARAMS)), query), rtol=1e-5)
    assert np.corrcoef(served, score(PARAMS, query))[0, 1] > 0.999


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match="bits must be 8 or 4; got 3"):
        quantize_params(PARAMS, bits=3)
    with pytest.raises(ValueError, match="must be float32; got int32"):
        quantize_params({"w": jnp.ones((2, 2), jnp.int32)})
    monkeypatch.setitem(sys.modules, "qwix", None)  # as if it were not installed
    with pytest.raises(ModuleNotFoundError, match=r"fedjax-rec\[int8\]"):
        quantize_params(PARAMS)

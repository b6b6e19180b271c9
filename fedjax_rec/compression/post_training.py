"""Post-training quantisation: a trained recommender in a quarter of the bytes, for the device that serves it.

Each channel c of a matrix w is kept as integers and one float32 scale,

    w_ic ~ s_c q_ic    q_ic = round(w_ic / s_c) in [-127, 127]    s_c = max_i |w_ic| / 127.5    (8 bits),

by `qwix`. Channels are an item table's rows, so that every item keeps the size of its vector, and the columns of a
layer's kernel. Vectors and scalars (biases, norms) stay float32. Post-processing of what was trained: no epsilon.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_rec.models.base import Shared

_TYPES = {8: jnp.int8, 4: jnp.int4}


def quantize_params(params: Any, *, bits: int = 8) -> Any:
    """The same pytree with a quantised array (`qwix.QArray`) in place of each float32 matrix.

    Args:
      params: `Shared`, or any pytree of float32 arrays; of the latter every matrix is taken by its columns.
      bits: of a number, 8 or 4.

    Raises:
      ModuleNotFoundError: without qwix; the message names the extra that brings it.
      ValueError: for other bits, or leaves that are not float32.
    """
    if bits not in _TYPES:
        raise ValueError(f"bits must be 8 or 4; got {bits}.")
    qwix = _qwix()

    def quantized(leaf, axis):
        if leaf.dtype != jnp.float32:
            raise ValueError(f"Parameters to quantise must be float32; got {leaf.dtype} of shape {leaf.shape}.")
        if leaf.ndim < 2:
            return leaf
        return qwix.quantize(jnp.asarray(leaf), _TYPES[bits], channelwise_axes=(axis % leaf.ndim,))

    if isinstance(params, Shared):
        tables = {name: quantized(table, 0) for name, table in params.tables.items()}
        return Shared(tables, jax.tree.map(lambda leaf: quantized(leaf, -1), params.dense))
    return jax.tree.map(lambda leaf: quantized(leaf, -1), params)


def dequantize(params: Any) -> Any:
    """float32 parameters again, for ``model.score(dequantize(params), history)``.

    Call it inside the compiled function that serves: what is kept between requests are then the integers.
    """
    qwix = _qwix()
    return jax.tree.map(
        lambda leaf: qwix.dequantize(leaf) if isinstance(leaf, qwix.QArray) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, qwix.QArray),
    )


def num_bytes(params: Any) -> int:
    """Bytes of a pytree of arrays as a file or a download would hold it, 4-bit numbers two a byte."""
    bits = sum(leaf.size * _bits(leaf.dtype) for leaf in jax.tree.leaves(params))
    return math.ceil(bits / 8)


def _bits(dtype) -> int:
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).bits


def _qwix():
    try:
        import qwix
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Post-training quantisation needs qwix, which is not installed: pip install 'fedjax-rec[int8]'."
        ) from error
    return qwix

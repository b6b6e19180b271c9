"""Half precision on the wire: 16 bits a number, down to the clients or up to the server."""

import dataclasses

import jax
import jax.numpy as jnp

from fedjax_rec.federated.rows import is_rows
from fedjax_rec.federated.transforms import Bound, UpdateTransform

HALVES = {"bfloat16": (8, 7), "float16": (5, 10)}  # bits of the exponent and of the mantissa


def half_precision_download(dtype: str = "bfloat16") -> UpdateTransform:
    """Clients receive the server's shared parameters rounded to 16 bits a number; the server keeps float32.

    What a client trains and returns is relative to what it received, so the server adds it to parameters that differ
    from those by the rounding; it costs no privacy, being computed from what is released anyway. bfloat16 has float32's
    range and 8 significant bits; float16 has 11, ends at 65,504 (larger numbers become that) and loses numbers below
    6.1e-5, which small item vectors may be.

    Args:
      dtype: "bfloat16" or "float16".

    Raises:
      ValueError: for another one.
    """
    _check(dtype)

    def broadcast(shared, prepared):
        del prepared
        return jax.tree.map(lambda x: to_half(x, dtype), shared)

    return UpdateTransform(broadcast=broadcast, download=lambda wire, update: wire._replace(bits=min(wire.bits, 16.0)))


def half_precision_upload(dtype: str = "bfloat16") -> UpdateTransform:
    """Clients send 16 bits a number, rounded to the nearest: a bias of at most 2^-8 (bfloat16) of each number.

    The server sums in float32, and what it sums is what was sent: linear, in the sense that nothing is decoded. A
    secure sum over a ring rounds to its own grid and gains nothing from it.

    Guarantee: no number grows by more than 2^-8 of itself (float16: 2^-11), so neither does a norm, and the bound after
    it says so.

    Args:
      dtype: "bfloat16" or "float16"; the latter loses numbers below 6.1e-5, which updates often are.

    Raises:
      ValueError: for another one.
    """
    _check(dtype)
    growth = 1 + 2.0 ** -(HALVES[dtype][1] + 1)

    def client(update, state, key):
        del state, key

        def half(leaf):
            if is_rows(leaf):
                return dataclasses.replace(leaf, values=to_half(leaf.values, dtype))
            return to_half(leaf, dtype)

        return jax.tree.map(half, update, is_leaf=is_rows), {}

    def sensitivity(bound):
        return Bound(noised=True) if bound.noised else bound.scaled(growth)

    return UpdateTransform(
        client=client, sensitivity=sensitivity, upload=lambda wire, update: wire._replace(bits=min(wire.bits, 16.0))
    )


def to_half(x: jax.Array, dtype: str) -> jax.Array:
    """Floating-point numbers rounded to a 16-bit type, in the type that they had; integers as they are.

    ``reduce_precision``, because a compiler may leave out a cast there and back.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    exponent, mantissa = HALVES[dtype]
    if dtype == "float16":
        largest = float(jnp.finfo(jnp.float16).max)
        x = jnp.where(jnp.abs(x) < jnp.inf, jnp.clip(x, -largest, largest), x)  # NaN and infinity stay what they are
    return jax.lax.reduce_precision(x, exponent, mantissa)


def _check(dtype: str) -> None:
    if dtype not in HALVES:
        raise ValueError(f"dtype must be one of {', '.join(HALVES)}; got {dtype!r}.")

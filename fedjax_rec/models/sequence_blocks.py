"""Layers over one history: a pre-norm Transformer block, an HSTU block, and the stack that they make.

Everything is of one history ``[L, dim]`` and has no state: dropout takes an explicit key, and None turns it off.
Places are counted from the end of the history, so that padding behind it, of any width, changes nothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

INIT = nnx.initializers.normal(0.02)


class TransformerBlock(nnx.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)), of ``x [L, dim]``.

    Vaswani et al., 2017, "Attention Is All You Need", with the norm before each part and not after it.
    """

    def __init__(self, dim: int, *, num_heads: int, hidden: int, activation: Callable, dropout: float, rngs: nnx.Rngs):
        if dim % num_heads:
            raise ValueError(f"num_heads must divide the length of item vectors: got {num_heads} and {dim}.")
        self.num_heads, self.dropout, self.activation = num_heads, dropout, activation
        self.attention_norm = nnx.LayerNorm(dim, rngs=rngs)
        self.query = nnx.Linear(dim, dim, rngs=rngs)
        self.key = nnx.Linear(dim, dim, rngs=rngs)
        self.value = nnx.Linear(dim, dim, rngs=rngs)
        self.out = nnx.Linear(dim, dim, rngs=rngs)
        self.forward_norm = nnx.LayerNorm(dim, rngs=rngs)
        self.up = nnx.Linear(dim, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, dim, rngs=rngs)

    def __call__(self, x: jax.Array, seen: jax.Array, key: jax.Array | None) -> jax.Array:
        """``seen`` bool ``[L, L]``: True where the place of the row may look at that of the column."""
        keys = split_or_none(key, 3)
        normed = self.attention_norm(x)
        q, k, v = (_heads(layer(normed), self.num_heads) for layer in (self.query, self.key, self.value))
        scores = jnp.einsum("hqd,hkd->hqk", q, k) / q.shape[-1] ** 0.5
        # A large negative number, not -inf: a row of padding that sees nothing stays finite.
        weights = jax.nn.softmax(jnp.where(seen[None], scores, -1e9), axis=-1)
        mixed = _joined(jnp.einsum("hqk,hkd->hqd", drop(weights, self.dropout, keys[0]), v))
        x = x + drop(self.out(mixed), self.dropout, keys[1])
        return x + drop(self.down(self.activation(self.up(self.forward_norm(x)))), self.dropout, keys[2])


class HstuBlock(nnx.Module):
    """Pointwise aggregated attention with a gate, of ``x [L, dim]``.

        U, V, Q, K = silu(linear(norm(x)))
        A = silu(Q K^T + bias(place - place')) / N,    N = max_length
        x + linear(norm(A V) * U)

    Zhai et al., 2024, "Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for Generative
    Recommendations". Weights are not normalised, so that how often something occurs stays to be seen.
    """

    def __init__(self, dim: int, *, num_heads: int, max_length: int, dropout: float, rngs: nnx.Rngs):
        if dim % num_heads:
            raise ValueError(f"num_heads must divide the length of item vectors: got {num_heads} and {dim}.")
        self.num_heads, self.max_length, self.dropout = num_heads, max_length, dropout
        self.norm = nnx.LayerNorm(dim, rngs=rngs)
        self.gates = nnx.Linear(dim, 4 * dim, rngs=rngs)
        self.bias = nnx.Param(INIT(rngs.params(), (max_length,), jnp.float32))
        self.mixed_norm = nnx.LayerNorm(dim, use_bias=False, use_scale=False, rngs=rngs)
        self.out = nnx.Linear(dim, dim, rngs=rngs)

    def __call__(self, x: jax.Array, seen: jax.Array, key: jax.Array | None) -> jax.Array:
        """``seen`` bool ``[L, L]``: True where the place of the row may look at that of the column."""
        u, v, q, k = jnp.split(jax.nn.silu(self.gates(self.norm(x))), 4, axis=-1)
        q, k, v = (_heads(part, self.num_heads) for part in (q, k, v))
        places = jnp.arange(len(x))
        apart = jnp.abs(places[:, None] - places[None, :])
        scores = jnp.einsum("hqd,hkd->hqk", q, k) + self.bias[...].at[apart].get(mode="clip")[None]
        weights = jnp.where(seen[None], jax.nn.silu(scores), 0.0) / self.max_length
        mixed = _joined(jnp.einsum("hqk,hkd->hqd", weights, v))
        return x + self.out(drop(self.mixed_norm(mixed) * u, self.dropout, key))


class Stack(nnx.Module):
    """Item vectors and places in, blocks, a norm, queries out: ``[L, dim] -> [L, dim]``.

    Args:
      dim: length of item vectors.
      max_length: most places.
      blocks: makers ``rngs -> block``.
      dropout: of the inputs.
      rngs: of the initial parameters.
    """

    def __init__(self, dim: int, *, max_length: int, blocks: list[Callable], dropout: float, rngs: nnx.Rngs):
        self.dim, self.dropout = dim, dropout
        self.position = nnx.Param(INIT(rngs.params(), (max_length, dim), jnp.float32))
        self.blocks = nnx.List([make(rngs) for make in blocks])
        self.norm = nnx.LayerNorm(dim, rngs=rngs)

    def __call__(self, vectors: jax.Array, places: jax.Array, seen: jax.Array, key: jax.Array | None) -> jax.Array:
        """``places`` int32 ``[L]``, from `places_from_end`; ``seen`` as the blocks have it."""
        keys = split_or_none(key, len(self.blocks) + 1)
        x = vectors * self.dim**0.5 + self.position[...].at[places].get(mode="clip")
        x = drop(x, self.dropout, keys[0])
        for block, block_key in zip(self.blocks, keys[1:], strict=True):
            x = block(x, seen, block_key)
        return self.norm(x)


def places_from_end(real: jax.Array) -> jax.Array:
    """0 at the last real place, 1 before it, ..., int32 ``[L]``; 0 on padding behind."""
    return jnp.maximum(real.sum() - 1 - jnp.arange(len(real)), 0)


def earlier(length: int) -> jax.Array:
    """Which places each may look at in a causal model: itself and those before it, bool ``[L, L]``.

    Padding lies behind, so no real place sees it.
    """
    return jnp.tril(jnp.ones((length, length), bool))


def drop(x: jax.Array, dropout: float, key: jax.Array | None) -> jax.Array:
    """Each entry 0 by chance and the others rescaled; ``x`` itself without a key."""
    if key is None or dropout == 0:
        return x
    kept = jax.random.bernoulli(key, 1.0 - dropout, x.shape)
    return jnp.where(kept, x / (1.0 - dropout), 0.0)


def split_or_none(key: jax.Array | None, num: int):
    """Keys for the parts of a layer, or as many None."""
    return [None] * num if key is None else list(jax.random.split(key, num))


def check_settings(max_length: int, num_blocks: int, num_heads: int, dropout: float) -> None:
    """Raises a ValueError for sizes below 1 or dropout outside [0, 1)."""
    for name, size in {"max_length": max_length, "num_blocks": num_blocks, "num_heads": num_heads}.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1); got {dropout}.")


def _heads(x: jax.Array, num_heads: int) -> jax.Array:
    """``[L, dim] -> [heads, L, dim / heads]``."""
    return x.reshape(len(x), num_heads, -1).transpose(1, 0, 2)


def _joined(x: jax.Array) -> jax.Array:
    """``[heads, L, dim / heads] -> [L, dim]``."""
    return x.transpose(1, 0, 2).reshape(x.shape[1], -1)

"""HSTU: a history as one stream through pointwise aggregated attention.

Blocks are `HstuBlock`s instead of a Transformer's, the loss is a softmax over drawn negatives, and scores are cosines
at a temperature: <h_t, v_j> / (|h_t| |v_j| temperature). Zhai et al., 2024, "Actions Speak Louder than Words:
Trillion-Parameter Sequential Transducers for Generative Recommendations".

Differs from the paper: the bias of attention is of places alone and not of time, since a client's histories here have
an order and no clock.
"""

from functools import partial

import jax
import jax.numpy as jnp

from fedjax_rec.models.items import ItemTower
from fedjax_rec.models.nnx import pure_module
from fedjax_rec.models.sasrec import causal_model
from fedjax_rec.models.sequence import SequenceModel
from fedjax_rec.models.sequence_blocks import HstuBlock, Stack, check_settings
from fedjax_rec.models.sequence_losses import SequenceLoss, sampled_softmax


def hstu(
    items: ItemTower,
    *,
    max_length: int = 200,
    num_blocks: int = 2,
    num_heads: int = 1,
    dropout: float = 0.2,
    temperature: float = 0.05,
    loss: SequenceLoss | None = None,
) -> SequenceModel:
    """HSTU on any item side; parameters are laid out as those of `sasrec`.

    Args:
      items: where item vectors come from.
      max_length: most items of a history that count.
      num_blocks: HSTU blocks.
      num_heads: of attention; must divide ``items.dim``.
      dropout: of inputs and of what blocks add, in [0, 1).
      temperature: that cosines are divided by, > 0.
      loss: from `sequence_losses`; None = `sampled_softmax()`, 128 negatives.

    Raises:
      ValueError: for settings out of range.
    """
    check_settings(max_length, num_blocks, num_heads, dropout)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive; got {temperature}.")
    block = partial(_block, items.dim, num_heads, max_length, dropout)
    settings = {"max_length": max_length, "blocks": [block] * num_blocks, "dropout": dropout}
    return causal_model(
        items,
        unit_tower(items),
        pure_module(lambda rngs: Stack(items.dim, rngs=rngs, **settings)),
        max_length=max_length,
        loss=sampled_softmax() if loss is None else loss,
        finish=lambda queries: unit_length(queries) / temperature,
    )


def unit_tower(items: ItemTower) -> ItemTower:
    """The same items with vectors of length 1."""
    return items._replace(
        take=lambda params, ids: unit_length(items.take(params, ids)),
        all=lambda params: unit_length(items.all(params)),
    )


def unit_length(vectors: jax.Array) -> jax.Array:
    """``[..., dim]`` over the L2 norm of the last axis."""
    # The number under the root keeps the gradient at a zero vector finite.
    return vectors * jax.lax.rsqrt(jnp.square(vectors).sum(-1, keepdims=True) + 1e-12)


def _block(dim, num_heads, max_length, dropout, rngs):
    return HstuBlock(dim, num_heads=num_heads, max_length=max_length, dropout=dropout, rngs=rngs)

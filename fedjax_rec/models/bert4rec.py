"""BERT4Rec: bidirectional self-attention that fills masked places of a history.

In training some items are replaced by a mask token, and the state at such a place is the query for the item that was
there. To ask what comes next, a mask token is appended. Since a history never ends in a mask otherwise, some histories
have only their last item masked. Sun et al., 2019, "BERT4Rec: Sequential Recommendation with Bidirectional Encoder
Representations from Transformer".

Differs from the paper: the norm is before each part of a block, scores have no bias of items (a query has to be all
that they need), and a chance takes the place of copies of the data set: in `last_prob` of the steps only the last item
is masked.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from fedjax_rec.models.items import ItemTower
from fedjax_rec.models.nnx import pure_module
from fedjax_rec.models.sasrec import init_with_items, tower_params
from fedjax_rec.models.sequence import SequenceModel, last_items, last_items_of
from fedjax_rec.models.sequence_blocks import INIT, Stack, TransformerBlock, check_settings, places_from_end
from fedjax_rec.models.sequence_losses import SequenceLoss, Targets, full_cross_entropy


def bert4rec(
    items: ItemTower,
    *,
    max_length: int = 200,
    num_blocks: int = 2,
    num_heads: int = 2,
    dropout: float = 0.2,
    mask_prob: float = 0.2,
    last_prob: float = 0.1,
    loss: SequenceLoss | None = None,
) -> SequenceModel:
    """BERT4Rec on any item side.

    Shared: the item side's tables; dense "items", what else the item side has, "body", the layers by name, and "mask"
    ``[dim]``, the vector of the mask token.

    Args:
      items: where item vectors come from.
      max_length: places; a query takes one, so that one item less counts.
      num_blocks: Transformer blocks, with a feed-forward layer four times as wide as an item vector.
      num_heads: of attention; must divide ``items.dim``.
      dropout: of inputs, attention weights and what blocks add, in [0, 1).
      mask_prob: chance of an item to be masked, in (0, 1); at least one is.
      last_prob: chance that the last item is masked and no other, in [0, 1].
      loss: from `sequence_losses`; None = `full_cross_entropy()`.

    Raises:
      ValueError: for settings out of range.
    """
    check_settings(max_length, num_blocks, num_heads, dropout)
    if max_length < 2 or not 0 < mask_prob < 1 or not 0 <= last_prob <= 1:
        raise ValueError(
            "BERT4Rec needs max_length >= 2, mask_prob in (0, 1) and last_prob in [0, 1]; got "
            f"{max_length}, {mask_prob} and {last_prob}."
        )
    loss = full_cross_entropy() if loss is None else loss
    num_items = items.num_items
    block = partial(_block, items.dim, num_heads, dropout)
    settings = {"max_length": max_length, "blocks": [block] * num_blocks, "dropout": dropout}
    body = pure_module(lambda rngs: Stack(items.dim, rngs=rngs, **settings))

    def states(params, vectors, real, masked, key):
        token = jnp.broadcast_to(params.dense["mask"][None], vectors.shape)
        vectors = jnp.where(masked[:, None], token, vectors)
        seen = jnp.broadcast_to(real[None, :], (len(real), len(real)))
        return body.apply(params.dense["body"], vectors, places_from_end(real), seen, key)

    def mean_loss(params, history, key):
        mask_key, last_key, dropout_key, loss_key = jax.random.split(key, 4)
        ids = last_items(history, max_length, num_items)
        real = ids < num_items
        last = jnp.arange(len(ids)) == real.sum() - 1
        masked = jax.random.bernoulli(mask_key, mask_prob, ids.shape) & real
        only_last = jax.random.bernoulli(last_key, last_prob) | ~masked.any()
        masked = jnp.where(only_last, last, masked)
        queries = states(params, items.take(tower_params(params), ids), real, masked, dropout_key)
        # Scores are made at masked places alone; a history with twice the expected number leaves some out.
        asked = jnp.argsort(~masked)[: min(len(ids), 1 + math.ceil(2 * mask_prob * len(ids)))]
        return loss(items, tower_params(params), Targets(queries[asked], ids[asked], masked[asked], ids), loss_key)

    def query(params, history, presence):
        ids = last_items(history, max_length - 1, num_items)
        vectors = items.take(tower_params(params), ids)
        if presence is not None:
            vectors = vectors * last_items_of(presence, history, max_length - 1, num_items)[:, None]
        num_real = jnp.sum(ids < num_items)
        places = jnp.arange(len(ids) + 1)
        vectors = jnp.concatenate([vectors, jnp.zeros((1, items.dim))])
        return states(params, vectors, places <= num_real, places == num_real, None)[num_real]

    def init_rest(key):
        body_key, mask_key = jax.random.split(key)
        return {"body": body.init(body_key), "mask": INIT(mask_key, (items.dim,), jnp.float32)}

    return SequenceModel(
        init=partial(init_with_items, items, init_rest),
        loss=mean_loss,
        query=query,
        catalogue=lambda params: items.all(tower_params(params)),
        num_items=num_items,
        max_length=max_length,
    )


def _block(dim, num_heads, dropout, rngs):
    return TransformerBlock(
        dim, num_heads=num_heads, hidden=4 * dim, activation=jax.nn.gelu, dropout=dropout, rngs=rngs
    )

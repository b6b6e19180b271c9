"""SASRec: causal self-attention over a history.

With item vectors v, the input at place t is sqrt(dim) v_{i_t} + p_{places to the end}; after causal Transformer blocks
the state h_t is the query for item i_{t + 1}, whose score is <h_t, v_j>. Kang and McAuley, 2018, "Self-Attentive
Sequential Recommendation".

Differs from the paper: the loss is cross-entropy over the whole catalogue unless another is given, since that ranks far
better (Klenitskiy and Vasilev, 2023, "Turning Dross Into Gold Loss: is BERT4Rec really better than SASRec?"); keys and
values are made of the normed input, as queries are.
"""

from functools import partial

import jax
import jax.numpy as jnp

from fedjax_rec.models.base import Shared
from fedjax_rec.models.items import ItemTower
from fedjax_rec.models.nnx import PureModule, pure_module
from fedjax_rec.models.sequence import SequenceModel, last_items, last_items_of
from fedjax_rec.models.sequence_blocks import Stack, TransformerBlock, check_settings, earlier, places_from_end
from fedjax_rec.models.sequence_losses import SequenceLoss, Targets, full_cross_entropy


def sasrec(
    items: ItemTower,
    *,
    max_length: int = 200,
    num_blocks: int = 2,
    num_heads: int = 1,
    dropout: float = 0.2,
    loss: SequenceLoss | None = None,
) -> SequenceModel:
    """SASRec on any item side.

    Shared: the item side's tables; dense "items", what else the item side has, and "body", the layers by name.

    Args:
      items: where item vectors come from, such as ``id_table(num_items, dim=64)``.
      max_length: most items of a history that count.
      num_blocks: Transformer blocks.
      num_heads: of attention; must divide ``items.dim``.
      dropout: of inputs, attention weights and what blocks add, in [0, 1).
      loss: from `sequence_losses`; None = `full_cross_entropy()`.

    Raises:
      ValueError: for settings out of range.
    """
    check_settings(max_length, num_blocks, num_heads, dropout)
    block = partial(_block, items.dim, num_heads, dropout)
    settings = {"max_length": max_length, "blocks": [block] * num_blocks, "dropout": dropout}
    body = pure_module(lambda rngs: Stack(items.dim, rngs=rngs, **settings))
    return causal_model(items, items, body, max_length=max_length, loss=loss)


def causal_model(
    items: ItemTower,
    scored: ItemTower,
    body: PureModule,
    *,
    max_length: int,
    loss: SequenceLoss | None,
    finish=lambda queries: queries,
) -> SequenceModel:
    """A model in which every place asks for the next item.

    Args:
      items: vectors that go in.
      scored: vectors that queries are multiplied with, of the same parameters.
      body: a `Stack`.
      max_length: most items of a history that count.
      loss: as for `sasrec`.
      finish: what is done to queries ``[n, dim]`` at the end.
    """
    loss = full_cross_entropy() if loss is None else loss
    num_items = items.num_items

    def queries(params, inputs, presence, key):
        vectors = items.take(tower_params(params), inputs)
        if presence is not None:
            vectors = vectors * presence[:, None]
        places = places_from_end(inputs < num_items)
        return finish(body.apply(params.dense["body"], vectors, places, earlier(len(inputs)), key))

    def mean_loss(params, history, key):
        dropout_key, loss_key = jax.random.split(key)
        recent = last_items(history, max_length + 1, num_items)
        ids = recent[1:]
        # The last item is only ever a target: places count from the item before it.
        inputs = jnp.where(ids < num_items, recent[:-1], num_items)
        asked = Targets(queries(params, inputs, None, dropout_key), ids, ids < num_items, recent)
        return loss(scored, tower_params(params), asked, loss_key)

    def query(params, history, presence):
        recent = last_items(history, max_length, num_items)
        if presence is not None:
            presence = last_items_of(presence, history, max_length, num_items)
        return queries(params, recent, presence, None)[jnp.maximum(jnp.sum(recent < num_items) - 1, 0)]

    return SequenceModel(
        init=partial(init_with_items, items, lambda key: {"body": body.init(key)}),
        loss=mean_loss,
        query=query,
        catalogue=lambda params: scored.all(tower_params(params)),
        num_items=num_items,
        max_length=max_length,
        places=lambda params, history: queries(params, history, None, None),
    )


def init_with_items(items: ItemTower, init_rest, key: jax.Array) -> Shared:
    """Parameters of a model: the item side's, and a dict ``init_rest(key)`` of others."""
    items_key, rest_key = jax.random.split(key)
    tower = items.init(items_key)
    return Shared(tower.tables, {"items": tower.dense, **init_rest(rest_key)})


def tower_params(params: Shared) -> Shared:
    """The item side's part of a model's parameters."""
    return Shared(params.tables, params.dense["items"])


def _block(dim, num_heads, dropout, rngs):
    return TransformerBlock(dim, num_heads=num_heads, hidden=dim, activation=jax.nn.relu, dropout=dropout, rngs=rngs)

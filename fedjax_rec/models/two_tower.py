"""Two towers: a query made of a history, item vectors of any item side, and their product.

With v_i the item side's vector of item i, and the history's items up to place t,

    a_t = sum_{s <= t} alpha_s v_{i_s} / sum_{s <= t} alpha_s     alpha = 1, or exp(u . tanh(W v_{i_s}))
    q_t = f(a_t)                                                  f: a ReLU tower, or nothing
    score of item j = <q_t / |q_t|, v_j / |v_j|> / temperature

and the loss is a softmax whose negatives are drawn from a distribution p over items, with every score corrected by the
log of how often its item is drawn,

    -mean_t log e^{s_t i_t} / (e^{s_t i_t} + sum_{j in N} e^{s_tj - log(k p_j)}),   N: k draws from p

so that the denominator is that of the softmax over the catalogue in expectation, whatever p is. Without the correction,
items that are drawn often would be pushed down for being popular. Draws that hit the target do not count: its own score
is there once already.

Yi et al., 2019, "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations" (RecSys); queries from
an averaged history after Covington, Adams and Sargin, 2016, "Deep Neural Networks for YouTube Recommendations".

Differs from the papers: p is given and not estimated from a stream; the target's score is not corrected. On one client
there is no batch of other users, so negatives are drawn from p: uniform, or released counts of items. `in_batch_loss`
is for training in one place, with other users' targets as in the paper. The query reads the history alone.
"""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_rec.models.base import Shared
from fedjax_rec.models.click_network import Mlp
from fedjax_rec.models.items import ItemTower
from fedjax_rec.models.nnx import pure_module
from fedjax_rec.models.sasrec import init_with_items, tower_params
from fedjax_rec.models.sequence import SequenceModel, last_items, last_items_of
from fedjax_rec.models.sequence_losses import mean_over

POOLINGS = ("mean", "attention")


def two_tower(
    items: ItemTower,
    *,
    max_length: int = 50,
    pooling: str = "mean",
    hidden: Sequence[int] = (),
    temperature: float = 0.05,
    num_negatives: int = 128,
    item_probs: jax.Array | None = None,
) -> SequenceModel:
    """Two towers over any item side.

    Shared: the item side's tables; dense "items", what else the item side has, and "user", the user tower by name.

    Args:
      items: where item vectors come from, such as ``id_table(num_items, dim=32)``.
      max_length: most items of a history that count.
      pooling: "mean", or "attention" that learns which items say more.
      hidden: width of each ReLU layer of the user tower before a linear one back to ``items.dim``; none leaves the
        pooled vector as it is.
      temperature: positive; scores lie in [-1, 1] over it.
      num_negatives: k, drawn once for a history.
      item_probs: p, float32 ``[num_items]``, sums to 1; None for uniform. Under differential privacy it must be public
        or released, as it is part of the loss. Items of probability 0 are never drawn.

    Raises:
      ValueError: for settings out of range.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}; got {pooling!r}.")
    if max_length < 1 or num_negatives < 1 or not temperature > 0:
        raise ValueError(
            f"max_length and num_negatives must be at least 1 and temperature positive; got {max_length}, "
            f"{num_negatives} and {temperature}."
        )
    if item_probs is not None and jnp.shape(item_probs) != (items.num_items,):
        raise ValueError(f"item_probs must be [{items.num_items}], one an item; got {list(jnp.shape(item_probs))}.")
    num_items = items.num_items
    tower = pure_module(lambda rngs: _UserTower(items.dim, tuple(hidden), pooling == "attention", rngs))
    log_probs = jnp.full(num_items, -math.log(num_items)) if item_probs is None else jnp.log(item_probs)

    def queries(params, inputs, presence):
        vectors = items.take(tower_params(params), inputs)
        if presence is not None:
            vectors = vectors * presence[:, None]
        pooled = tower.apply(params.dense["user"], vectors, inputs < num_items)
        return unit(pooled) / temperature

    def loss(params, history, key):
        recent = last_items(history, max_length + 1, num_items)
        ids = recent[1:]
        asked = queries(params, jnp.where(ids < num_items, recent[:-1], num_items), None)
        drawn = jax.random.categorical(key, log_probs, shape=(num_negatives,))
        target = jnp.sum(asked * unit(items.take(tower_params(params), ids)), axis=1)
        others = jnp.matmul(asked, unit(items.take(tower_params(params), drawn)).T, precision="highest")
        others -= (log_probs[drawn] + math.log(num_negatives))[None, :]
        others = jnp.where(drawn[None, :] == ids[:, None], -jnp.inf, others)
        return mean_over(_surprise(target, others), ids < num_items)

    def query(params, history, presence):
        recent = last_items(history, max_length, num_items)
        if presence is not None:
            presence = last_items_of(presence, history, max_length, num_items)
        return queries(params, recent, presence)[jnp.maximum(jnp.sum(recent < num_items) - 1, 0)]

    return SequenceModel(
        init=partial(init_with_items, items, lambda key: {"user": tower.init(key)}),
        loss=loss,
        query=query,
        catalogue=lambda params: unit(items.all(tower_params(params))),
        num_items=num_items,
        max_length=max_length,
        places=lambda params, history: queries(params, history, None),
    )


def in_batch_loss(
    model: SequenceModel, params: Shared, histories: jax.Array, targets: jax.Array, item_probs: jax.Array
) -> jax.Array:
    """The loss of a batch of users, each with the others' targets as negatives: float32 scalar.

    Another user's target is a draw from p, so its score is corrected as above. Not for clients, who see no batch.

    Args:
      model: from `two_tower`.
      params: its parameters.
      histories: int32 ``[B, L]``, padded behind with ``num_items``.
      targets: int32 ``[B]``, what came next; two or more users.
      item_probs: float32 ``[num_items]``, how often each item is a target, such as its share of all interactions.

    Raises:
      ValueError: for a batch of one.
    """
    if len(targets) < 2:
        raise ValueError("A batch of one user has no other users' targets for negatives; take two or more.")
    asked = jax.vmap(lambda history: model.query(params, history, None))(histories)
    scores = jnp.matmul(asked, model.catalogue(params)[targets].T, precision="highest")
    others = scores - (jnp.log(item_probs[targets]) + math.log(len(targets) - 1))[None, :]
    others = jnp.where(targets[None, :] == targets[:, None], -jnp.inf, others)
    return _surprise(jnp.diagonal(scores), others).mean()


def unit(vectors: jax.Array) -> jax.Array:
    """Vectors ``[..., dim]`` over their norms; zero stays zero, and so does its gradient."""
    squares = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    return jnp.where(squares > 0, vectors * jax.lax.rsqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def _surprise(target: jax.Array, others: jax.Array) -> jax.Array:
    """-log of the target's share, ``[n]``, from its score ``[n]`` and corrected scores ``[n, k]``."""
    return jax.nn.logsumexp(jnp.concatenate([target[:, None], others], axis=1), axis=1) - target


class _UserTower(nnx.Module):
    """Vectors ``[L, dim]`` of a history's items, and which are real, to ``[L, dim]`` after each place."""

    def __init__(self, dim: int, widths: tuple[int, ...], attention: bool, rngs: nnx.Rngs):
        self.attention = nnx.Linear(dim, dim, rngs=rngs) if attention else None
        self.weigh = nnx.Linear(dim, 1, use_bias=False, rngs=rngs) if attention else None
        self.deep = Mlp(dim, widths, rngs) if widths else None
        self.out = nnx.Linear(widths[-1], dim, rngs=rngs) if widths else None

    def __call__(self, vectors, real):
        weights = real.astype(jnp.float32)
        if self.attention is not None:
            logits = self.weigh(jnp.tanh(self.attention(vectors)))[:, 0]
            # A shift common to all places cancels, so that it tells no place of later ones.
            largest = jnp.max(jnp.where(real, logits, -jnp.inf), initial=-1e9)
            weights = jnp.where(real, jnp.exp(logits - jax.lax.stop_gradient(largest)), 0.0)
        total = jnp.cumsum(weights)[:, None]
        pooled = jnp.cumsum(jnp.where(real[:, None], weights[:, None] * vectors, 0.0), axis=0)
        pooled = jnp.where(total > 0, pooled / jnp.where(total > 0, total, 1.0), 0.0)
        return pooled if self.deep is None else self.out(self.deep(pooled))

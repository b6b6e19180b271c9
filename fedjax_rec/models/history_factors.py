"""Factors of a history: matrix factorisation whose user vector is a fading sum of what the history shows.

    q_t = a * sum_{s <= t} r^(t - s) v_{i_s} / sqrt(sum_{s <= t} r^(2 (t - s))) + c,    r = exp(-1 / recency)

for item vectors v, with a scale a and a constant c, ``[dim]`` each; item j scores <q_t, v_j>. It has no layers and no
table of users, and takes new users as they come: what a small device can hold. After FISM of Kabbur, Ning and Karypis,
2013, "FISM: Factored Item Similarity Models for Top-N Recommender Systems", which has two tables of items and no order.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_rec.models.items import ItemTower
from fedjax_rec.models.sasrec import init_with_items, tower_params
from fedjax_rec.models.sequence import SequenceModel, last_items, last_items_of
from fedjax_rec.models.sequence_losses import SequenceLoss, Targets, full_cross_entropy


class _Bag(NamedTuple):
    """Sums of what each place shows."""

    totals: jax.Array
    counts: jax.Array


def history_factors(
    items: ItemTower, *, max_length: int = 200, recency: float = 10.0, loss: SequenceLoss | None = None
) -> SequenceModel:
    """The smallest sequence model; see the module.

    Shared: the item side's tables; dense "items", what else the item side has, "scale" and "constant" ``[dim]``.

    Args:
      items: where item vectors come from.
      max_length: most items of a history that count.
      recency: how fast the past fades, in items.
      loss: from `sequence_losses`, or `distilled`; None = `full_cross_entropy()`.

    Raises:
      ValueError: for a recency that is not positive, or no length.
    """
    if not recency > 0 or max_length < 1:
        raise ValueError(f"recency must be positive and max_length at least 1; got {recency} and {max_length}.")
    loss = full_cross_entropy() if loss is None else loss
    num_items = items.num_items
    decay = math.exp(-1.0 / recency)

    def init_rest(key):
        del key
        return {"scale": jnp.ones(items.dim), "constant": jnp.zeros(items.dim)}

    def places(params, history, presence=None):
        real = (history < num_items).astype(jnp.float32)
        shown = real if presence is None else real * presence
        vectors = items.take(tower_params(params), history) * shown[:, None]

        def step(bag, row):
            vector, one = row
            bag = _Bag(decay * bag.totals + vector, decay**2 * bag.counts + one)
            return bag, bag

        bags = jax.lax.scan(step, _Bag(jnp.zeros(items.dim), jnp.zeros(())), (vectors, real))[1]
        means = bags.totals * jax.lax.rsqrt(jnp.maximum(bags.counts, 1e-6))[:, None]
        return means * params.dense["scale"][None, :] + params.dense["constant"][None, :]

    def query(params, history, presence):
        recent = last_items(history, max_length, num_items)
        if presence is not None:
            presence = last_items_of(presence, history, max_length, num_items)
        return places(params, recent, presence)[jnp.maximum(jnp.sum(recent < num_items) - 1, 0)]

    def mean_loss(params, history, key):
        recent = last_items(history, max_length + 1, num_items)
        ids = recent[1:]
        asked = Targets(places(params, recent[:-1]), ids, ids < num_items, recent)
        return loss(items, tower_params(params), asked, key)

    return SequenceModel(
        init=lambda key: init_with_items(items, init_rest, key),
        loss=mean_loss,
        query=query,
        catalogue=lambda params: items.all(tower_params(params)),
        num_items=num_items,
        max_length=max_length,
        places=places,
    )

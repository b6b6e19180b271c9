"""The plainest recommender of the next item on any item side: a history is the mean of its items' vectors.

    q_u = norm(mean over shown i of v_i) K + c,    score of j = <q_u, v_j>

A step shows a random part of a history and asks for the rest, by cross-entropy over the catalogue: one query a user, so
that an epoch takes as long as a matrix product. The order of items is not used.
"""

import jax
import jax.numpy as jnp

from fedjax_rec.models.base import Shared
from fedjax_rec.models.items import ItemTower
from fedjax_rec.models.sequence import SequenceModel, last_items, last_items_of


def mean_user(items: ItemTower, *, max_length: int = 200, dropout: float = 0.5) -> SequenceModel:
    """The recommender; shared as the item side has it, with dense "items" and "body".

    Args:
      items: where item vectors come from.
      max_length: most items of a history that count.
      dropout: share of a history that is asked for in a step, and not shown.
    """
    num_items = items.num_items

    def init(key):
        tower = items.init(key)
        body = {"out.kernel": jnp.eye(items.dim), "out.bias": jnp.zeros(items.dim)}
        return Shared(tower.tables, {"items": tower.dense, "body": body})

    def catalogue(params):
        return items.all(Shared(params.tables, params.dense["items"]))

    def query_of(params, table, history, weights):
        vectors = jnp.take(table, history, axis=0, mode="clip")
        mean = jnp.sum(vectors * weights[:, None], axis=0)
        mean = mean * jax.lax.rsqrt(jnp.mean(mean**2) + 1e-8)
        return mean @ params.dense["body"]["out.kernel"] + params.dense["body"]["out.bias"]

    def loss(params, history, key):
        history = last_items(history, max_length, num_items)
        real, table = history < num_items, catalogue(params)
        shown = jax.random.bernoulli(key, 1.0 - dropout, history.shape) & real
        asked = real & ~shown
        scores = table @ query_of(params, table, history, shown.astype(jnp.float32))
        surprise = jax.nn.logsumexp(scores) - scores.at[history].get(mode="clip")
        return jnp.where(asked, surprise, 0.0).sum() / jnp.maximum(asked.sum(), 1)

    def query(params, history, presence):
        recent = last_items(history, max_length, num_items)
        weights = (recent < num_items).astype(jnp.float32)
        if presence is not None:
            weights = weights * last_items_of(presence, history, max_length, num_items)
        return query_of(params, catalogue(params), recent, weights)

    return SequenceModel(init, loss, query, catalogue, num_items, max_length)

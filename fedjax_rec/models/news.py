"""NRMS's user tower: self-attention over the vectors of what a user clicked, pooled by attention, and a dot product.

    h_i = sum_j softmax_j(<Q d_i, K d_j> / sqrt(dim / heads)) V d_j        for each head, then side by side
    u   = sum_i softmax_i(<q, tanh(W h_i + b)>) h_i
    score of news j = <u, d_j>,      loss = -log softmax of one clicked news among it and K others

for vectors d of clicked news, in any order. Wu, Wu, Ge, Qi, Huang, Xie, 2019, "Neural News Recommendation with
Multi-Head Self-Attention". Where the vectors come from is the `ItemTower`'s matter: a table, or an encoder of titles.

Differs from the paper: queries and keys are projected to a head's width, where the paper has one matrix over whole
vectors; V starts as the identity and Q, K, q small, so that the first tower takes about the mean of the clicked
vectors, which already ranks if the vectors mean something; no dropout.
"""

import jax
import jax.numpy as jnp

from fedjax_rec.federated.rows import take_rows
from fedjax_rec.models.base import Shared
from fedjax_rec.models.items import ItemTower
from fedjax_rec.models.sequence import SequenceModel, last_items, last_items_of


def nrms(
    items: ItemTower,
    *,
    max_length: int = 50,
    num_heads: int = 4,
    pool_size: int = 32,
    num_negatives: int | None = 4,
    num_targets: int = 1,
    item_bias: jax.Array | None = None,
) -> SequenceModel:
    """A news recommender of one history.

    The loss of a history is of one place in it, drawn uniformly: the items before are shown, and each of the next
    ``num_targets`` is the positive of a softmax. For recorded impressions, see `impression_loss`.

    With an ``item_bias`` every score has a fixed, public part, such as the logarithm of released counts: catalogue and
    query then have one column more, of the bias and of 1.

    Args:
      items: vectors of news.
      max_length: clicked news that count, the newest.
      num_heads: of self-attention; they divide the length of a vector.
      pool_size: width of the pooling attention.
      num_negatives: K of the loss, drawn uniformly from the catalogue; None = a softmax over all of it.
      num_targets: positives that follow the drawn place.
      item_bias: float32 ``[num_items]``.

    Raises:
      ValueError: for sizes below 1, or heads that do not divide the vectors.
    """
    if min(max_length, num_heads, pool_size, num_targets) < 1 or (num_negatives is not None and num_negatives < 1):
        raise ValueError(
            "NRMS needs max_length, num_heads, pool_size, num_targets and num_negatives of at least 1; got "
            f"{max_length}, {num_heads}, {pool_size}, {num_targets}, {num_negatives}."
        )
    if items.dim % num_heads:
        raise ValueError(f"num_heads must divide the vectors' length {items.dim}; got {num_heads}.")
    num_items = items.num_items
    bias = None if item_bias is None else jnp.asarray(item_bias, jnp.float32)[:, None]

    def init(key):
        item_key, tower_key = jax.random.split(key)
        params = items.init(item_key)
        return Shared(params.tables, {"items": params.dense, "tower": init_tower(tower_key, items.dim, pool_size)})

    def vectors_of(params):
        return Shared(params.tables, params.dense["items"])

    def query(params, history, presence=None):
        if presence is not None:
            presence = last_items_of(presence, history, max_length, num_items)
        history = last_items(history, max_length, num_items)
        clicked = items.take(vectors_of(params), history)
        if presence is not None:
            clicked = clicked * presence[:, None]
        user = user_vector(params.dense["tower"], clicked, history < num_items, num_heads=num_heads)
        return user if bias is None else jnp.append(user, 1.0)

    def catalogue(params):
        vectors = items.all(vectors_of(params))
        return vectors if bias is None else jnp.concatenate([vectors, bias], axis=1)

    def some(params, ids):
        vectors = items.take(vectors_of(params), ids)
        return vectors if bias is None else jnp.concatenate([vectors, take_rows(bias, ids)], axis=-1)

    def loss(params, history, key):
        place_key, negative_key = jax.random.split(key)
        length = jnp.sum(history < num_items)
        place = jax.random.randint(place_key, (), 1, jnp.maximum(length, 2))
        asked = query(params, jnp.where(jnp.arange(len(history)) < place, history, num_items))
        ahead = place + jnp.arange(num_targets)
        targets = history.at[ahead].get(mode="fill", fill_value=num_items)
        if num_negatives is None:
            scores = catalogue(params) @ asked
            own = scores.at[targets].get(mode="clip")
            losses = jax.nn.logsumexp(scores) - own
        else:
            drawn = jax.random.randint(negative_key, (num_targets, num_negatives), 0, num_items)
            candidates = jnp.concatenate([targets[:, None], drawn], axis=1)
            repeats = jnp.concatenate([jnp.zeros((num_targets, 1), bool), drawn == targets[:, None]], axis=1)
            scores = some(params, candidates) @ asked
            losses = -jax.nn.log_softmax(jnp.where(repeats, -jnp.inf, scores), axis=1)[:, 0]
        real = (targets < num_items) & (length > 1)
        return jnp.where(real, losses, 0.0).sum() / jnp.maximum(real.sum(), 1)

    return SequenceModel(
        init=init,
        loss=loss,
        query=query,
        catalogue=catalogue,
        num_items=num_items,
        max_length=max_length,
    )


def init_tower(key: jax.Array, dim: int, pool_size: int) -> dict[str, jax.Array]:
    """Parameters of a user tower that starts as about the mean of the clicked vectors."""
    query_key, key_key, pool_key, ask_key = jax.random.split(key, 4)
    return {
        "query": jax.random.normal(query_key, (dim, dim)) / (2 * dim) ** 0.5,
        "key": jax.random.normal(key_key, (dim, dim)) / (2 * dim) ** 0.5,
        "value": jnp.eye(dim),
        "pool": jax.random.normal(pool_key, (dim, pool_size)) / dim**0.5,
        "pool_bias": jnp.zeros(pool_size),
        "pool_query": 0.1 * jax.random.normal(ask_key, (pool_size,)),
    }


def user_vector(tower: dict[str, jax.Array], clicked: jax.Array, real: jax.Array, *, num_heads: int) -> jax.Array:
    """The vector of a user, float32 ``[dim]``; zero for one without clicks.

    Args:
      tower: from `init_tower`.
      clicked: float32 ``[n, dim]``.
      real: bool ``[n]``, False on padding.
      num_heads: of self-attention.
    """
    n, dim = clicked.shape
    clicked = jnp.where(real[:, None], clicked, 0.0)
    queries, keys, values = (
        (clicked @ tower[name]).reshape(n, num_heads, dim // num_heads) for name in ("query", "key", "value")
    )
    logits = jnp.einsum("ihd,jhd->hij", queries, keys) / (dim // num_heads) ** 0.5
    weights = _softmax(logits, real[None, None, :])
    heads = jnp.einsum("hij,jhd->ihd", weights, values).reshape(n, dim)
    asked = jnp.tanh(heads @ tower["pool"] + tower["pool_bias"][None, :]) @ tower["pool_query"]
    return _softmax(asked, real) @ heads


def impression_loss(model: SequenceModel, *, num_negatives: int = 4):
    """The loss of recorded impressions: each clicked news against K of those shown beside it and not clicked.

    A client's examples are its news with labels: 0 = of its history; k = clicked in its impression k; -k = shown in
    impression k and not clicked, for k = 1, 2, ... (`mind_clients` lays them out so). The mean is over clicked news of
    all impressions that show others too. An impression with fewer than K others gives as many as it has.

    Returns:
      ``(params, item_ids int32 [L], labels float32 [L], key) -> float32 scalar``, for `server_encoder`.
    """

    def loss(params, item_ids, labels, key):
        real = item_ids < model.num_items
        in_history = real & (labels == 0)
        order = jnp.argsort(~in_history, stable=True)
        history = jnp.where(in_history, item_ids, model.num_items)[order]
        scores = model.catalogue(params).at[item_ids].get(mode="clip") @ model.query(params, history, None)
        clicked = real & (labels > 0)
        beside = (labels[None, :] == -labels[:, None]) & clicked[:, None]
        # The K largest of random numbers: K different ones of those beside, uniformly.
        coins = jnp.where(beside, jax.random.uniform(key, beside.shape), -1.0)
        drawn, places = jax.lax.top_k(coins, min(num_negatives, len(item_ids)))
        others = jnp.where(drawn >= 0, scores[places], -jnp.inf)
        losses = jax.nn.logsumexp(jnp.concatenate([scores[:, None], others], axis=1), axis=1) - scores
        counted = clicked & jnp.any(beside, axis=1)
        return jnp.where(counted, losses, 0.0).sum() / jnp.maximum(counted.sum(), 1)

    return loss


def _softmax(logits: jax.Array, real: jax.Array) -> jax.Array:
    """Over the last axis, among real places; zero where none is."""
    weights = jax.nn.softmax(jnp.where(real, logits, -1e30), axis=-1)
    return jnp.where(real, weights, 0.0)

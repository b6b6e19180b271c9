"""The definition of every rank metric, as a sum over users.

Notation: R = a user's held-out positives, r_p = 1-based rank of positive p among all candidates (other positives
included), k = cut-off. Every metric is computed from two curves over the first ranks: how much relevance is expected at
rank r, and how probable it is that the first positive stands at or above r. Without ties both are 0/1.

Metrics of one user lie in [0, 1] and add up over users: `MetricState` is a sum that a device, a secure sum or a noised
sum can form alike; `finalize` turns it into numbers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.evaluation.ranks import Ranks

TIES = ("expected", "pessimistic", "optimistic")
_AT_K = ("hit", "recall", "recall_capped", "precision", "ndcg", "mrr", "map")


class MetricState(NamedTuple):
    """Sums over users; add two of them with `jax.tree.map(jnp.add, a, b)`."""

    sums: jax.Array  # float32 [metrics], in the order of `metric_names`; a user moves each entry by at most 1
    num_users: jax.Array  # float32 []
    exposure: jax.Array  # float32 [cut-offs, items], how many lists show an item; a user moves row k by k entries of 1


class _Places(NamedTuple):
    """Positives with their ties resolved: p is uniform over `window` ranks from `first` + 1 on; all `[B, P]`."""

    first: jax.Array  # int32, candidates certainly before p
    window: jax.Array  # int32, ranks that p may take
    above: jax.Array  # int32, positives certainly before p
    beside: jax.Array  # int32, other positives in the same window
    real: jax.Array  # bool


def metric_names(ks: Sequence[int]) -> tuple[str, ...]:
    """Names of the per-user metrics in the order of `user_metrics`: "hit@5", ..., "map@50", "auc"."""
    return (*(f"{name}@{k}" for name in _AT_K for k in ks), "auc")


def user_metrics(ranks: Ranks, *, ks: tuple[int, ...], ties: str = "expected") -> jax.Array:
    """Every rank metric of every user, float32 `[B, metrics]` in the order of `metric_names`.

    - hit@k: 1 if any r_p <= k.
    - recall@k: hits / |R|. recall_capped@k: hits / min(k, |R|), Liang et al. (2018), "Variational Autoencoders for
      Collaborative Filtering". precision@k: hits / k.
    - ndcg@k: sum of 1 / log2(1 + r_p) over r_p <= k, divided by the same sum for the best list, min(k, |R|) long.
    - mrr@k: 1 / min r_p, 0 past k.
    - map@k: sum over r_p <= k of (positives up to r_p) / r_p, divided by min(k, |R|).
    - auc: the share of pairs (positive, negative) that are ordered rightly, over all candidates that are no positive;
      1/2 for a user with no negative.

    Args:
      ranks: of one chunk.
      ks: cut-offs.
      ties: "expected" takes the mean over all orders of equal scores (an equal negative counts 1/2 in auc);
        "pessimistic" puts equal negatives before the positive, "optimistic" behind it.
    """
    places = _resolve_ties(ranks, ties)
    cut = jnp.asarray(ks) - 1
    rank = jnp.arange(1, max(ks) + 1)
    discount = 1.0 / jnp.log2(1.0 + rank)
    num_positives = ranks.real.sum(axis=1)[:, None]
    capped = jnp.minimum(jnp.asarray(ks)[None, :], num_positives)
    relevance, precision_sum = _relevance_curves(places, rank)
    found = _first_positive_curve(places, rank)
    newly = jnp.diff(found, axis=1, prepend=0.0)
    hits = jnp.cumsum(relevance, axis=1)[:, cut]
    ideal = jnp.cumsum(discount)[jnp.maximum(capped, 1) - 1]
    at_k = (
        found[:, cut],
        hits / num_positives,
        hits / capped,
        hits / jnp.asarray(ks)[None, :],
        jnp.cumsum(relevance * discount[None, :], axis=1)[:, cut] / ideal,
        jnp.cumsum(newly / rank[None, :], axis=1)[:, cut],
        jnp.cumsum(precision_sum / rank[None, :], axis=1)[:, cut] / capped,
    )
    return jnp.concatenate([*at_k, _auc(ranks, places)[:, None]], axis=1).astype(jnp.float32)


def metric_state(user_values: jax.Array, *, real: jax.Array, exposure: jax.Array) -> MetricState:
    """The sum over the real users of a chunk.

    Args:
      user_values: float32 `[B, metrics]`.
      real: bool `[B]`, False = padding.
      exposure: float32 `[cut-offs, items]`, already over real users only.
    """
    sums = jnp.where(real[:, None], user_values, 0.0).sum(axis=0)
    return MetricState(sums, real.sum(dtype=jnp.float32), exposure)


def empty_state(*, ks: Sequence[int], num_items: int) -> MetricState:
    """The state of nobody."""
    return MetricState(jnp.zeros(len(metric_names(ks))), jnp.zeros(()), jnp.zeros((len(ks), num_items)))


def finalize(state: MetricState, *, ks: Sequence[int]) -> dict[str, float]:
    """Means over users by name; list metrics are in `lists.list_metrics`.

    Raises:
      ValueError: for a state without users.
    """
    num_users = float(state.num_users)
    if not num_users > 0:
        raise ValueError(f"A mean over {num_users:g} users is undefined; evaluate at least one user with a positive.")
    means = np.asarray(state.sums, np.float64) / num_users
    return dict(zip(metric_names(ks), means.tolist(), strict=True))


def _resolve_ties(ranks: Ranks, ties: str) -> _Places:
    both = ranks.real[:, :, None] & ranks.real[:, None, :]
    above = (both & (ranks.better[:, None, :] < ranks.better[:, :, None])).sum(axis=2)
    equal = both & (ranks.better[:, None, :] == ranks.better[:, :, None])
    beside = equal.sum(axis=2) - ranks.real
    if ties == "expected":
        return _Places(ranks.better, ranks.tied + 1, above, beside, ranks.real)
    order = jnp.arange(ranks.better.shape[1])
    before = (equal & (order[None, None, :] < order[None, :, None])).sum(axis=2)
    first = ranks.better + before + (ranks.tied - beside if ties == "pessimistic" else 0)
    return _Places(first, jnp.ones_like(first), above + before, jnp.zeros_like(beside), ranks.real)


def _relevance_curves(places: _Places, rank: jax.Array) -> tuple[jax.Array, jax.Array]:
    """E[rel(r)] and E[rel(r) * (positives up to r)] at each rank, both `[B, ranks]`.

    Within one window any two positives stand at any two different ranks with equal probability, so that, given p at r,
    each of the `beside` others is before r with probability (r - first - 1) / (window - 1).
    """
    offset = rank[None, None, :] - places.first[:, :, None]  # 1 at the first rank that p may take
    window = places.window[:, :, None]
    inside = (offset >= 1) & (offset <= window) & places.real[:, :, None]
    prob = jnp.where(inside, 1.0 / window, 0.0)
    before = places.beside[:, :, None] * (offset - 1) / jnp.maximum(window - 1, 1)
    return prob.sum(axis=1), (prob * (places.above[:, :, None] + 1 + before)).sum(axis=1)


def _first_positive_curve(places: _Places, rank: jax.Array) -> jax.Array:
    """P(min r_p <= r) at each rank, `[B, ranks]`.

    Only the first window matters. Of its `window` ranks the first x hold none of its m positives with probability
    C(window - x, m) / C(window, m), written here as a product of m factors.
    """
    first = jnp.where(places.real, places.first, jnp.iinfo(jnp.int32).max)
    best = jnp.argmin(first, axis=1)[:, None]
    window = jnp.take_along_axis(places.window, best, axis=1)
    others = jnp.take_along_axis(places.beside, best, axis=1)
    taken = jnp.clip(rank[None, :] - jnp.take_along_axis(places.first, best, axis=1), 0, window)

    def factor(j, missed):
        share = jnp.maximum(window - taken - j, 0) / jnp.maximum(window - j, 1)
        return missed * jnp.where(j <= others, share, 1.0)

    return 1.0 - jax.lax.fori_loop(0, others.max() + 1, factor, jnp.ones(taken.shape))


def _auc(ranks: Ranks, places: _Places) -> jax.Array:
    num_positives = ranks.real.sum(axis=1)
    num_negatives = (ranks.num_candidates - num_positives)[:, None]
    negatives_before = places.first - places.above
    negatives_beside = places.window - 1 - places.beside
    right = num_negatives - negatives_before - 0.5 * negatives_beside
    share = jnp.where(num_negatives > 0, right / jnp.maximum(num_negatives, 1), 0.5)
    return jnp.where(ranks.real, share, 0.0).sum(axis=1) / jnp.maximum(num_positives, 1)

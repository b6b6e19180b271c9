"""Metrics against a few sampled negatives: in closed form from exact ranks, or from a published candidate file.

Sampled metrics rank a positive among m negatives only. They are not the full-ranking metrics and may order two models
the other way round (Krichene, Rendle 2020, "On Sampled Metrics for Item Recommendation"), so their names end in the
number of negatives: "hit@10/99neg".
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import gammaln

from fedjax_rec.evaluation.exact import Evaluation, check_cut_offs, check_no_nan, chunks, gather_chunks
from fedjax_rec.evaluation.heldout import Cases
from fedjax_rec.evaluation.metrics import metric_names, user_metrics
from fedjax_rec.evaluation.ranks import Ranks
from fedjax_rec.evaluation.scorers import Scorer


def expect_sampled(
    evaluation: Evaluation, *, num_negatives: int = 99, ks: Sequence[int] = (1, 5, 10, 20), ties: str = "expected"
) -> Evaluation:
    """Expectation of sampled metrics over the draw of negatives and the order of ties, without sampling.

    Negatives are uniform without replacement from the user's candidates other than the positive: with b of the N
    better, the positive's rank among m sampled ones is 1 + a hypergeometric variable. If the tied window of t + 1
    places starts at b, the mean over its places is again two hypergeometric tails, by Vandermonde's identity:

        sum_{g < G} P(Hyp(N, g, m) = j) = (N + 1) / (m + 1) * P(Hyp(N + 1, G, m + 1) > j).

    Args:
      evaluation: of `evaluate`, with one positive a user.
      num_negatives: m.
      ks: cut-offs, at most m + 1.
      ties: as in `evaluate`.

    Returns:
      An `Evaluation` with hit, ndcg and mrr at each k, and auc, named "hit@10/99neg" and so on.

    Raises:
      ValueError: when a user has several positives or fewer candidates than m, or cut-offs do not fit.
    """
    ranks = evaluation.ranks
    if ranks.real.shape[1] != 1:
        raise ValueError(
            f"Sampled metrics are defined for one positive a user, and a user here has {ranks.real.sum(axis=1).max()}; "
            "use a leave-one-out split, or the full-ranking metrics."
        )
    ks = check_cut_offs(ks, num_negatives + 1, ties=ties)
    population = ranks.num_candidates.astype(np.int64) - 1
    if population.min() < num_negatives:
        raise ValueError(
            f"User id {evaluation.user_ids[population.argmin()]} has only {population.min()} items to sample "
            f"{num_negatives} negatives from; use a smaller num_negatives."
        )
    better, tied = ranks.better[:, 0].astype(np.int64), ranks.tied[:, 0].astype(np.int64)
    first = better + (tied if ties == "pessimistic" else 0)
    window = 1 + (tied if ties == "expected" else 0)
    prob = _rank_probabilities(first, window, population, num_negatives, max(ks))
    rank = np.arange(1, max(ks) + 1)
    curves = {"hit": prob, "ndcg": prob / np.log2(1 + rank), "mrr": prob / rank}
    suffix = f"/{num_negatives}neg"
    per_user = {f"{name}@{k}{suffix}": curve[:, :k].sum(axis=1) for name, curve in curves.items() for k in ks}
    per_user[f"auc{suffix}"] = 1 - (first + (window - 1) / 2) / population  # a uniform sample does not change it
    return _evaluation(per_user, evaluation.user_ids, ranks, ties, evaluation)


def evaluate_candidates(
    scorer: Scorer,
    cases: Cases,
    *,
    ks: Sequence[int] = (1, 5, 10, 20),
    ties: str = "expected",
    batch_size: int = 256,
) -> Evaluation:
    """Metrics of each positive among the published negatives of its user, as a candidate file prescribes.

    Seen items are not masked: the file alone says what is ranked. A positive listed among its own negatives is dropped
    there, so that such a user has fewer. With several positives, all are ranked together with the negatives.

    Args:
      scorer: the model.
      cases: with `candidates`.
      ks: cut-offs, at most the number of candidates and one positive.
      ties: as in `evaluate`.
      batch_size: users scored at a time.

    Returns:
      An `Evaluation` with every per-user metric of `evaluate`, named "hit@10/99neg" and so on, and no lists.

    Raises:
      ValueError: for cases without candidates, NaN scores, or cut-offs that do not fit.
    """
    if cases.candidates is None:
        raise ValueError(
            "These cases have no candidates; attach a candidate file to the split with with_candidates, or use "
            "expect_sampled for uniform negatives in closed form."
        )
    num_negatives = cases.candidates.shape[1]
    ks = check_cut_offs(ks, num_negatives + 1, ties=ties)
    rows, outputs = [], []
    for places, chunk in chunks(cases, min(batch_size, cases.num_cases)):
        padding = len(chunk.user_ids) - len(places)
        negatives = cases.candidates[np.concatenate([places, np.repeat(places[:1], padding)])]
        output = _evaluate_candidates(
            scorer.params, chunk.user_ids, chunk.positives, negatives, fn=scorer.fn, ks=ks, ties=ties
        )
        rows.append(places)
        outputs.append(output)
    user_values, ranks, has_nan = gather_chunks(rows, outputs, num_cases=cases.num_cases)
    check_no_nan(has_nan, cases)
    names = metric_names(ks)
    per_user = {f"{name}/{num_negatives}neg": user_values[:, column] for column, name in enumerate(names)}
    return _evaluation(per_user, cases.user_ids, ranks, ties, cases)


@partial(jax.jit, static_argnames=("fn", "ks", "ties"))
def _evaluate_candidates(params, user_ids, positives, negatives, *, fn, ks, ties):
    scores = fn(params, user_ids).astype(jnp.float32)
    num_items = scores.shape[1]
    own_negative = (negatives[:, :, None] == positives[:, None, :]).any(axis=2)
    real = positives < num_items
    listed = jnp.concatenate([positives, jnp.where(own_negative, num_items, negatives)], axis=1)
    is_listed = listed < num_items
    listed_scores = jnp.take_along_axis(scores, jnp.minimum(listed, num_items - 1), axis=1)
    against = listed_scores[:, : positives.shape[1], None]
    compared = is_listed[:, None, :]
    better = (compared & (listed_scores[:, None, :] > against)).sum(axis=2, dtype=jnp.int32)
    tied = (compared & (listed_scores[:, None, :] == against)).sum(axis=2, dtype=jnp.int32) - 1
    ranks = Ranks(better, tied, real, is_listed.sum(axis=1, dtype=jnp.int32))
    has_nan = (is_listed & jnp.isnan(listed_scores)).any(axis=1)
    return user_metrics(ranks, ks=ks, ties=ties), ranks, has_nan


def _rank_probabilities(
    first: np.ndarray, window: np.ndarray, population: np.ndarray, num_negatives: int, depth: int
) -> np.ndarray:
    """P(rank among the sample = r) for r = 1..depth, float64 `[cases, depth]`, for a rank uniform over a window."""
    upper = _tails(first + window, population, num_negatives, depth)
    lower = _tails(first, population, num_negatives, depth)
    scale = (population + 1) / ((num_negatives + 1) * window)
    return np.clip(scale[:, None] * (upper - lower), 0.0, 1.0)


def _tails(successes: np.ndarray, population: np.ndarray, num_negatives: int, depth: int) -> np.ndarray:
    """P(Hyp(N + 1, G, m + 1) > j) for j = 0..depth - 1; [cases, depth]."""
    j = np.arange(depth)[None, :]
    total, good, drawn = population[:, None] + 1, successes[:, None], num_negatives + 1
    log_prob = _log_choose(good, j) + _log_choose(total - good, drawn - j) - _log_choose(total, drawn)
    return 1.0 - np.cumsum(np.exp(log_prob), axis=1)


def _log_choose(n: np.ndarray, k: np.ndarray | int) -> np.ndarray:
    possible = (k >= 0) & (k <= n)
    k = np.clip(k, 0, n)
    return np.where(possible, gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1), -np.inf)


def _evaluation(per_user, user_ids, ranks, ties, source: Cases | Evaluation) -> Evaluation:
    return Evaluation(
        values={name: float(values.mean(dtype=np.float64)) for name, values in per_user.items()},
        per_user={name: values.astype(np.float32) for name, values in per_user.items()},
        user_ids=user_ids,
        ranks=ranks,
        exposure={},
        num_users_without_positives=source.num_users_without_positives,
        ties=ties,
        fingerprint=source.fingerprint,
    )

"""Metrics of recorded impressions, as in MIND: how each impression's clicked news rank among the news it showed.

Wu et al., 2020, "MIND: A Large-scale Dataset for News Recommendation". For one impression with clicked news P and
ranks r from 1 by falling score,

- auc: the share of pairs (clicked, not clicked) that are ordered rightly;
- mrr: mean over p in P of 1 / r_p. All clicked news count, and not the first alone;
- ndcg@k: sum of 1 / log2(1 + r_p) over p in P with r_p <= k, over the same sum for the best order.

The values are means over impressions. Equal scores count by their mean over all orders, which is exact here since each
metric is a sum over clicked news; elsewhere the order of the file decides. Impressions in which all or no news were
clicked have no auc; they are left out of all metrics and counted.
"""

from typing import NamedTuple

import numpy as np

METRICS = ("auc", "mrr", "ndcg@5", "ndcg@10")
_CUT_OFFS = (5, 10)


class ImpressionMetrics(NamedTuple):
    """What `impression_metrics` gives.

    Attributes:
      values: means over the impressions that count, by the names in ``METRICS``; NaN if none counts.
      per_impression: float64 ``[counted]`` each.
      counted: int64, which impressions count.
      num_left_out: impressions in which all or no news were clicked.
    """

    values: dict[str, float]
    per_impression: dict[str, np.ndarray]
    counted: np.ndarray
    num_left_out: int


def impression_metrics(scores: np.ndarray, clicked: np.ndarray, offsets: np.ndarray) -> ImpressionMetrics:
    """Metrics of impressions.

    Args:
      scores: float ``[shown]`` of all news of all impressions, higher is better.
      clicked: bool ``[shown]``.
      offsets: int64 ``[impressions + 1]``, where each impression starts.

    Raises:
      ValueError: if the lengths do not fit each other, or a score is NaN.
    """
    scores, clicked, offsets = np.asarray(scores), np.asarray(clicked, bool), np.asarray(offsets, np.int64)
    if not len(scores) == len(clicked) == offsets[-1] or offsets[0] != 0 or np.any(np.diff(offsets) < 0):
        raise ValueError(
            f"offsets must rise from 0 to the number of scores and of clicked; got {len(scores)} scores, "
            f"{len(clicked)} clicked and offsets from {offsets[0]} to {offsets[-1]}."
        )
    if np.any(np.isnan(scores)):
        raise ValueError(f"{int(np.isnan(scores).sum())} scores are NaN; the model diverged, or padding was scored.")
    lengths = np.diff(offsets)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((-scores, owner))
    by_rank = scores[order]
    first = np.ones(len(order), bool)
    first[1:] = (by_rank[1:] != by_rank[:-1]) | (owner[1:] != owner[:-1])
    starts, group = np.flatnonzero(first), np.cumsum(first) - 1  # groups of equal scores
    sizes = np.diff([*starts, len(order)])
    places = np.arange(len(order)) - offsets[owner] + 1  # ranks in one of the orders

    def expected(values):
        """Mean over a group of equal scores, at each place."""
        return (np.bincount(group, values, minlength=len(starts)) / sizes)[group]

    hit = clicked[order].astype(np.float64)
    num_clicked = np.bincount(owner, hit, minlength=len(lengths))
    num_others = lengths - num_clicked
    counted = np.flatnonzero((num_clicked > 0) & (num_others > 0))

    def total(values):
        return np.bincount(owner, values, minlength=len(lengths))[counted]

    hits_before = np.concatenate([[0.0], np.cumsum(hit)])
    clicked_above = hits_before[starts][group] - hits_before[offsets[owner]] + expected(hit) * sizes[group] / 2
    per = {"auc": total(clicked_above * (1 - hit)) / (num_clicked[counted] * num_others[counted])}
    per["mrr"] = total(hit * expected(1 / places)) / num_clicked[counted]
    discount = 1 / np.log2(1 + places)
    longest = int(num_clicked.max(initial=1))
    ideal = np.concatenate([[0.0], np.cumsum(1 / np.log2(2 + np.arange(longest)))])
    for k in _CUT_OFFS:
        best = ideal[np.minimum(num_clicked[counted].astype(int), k)]
        per[f"ndcg@{k}"] = total(hit * expected(np.where(places <= k, discount, 0.0))) / best
    values = {name: float(np.mean(per[name])) if len(counted) else np.nan for name in METRICS}
    return ImpressionMetrics(values, per, counted, len(lengths) - len(counted))

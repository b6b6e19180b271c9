"""Risk: the metrics of impressions are not those of MIND, or equal scores are ranked by luck."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_rec.evaluation.impressions import METRICS, impression_metrics


def of_one(scores, clicked):
    return impression_metrics(np.array(scores, float), np.array(clicked), np.array([0, len(scores)])).values


def test_a_hand_worked_impression():
    """Ranks of the clicked news are 2 and 5 of 5: two of the three pairs with rank 2 are right, none with rank 5."""
    values = of_one([0.9, 0.8, 0.7, 0.6, 0.5], [0, 1, 0, 0, 1])
    best = 1 + 1 / np.log2(3)
    assert values["auc"] == pytest.approx(2 / 6)
    assert values["mrr"] == pytest.approx((1 / 2 + 1 / 5) / 2)
    assert values["ndcg@5"] == pytest.approx((1 / np.log2(3) + 1 / np.log2(6)) / best)


def test_the_cut_off_and_the_best_list():
    clicked = np.zeros(12, int)
    clicked[6] = 1
    values = of_one(-np.arange(12.0), clicked)
    assert values["ndcg@5"] == 0
    assert values["ndcg@10"] == pytest.approx(1 / np.log2(8))
    perfect = of_one(-np.arange(12.0), [1] * 7 + [0] * 5)
    assert perfect["ndcg@5"] == perfect["auc"] == pytest.approx(1)
    assert perfect["mrr"] == pytest.approx(sum(1 / np.arange(1, 8)) / 7)


def test_means_are_over_impressions_and_those_without_a_pair_are_left_out():
    scores, clicked = np.array([2.0, 1.0, 1.0, 2.0, 3.0, 5.0, 4.0]), np.array([1, 0, 1, 0, 1, 0, 0], bool)
    found = impression_metrics(scores, clicked, np.array([0, 2, 4, 5, 5, 7]))
    assert found.counted.tolist() == [0, 1]
    assert found.num_left_out == 3
    assert found.values["auc"] == 0.5
    assert found.per_impression["mrr"].tolist() == [1.0, 0.5]
    nothing = impression_metrics(np.zeros(0), np.zeros(0, bool), np.zeros(1, int))
    assert np.isnan(nothing.values["auc"])


impressions = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=2, max_size=6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shown=impressions, other=impressions)
def test_equal_scores_count_by_their_mean_over_all_orders(shown, other):
    """By writing out every order, with sums over ranks as in MIND's own program; another impression stands beside."""
    parts = [part for part in (other, shown) if len({c for _, c in part}) == 2]
    if not parts:
        return
    scores, clicked = (np.array([x[i] for part in parts for x in part], float) for i in (0, 1))
    found = impression_metrics(scores, clicked > 0, np.cumsum([0, *map(len, parts)]))
    for place, part in enumerate(parts):
        orders = [
            [c for _, c in order]
            for order in itertools.permutations(part)
            if all(a[0] >= b[0] for a, b in itertools.pairwise(order))
        ]
        for name, metric in zip(METRICS, (auc, mrr, lambda x: ndcg(x, 5), lambda x: ndcg(x, 10)), strict=True):
            expected = np.mean([metric(np.array(order, float)) for order in orders])
            assert found.per_impression[name][place] == pytest.approx(expected)


def auc(y):
    return np.mean([i < j for i in np.flatnonzero(y) for j in np.flatnonzero(y == 0)])


def mrr(y):
    return np.sum(y / (np.arange(len(y)) + 1)) / np.sum(y)


def ndcg(y, k):
    def dcg(x):
        return np.sum((2 ** x[:k] - 1) / np.log2(np.arange(len(x[:k])) + 2))

    return dcg(y) / dcg(np.sort(y)[::-1])


def test_scores_that_are_none_are_refused():
    with pytest.raises(ValueError, match="1 scores are NaN"):
        of_one([1.0, np.nan], [0, 1])
    with pytest.raises(ValueError, match="2 scores"):
        impression_metrics(np.zeros(2), np.zeros(2, bool), np.array([0, 3]))

"""Risk: a metric with a familiar name and another definition. Each is worked by hand; other libraries stand beside.

What other libraries compute is written here as a formula, next to our number, on the same list.
"""

import numpy as np
import pytest
from evaluation_worlds import make_cases
from test_ranks import table_scorer

from fedjax_rec.evaluation import evaluate, list_metrics, rating_errors
from fedjax_rec.evaluation.ratings import finalize_ratings, rating_state

LOG2 = np.log2
# Ten candidates; the positives stand at ranks 1, 3 and 8. Item ids are shuffled on purpose.
RANKING = [7, 2, 9, 4, 0, 1, 6, 3, 8, 5]
POSITIVES = [7, 9, 3]


def by_rank(ranking):
    scores = np.zeros(len(ranking))
    scores[ranking] = -np.arange(len(ranking))
    return scores


@pytest.fixture(scope="module")
def worked():
    world = make_cases([[]], [POSITIVES], num_items=10)
    return evaluate(table_scorer([by_rank(RANKING)]), world, ks=(2, 5, 10)).values


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hit@2", 1),
        ("recall@2", 1 / 3),
        ("recall_capped@2", 1 / 2),
        ("precision@2", 1 / 2),
        ("ndcg@2", 1 / (1 + 1 / LOG2(3))),
        ("mrr@2", 1),
        ("map@2", 1 / 2),
        ("recall@5", 2 / 3),
        ("recall_capped@5", 2 / 3),
        ("precision@5", 2 / 5),
        ("ndcg@5", (1 + 1 / 2) / (1 + 1 / LOG2(3) + 1 / 2)),
        ("map@5", (1 + 2 / 3) / 3),
        ("recall@10", 1),
        ("precision@10", 3 / 10),
        ("ndcg@10", (1 + 1 / 2 + 1 / LOG2(9)) / (1 + 1 / LOG2(3) + 1 / 2)),
        ("map@10", (1 + 2 / 3 + 3 / 8) / 3),
        ("auc", (7 + 6 + 2) / 21),
    ],
)
def test_one_list_by_hand(worked, name, value):
    assert worked[name] == pytest.approx(value, abs=1e-6)


def test_first_positive_past_k_gives_zero():
    world = make_cases([[]], [[5]], num_items=10)
    values = evaluate(table_scorer([by_rank(RANKING)]), world, ks=(9, 10)).values
    assert [values[f"{name}@9"] for name in ("hit", "recall", "precision", "ndcg", "mrr", "map")] == [0] * 6
    assert values["mrr@10"] == pytest.approx(1 / 10)
    assert values["ndcg@10"] == pytest.approx(1 / LOG2(11))


def test_single_positive_in_a_tie_by_hand():
    # Two candidates are better, three share the positive's score: it stands at rank 3, 4, 5 or 6, each with 1/4.
    world = make_cases([[]], [[2]], num_items=8)
    scores = [[9, 8, 5, 5, 5, 5, 1, 0]]
    expected = evaluate(table_scorer(scores), world, ks=(2, 4, 6)).values
    assert [expected[f"hit@{k}"] for k in (2, 4, 6)] == pytest.approx([0, 2 / 4, 1])
    assert expected["ndcg@4"] == pytest.approx((1 / LOG2(4) + 1 / LOG2(5)) / 4)
    assert expected["mrr@6"] == pytest.approx((1 / 3 + 1 / 4 + 1 / 5 + 1 / 6) / 4)
    assert expected["auc"] == pytest.approx((2 + 3 / 2) / 7)
    worst = evaluate(table_scorer(scores), world, ks=(5, 6), ties="pessimistic").values
    assert [worst["hit@5"], worst["hit@6"]] == [0, 1]
    best = evaluate(table_scorer(scores), world, ks=(2, 3), ties="optimistic").values
    assert [best["hit@2"], best["hit@3"]] == [0, 1]


def test_two_positives_in_one_tie_by_hand():
    # Positives 0 and 1 share the top score with item 2: they take two of the first three ranks, each pair with 1/3.
    world = make_cases([[]], [[0, 1]], num_items=5)
    values = evaluate(table_scorer([[4, 4, 4, 1, 0]]), world, ks=(1, 2)).values
    assert values["hit@1"] == pytest.approx(2 / 3)
    assert values["hit@2"] == pytest.approx(1)
    assert values["recall@2"] == pytest.approx(2 / 3)
    assert values["mrr@2"] == pytest.approx(2 / 3 + 1 / 3 * 1 / 2)
    # Pairs of ranks (1,2), (1,3), (2,3): sums of precisions up to rank 2 are 2, 1 and 1/2.
    assert values["map@2"] == pytest.approx((2 + 1 + 1 / 2) / 3 / 2)


def test_recall_divides_by_all_positives_and_the_capped_one_does_not(worked):
    assert worked["recall@2"] == pytest.approx(1 / 3)  # RecBole, Cornac, microsoft/recommenders
    assert worked["recall_capped@2"] == pytest.approx(1 / min(2, 3))  # Mult-VAE, iALS, LensKit, recpack "calibrated"


def test_precision_is_not_the_ratio_of_sums_that_implicit_reports():
    world = make_cases([[], []], [[0], [1, 2, 3]], num_items=6)
    values = evaluate(table_scorer([by_rank([0, 1, 2, 3, 4, 5]), by_rank([1, 0, 2, 3, 4, 5])]), world, ks=(2,)).values
    hits, num_positives = np.array([1, 1]), np.array([1, 3])
    assert values["precision@2"] == pytest.approx(np.mean(hits / 2))
    implicit = hits.sum() / np.minimum(2, num_positives).sum()
    assert implicit == pytest.approx(2 / 3)
    assert values["precision@2"] != pytest.approx(implicit)
    # The mean of ratios with that denominator has its own name here.
    assert values["recall_capped@2"] == pytest.approx(np.mean(hits / np.minimum(2, num_positives)))


def test_ndcg_is_binary_and_not_graded_as_in_elliot(worked):
    gains = {
        7: 2 ** (3 - 3 + 1) - 1,
        9: 2 ** (5 - 3 + 1) - 1,
        3: 2 ** (4 - 3 + 1) - 1,
    }  # 2^(rating - threshold + 1) - 1
    found = sum(gains.get(item, 0) / LOG2(2 + place) for place, item in enumerate(RANKING[:5]))
    ideal = sum(gain / LOG2(2 + place) for place, gain in enumerate(sorted(gains.values(), reverse=True)))
    assert worked["ndcg@5"] == pytest.approx(1.5 / (1 + 1 / LOG2(3) + 1 / 2), abs=1e-6)
    assert abs(worked["ndcg@5"] - found / ideal) > 0.05


def test_map_has_the_denominator_of_map_at_k(worked):
    precisions = 1.0  # at rank 1, the only positive in the first two
    assert worked["map@2"] == pytest.approx(precisions / min(2, 3))  # microsoft/recommenders: map_at_k
    assert worked["map@2"] != pytest.approx(precisions / 3)  # microsoft/recommenders: map


def test_auc_counts_half_of_ties_and_cornac_counts_none():
    world = make_cases([[]], [[0]], num_items=5)
    scores = [[1, 1, 1, 0, 2]]
    assert evaluate(table_scorer(scores), world, ks=(1,)).values["auc"] == pytest.approx((1 + 2 / 2) / 4)
    cornac = np.mean(np.array(scores[0][0]) > np.array(scores[0][1:]))
    assert cornac == pytest.approx(1 / 4)
    assert evaluate(table_scorer(scores), world, ks=(1,), ties="pessimistic").values["auc"] == pytest.approx(cornac)


def test_auc_compares_with_items_the_user_never_touched():
    world = make_cases([[3, 4]], [[0, 1]], num_items=6)
    # Masked items 3 and 4 and the other positive are better than positive 0, and none of them counts.
    assert evaluate(table_scorer([[5, 7, 4, 9, 9, 6]]), world, ks=(1,)).values["auc"] == pytest.approx((1 + 2) / 4)


EXPOSURE = np.array([[4, 2, 0, 0], [4, 4, 3, 1]])  # of 4 items in the top-2 (3 users) and top-4 lists
ITEM_COUNTS = np.array([8, 4, 1, 0])


@pytest.fixture(scope="module")
def lists():
    return list_metrics(EXPOSURE, ks=(2, 4), item_counts=ITEM_COUNTS, num_train_users=8)


def test_list_metrics_by_hand(lists):
    assert [lists["coverage@2"], lists["coverage@4"]] == [0.5, 1]
    assert lists["gini@2"] == pytest.approx((-3 * 0 - 1 * 0 + 1 * 2 + 3 * 4) / (4 * 6))
    assert lists["entropy@2"] == pytest.approx(-(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3)))
    # -log2(8/8) = 0, -log2(4/8) = 1, -log2(1/8) = 3, and an item without train users counts as one that has one.
    assert lists["novelty@2"] == pytest.approx((4 * 0 + 2 * 1) / 6)
    assert lists["novelty@4"] == pytest.approx((4 * 0 + 4 * 1 + 3 * 3 + 1 * 3) / 12)


def test_extremes_of_concentration():
    even = list_metrics(np.full((1, 5), 3), ks=(3,), item_counts=np.ones(5), num_train_users=1)
    assert (even["gini@3"], even["entropy@3"]) == pytest.approx((0, np.log(5)))
    single = list_metrics(np.array([[0, 0, 9, 0, 0]]), ks=(1,), item_counts=np.ones(5), num_train_users=1)
    assert (single["gini@1"], single["entropy@1"]) == pytest.approx((4 / 5, 0))


def test_entropy_is_not_divided_by_the_distinct_items_as_in_recbole(lists):
    share = np.array([4, 2]) / 6
    recbole = -(share * np.log(share)).sum() / len(share)
    assert lists["entropy@2"] == pytest.approx(recbole * 2)


def test_coverage_counts_no_padding_item_as_recbole_does(lists):
    recbole_num_items = 4 + 1  # item 0 is padding there, and in the denominator
    assert lists["coverage@2"] == pytest.approx(2 / 4)
    assert lists["coverage@2"] != pytest.approx(2 / recbole_num_items)


def test_exposure_counts_the_lists_that_were_ranked():
    world = make_cases([[0], []], [[3], [3]], num_items=5)
    evaluation = evaluate(table_scorer([[9, 3, 2, 1, 0], [9, 3, 2, 1, 0]]), world, ks=(1, 2))
    assert evaluation.exposure[1].tolist() == [1, 1, 0, 0, 0]
    assert evaluation.exposure[2].tolist() == [1, 2, 1, 0, 0]
    assert evaluation.values["coverage@2"] == pytest.approx(3 / 5)


RATINGS = {"predicted": [3.0, 4.0, 7.0, 1.0], "actual": [3.0, 2.0, 5.0, 4.0], "user_ids": [0, 0, 0, 1]}


def test_rating_errors_by_hand_and_the_macro_ones_of_lenskit():
    errors = rating_errors(**RATINGS)
    assert errors.rmse == pytest.approx(np.sqrt((0 + 4 + 4 + 9) / 4))
    assert errors.mae == pytest.approx((0 + 2 + 2 + 3) / 4)
    assert errors.user_rmse == pytest.approx((np.sqrt(8 / 3) + 3) / 2)  # LensKit's rmse: the mean over users
    assert errors.user_mae == pytest.approx((4 / 3 + 3) / 2)
    np.testing.assert_allclose(errors.per_user["rmse"], [np.sqrt(8 / 3), 3], rtol=1e-6)


def test_clipped_rating_errors():
    assert rating_errors(**RATINGS, clip=(1, 5)).rmse == pytest.approx(np.sqrt((0 + 4 + 0 + 9) / 4))


def test_rating_states_add_up_and_ignore_padding():
    predicted, actual = (np.array([*RATINGS[name], np.nan], np.float32) for name in ("predicted", "actual"))
    real = np.array([True] * 4 + [False])
    whole = rating_state(predicted, actual, real=real)
    halves = [rating_state(predicted[cut], actual[cut], real=real[cut]) for cut in (slice(2), slice(2, 5))]
    assert [float(a + b) for a, b in zip(*halves, strict=True)] == pytest.approx([float(total) for total in whole])
    assert finalize_ratings(whole)["rmse"] == pytest.approx(rating_errors(**RATINGS).rmse)


def test_bad_ratings_raise():
    with pytest.raises(ValueError, match="1 of 2 ratings are NaN, first at row 1"):
        rating_errors([1.0, 2.0], [1.0, np.nan], user_ids=[5, 6])
    with pytest.raises(ValueError, match="as many predictions as ratings"):
        rating_errors([1.0], [1.0, 2.0], user_ids=[5, 6])

"""Risk: sampled metrics that differ from what sampling would give, or that treat a candidate file wrongly."""

import itertools

import numpy as np
import pytest
from evaluation_worlds import make_cases
from test_ranks import numpy_metrics, table_scorer

from fedjax_rec.evaluation import constant_scorer, evaluate, evaluate_candidates, expect_sampled

SCORES = [
    [5.0, 4.0, 3.0, 3.0, 3.0, 3.0, 2.0, 1.0],
    [0.0, 4.0, 1.0, 1.0, 1.0, 2.0, 2.0, 1.0],
    [7.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0],
]


@pytest.fixture(scope="module")
def world():
    return make_cases([[0], [], [1, 2]], [[3], [7], [4]], num_items=8)


def enumerate_samples(evaluation, world, *, num_negatives, k):
    """Mean of each metric over every sample of negatives and every order of ties, by listing all of them."""
    rows = []
    for case in range(world.num_cases):
        seen = world.seen_item_ids[world.seen_offsets[case] : world.seen_offsets[case + 1]]
        positive = world.positives[case, 0]
        negatives = [item for item in range(world.num_items) if item not in (positive, *seen)]
        values = []
        for sample in itertools.combinations(negatives, num_negatives):
            for order in itertools.permutations([positive, *sample]):
                ranking = sorted(order, key=lambda item: -SCORES[case][item])
                values.append(numpy_metrics(ranking, [positive], k))
        rows.append({name: np.mean([value[name] for value in values]) for name in ("hit", "ndcg", "mrr")})
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.mark.parametrize(("num_negatives", "k"), [(1, 1), (3, 1), (3, 2), (4, 3)])
def test_closed_form_equals_listing_every_sample(world, num_negatives, k):
    evaluation = evaluate(table_scorer(SCORES), world, ks=(1,))
    sampled = expect_sampled(evaluation, num_negatives=num_negatives, ks=(k,))
    for name, values in enumerate_samples(evaluation, world, num_negatives=num_negatives, k=k).items():
        np.testing.assert_allclose(sampled.per_user[f"{name}@{k}/{num_negatives}neg"], values, atol=1e-6)


def test_all_negatives_give_the_full_ranking():
    world = make_cases([[0], [1]], [[3], [7]], num_items=8)
    evaluation = evaluate(table_scorer(SCORES[:2]), world, ks=(1, 3))
    sampled = expect_sampled(evaluation, num_negatives=6, ks=(1, 3))
    for name in ("hit@1", "hit@3", "ndcg@3", "mrr@3", "auc"):
        np.testing.assert_allclose(sampled.per_user[f"{name}/6neg"], evaluation.per_user[name], atol=1e-6)


@pytest.mark.parametrize("ties", ["pessimistic", "optimistic"])
def test_named_tie_rules_bound_the_expectation(world, ties):
    by_rule = {}
    for rule in ("expected", ties):
        evaluation = evaluate(table_scorer(SCORES), world, ks=(1,), ties=rule)
        by_rule[rule] = expect_sampled(evaluation, num_negatives=3, ks=(2,), ties=rule).per_user["hit@2/3neg"]
    difference = by_rule[ties] - by_rule["expected"]
    assert np.all(difference <= 0 if ties == "pessimistic" else difference >= 0)
    assert np.any(difference != 0)


def test_constant_scores_give_chance_level_among_99_negatives():
    world = make_cases([[0]] * 4, [[7]] * 4, num_items=3706)
    sampled = expect_sampled(evaluate(constant_scorer(np.zeros(3706)), world, ks=(10,)))
    assert sampled.values["hit@10/99neg"] == pytest.approx(0.1, abs=1e-9)
    discounts = 1 / np.log2(1 + np.arange(1, 11))
    assert sampled.values["ndcg@10/99neg"] == pytest.approx(discounts.sum() / 100, abs=1e-9)
    assert sampled.values["auc/99neg"] == pytest.approx(0.5)


def test_closed_form_agrees_with_drawing_negatives():
    rng = np.random.default_rng(0)
    num_users, num_items, draws = 40, 300, 400
    scores = rng.integers(0, 60, (num_users, num_items)).astype(np.float32)
    scores[:, 7] += 30  # better than chance
    world = make_cases([[0]] * num_users, [[7]] * num_users, num_items=num_items)
    sampled = expect_sampled(evaluate(table_scorer(scores), world, ks=(10,)), num_negatives=50, ks=(10,))
    negatives = np.array([item for item in range(1, num_items) if item != 7])
    noise = rng.random((draws, num_users, num_items)) * 0.5  # breaks ties of whole numbers at random
    drawn = np.stack([rng.permuted(np.tile(negatives, (num_users, 1)), axis=1)[:, :50] for _ in range(draws)])
    noisy = scores[None] + noise
    better = np.take_along_axis(noisy, drawn, axis=2) > noisy[:, :, 7:8]
    hits = better.sum(axis=2) < 10
    error = hits.mean() - sampled.values["hit@10/50neg"]
    assert abs(error) < 4 * np.sqrt(hits.mean() * (1 - hits.mean()) / hits.size)


def test_several_positives_or_too_few_negatives_raise(world):
    several = evaluate(table_scorer(SCORES[:1]), make_cases([[0]], [[1, 2]], num_items=8), ks=(1,))
    with pytest.raises(ValueError, match="one positive a user, and a user here has 2"):
        expect_sampled(several, num_negatives=2, ks=(1,))
    evaluation = evaluate(table_scorer(SCORES), world, ks=(1,))
    with pytest.raises(ValueError, match="User id 2 has only 5 items to sample 6 negatives from"):
        expect_sampled(evaluation, num_negatives=6, ks=(1,))
    with pytest.raises(ValueError, match="between 1 and the 4 items"):
        expect_sampled(evaluation, num_negatives=3, ks=(5,))


def candidate_cases(candidates):
    return make_cases([[0], []], [[3], [7]], num_items=8, candidates=np.array(candidates, np.int32))


def test_candidate_file_ranks_among_its_items_only():
    # Seen item 0 is listed, so it competes: the file alone says what is ranked. User 1's list is shorter (8 = padding).
    evaluation = evaluate_candidates(table_scorer(SCORES[:2]), candidate_cases([[0, 4, 6], [0, 5, 8]]), ks=(1, 2, 3))
    assert evaluation.ranks.better[:, 0].tolist() == [1, 1]
    assert evaluation.ranks.tied[:, 0].tolist() == [1, 0]
    np.testing.assert_allclose(evaluation.per_user["hit@2/3neg"], [0.5, 1])
    np.testing.assert_allclose(evaluation.per_user["mrr@3/3neg"], [(1 / 2 + 1 / 3) / 2, 1 / 2])
    np.testing.assert_allclose(evaluation.per_user["auc/3neg"], [(1 + 1 / 2) / 3, 1 / 2])


def test_positive_among_its_own_negatives_is_dropped_there():
    listed = evaluate_candidates(table_scorer(SCORES[:2]), candidate_cases([[3, 4, 6], [7, 7, 5]]), ks=(1,))
    clean = evaluate_candidates(table_scorer(SCORES[:2]), candidate_cases([[8, 4, 6], [8, 8, 5]]), ks=(1,))
    np.testing.assert_array_equal(listed.ranks.tied, clean.ranks.tied)
    assert listed.ranks.num_candidates.tolist() == [3, 2]
    assert listed.values == clean.values


@pytest.mark.parametrize("batch_size", [1, 2])
def test_candidate_chunks_never_change_a_result(batch_size):
    world = candidate_cases([[0, 4, 6], [0, 5, 8]])
    whole = evaluate_candidates(table_scorer(SCORES[:2]), world, ks=(1, 2))
    assert evaluate_candidates(table_scorer(SCORES[:2]), world, ks=(1, 2), batch_size=batch_size).values == whole.values


def test_cases_without_candidates_and_nan_candidates_raise(world):
    with pytest.raises(ValueError, match="have no candidates"):
        evaluate_candidates(table_scorer(SCORES), world)
    scores = np.array(SCORES[:2])
    scores[1, 5] = np.nan
    with pytest.raises(ValueError, match="first to user id 1"):
        evaluate_candidates(table_scorer(scores), candidate_cases([[0, 4, 6], [0, 5, 8]]), ks=(1,))

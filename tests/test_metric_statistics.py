"""Risk: an interval that does not cover, a test that finds differences in noise, a spread that hides who is served."""

import dataclasses

import numpy as np
import pytest
from evaluation_worlds import make_cases
from test_ranks import table_scorer

from fedjax_rec.evaluation import (
    activity_quartiles,
    bootstrap_interval,
    evaluate,
    group_means,
    paired_test,
    spread,
)


def test_bootstrap_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        interval = bootstrap_interval(rng.exponential(size=80), confidence=0.9, num_resamples=300, seed=trial)
        assert interval.low <= interval.mean <= interval.high
        covered += interval.low <= 1.0 <= interval.high
    assert 0.83 <= covered / 200 <= 0.96  # 0.9 with three standard errors of 200 trials


def test_bootstrap_is_seeded_and_degenerates_for_equal_values():
    values = np.random.default_rng(1).random(50)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    constant = bootstrap_interval(np.full(9, 0.25))
    assert (constant.low, constant.mean, constant.high) == (0.25, 0.25, 0.25)


def test_bootstrap_of_nobody_raises():
    with pytest.raises(ValueError, match="at least one user"):
        bootstrap_interval(np.zeros(0))
    with pytest.raises(ValueError, match="confidence=95"):
        bootstrap_interval(np.zeros(4), confidence=95)


@pytest.fixture(scope="module")
def pair():
    """Two random models of equal quality, and one that is better, on 200 users."""
    world = make_cases([[]] * 200, [[0]] * 200, num_items=30)
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(3, 200, 30))
    scores[2, :, 0] += 1.0
    return [evaluate(table_scorer(table), world, ks=(10,)) for table in scores]


def test_paired_test_finds_a_real_difference_and_none_in_noise(pair):
    first, second, better = pair
    real = paired_test(better, first)
    assert real.difference.low > 0
    assert max(real.permutation_p, real.wilcoxon_p) < 0.01
    noise = paired_test(second, first)
    assert noise.difference.low < 0 < noise.difference.high
    assert min(noise.permutation_p, noise.wilcoxon_p) > 0.05
    opposite = paired_test(first, better)
    assert opposite.difference.mean == pytest.approx(-real.difference.mean)


def test_a_model_does_not_differ_from_itself(pair):
    same = paired_test(pair[0], pair[0])
    assert (same.permutation_p, same.wilcoxon_p, same.num_differ, same.num_users) == (1.0, 1.0, 0, 200)
    assert (same.difference.low, same.difference.high) == (0, 0)


def test_permutation_p_is_exact_for_a_few_users(pair):
    # Five users, all better by the same amount: of 32 sign flips only the two extreme ones are as far from zero.
    first = dataclasses.replace(pair[0], user_ids=np.arange(5), per_user={"ndcg@10": np.full(5, 0.5, np.float32)})
    second = dataclasses.replace(first, per_user={"ndcg@10": np.zeros(5, np.float32)})
    assert paired_test(first, second, num_resamples=20_000).permutation_p == pytest.approx(2 / 32, abs=0.006)


def test_paired_test_refuses_other_users_splits_and_metrics(pair):
    fewer = dataclasses.replace(pair[0], user_ids=pair[0].user_ids[1:])
    with pytest.raises(ValueError, match=r"200 users of .* and 199"):
        paired_test(pair[0], fewer)
    with pytest.raises(ValueError, match="same users of the same split"):
        paired_test(pair[0], dataclasses.replace(pair[0], fingerprint="another"))
    with pytest.raises(ValueError, match="No per-user values of 'ndcg@7'"):
        paired_test(pair[0], pair[1], metric="ndcg@7")


def test_spread_by_hand():
    result = spread(np.arange(20)[::-1] / 20)
    assert result.p50 == pytest.approx(9.5 / 20)
    assert result.worst_decile_mean == pytest.approx((0 + 1) / 2 / 20)
    assert spread(np.array([0.3])).worst_decile_mean == pytest.approx(0.3)
    assert (result.p10, result.p90) == pytest.approx((1.9 / 20, 17.1 / 20))


def test_group_means_and_gap_by_hand():
    result = group_means(np.array([0.0, 1.0, 0.5, 0.5]), np.array(["F", "M", "M", "F"]))
    assert result.means == {"F": 0.25, "M": 0.75}
    assert result.num_users == {"F": 2, "M": 2}
    assert result.gap == pytest.approx(0.5)
    with pytest.raises(ValueError, match="one group a user"):
        group_means(np.zeros(3), np.zeros(2))


def test_activity_quartiles_keep_equal_counts_together():
    assert activity_quartiles(np.array([1, 2, 3, 4])).tolist() == ["q1", "q2", "q3", "q4"]
    assert len(set(activity_quartiles(np.array([5, 5, 5, 5, 90])).tolist())) == 2

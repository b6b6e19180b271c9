"""Risk: a search over hyper-parameters that is drawn from another distribution than the one that is accounted."""

import math

import jax
import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import rdp_privacy_accountant
from scipy import stats

from fedjax_rec.privacy.accounting import RDP, privacy_spent
from fedjax_rec.privacy.ledger import Ledger
from fedjax_rec.privacy.selection import _gamma, _quantile, draw_repetitions, select_privately, selection_event

EVENT = dp_event.GaussianDpEvent(4.0)
UNIFORM = (np.arange(20_000) + 0.5) / 20_000


@pytest.mark.parametrize("shape", [0.0, 0.5, 1.0, 4.0, math.inf])
@pytest.mark.parametrize("mean", [1.5, 4.0, 16.0])
def test_repetitions_have_the_distribution_that_the_event_assumes(shape, mean):
    """Its parameter is dp_accounting's, its mean is as asked, and its probabilities are scipy's."""
    drawn = np.array([_quantile(u, mean, shape) for u in UNIFORM[::10]])
    most = drawn.max()
    if shape == math.inf:
        expected = stats.poisson.pmf(np.arange(most + 1), mean)
    else:
        # The accountant rounds to the safe side, by 1e-9.
        gamma = rdp_privacy_accountant._gamma_truncated_negative_binomial(shape, mean)
        assert _gamma(mean, shape) == pytest.approx(gamma, rel=1e-6)
        if shape == 0:
            expected = np.concatenate([[0], stats.logser.pmf(np.arange(1, most + 1), 1 - gamma)])
        else:
            whole = stats.nbinom.pmf(np.arange(most + 1), shape, gamma)
            expected = np.where(np.arange(most + 1) > 0, whole / (1 - whole[0]), 0.0)
    counts = np.bincount(drawn, minlength=most + 1) / len(drawn)
    assert np.max(np.abs(np.cumsum(counts) - np.cumsum(expected))) < 2e-3
    assert drawn.min() == 1 or shape == math.inf
    assert drawn.mean() == pytest.approx(mean, rel=0.06)  # the tail is cut at the last quantile


def test_draws_follow_the_key_and_its_randomness():
    keys = [jax.random.key(seed) for seed in range(300)]
    drawn = [draw_repetitions(key, mean=4.0, shape=1.0) for key in keys]
    assert drawn[0] == draw_repetitions(jax.random.key(0), mean=4.0, shape=1.0)
    observed = np.array([drawn.count(1), drawn.count(2), drawn.count(3), sum(d > 3 for d in drawn)])
    expected = 300 * np.array([0.25, 0.25 * 0.75, 0.25 * 0.75**2, 0.75**3])
    assert stats.chisquare(observed, expected).pvalue > 1e-3
    assert draw_repetitions(jax.random.key(1), mean=1.0, shape=1.0) == 1


def test_what_a_search_costs_against_reference_numbers():
    """Geometric repetitions of 500 rounds, Poisson(256 / 6040) with noise 1.1278, delta 1e-5."""
    rounds = dp_event.PoissonSampledDpEvent(256 / 6040, dp_event.GaussianDpEvent(1.1278))
    training = dp_event.SelfComposedDpEvent(rounds, 500)
    one = privacy_spent(training, delta=1e-5, accountant=RDP).epsilon
    spent = [privacy_spent(selection_event(training, mean=m, shape=1.0), delta=1e-5) for m in (1, 4, 16)]
    certain, four, sixteen = spent  # one run for certain costs a little more than that run: the theorem is not tight
    assert certain.epsilon == pytest.approx(5.642, rel=1e-3)
    assert four.epsilon == pytest.approx(8.343, rel=1e-3)
    assert sixteen.epsilon == pytest.approx(10.134, rel=1e-3)
    assert one < certain.epsilon
    assert sixteen.epsilon < 2 * one  # sixteen runs for less than two
    assert four.accountant == RDP
    expected = dp_event.RepeatAndSelectDpEvent(training, 4.0, 1.0)
    assert selection_event(training, mean=4, shape=1) == expected


def test_the_geometric_case_is_the_theorems_formula():
    """Theorem 2: rdp_a + log(mean) / (a - 1) + 2 min_b((1 - 1/b) rdp_b + log(mean) / b), or that of a larger order."""
    orders = np.array([2.0, 4.0, 8.0, 16.0, 32.0])
    rdp = orders / (2 * 4.0**2)
    accountant = rdp_privacy_accountant.RdpAccountant(orders)
    accountant.compose(selection_event(EVENT, mean=9.0, shape=1.0))
    least = np.min((1 - 1 / orders) * rdp + math.log(9.0) / orders)
    expected = rdp + math.log(9.0) / (orders - 1) + 2 * least
    np.testing.assert_allclose(accountant.rdp, np.minimum.accumulate(expected[::-1])[::-1])


def test_the_best_run_is_returned_and_charged_as_a_selection():
    seen = []

    def run(candidate, key):
        score = candidate + 0.1 * float(jax.random.normal(key))
        seen.append((score, candidate))
        return score, {"model": candidate}

    seed = next(seed for seed in range(500) if _runs(seed, mean=30.0) == 12)
    found = select_privately((0.0, 10.0, 5.0), run, event=EVENT, mean=30.0, key=jax.random.key(seed))
    assert len(seen) == 12
    assert (found.score, found.candidate) == max(seen)
    assert found.output == {"model": found.candidate}
    assert len({score for score, _ in seen}) == len(seen)  # a key of its own for each run
    assert {candidate for _, candidate in seen} == {0.0, 5.0, 10.0}
    assert found.event == dp_event.RepeatAndSelectDpEvent(EVENT, 30.0, 1.0)
    ledger = Ledger().record(found.event, phase="tuning", released="the best of a random number of runs")
    assert ledger.spent(1e-5).epsilon > privacy_spent(EVENT, delta=1e-5).epsilon
    again = select_privately((0.0, 10.0, 5.0), run, event=EVENT, mean=30.0, key=jax.random.key(seed))
    assert again.score == found.score


def test_candidates_are_drawn_uniformly_with_replacement():
    drawn = []
    for seed in range(12):
        select_privately(
            "abc", lambda c, key: (drawn.append(c) or 0.0, c), event=EVENT, mean=40.0, key=jax.random.key(seed)
        )
    counts = [drawn.count(letter) for letter in "abc"]
    assert sum(counts) > 200
    assert stats.chisquare(counts).pvalue > 1e-3


def test_a_diverged_run_never_wins_and_no_run_has_no_winner():
    scores = {"a": math.nan, "b": -5.0}
    found = select_privately(
        "ab", lambda c, key: (scores[c], c), event=EVENT, mean=40.0, shape=0.5, key=jax.random.key(2)
    )
    assert found.candidate == "b"
    seed = next(seed for seed in range(100) if _runs(seed, mean=1.0, shape=math.inf) == 0)
    nothing = select_privately(
        "ab", lambda c, key: (0.0, c), event=EVENT, mean=1.0, shape=math.inf, key=jax.random.key(seed)
    )
    assert nothing.candidate is None
    assert nothing.output is None
    assert nothing.event == dp_event.RepeatAndSelectDpEvent(EVENT, 1.0, math.inf)  # charged all the same


def _runs(seed, *, mean, shape=1.0):
    return draw_repetitions(jax.random.split(jax.random.key(seed))[0], mean=mean, shape=shape)


def test_senseless_searches_are_refused():
    key = jax.random.key(0)
    for mean, shape, words in (
        (0.5, 1.0, "at least 1"),
        (math.inf, 1.0, "finite"),
        (4.0, -1.0, "shape"),
        (4.0, math.nan, "shape"),
    ):
        with pytest.raises(ValueError, match=words):
            draw_repetitions(key, mean=mean, shape=shape)
    with pytest.raises(ValueError, match="nothing to select from"):
        select_privately((), lambda c, key: (0.0, c), event=EVENT, mean=4.0, key=key)
    with pytest.raises(ValueError, match="all but Poisson"):
        draw_repetitions(jax.random.key(1), mean=2000.0, shape=5000.0)

"""Risk: noise that misses its target, or a budget that admits one round too many."""

import math

import pytest
from dp_accounting import (
    ComposedDpEvent,
    GaussianDpEvent,
    LaplaceDpEvent,
    NonPrivateDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    SampledWithoutReplacementDpEvent,
    SelfComposedDpEvent,
    TruncatedSubsampledGaussianDpEvent,
    ZCDpEvent,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_rec.privacy.accounting import privacy_spent
from fedjax_rec.privacy.calibration import calibrate_noise_multiplier, max_rounds

# A target may take 3 s on an idle two-core machine (python -m benchmarks.accounting measures it);
# test machines are shared, so here only a search that has gone astray fails.
SLACK_SECONDS = 6.0


def poisson(prob, noise_multiplier, rounds):
    return SelfComposedDpEvent(PoissonSampledDpEvent(prob, GaussianDpEvent(noise_multiplier)), rounds)


# Data set: population, expected cohort, rounds, delta, and the noise multipliers for epsilon 1, 5, 10, 20.
TABLE = {
    "ml-100k": (943, 94, 200, 1e-4, (4.6312, 1.3655, 0.9234, 0.6675)),
    "ml-1m": (6040, 256, 500, 1e-5, (3.6774, 1.1278, 0.8032, 0.6075)),
    "ml-10m": (69878, 1024, 500, 1e-5, (1.4744, 0.7002, 0.5544, 0.4419)),
    "ml-20m": (116677, 2048, 500, 8e-6, (1.7108, 0.7476, 0.5859, 0.4647)),
}


@pytest.mark.parametrize("dataset", TABLE)
@pytest.mark.parametrize(("column", "target"), list(enumerate([1, 5, 10, 20])))
def test_the_noise_multiplier_is_the_reference_and_its_epsilon_just_below_the_target(dataset, column, target):
    population, cohort, rounds, delta, noise_multipliers = TABLE[dataset]

    def run(noise_multiplier):
        return poisson(cohort / population, noise_multiplier, rounds)

    found = calibrate_noise_multiplier(run, target_epsilon=target, delta=delta)
    assert found.noise_multiplier == pytest.approx(noise_multipliers[column], rel=1e-3)
    assert 0.995 * target <= found.epsilon <= target
    assert found.epsilon == privacy_spent(run(found.noise_multiplier), delta=delta).epsilon
    assert found.accountant == "PLD"
    assert found.seconds < SLACK_SECONDS


@pytest.mark.parametrize(
    ("make_event", "target", "relation", "accountant"),
    [
        (GaussianDpEvent, 4.37718, "add_or_remove_one", "analytic Gaussian"),
        (GaussianDpEvent, 4.37718, "replace_one", "analytic Gaussian"),
        (lambda z: ZCDpEvent(0.5 / z**2), 2.0, "add_or_remove_one", "RDP"),
        (
            lambda z: SelfComposedDpEvent(SampledWithoutReplacementDpEvent(6040, 256, GaussianDpEvent(z)), 500),
            5.0,
            "replace_one",
            "RDP",
        ),
        (
            lambda z: SelfComposedDpEvent(PoissonSampledDpEvent(0.01, LaplaceDpEvent(z)), 1000),
            2.0,
            "add_or_remove_one",
            "PLD",
        ),
        (
            lambda z: SelfComposedDpEvent(TruncatedSubsampledGaussianDpEvent(6040, 256 / 6040, 288, z), 100),
            3.0,
            "add_or_remove_one",
            "PLD",
        ),
        (lambda z: ComposedDpEvent([LaplaceDpEvent(10), poisson(0.05, z, 100)]), 3.0, "add_or_remove_one", "PLD"),
        (lambda z: poisson(256 / 6040, z, 500), 0.02, "add_or_remove_one", "PLD"),
        (lambda z: poisson(256 / 6040, z, 500), 1000.0, "add_or_remove_one", "RDP"),
    ],
)
def test_every_kind_of_release_can_be_calibrated(make_event, target, relation, accountant):
    found = calibrate_noise_multiplier(make_event, target_epsilon=target, delta=1e-5, relation=relation)
    assert 0.995 * target <= found.epsilon <= target
    assert found.accountant == accountant
    assert found.seconds < 2 * SLACK_SECONDS
    less_noise = make_event(found.noise_multiplier * 0.99)
    assert privacy_spent(less_noise, delta=1e-5, relation=relation).epsilon > target


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    prob=st.floats(1e-3, 0.5), rounds=st.integers(1, 2000), target=st.floats(0.1, 30), log10_delta=st.floats(-8.0, -3.0)
)
def test_no_target_is_ever_exceeded(prob, rounds, target, log10_delta):
    delta = 10**log10_delta
    found = calibrate_noise_multiplier(lambda z: poisson(prob, z, rounds), target_epsilon=target, delta=delta)
    assert 0.995 * target <= found.epsilon <= target


@pytest.mark.parametrize(
    "spent_already",
    [LaplaceDpEvent(0.1), GaussianDpEvent(0.3), NonPrivateDpEvent()],
    ids=["Laplace", "Gaussian", "bare"],
)
def test_a_target_that_other_phases_have_spent_is_refused(spent_already):
    with pytest.raises(ValueError, match=r"No noise reaches epsilon 5: .* spent by the other releases"):
        calibrate_noise_multiplier(
            lambda z: ComposedDpEvent([spent_already, poisson(0.04, z, 500)]), target_epsilon=5, delta=1e-5
        )


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_a_target_must_be_positive(target):
    with pytest.raises(ValueError, match="target epsilon must be positive"):
        calibrate_noise_multiplier(GaussianDpEvent, target_epsilon=target, delta=1e-5)
    with pytest.raises(ValueError, match="target epsilon must be positive"):
        max_rounds(GaussianDpEvent(1.0), target_epsilon=target, delta=1e-5)


@pytest.mark.parametrize(
    ("event", "prior", "target", "relation"),
    [
        (PoissonSampledDpEvent(256 / 6040, GaussianDpEvent(1.0)), None, 5.0, "add_or_remove_one"),
        (PoissonSampledDpEvent(256 / 6040, GaussianDpEvent(0.6)), LaplaceDpEvent(2.0), 5.0, "add_or_remove_one"),
        (PoissonSampledDpEvent(0.01, LaplaceDpEvent(1.0)), None, 1.0, "add_or_remove_one"),
        (GaussianDpEvent(10.0), GaussianDpEvent(3.0), 4.0, "replace_one"),
        (SampledWithoutReplacementDpEvent(943, 94, GaussianDpEvent(3.0)), None, 3.0, "replace_one"),
    ],
)
def test_max_rounds_is_the_last_count_within_the_target(event, prior, target, relation):
    rounds = max_rounds(event, target_epsilon=target, delta=1e-5, prior=prior, relation=relation)
    before = [prior] if prior else []
    within, beyond = (
        privacy_spent(ComposedDpEvent([*before, SelfComposedDpEvent(event, n)]), delta=1e-5, relation=relation).epsilon
        for n in (rounds, rounds + 1)
    )
    assert rounds > 1
    assert within <= target < beyond


def test_max_rounds_at_its_ends():
    assert max_rounds(GaussianDpEvent(0.5), target_epsilon=1.0, delta=1e-5) == 0
    assert max_rounds(NonPrivateDpEvent(), target_epsilon=1.0, delta=1e-5) == 0
    assert max_rounds(GaussianDpEvent(9.0), target_epsilon=1.0, delta=1e-5, prior=GaussianDpEvent(1.0)) == 0
    assert max_rounds(NoOpDpEvent(), target_epsilon=1.0, delta=1e-5, limit=77) == 77
    assert max_rounds(GaussianDpEvent(1e6), target_epsilon=1.0, delta=1e-5, limit=1000) == 1000

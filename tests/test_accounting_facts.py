"""Risk: an epsilon that is wrong. Published and recomputed values, the traps of the accountants, closed forms."""

import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import (
    ComposedDpEvent,
    GaussianDpEvent,
    LaplaceDpEvent,
    NonPrivateDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    RandomizedResponseDpEvent,
    SampledWithoutReplacementDpEvent,
    SelfComposedDpEvent,
    TruncatedSubsampledGaussianDpEvent,
    ZCDpEvent,
)
from dp_accounting.dp_event import (
    DiscreteLaplaceDpEvent,
    RepeatAndSelectDpEvent,
    SampledWithReplacementDpEvent,
)
from dp_accounting.pld import PLDAccountant, privacy_loss_distribution
from dp_accounting.rdp import RdpAccountant

from fedjax_rec.privacy import formulas
from fedjax_rec.privacy.accounting import delta_warning, privacy_spent
from fedjax_rec.privacy.curve import epsilon_curve
from fedjax_rec.privacy.events import flatten

REPLACE_ONE = dp_accounting.NeighboringRelation.REPLACE_ONE
ML_1M = 256 / 6040


def poisson(prob, noise_multiplier, rounds):
    return SelfComposedDpEvent(PoissonSampledDpEvent(prob, GaussianDpEvent(noise_multiplier)), rounds)


def epsilon(event, delta=1e-5, **options):
    return privacy_spent(event, delta=delta, **options).epsilon


# Sampling probability, noise multiplier, rounds, delta, epsilon by RDP, epsilon by PLD.
REFERENCE = [
    (256 / 60000, 1.1, 14062, 1e-5, 2.5966, 2.3817),
    (256 / 60000, 1.3, 3515, 1e-5, 0.9544, 0.8645),
    (256 / 60000, 0.7, 10546, 1e-5, 6.3195, 5.6394),
    (0.01, 4, 10000, 1e-5, 1.0355, 0.9470),  # Abadi et al. (2016) published 1.26
    (5000 / 763430, 1, 5000, 1e-9, 4.1833, 3.8988),  # McMahan et al. (2018) published 4.634
    (0.1, 3, 512, 1e-6, 4.0510, 3.7697),
    (ML_1M, 1, 500, 1e-5, 6.938, 6.2654),
]


@pytest.mark.parametrize(("prob", "noise", "rounds", "delta", "by_rdp", "by_pld"), REFERENCE)
def test_poisson_gaussian_has_its_reference_epsilon(prob, noise, rounds, delta, by_rdp, by_pld):
    event = poisson(prob, noise, rounds)
    best = privacy_spent(event, delta=delta)
    assert best.accountant == "PLD"
    assert best.epsilon == pytest.approx(by_pld, rel=1e-3)
    assert epsilon(event, delta, accountant="RDP") == pytest.approx(by_rdp, rel=1e-3)


def test_one_gaussian_is_analytic_and_every_accountant_agrees_with_it():
    event = GaussianDpEvent(1.0)
    assert privacy_spent(event, delta=1e-5).accountant == "analytic Gaussian"
    assert epsilon(event) == pytest.approx(4.37718, rel=1e-5)
    assert epsilon(event, accountant="PLD") == pytest.approx(4.3772, rel=1e-3)
    assert epsilon(event, accountant="RDP") == pytest.approx(4.7285, rel=1e-3)


def test_laplace_has_its_reference_epsilon():
    assert epsilon(SelfComposedDpEvent(LaplaceDpEvent(10), 100)) == pytest.approx(4.2203, rel=1e-3)
    sampled = PoissonSampledDpEvent(0.01, LaplaceDpEvent(1))
    assert epsilon(SelfComposedDpEvent(sampled, 1000)) == pytest.approx(1.1238, rel=1e-3)


def test_fixed_size_cohorts_are_accounted_under_replace_one_at_doubled_sensitivity():
    # Standard deviation 4C; dp_accounting's bound wants it over the doubled sensitivity, 4C / 2C.
    event = SelfComposedDpEvent(SampledWithoutReplacementDpEvent(6040, 256, GaussianDpEvent(4.0)), 500)
    spent = privacy_spent(event, delta=1e-5, relation="replace_one")
    assert (spent.accountant, spent.epsilon) == ("RDP", pytest.approx(4.952, rel=1e-3))
    with pytest.raises(ValueError, match="relation='replace_one'"):
        privacy_spent(event, delta=1e-5)


@pytest.mark.parametrize(("capacity", "expected"), [(256, 27.5), (288, 10.26), (320, 6.306), (352, 6.2656)])
def test_a_truncated_poisson_cohort_costs_more(capacity, expected):
    event = TruncatedSubsampledGaussianDpEvent(6040, ML_1M, capacity, 1.0)
    assert epsilon(SelfComposedDpEvent(event, 500)) == pytest.approx(expected, rel=1e-3)


def test_shuffled_batches_cost_what_full_participation_does_not_what_poisson_sampling_claims():
    epochs, rounds = 20, 20 * 6040 // 256
    assert epsilon(poisson(ML_1M, 1.0, rounds)) == pytest.approx(6.08, rel=1e-3)
    valid = formulas.full_participation_epsilon(1.0, rounds=epochs, delta=1e-5)
    assert valid == pytest.approx(28.37, rel=1e-3)
    assert epsilon(SelfComposedDpEvent(GaussianDpEvent(1.0), epochs)) == pytest.approx(valid, rel=1e-9)


def test_phases_together_cost_less_than_the_sum_of_their_epsilons():
    phases = [GaussianDpEvent(5), poisson(ML_1M, 1.2, 300), poisson(ML_1M, 2, 50), LaplaceDpEvent(10)]
    assert epsilon(ComposedDpEvent(phases)) == pytest.approx(3.651, rel=1e-3)
    assert sum(epsilon(phase) for phase in phases) == pytest.approx(4.93, rel=1e-3)


@pytest.mark.parametrize(("mean_runs", "expected"), [(1, 5.64), (4, 8.34), (16, 10.13)])
def test_choosing_the_best_of_several_runs_costs(mean_runs, expected):
    event = RepeatAndSelectDpEvent(poisson(ML_1M, 1.1278, 500), mean_runs, 1)  # 1: geometric number of runs
    assert privacy_spent(event, delta=1e-5).accountant == "RDP"
    assert epsilon(event) == pytest.approx(expected, rel=1e-3)


# --- traps of dp_accounting 0.6.0 ---------------------------------------------------------------------------------


def test_the_count_of_randomized_response_is_not_ignored():
    report = RandomizedResponseDpEvent(2 / (math.e + 1), 2)  # local epsilon 1
    twenty = SelfComposedDpEvent(report, 20)
    all_true = (math.e / (math.e + 1)) ** 20  # the only outcome with a loss above 18
    exact = 20 + math.log1p(-1e-5 / all_true)
    assert exact <= epsilon(twenty, relation="replace_one") == pytest.approx(19.9995, rel=1e-3)
    theirs = PLDAccountant(REPLACE_ONE).compose(twenty).get_epsilon(1e-5)
    assert theirs == pytest.approx(1.0, rel=1e-3), "dp_accounting has mended its count: this guard may go"
    with pytest.raises(ValueError, match="relation='replace_one'"):
        epsilon(twenty)


def test_replace_one_means_doubled_sensitivity_under_every_accountant():
    event = GaussianDpEvent(1.0)
    options = {"relation": "replace_one"}
    assert epsilon(event, **options) == pytest.approx(9.997, rel=1e-3)
    assert epsilon(event, accountant="PLD", **options) == pytest.approx(9.997, rel=1e-3)
    assert epsilon(event, accountant="RDP", **options) == pytest.approx(
        RdpAccountant().compose(GaussianDpEvent(0.5)).get_epsilon(1e-5)
    )
    theirs = RdpAccountant(neighboring_relation=REPLACE_ONE).compose(event).get_epsilon(1e-5)
    assert theirs == pytest.approx(4.7285, rel=1e-3), "dp_accounting has mended its relation: this guard may go"


@pytest.mark.parametrize(
    ("event", "halved"),
    [
        (LaplaceDpEvent(10.0), LaplaceDpEvent(5.0)),
        (DiscreteLaplaceDpEvent(0.1, 3), DiscreteLaplaceDpEvent(0.1, 6)),
        (ZCDpEvent(0.02), ZCDpEvent(0.08)),
        (RepeatAndSelectDpEvent(GaussianDpEvent(2.0), 3, 1), RepeatAndSelectDpEvent(GaussianDpEvent(1.0), 3, 1)),
        (
            RepeatAndSelectDpEvent(ComposedDpEvent([SelfComposedDpEvent(GaussianDpEvent(4.0), 2)]), 3, 1),
            RepeatAndSelectDpEvent(SelfComposedDpEvent(GaussianDpEvent(2.0), 2), 3, 1),
        ),
    ],
)
def test_replace_one_doubles_the_sensitivity_of_every_release(event, halved):
    assert epsilon(event, relation="replace_one") == pytest.approx(epsilon(halved), rel=5e-4)


def test_replace_one_of_a_poisson_cohort_is_what_dp_accounting_says():
    event = poisson(ML_1M, 1.5, 100)
    theirs = PLDAccountant(REPLACE_ONE).compose(event).get_epsilon(1e-5)
    assert epsilon(event, relation="replace_one") == pytest.approx(theirs, rel=1e-3)
    assert theirs > epsilon(event)


def test_a_delta_that_the_fft_cannot_resolve_never_gives_an_epsilon_below_the_truth():
    rounds, delta = 100_000, 1e-12
    truth = dp_accounting.get_epsilon_gaussian(1.0, delta)
    single = privacy_loss_distribution.from_gaussian_mechanism(math.sqrt(rounds), value_discretization_interval=1e-4)
    assert single.self_compose(rounds).get_epsilon_for_delta(delta) < truth
    spent = privacy_spent(poisson(0.999999, math.sqrt(rounds), rounds), delta=delta)
    assert spent.accountant == "RDP"
    assert spent.epsilon > truth * 0.999
    with pytest.raises(ValueError, match="delta of at least"):
        privacy_spent(SelfComposedDpEvent(LaplaceDpEvent(10), rounds), delta=delta, accountant="PLD")


# --- what the accountants agree on --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "interval"),
    [
        (ComposedDpEvent([poisson(0.05, 0.8, 20), poisson(0.01, 2.0, 300), GaussianDpEvent(3.0)]), 2e-4),
        (ComposedDpEvent([poisson(0.2, 1.5, 40), SelfComposedDpEvent(LaplaceDpEvent(20.0), 10)]), 1e-4),
        (DiscreteLaplaceDpEvent(0.2, 2), 1e-5),
        (poisson(0.001, 0.5, 2000), 2e-4),
        (poisson(0.01, 50.0, 1000), 2e-7),
    ],
    ids=["two cohorts", "two noises", "discrete Laplace", "rare", "tiny"],
)
@pytest.mark.parametrize("delta", [1e-4, 1e-7])
def test_the_chosen_grid_is_as_good_as_a_fine_one(event, interval, delta):
    fine = PLDAccountant(value_discretization_interval=interval).compose(event).get_epsilon(delta)
    assert epsilon(event, delta) == pytest.approx(fine, rel=5e-4)


@pytest.mark.parametrize(
    ("event", "same"),
    [
        (SelfComposedDpEvent(SelfComposedDpEvent(GaussianDpEvent(2.0), 2), 2), GaussianDpEvent(1.0)),
        (PoissonSampledDpEvent(1.0, GaussianDpEvent(1.0)), GaussianDpEvent(1.0)),
        (SampledWithoutReplacementDpEvent(10, 10, GaussianDpEvent(1.0)), GaussianDpEvent(1.0)),
        (ComposedDpEvent([NoOpDpEvent(), GaussianDpEvent(1.0), GaussianDpEvent(math.inf)]), GaussianDpEvent(1.0)),
        (
            PoissonSampledDpEvent(0.1, ComposedDpEvent([GaussianDpEvent(5.0 / 3), GaussianDpEvent(1.25)])),
            PoissonSampledDpEvent(0.1, GaussianDpEvent(1.0)),
        ),
        (ComposedDpEvent([poisson(0.1, 1.0, 3), LaplaceDpEvent(9), poisson(0.1, 1.0, 4)]), None),
    ],
)
def test_flatten_keeps_the_privacy_loss(event, same):
    if same is None:
        assert flatten(event) == ((PoissonSampledDpEvent(0.1, GaussianDpEvent(1.0)), 7), (LaplaceDpEvent(9), 1))
    else:
        assert [count for _, count in flatten(event)] == [1]
        assert epsilon(event) == pytest.approx(epsilon(same), rel=1e-9)


def test_a_release_without_noise_is_infinite_and_no_release_is_nothing():
    for bare in (
        NonPrivateDpEvent(),
        GaussianDpEvent(0.0),
        poisson(0.1, 0.0, 5),
        LaplaceDpEvent(0.0),
        SelfComposedDpEvent(RepeatAndSelectDpEvent(GaussianDpEvent(0.0), 2, 1), 2),
        TruncatedSubsampledGaussianDpEvent(100, 0.1, 20, 0.0),
        RandomizedResponseDpEvent(0.0, 4),
    ):
        spent = privacy_spent(ComposedDpEvent([GaussianDpEvent(5.0), bare]), delta=1e-5)
        assert spent.epsilon == math.inf
        assert spent.sentence.startswith("No user-level differential privacy")
    for nothing in (NoOpDpEvent(), ComposedDpEvent([]), poisson(0.0, 1.0, 5), RandomizedResponseDpEvent(1.0, 4)):
        assert epsilon(nothing) == 0.0


def test_an_epsilon_beyond_what_plds_can_express_is_finite():
    spent = privacy_spent(poisson(ML_1M, 0.16, 500), delta=1e-5)
    assert (spent.accountant, spent.epsilon) == ("RDP", pytest.approx(1040, rel=0.1))


def test_the_sentence_states_unit_relation_and_delta():
    spent = privacy_spent(GaussianDpEvent(1.0), delta=1e-5, unit="example", relation="replace_one")
    for word in ("Example-level", "replacing one interaction", "1e-05", "9.9"):
        assert word in spent.sentence


@pytest.mark.parametrize(
    ("event", "options", "match"),
    [
        (GaussianDpEvent(-1.0), {}, "noise multiplier"),
        (GaussianDpEvent(math.nan), {}, "noise multiplier"),
        (PoissonSampledDpEvent(1.5, GaussianDpEvent(1.0)), {}, "sampling probability"),
        (SelfComposedDpEvent(GaussianDpEvent(1.0), 0), {}, "count"),
        (SampledWithoutReplacementDpEvent(5, 6, GaussianDpEvent(1.0)), {}, "without replacement"),
        (GaussianDpEvent(1.0), {"delta": 0.0}, "delta"),
        (GaussianDpEvent(1.0), {"relation": "replace"}, "neighbouring relation"),
        (GaussianDpEvent(1.0), {"unit": "item"}, "unit"),
        (GaussianDpEvent(1.0), {"accountant": "moments"}, "accountant"),
        (poisson(0.1, 1.0, 2), {"accountant": "analytic Gaussian"}, "does not apply"),
        (PoissonSampledDpEvent(0.1, ZCDpEvent(0.1)), {}, "Sampling has a bound around one Gaussian"),
        (
            ComposedDpEvent([ZCDpEvent(0.1), PoissonSampledDpEvent(0.1, LaplaceDpEvent(1))]),
            {},
            "No accountant takes all",
        ),
    ],
)
def test_what_cannot_be_accounted_is_refused_with_a_sentence(event, options, match):
    with pytest.raises(ValueError, match=match):
        privacy_spent(event, **{"delta": 1e-5} | options)


def test_unknown_events_are_refused():
    with pytest.raises(TypeError, match="DpEvent"):
        privacy_spent("Gaussian(1)", delta=1e-5)
    with pytest.raises(TypeError, match="no accounting"):
        privacy_spent(SampledWithReplacementDpEvent(10, 5, GaussianDpEvent(1.0)), delta=1e-5)


def test_delta_is_warned_about_from_one_over_the_population_on():
    assert delta_warning(1e-5, 6040) is None
    assert "1 / 6040 users" in delta_warning(1 / 6040, 6040)


# --- the curve ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "prior", "relation"),
    [
        (PoissonSampledDpEvent(ML_1M, GaussianDpEvent(1.0)), None, "add_or_remove_one"),
        (PoissonSampledDpEvent(ML_1M, GaussianDpEvent(1.0)), LaplaceDpEvent(5), "add_or_remove_one"),
        (GaussianDpEvent(20.0), GaussianDpEvent(5.0), "replace_one"),
        (SampledWithoutReplacementDpEvent(6040, 256, GaussianDpEvent(4.0)), GaussianDpEvent(9.0), "replace_one"),
    ],
)
def test_the_curve_passes_through_the_single_values(event, prior, relation):
    rounds = [200, 0, 1, 50, 200, 100]
    curve = epsilon_curve(event, rounds, delta=1e-5, relation=relation, prior=prior)
    runs = [
        ComposedDpEvent([prior or NoOpDpEvent(), SelfComposedDpEvent(event, count) if count else NoOpDpEvent()])
        for count in rounds
    ]
    last = privacy_spent(runs[0], delta=1e-5, relation=relation)
    for run, value in zip(runs, curve, strict=True):
        single = epsilon(run, relation=relation, accountant=last.accountant)
        assert value == pytest.approx(single, abs=6e-4 * last.epsilon)
    assert np.all(np.diff(curve[np.argsort(rounds)]) >= 0)


def test_the_curve_of_a_noiseless_run_is_infinite_from_its_first_round():
    curve = epsilon_curve(NonPrivateDpEvent(), [0, 1, 2], delta=1e-5)
    np.testing.assert_array_equal(curve, [0.0, math.inf, math.inf])
    with pytest.raises(ValueError, match="rounds"):
        epsilon_curve(GaussianDpEvent(1.0), [-1, 3], delta=1e-5)


# --- closed forms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cohort_size", "extra_noise"), [(256, 0.0008), (20, 0.155)])
def test_adaptive_clipping_splits_the_noise_at_equal_cost(cohort_size, extra_noise):
    std = cohort_size / 20
    update = formulas.adaptive_clipping_noise_multiplier(1.0, quantile_noise_std=std)
    assert update - 1 == pytest.approx(extra_noise, rel=0.05)
    assert formulas.combined_noise_multiplier(update, 2 * std) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="does not fit"):
        formulas.adaptive_clipping_noise_multiplier(1.0, quantile_noise_std=0.4)


def test_several_gaussians_cost_one():
    several = ComposedDpEvent([GaussianDpEvent(2.0), GaussianDpEvent(3.0)])
    one = GaussianDpEvent(formulas.combined_noise_multiplier(2.0, 3.0))
    assert epsilon(several) == pytest.approx(epsilon(one), rel=1e-9)
    with pytest.raises(ValueError, match="Positive"):
        formulas.combined_noise_multiplier(1.0, 0.0)


@pytest.mark.parametrize(("num_reports", "expected"), [(6040, 0.268), (943, 0.579)])
def test_shuffling_amplifies_local_reports(num_reports, expected):
    assert formulas.shuffled_epsilon(1.0, num_reports=num_reports, delta=1e-6) == pytest.approx(expected, rel=1e-3)
    with pytest.raises(ValueError, match="shuffled reports"):
        formulas.shuffled_epsilon(8.0, num_reports=num_reports, delta=1e-6)


@pytest.mark.parametrize(("delta", "expected"), [(5e-4, 0.677), (1e-4, 0.658)])
def test_membership_attacks_have_a_ceiling(delta, expected):
    assert formulas.membership_auc_ceiling(2.0, delta=delta) == pytest.approx(expected, rel=1e-3)

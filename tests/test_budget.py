"""Risk: a plan that says epsilon 8 and spends more, or gives noise to the wrong phase."""

import dataclasses
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import dp_event

from fedjax_rec.privacy.accounting import privacy_spent
from fedjax_rec.privacy.allocation import allocate, grid, quadratic_loss
from fedjax_rec.privacy.budget import Phase, Plan, sampler_of, solve
from fedjax_rec.privacy.plan_files import EXAMPLE, from_toml
from fedjax_rec.privacy.schedule import geometric

GAUSSIAN = dp_event.GaussianDpEvent
COUNTS = Phase("popularity", weight=4.0, num_numbers=100)
ROUNDS = Phase("training", rounds=30, ratio=2.0, num_numbers=400, sensitivity=0.5)
PLAN = Plan(phases=(COUNTS, ROUNDS), epsilon=3.0, delta=1e-5, num_users=1000)


def poisson(**options):
    return Phase("training", rounds=300, sampler="poisson", cohort_size=256, **options)


def test_several_phases_with_given_noise_are_accounted_jointly():
    """Counts, training, distillation and Laplace noise together: less than the phases added up."""
    phases = (
        Phase("popularity", noise_multiplier=5.0),
        poisson(noise_multiplier=1.2),
        Phase("distillation", rounds=50, sampler="poisson", cohort_size=256, noise_multiplier=2.0),
        Phase("count", mechanism="laplace", noise_multiplier=10.0),
    )
    solved = solve(Plan(phases=phases, epsilon=4.0, delta=1e-5, num_users=6040))
    assert solved.scale is None
    assert solved.spent.epsilon == pytest.approx(3.651, rel=1e-3)
    added = sum(phase.epsilon_alone for phase in solved.phases.values())
    assert added == pytest.approx(4.93, rel=2e-3)
    after = [phase.epsilon_after for phase in solved.phases.values()]
    assert after == sorted(after)
    assert after[0] == solved.phases["popularity"].epsilon_alone
    assert after[-1] == solved.spent.epsilon
    with pytest.raises(ValueError, match=r"given noise spends epsilon 3.65.* above the plan's 2"):
        solve(Plan(phases=phases, epsilon=2.0, delta=1e-5, num_users=6040))


def test_one_scale_is_solved_for_and_weights_are_the_ratios():
    solved = solve(PLAN)
    counts, rounds = solved.phases.values()
    together = (counts.noise_multipliers**-2.0).sum() + (rounds.noise_multipliers**-2.0).sum()
    epsilon = dp_accounting.get_epsilon_gaussian(together**-0.5, 1e-5)  # the closed form
    assert epsilon == pytest.approx(solved.spent.epsilon, rel=1e-6)
    assert 0.995 * 3.0 <= epsilon <= 3.0
    assert counts.last_noise_multiplier == pytest.approx(4.0 * solved.scale)
    np.testing.assert_allclose(rounds.noise_multipliers, solved.scale * geometric(30, 2.0))
    np.testing.assert_allclose(solved.stddevs("training"), 0.5 * rounds.noise_multipliers)
    assert privacy_spent(solved.event, delta=1e-5).epsilon == pytest.approx(epsilon, rel=1e-6)


def test_given_noise_is_not_scaled_and_the_rest_gets_what_is_left():
    changed = dataclasses.replace(PLAN, phases=(Phase("popularity", noise_multiplier=2.0), ROUNDS))
    solved = solve(changed)
    assert solved.phases["popularity"].last_noise_multiplier == 2.0
    assert 0.995 * 3.0 <= solved.spent.epsilon <= 3.0
    with pytest.raises(ValueError, match="No noise reaches epsilon"):
        solve(dataclasses.replace(changed, epsilon=1.0))


def test_poisson_phases_meet_the_target_by_another_accountant():
    """dp_accounting's own PLD, composed here round by round."""
    phases = (Phase("popularity", weight=5.0), dataclasses.replace(poisson(ratio=1.5), rounds=4, cohort_size=300))
    solved = solve(Plan(phases=phases, epsilon=2.0, delta=1e-5, num_users=3000))
    alone = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-3)
    alone.compose(GAUSSIAN(5.0 * solved.scale))
    for noise, count in zip(*np.unique(solved.phases["training"].noise_multipliers, return_counts=True), strict=True):
        alone.compose(dp_event.PoissonSampledDpEvent(0.1, GAUSSIAN(float(noise))), int(count))
    assert alone.get_epsilon(1e-5) == pytest.approx(solved.spent.epsilon, rel=1e-3)
    assert 0.995 * 2.0 <= solved.spent.epsilon <= 2.0
    points, epsilons = solved.epsilon_curve(5)
    assert points[-1] == 5
    assert 1 in points
    assert np.all(np.diff(epsilons) > 0)
    assert epsilons[-1] == pytest.approx(solved.spent.epsilon, rel=0.01)
    assert epsilons[0] == pytest.approx(solved.phases["popularity"].epsilon_alone, rel=0.01)


def test_the_signal_to_noise_ratio_is_cohort_over_noise_norm():
    phases = (
        Phase("training", sampler="poisson", cohort_size=256, noise_multiplier=1.1278, num_numbers=3706 * 32),
        Phase("count", mechanism="laplace", noise_multiplier=10.0, num_numbers=4, signal=0.5),
    )
    solved = solve(Plan(phases=phases, epsilon=9.0, delta=1e-5, num_users=6040))
    training, count = solved.phases.values()
    assert training.snr == pytest.approx([256 / (1.1278 * math.sqrt(3706 * 32))])
    rng = np.random.default_rng(0)
    norms = np.linalg.norm(rng.laplace(scale=10.0, size=(100_000, 4)), axis=1)
    assert count.snr[0] == pytest.approx(6040 * 0.5 / np.sqrt(np.mean(norms**2)), rel=0.01)


def test_the_sampler_of_a_phase_is_the_one_that_was_accounted():
    assert sampler_of(poisson(), 6040).sampling_prob == pytest.approx(256 / 6040)
    fixed = Phase("training", sampler="fixed_size", cohort_size=10, noise_multiplier=9.0)
    plan = Plan(phases=(fixed,), epsilon=3.0, delta=1e-5, num_users=100, relation="replace_one")
    assert sampler_of(fixed, 100).relation == plan.relation
    assert solve(plan).spent.accountant == "RDP"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mechanism": "skellam"}, "mechanism of phase 'x' must be one of gaussian, laplace"),
        ({"sampler": "shuffle"}, "sampler of phase 'x' must be one of"),
        ({"rounds": 0}, "rounds of phase 'x' must be a whole number of at least 1; got 0"),
        ({"rounds": 2.5}, "rounds of phase 'x'"),
        ({"ratio": -1.0}, "ratio of phase 'x' must be positive"),
        ({"weight": "3"}, "weight of phase 'x' must be positive"),
        ({"noise_multiplier": 0.0}, "noise_multiplier of phase 'x' must be positive"),
        ({"weight": 1.0, "noise_multiplier": 1.0}, "beside a noise_multiplier"),
        ({"sampler": "poisson"}, "give it a cohort_size"),
        ({"cohort_size": 5}, "leave cohort_size out"),
        ({"signal": math.nan}, "signal of phase 'x'"),
    ],
)
def test_a_phase_that_means_nothing_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Phase("x", **changes)


def test_a_plan_that_has_no_bound_is_refused_with_the_reason():
    def plan(*phases, **changes):
        return Plan(**{"phases": phases, "epsilon": 1.0, "delta": 1e-5, "num_users": 50} | changes)

    with pytest.raises(ValueError, match="different names"):
        plan(COUNTS, COUNTS)
    with pytest.raises(ValueError, match="different names"):
        plan()
    with pytest.raises(ValueError, match="replace_one only"):
        plan(Phase("training", sampler="fixed_size", cohort_size=10))
    with pytest.raises(ValueError, match="cohort_size of phase 'training': The cohort size"):
        plan(poisson())
    for changes in ({"epsilon": 0.0}, {"delta": 2.0}, {"num_users": 0}, {"relation": "swap"}, {"unit": "item"}):
        with pytest.raises(ValueError, match="must be"):
            plan(COUNTS, **changes)
    with pytest.raises(ValueError, match="has no phase 'x'; it has popularity, training"):
        PLAN.changed({"x": {"ratio": 2.0}})


def test_allocation_takes_the_best_of_the_simulated_plans():
    """On a contracting quadratic with everyone in every round the textbook's ratio is the best of the grid."""
    plan = Plan(phases=(Phase("training", rounds=60, num_numbers=10),), epsilon=3.0, delta=1e-5, num_users=100)
    candidates = grid({"training": {"ratio": (1.0, 1.5, 0.95**-30, 8.0)}})
    assert candidates[1] == {"training": {"ratio": 1.5}}
    found = allocate(plan, lambda solved: quadratic_loss(solved, contractions={"training": 0.95}), candidates)
    assert found.changes == candidates[2]
    assert found.losses[2] == min(found.losses)
    assert all(math.isfinite(loss) for loss in found.losses)
    np.testing.assert_allclose(found.best.phases["training"].noise_multipliers[0] / found.best.scale, 0.95**-28.5)
    with pytest.raises(ValueError, match="None of 1 candidates"):
        allocate(plan, lambda solved: math.nan, candidates[:1])


def test_allocation_moves_the_budget_to_the_phase_that_needs_it():
    candidates = grid({"popularity": {"weight": (0.5, 4.0, 32.0)}, "training": {"ratio": (1.0, 2.0)}})
    assert len(candidates) == 6
    of_counts, of_rounds = (
        allocate(PLAN, lambda solved, name=name: quadratic_loss(solved, contractions={name: 0.0}), candidates)
        for name in ("popularity", "training")
    )
    assert of_counts.changes["popularity"]["weight"] == 0.5
    assert of_rounds.changes["popularity"]["weight"] == 32.0
    with pytest.raises(ValueError, match="contraction of phase"):
        quadratic_loss(of_counts.best, contractions={"training": 1.0})


def test_the_example_is_a_plan(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(EXAMPLE, encoding="utf-8")
    plan = from_toml(path)
    assert [phase.name for phase in plan.phases] == ["popularity", "training", "evaluation"]
    assert (plan.epsilon, plan.num_users) == (8.0, 943)
    assert plan.phase("training").sampler == "poisson"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("delta = 1e-4 ", "delta = ", r"is no TOML: .*line 4"),
        ("delta = 1e-4 ", "delta = 1.5 ", r"line 4: delta must be between"),
        ("epsilon = 8.0", "epsilom = 8.0", r"line 3: the plan has no key 'epsilom'; the keys are epsilon"),
        ("epsilon = 8.0\n", "", r"line 1: the plan needs 'epsilon'; add a line like 'epsilon = 8.0'"),
        ('unit = "user"  ', 'unit = "item" ', r"line 7: The unit of privacy"),
        ("rounds = 200", "rounds = 0", r"line 17: rounds of phase 'training' must be"),
        ("ratio = 1.5 ", "ration = 1.5 ", r"line 21: phase 'training' has no key 'ration'"),
        ('name = "popularity"\n', "", r"line 9: phase 1 needs 'name'"),
        ("cohort_size = 94", "cohort_size = 9400", r"line 19: cohort_size of phase 'training': The cohort size"),
        ("cohort_size = 94\n", "", r"line 18: sampler of phase 'training' is 'poisson'; give it a cohort_size"),
        ('name = "training"', 'name = "popularity"', r"different names"),
        ("[[phase]] ", "[phase] ", r"TOML|of its own"),
    ],
)
def test_a_wrong_file_is_a_sentence_with_its_line(tmp_path, old, new, words):
    assert old in EXAMPLE
    path = tmp_path / "plan.toml"
    path.write_text(EXAMPLE.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=words) as caught:
        from_toml(path)
    assert str(path) in str(caught.value)

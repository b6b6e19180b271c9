"""Risk: the noise of a round is not the one its schedule charges: another round's, after a resume, or past the end."""

import dp_accounting
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from scipy import stats
from test_noise import NUM_CLIENTS, PROBE, keys, leaves, ones, population
from test_sensitivity import CLIP, TOLERANCE, adversaries, moved, nothing_but_clients, uploads, users
from test_sensitivity import NUM_CLIENTS as NUM_ADVERSARIES

from fedjax_rec.federated.cohort import full_participation, in_turn, poisson
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import Bound, chain
from fedjax_rec.privacy.accounting import privacy_spent
from fedjax_rec.privacy.ledger import Ledger
from fedjax_rec.privacy.mechanisms import clip_by_global_norm
from fedjax_rec.privacy.schedule import (
    calibrate_schedule,
    geometric,
    half_exponent_ratio,
    noise_energy,
    schedule_event,
    scheduled_gaussian,
    textbook_ratio,
)

STDDEVS = (6.0, 3.0, 1.0)
NORM = 2.0
NUM_ITEMS, DIM = 4_000, 16


def scheduled_rounds(stddevs=STDDEVS, sampler=None):
    """Everything is compiled anew, as in a new process."""
    transforms = chain(clip_by_global_norm(NORM), scheduled_gaussian(stddevs), PROBE)
    sampler = full_participation(NUM_CLIENTS) if sampler is None else sampler
    return make_rounds(ones(NUM_ITEMS, DIM, 3), transforms, sampler, population(num_items=NUM_ITEMS), span_size=4)


@pytest.fixture(scope="module")
def unbroken():
    """The server's state after 1, 2, 3 and 4 rounds of one run, and its rounds."""
    rounds, states = scheduled_rounds(), []
    state, private = rounds.init(jax.random.key(0))
    for _ in range(4):
        state, private, _ = rounds.run(state, private, keys())
        states.append(jax.device_get(state))
    return rounds, states


def noise_of(state):
    """What was added to the sum; the probe kept the sum before it."""
    return leaves(state.shared).astype(np.float64) * NUM_CLIENTS - leaves(state.transforms[2])


def test_each_round_has_the_noise_of_its_place_and_no_other(unbroken):
    for state, stddev in zip(unbroken[1], (*STDDEVS, STDDEVS[-1]), strict=True):  # past the end: the last one's
        noise = noise_of(state)
        assert noise.size > 60_000
        assert stats.kstest(noise, "norm", args=(0, stddev)).pvalue > 1e-3
        for wrong in (2 / 3, 3 / 2):
            assert stats.kstest(noise, "norm", args=(0, stddev * wrong)).pvalue < 1e-9
    drawn = [noise_of(state) / stddev for state, stddev in zip(unbroken[1], (*STDDEVS, STDDEVS[-1]), strict=True)]
    for first, second in ((0, 1), (1, 2), (2, 3)):
        assert abs(np.corrcoef(drawn[first], drawn[second])[0, 1]) < 0.02


@pytest.mark.parametrize("killed_after", [1, 2])
def test_a_resumed_run_goes_on_with_its_schedule_bit_for_bit(unbroken, killed_after):
    """Fresh rounds, and a state that was on disk; then in one span, where the unbroken run took single rounds."""
    rounds = scheduled_rounds()
    private = rounds.init(jax.random.key(9))[1]
    state = unbroken[1][killed_after - 1]
    assert (state.transforms[1], state.transforms[1].dtype) == (killed_after, np.int32)
    state, _, _ = rounds.run(state, private, keys(), 3 - killed_after)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(unbroken[1][2]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_what_is_charged_is_what_runs(unbroken):
    event = dp_accounting.GaussianDpEvent
    assert unbroken[0].releases(0, 3) == tuple((event(s / NORM), 1) for s in STDDEVS)
    assert unbroken[0].releases(1, 2) == tuple((event(s / NORM), 1) for s in STDDEVS[1:])
    ledger = unbroken[0].charge(Ledger(), first_round=0, num_rounds=3)
    together = sum((s / NORM) ** -2 for s in STDDEVS) ** -0.5
    expected = dp_accounting.get_epsilon_gaussian(together, 1e-5)
    assert ledger.spent(1e-5).epsilon == pytest.approx(expected, rel=1e-3)


def test_rounds_past_the_end_cannot_be_charged(unbroken):
    with pytest.raises(ValueError, match=r"schedule is for 3 rounds, and round 3 .* past its end"):
        unbroken[0].charge(Ledger(), first_round=2, num_rounds=2)


@pytest.fixture(scope="module")
def adversarial():
    transforms = chain(clip_by_global_norm(CLIP), scheduled_gaussian(STDDEVS), PROBE)
    return make_rounds(adversaries(), transforms, full_participation(NUM_ADVERSARIES), nothing_but_clients())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(private=uploads, user=users)
def test_one_client_moves_a_rounds_sum_by_at_most_the_clip(adversarial, private, user):
    """Each round on its own, from the same state: what later rounds see is released."""
    gone = np.arange(NUM_ADVERSARIES) == user
    absent = {k: np.where(gone.reshape(-1, *[1] * (v.ndim - 1)), np.zeros_like(v), v) for k, v in private.items()}
    state, _ = adversarial.init(jax.random.key(0))
    run_keys = RoundKeys(*(jax.random.key(i) for i in range(3)))
    sums = []
    for mine in (private, absent):
        start = jax.tree.map(np.array, state)
        sums.append(jax.device_get(adversarial.run(start, jax.tree.map(np.array, mine), run_keys, 2)[0].transforms[2]))
    assert moved(*sums) <= CLIP * (1 + TOLERANCE)


def test_unsound_schedules_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="put a clip before it"):
        chain(scheduled_gaussian(STDDEVS))
    for stddevs in ((), (1.0, 0.0), (1.0, -1.0), (np.inf,), (np.nan,), ((1.0,),)):
        with pytest.raises(ValueError, match="positive, finite"):
            scheduled_gaussian(stddevs)
    with pytest.raises(ValueError, match="noise changes within a turn"):
        schedule_event(STDDEVS, in_turn(6, num_groups=2))
    with pytest.raises(ValueError, match="contraction"):
        textbook_ratio(1.2, 10)
    with pytest.raises(ValueError, match="ratio"):
        geometric(10, 0.0)
    with pytest.raises(ValueError, match="num_levels"):
        geometric(10, 2.0, num_levels=0)


def test_geometric_is_the_formula_with_few_levels():
    np.testing.assert_allclose(geometric(4, 16.0), [8, 4, 2, 1])  # r^((T - t) / T)
    assert np.all(geometric(7, 1.0) == 1)
    long = geometric(500, 3.0)
    values, counts = np.unique(long, return_counts=True)
    assert (len(values), counts.min(), counts.max(), long[-1]) == (20, 25, 25, 1.0)
    assert np.all(np.diff(long) <= 0)
    exact = geometric(500, 3.0, num_levels=500)
    assert np.max(np.abs(np.log(long / exact))) <= np.log(3.0) / 20
    turns = geometric(10, 4.0, num_groups=3)  # the last turn is cut short
    np.testing.assert_allclose(turns, np.repeat(4.0 ** (np.array([3, 2, 1, 0]) / 4), 3)[:10])


def test_in_turn_only_one_round_of_a_turn_is_charged():
    event = schedule_event(geometric(6, 4.0, num_groups=2), in_turn(6, num_groups=2))
    once = sum(geometric(3, 4.0) ** -2) ** -0.5
    spent = privacy_spent(event, delta=1e-5).epsilon
    assert spent == pytest.approx(dp_accounting.get_epsilon_gaussian(once, 1e-5), rel=1e-3)


def test_the_textbook_schedule_is_the_best_at_a_fixed_sum_of_inverse_variances():
    """Against small changes of it, and against a run of the contracting optimiser with noise in it."""
    contraction, num_rounds = 0.9, 30
    best = geometric(num_rounds, textbook_ratio(contraction, num_rounds), num_levels=num_rounds)
    rng = np.random.default_rng(0)

    def energy(stddevs):
        return noise_energy(np.asarray(stddevs) * np.sqrt(np.sum(np.asarray(stddevs, float) ** -2)), contraction)

    for _ in range(50):
        assert energy(best) <= energy(best * np.exp(0.1 * rng.normal(size=num_rounds)))
    assert half_exponent_ratio(contraction, num_rounds) == pytest.approx(0.9**-7.5)
    w = np.zeros(200_000)
    for stddev in best:
        w = contraction * w + stddev * rng.normal(size=w.size)
    assert w.var() == pytest.approx(noise_energy(best, contraction), rel=0.02)


def test_a_calibrated_schedule_meets_its_target_from_below():
    found = calibrate_schedule(geometric(40, 2.0), sampler=full_participation(50), target_epsilon=2.0, delta=1e-4)
    together = np.sum(found.noise_multipliers**-2) ** -0.5
    epsilon = dp_accounting.get_epsilon_gaussian(together, 1e-4)
    assert 0.995 * 2.0 <= epsilon <= 2.0
    assert found.noise_multipliers[0] / found.noise_multipliers[-1] == pytest.approx(2.0 ** (19 / 20))
    sampler = poisson(1000, cohort_size=50)
    mult = geometric(40, 2.0, num_levels=2)
    found = calibrate_schedule(mult, sampler=sampler, target_epsilon=2.0, delta=1e-5)
    assert len(np.unique(found.noise_multipliers)) == 2
    alone = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-3)  # round by round, by itself
    for noise in found.noise_multipliers:
        alone.compose(dp_accounting.PoissonSampledDpEvent(0.05, dp_accounting.GaussianDpEvent(noise)))
    assert 0.995 * 2.0 <= found.calibration.epsilon <= 2.0
    assert alone.get_epsilon(1e-5) == pytest.approx(found.calibration.epsilon, rel=1e-3)
    # The link charges in its units what was calibrated.
    link = scheduled_gaussian(NORM * found.noise_multipliers)
    assert link.dp_event(Bound(l2=NORM), 39).noise_multiplier == pytest.approx(found.calibration.noise_multiplier)

"""Risk: Laplace noise on an update that no L1 norm bounds, of another scale than is accounted, or drawn twice."""

import math

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import given, settings
from scipy import stats
from test_noise import PROBE, keys, ones, population
from test_sensitivity import (
    NUM_CLIENTS,
    SAMPLER,
    adversaries,
    cohorts,
    joint_norm,
    nothing_but_clients,
    pre_noise_sum,
    uploads,
    users,
    with_and_without,
)

from fedjax_rec.federated.cohort import fixed_size, full_participation, poisson
from fedjax_rec.federated.round import make_rounds
from fedjax_rec.federated.transforms import UNBOUNDED, Bound, chain, scale
from fedjax_rec.privacy.accounting import privacy_spent
from fedjax_rec.privacy.laplace import clip_by_l1_norm, laplace_noise, user_level_laplace
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise

CLIP = 0.5


def difference(sums):
    return jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64), *sums)


def l1_norm(tree) -> float:
    return float(sum(np.abs(x).sum() for x in jax.tree.leaves(tree)))


def noise_of_a_round(transforms, probe=PROBE, num_dense=60_000):
    """The noise of one real round, in units of the update: what is released less the sum before the noise."""
    rounds = make_rounds(
        ones(7, 2, num_dense), chain(transforms, probe), full_participation(6), population(), span_size=1
    )
    state, _, _ = rounds.run(*rounds.init(jax.random.key(0)), keys())
    return jax.device_get((state.shared, state.transforms))


def resumes_bit_for_bit(transforms, sampler):
    """Three rounds in one go, and one round, a copy on the host, new rounds and two more: every bit the same."""

    def rounds():
        return make_rounds(ones(7, 2, 3), transforms, sampler, population(), span_size=3)

    unbroken = rounds()
    at_once = unbroken.run(*unbroken.init(jax.random.key(0)), keys(), 3)[:2]
    first = jax.device_get(unbroken.run(*unbroken.init(jax.random.key(0)), keys(), 1)[:2])
    stepwise = rounds().run(*jax.tree.map(jnp.asarray, first), keys(), 2)[:2]
    assert jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(at_once), jax.device_get(stepwise)))
    second = jax.device_get(unbroken.run(*unbroken.init(jax.random.key(0)), keys(), 2)[0])
    for a, b in [(first[0], second), (second, at_once[0])]:  # other noise in every round
        assert np.all(np.asarray(a.shared.dense["out"]) != np.asarray(b.shared.dense["out"]))
    return jax.device_get(at_once[0])


@pytest.fixture(scope="module")
def adversarial_rounds():
    transforms = chain(clip_by_l1_norm(CLIP), laplace_noise(1.0), PROBE)
    return make_rounds(adversaries(), transforms, SAMPLER, nothing_but_clients(), span_size=1)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(uploads=uploads, cohort=cohorts, user=users)
def test_whatever_a_client_sends(adversarial_rounds, uploads, cohort, user):
    """Add one client with any update, and the sum before the noise moves by at most C in L1 norm."""
    state, _ = adversarial_rounds.init(jax.random.key(0))
    sums = [pre_noise_sum(adversarial_rounds, state, uploads, mask) for mask in with_and_without(cohort, user)]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(sums))
    moved = difference(sums)
    assert joint_norm(moved) <= l1_norm(moved) * (1 + 1e-9)
    assert l1_norm(moved) <= CLIP * (1 + 1e-5)
    sent = {k: v[user].astype(np.float64) for k, v in uploads.items()}
    if np.all(np.abs(sent["values"]) <= 3) and np.all(np.abs(sent["dense"]) <= 3):  # and exactly so where it is plain
        table = np.zeros((8, 2))
        np.add.at(table, uploads["ids"][user], sent["values"])
        np.testing.assert_allclose(l1_norm(moved), min(l1_norm((table[:7], sent["dense"])), CLIP), rtol=1e-4, atol=1e-5)


def test_the_noise_is_laplace_of_its_scale():
    scale = 0.75 * CLIP
    released, states = noise_of_a_round(user_level_laplace(l1_clip_norm=CLIP, noise_multiplier=0.75))
    noise = np.asarray(released.dense["out"], np.float64) * 6 - states[1].dense["out"]
    assert stats.kstest(noise, "laplace", args=(0, scale)).pvalue > 1e-3
    for factor in (2 / 3, 3 / 2):
        assert stats.kstest(noise, "laplace", args=(0, factor * scale)).pvalue < 1e-6
    assert stats.kstest(noise, "norm", args=(0, math.sqrt(2) * scale)).pvalue < 1e-6
    rows = np.asarray(released.tables["item"], np.float64) * 6 - states[1].tables["item"]
    assert np.all(rows != 0)


def test_a_resumed_run_is_the_unbroken_one():
    resumes_bit_for_bit(
        user_level_laplace(l1_clip_norm=CLIP, noise_multiplier=1.0), poisson(NUM_CLIENTS, cohort_size=3)
    )


def test_epsilon_is_that_of_the_closed_form():
    event = user_level_laplace(l1_clip_norm=4.0, noise_multiplier=2.5).dp_event(UNBOUNDED, 0)
    assert event == dp_accounting.LaplaceDpEvent(2.5)
    for delta in (1e-6, 0.05):  # one Laplace number moved by its sensitivity: delta = 1 - exp((epsilon - 1 / z) / 2)
        closed_form = 1 / 2.5 + 2 * math.log1p(-delta)
        assert privacy_spent(event, delta=delta).epsilon == pytest.approx(closed_form, rel=1e-3)
        replaced = privacy_spent(event, delta=delta, relation="replace_one").epsilon
        assert replaced == pytest.approx(2 / 2.5 + 2 * math.log1p(-delta), rel=1e-3)


def test_one_number_moved_by_all_of_the_sensitivity_is_the_worst_update():
    """The event is of one number; a move spread evenly over two, or over ten, costs less at every delta."""
    whole = pld.from_laplace_mechanism(2.0, value_discretization_interval=1e-3)
    for parts in (2, 10):
        spread = pld.from_laplace_mechanism(2.0 * parts, value_discretization_interval=1e-3).self_compose(parts)
        for epsilon in np.linspace(0, 0.5, 11):
            assert spread.get_delta_for_epsilon(epsilon) <= whole.get_delta_for_epsilon(epsilon) + 1e-9


def test_links_before_the_noise_change_its_event():
    halved = chain(clip_by_l1_norm(4.0), scale(0.5), laplace_noise(1.0))
    assert halved.dp_event(UNBOUNDED, 0) == dp_accounting.LaplaceDpEvent(0.5)
    assert clip_by_l1_norm(2.0).sensitivity(UNBOUNDED) == Bound(2.0, 2.0)
    assert clip_by_l1_norm(2.0).sensitivity(Bound(1.0, 1.0, noised=True)) == Bound(2.0, 2.0)
    gaussian = chain(clip_by_l1_norm(2.0), gaussian_noise(1.0))  # an L1 bound is an L2 bound
    assert gaussian.dp_event(UNBOUNDED, 0) == dp_accounting.GaussianDpEvent(0.5)


def test_what_is_refused():
    with pytest.raises(ValueError, match="put clip_by_l1_norm before it"):
        chain(clip_by_global_norm(1.0), laplace_noise(1.0))
    for scale_ in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="not negative"):
            laplace_noise(scale_)
    for clip in (0.0, -1.0, math.nan, 1e13):
        with pytest.raises(ValueError, match="l1_clip_norm must be between"):
            clip_by_l1_norm(clip)
    transforms = user_level_laplace(l1_clip_norm=1.0, noise_multiplier=1.0)
    with pytest.raises(ValueError, match="No accountant has a bound for 3 of 6 without replacement"):
        make_rounds(ones(7, 2, 3), transforms, fixed_size(6, cohort_size=3), population())
    nothing = user_level_laplace(l1_clip_norm=1.0, noise_multiplier=0.0)
    assert nothing.dp_event(UNBOUNDED, 0) == dp_accounting.NonPrivateDpEvent()

"""Risk: integers that are none, rounding that lengthens an update, integer noise of another law than is accounted."""

import itertools
import math
from decimal import Decimal, localcontext

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from scipy import stats
from test_laplace import difference, l1_norm, noise_of_a_round, resumes_bit_for_bit
from test_noise import keys, ones, population
from test_sensitivity import (
    NUM_CLIENTS,
    PROBE,
    adversaries,
    joint_norm,
    nothing_but_clients,
    pre_noise_sum,
    uploads,
    users,
)

from fedjax_rec.federated.cohort import fixed_size, full_participation, in_turn, poisson
from fedjax_rec.federated.round import make_rounds
from fedjax_rec.federated.rows import Rows
from fedjax_rec.federated.transforms import UNBOUNDED, Bound, chain, scale
from fedjax_rec.privacy import noise
from fedjax_rec.privacy.accounting import privacy_spent
from fedjax_rec.privacy.discrete import (
    discrete_gaussian_noise,
    round_to_grid,
    rounded_norm_bound,
    skellam_noise,
    user_level_discrete_gaussian,
    user_level_skellam,
)
from fedjax_rec.privacy.mechanisms import clip_by_global_norm
from fedjax_rec.privacy.skellam import SkellamDpEvent, skellam_rdp

CLIP, GRANULARITY = 0.5, 0.05
MECHANISMS = {"discrete Gaussian": user_level_discrete_gaussian, "Skellam": user_level_skellam}
PMF = {
    "discrete Gaussian": lambda k, stddev: np.exp(-(k**2) / (2 * stddev**2)),
    "Skellam": lambda k, stddev: stats.skellam.pmf(k, stddev**2 / 2, stddev**2 / 2),
}


def private(name, *, noise_multiplier=1.0, num_numbers=13, **options):
    options = {"l2_clip_norm": CLIP, "granularity": GRANULARITY, "max_clients": NUM_CLIENTS} | options
    return MECHANISMS[name](noise_multiplier=noise_multiplier, num_numbers=num_numbers, **options)


# What a client adds.

ROUNDED = chain(clip_by_global_norm(CLIP), round_to_grid(GRANULARITY, num_numbers=13, max_clients=NUM_CLIENTS))
BOUND = ROUNDED.sensitivity(UNBOUNDED)


@pytest.fixture(scope="module")
def adversarial_rounds():
    transforms = chain(ROUNDED, discrete_gaussian_noise(1.0), PROBE)
    return make_rounds(adversaries(), transforms, full_participation(NUM_CLIENTS), nothing_but_clients(), span_size=1)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(uploads=uploads, user=users)
def test_whatever_a_client_sends(adversarial_rounds, uploads, user):
    """With any update of one client, and with none: integers that differ by at most the bound, without a tolerance."""
    state, _ = adversarial_rounds.init(jax.random.key(0))
    absent = {k: np.where((np.arange(6) == user).reshape(-1, *[1] * (v.ndim - 1)), 0, v) for k, v in uploads.items()}
    sums = [pre_noise_sum(adversarial_rounds, state, p, np.ones(6, bool)) for p in (uploads, absent)]
    assert all(np.array_equal(x, np.trunc(x)) for x in jax.tree.leaves(sums))
    moved = difference(sums)
    assert joint_norm(moved) <= BOUND.l2
    assert l1_norm(moved) <= BOUND.l1


def rounded(update, num_draws, link):
    draw = jax.jit(jax.vmap(lambda key: link.client(update, (), key)))
    return jax.device_get(draw(jax.random.split(jax.random.key(0), num_draws)))


@pytest.mark.parametrize("num_tries", [1, 16])
def test_rounding_keeps_the_mean_and_never_passes_the_bound(num_tries):
    """Half steps, the worst for the norm: one try fails now and then, and is rounded towards zero."""
    values = np.random.default_rng(0).choice([-0.5, 0.5], size=(100, 2)).astype(np.float32)
    update = {"rows": Rows(jnp.arange(100), jnp.asarray(values), 100), "dense": jnp.array([0.0, 2.5, -2.5])}
    link = round_to_grid(1.0, num_numbers=203, max_clients=1, num_tries=num_tries)
    limit = rounded_norm_bound(joint_norm((values, update["dense"])), 203)
    drawn, metrics = rounded(update, 4000, link)
    numbers = np.concatenate([drawn["rows"].values.reshape(4000, -1), drawn["dense"]], axis=1)
    assert np.array_equal(numbers, np.trunc(numbers))
    assert np.all(np.linalg.norm(numbers, axis=1) <= limit * (1 + 1e-6))
    assert np.all(drawn["dense"][:, 0] == 0)  # zeros, and so padding, stay zeros
    exact = np.concatenate([values.ravel(), np.asarray(update["dense"])])
    if num_tries == 1:
        assert 0 < metrics["truncated"].mean() < 0.4
    else:
        assert metrics["truncated"].mean() == 0
        assert np.abs(numbers.mean(0) - exact).mean() < 0.02
        assert np.abs(np.dot(numbers.mean(0), exact) / np.dot(exact, exact) - 1) < 0.02


def test_the_norm_bound_is_that_of_the_paper():
    c, d = 20.0, 400  # min(20 + 20, sqrt(400 + 100 + 20 + 10))
    assert rounded_norm_bound(c, d) == pytest.approx(math.sqrt(530))
    assert rounded_norm_bound(2.0, 4, beta=1e-60) == 4
    assert float(rounded_norm_bound(jnp.float32(c), d)) == pytest.approx(math.sqrt(530), rel=1e-6)
    assert Bound(min(math.sqrt(13) * BOUND.l2, BOUND.l2**2), BOUND.l2, integers=True) == BOUND
    assert 1 <= BOUND.l2 / rounded_norm_bound(CLIP / GRANULARITY, 13) < 1 + 3e-5


# The noise.


@pytest.mark.parametrize("name", MECHANISMS)
def test_the_noise_is_of_its_law_and_on_the_grid(name):
    """Through the real round: chi-square over the integers accepts the standard deviation, and not 2/3 or 3/2 of it."""
    mechanism = private(name, noise_multiplier=0.3, num_numbers=60_003, granularity=0.25, max_clients=6)
    stddev = (
        0.3
        * chain(clip_by_global_norm(CLIP), round_to_grid(0.25, num_numbers=60_003, max_clients=6))
        .sensitivity(UNBOUNDED)
        .l2
    )
    released, states = noise_of_a_round(mechanism)
    total = np.asarray(released.dense["out"], np.float64) * 6 / 0.25
    assert np.abs(total - np.round(total)).max() < 1e-2
    drawn = np.round(total)
    drawn -= np.asarray(states[1].dense["out"])

    values, observed = np.unique(drawn, return_counts=True)
    far = int(12 * stddev) + 20
    counts = np.zeros(2 * far + 1)
    counts[values.astype(int) + far] = observed

    def pvalue(std):
        expected = PMF[name](np.arange(-far, far + 1), std)
        expected *= drawn.size / expected.sum()
        often = expected > 5
        seen = np.append(counts[often], counts[~often].sum())
        expected = np.append(expected[often], max(expected[~often].sum(), 1e-9))
        return stats.chi2.sf(np.sum((seen - expected) ** 2 / expected), len(seen) - 1)

    assert pvalue(stddev) > 1e-3
    assert max(pvalue(stddev * 2 / 3), pvalue(stddev * 3 / 2)) < 1e-6


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize("stddev", [0.1, 0.7, 3.0, 40.0])
def test_the_table_is_the_law_to_the_last_bits(name, stddev, monkeypatch):
    """Total variation distance to probabilities in 60 decimal digits, from series that share nothing with ours."""
    tables = []
    monkeypatch.setattr(noise, "_symmetric_integers", lambda key, shape, mass: tables.append(mass))
    {"discrete Gaussian": noise.discrete_gaussian, "Skellam": noise.skellam}[name](None, (), stddev)
    thresholds = noise.tail_thresholds(tables[0])
    with localcontext() as context:
        context.prec = 60
        ours = [Decimal(2**63), *map(Decimal, thresholds), Decimal(0)]
        ours = [(a - b) / 2**63 for a, b in itertools.pairwise(ours)]  # P(|X| = k)
        variance = Decimal(stddev) ** 2
        masses = [_mass(name, k, variance) for k in range(len(ours) + 40)]
        total = masses[0] + 2 * sum(masses[1:])
        true = [(2 if k else 1) * mass / total for k, mass in enumerate(masses)]
        distance = sum(abs(a - b) for a, b in zip(ours + [Decimal(0)] * 40, true, strict=True)) / 2
    extended = np.finfo(np.longdouble).nmant >= 63
    assert float(distance) < max(stddev, 1) * (1e-16 if extended else 1e-14)


def _mass(name, k, variance):
    if name == "discrete Gaussian":
        return (-(Decimal(k) ** 2) / (2 * variance)).exp()
    half, term, total, j = variance / 2, Decimal(1), Decimal(0), 0  # I_k(variance), by its power series
    for i in range(1, k + 1):
        term *= half / i
    while term > total * Decimal(10) ** -45 or j < 2:
        total, j = total + term, j + 1
        term *= half * half / (j * (j + k))
    return total


def test_noise_that_is_too_small_for_the_grid_is_no_noise():
    assert not np.any(noise.discrete_gaussian(jax.random.key(0), (1000,), 0.1))  # P(1) = 2e-22: as in the true law
    with pytest.raises(ValueError, match="A coarser granularity makes it smaller"):
        skellam_noise(1e5)


def test_a_resumed_run_is_the_unbroken_one():
    mechanism = private("Skellam", noise_multiplier=20.0, num_numbers=6)  # so that no two rounds draw alike
    resumes_bit_for_bit(mechanism, full_participation(NUM_CLIENTS))


# What it costs.


def test_the_discrete_gaussian_costs_what_its_zcdp_says():
    event = private("discrete Gaussian", noise_multiplier=2.0).dp_event(UNBOUNDED, 0)
    assert event == dp_accounting.ZCDpEvent(rho=pytest.approx(1 / 8), xi=0.0)
    orders = np.concatenate([np.arange(1.1, 11, 0.1), np.arange(11, 64)])

    def closed_form(rho, delta):
        return np.min(rho * orders + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1))

    for count in (1, 50):
        composed = dp_accounting.SelfComposedDpEvent(event, count)
        assert privacy_spent(composed, delta=1e-5).epsilon == pytest.approx(closed_form(count / 8, 1e-5), rel=1e-3)
    replaced = privacy_spent(event, delta=1e-5, relation="replace_one").epsilon
    assert replaced == pytest.approx(closed_form(4 / 8, 1e-5), rel=1e-3)


@pytest.mark.parametrize(("stddev", "moved"), [(3.0, 1), (5.0, 4), (40.0, 20)])
def test_the_skellam_curve_bounds_the_true_divergence(stddev, moved):
    """Of one number moved by ``moved``, summed over the integers; above it, and by little where the noise is large."""
    k = np.arange(-int(40 * stddev) - moved, int(40 * stddev) + moved + 1)
    log_p = stats.skellam.logpmf(k, stddev**2 / 2, stddev**2 / 2)
    log_q = stats.skellam.logpmf(k - moved, stddev**2 / 2, stddev**2 / 2)
    known = np.isfinite(log_p) & np.isfinite(log_q)
    for order in (1.3, 2.0, 2.5, 4.0, 7.7, 16.0):
        terms = order * log_p[known] + (1 - order) * log_q[known]
        true = np.log(np.sum(np.exp(terms))) / (order - 1)
        (bound,) = skellam_rdp(SkellamDpEvent(stddev, moved, moved), [order])
        assert true <= bound * (1 + 1e-9)
        if stddev == 40.0 and order == int(order):
            assert bound <= true * 1.1


def test_skellam_epsilons():
    """Against the formula written out at integer orders, and against the Gaussian it comes near to."""
    event = private("Skellam", noise_multiplier=2.0, num_numbers=1000, granularity=0.005).dp_event(UNBOUNDED, 0)
    d1, d2, m = event.l1_sensitivity, event.l2_sensitivity, event.stddev**2
    assert event.stddev == pytest.approx(2.0 * d2)
    orders = np.arange(2, 64)

    def written_out(count, d1, d2):
        second = np.minimum(((2 * orders - 1) * d2**2 + 6 * d1) / (4 * m**2), 3 * d1 / (2 * m))
        rdp = count * (orders * d2**2 / (2 * m) + second)
        return np.min(rdp + np.log1p(-1 / orders) - np.log(1e-5 * orders) / (orders - 1))

    for count in (1, 20):
        composed = dp_accounting.SelfComposedDpEvent(event, count)
        spent = privacy_spent(composed, delta=1e-5)
        assert spent.accountant == "RDP"
        assert 0.98 * written_out(count, d1, d2) <= spent.epsilon <= written_out(count, d1, d2) * (1 + 1e-6)
        gaussian = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(2.0), count)
        assert 1 <= spent.epsilon / privacy_spent(gaussian, delta=1e-5, accountant="RDP").epsilon < 1.01
    replaced = privacy_spent(event, delta=1e-5, relation="replace_one").epsilon
    assert 0.98 * written_out(1, 2 * d1, 2 * d2) <= replaced <= written_out(1, 2 * d1, 2 * d2) * (1 + 1e-6)


def test_skellam_composes_with_other_releases():
    event = SkellamDpEvent(50.0, 30.0, 10.0)
    mixed = dp_accounting.ComposedDpEvent([event, dp_accounting.GaussianDpEvent(3.0), event])
    alone = privacy_spent(mixed, delta=1e-5)
    rdp = 2 * skellam_rdp(event, np.arange(2, 64)) + np.arange(2, 64) / 18
    orders = np.arange(2, 64)
    expected = np.min(rdp + np.log1p(-1 / orders) - np.log(1e-5 * orders) / (orders - 1))
    assert alone.epsilon == pytest.approx(expected, rel=1e-3)
    assert privacy_spent(SkellamDpEvent(0.0, 1.0, 1.0), delta=1e-5).epsilon == math.inf
    assert privacy_spent(SkellamDpEvent(1.0, 0.0, 0.0), delta=1e-5).epsilon == 0.0


# What is refused.


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize("sampler", [poisson(6, cohort_size=3), fixed_size(6, cohort_size=3)], ids=["poisson", "fixed"])
def test_no_amplification_by_sampling_is_claimed(name, sampler):
    with pytest.raises(ValueError, match="cohorts without sampling, full_participation or in_turn"):
        make_rounds(ones(7, 2, 3), private(name), sampler, population())
    for sampler in (full_participation(6, relation="replace_one"), in_turn(6, num_groups=2)):
        assert make_rounds(ones(7, 2, 3), private(name), sampler, population()).private


def test_integer_noise_needs_integers_of_bounded_norm():
    for link in (discrete_gaussian_noise, skellam_noise):
        for before in ((), (clip_by_global_norm(1.0),), (ROUNDED, scale(0.5)), (ROUNDED, clip_by_global_norm(1.0))):
            with pytest.raises(ValueError, match="put a clip and round_to_grid before it"):
                chain(*before, link(1.0))
        with pytest.raises(ValueError, match="A link after the noise"):
            chain(ROUNDED, link(1.0), scale(0.5))
    for bound in (UNBOUNDED, Bound(1.0, 1.0, noised=True)):
        with pytest.raises(ValueError, match="put a clip just before it"):
            round_to_grid(1.0, num_numbers=3, max_clients=1).sensitivity(bound)


def test_sums_beyond_the_integers_of_float32_are_refused():
    with pytest.raises(ValueError, match="float32 holds integers exactly up to 16777216"):
        private("Skellam", granularity=1e-4, max_clients=10_000)
    small = private("Skellam", num_numbers=5)
    rounds = make_rounds(ones(7, 2, 3), small, full_participation(NUM_CLIENTS), population())
    with pytest.raises(ValueError, match="6 numbers, more than num_numbers=5"):
        rounds.run(*rounds.init(jax.random.key(0)), keys())
    with pytest.raises(ValueError, match="positive granularity"):
        round_to_grid(0.0, num_numbers=3, max_clients=1)


def test_without_noise_nothing_is_claimed():
    assert private("Skellam", noise_multiplier=0.0).dp_event(UNBOUNDED, 0) == dp_accounting.NonPrivateDpEvent()

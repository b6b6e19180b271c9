"""Risk: the cohort that is drawn is not the one that is accounted: its size, who is in it, and how often."""

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fedjax_rec.federated.cohort import fixed_size, full_participation, poisson

NUM_CLIENTS, COHORT_SIZE, DRAWS = 40, 8, 20_000


def masks(sampler, num_draws=DRAWS, seed=0):
    """bool ``[draws, clients]``."""
    keys = jax.random.split(jax.random.key(seed), num_draws)
    return np.asarray(jax.jit(jax.vmap(lambda key: sampler.draw(key, 0)))(keys))


def test_poisson_sizes_have_the_binomial_mean_and_variance():
    prob = COHORT_SIZE / NUM_CLIENTS
    sizes = masks(poisson(NUM_CLIENTS, cohort_size=COHORT_SIZE)).sum(1)
    observed = np.bincount(sizes, minlength=NUM_CLIENTS + 1)
    expected = DRAWS * stats.binom.pmf(np.arange(NUM_CLIENTS + 1), NUM_CLIENTS, prob)
    often = expected > 20
    pooled = [np.append(x[often], x[~often].sum()) for x in (observed, expected)]
    assert stats.chisquare(*pooled, sum_check=False).pvalue > 1e-3
    assert abs(sizes.mean() - COHORT_SIZE) < 4 * np.sqrt(COHORT_SIZE * (1 - prob) / DRAWS)


@pytest.mark.parametrize("cohort_size", [1, COHORT_SIZE, NUM_CLIENTS - 1, NUM_CLIENTS])
def test_fixed_sizes_are_exact(cohort_size):
    assert set(masks(fixed_size(NUM_CLIENTS, cohort_size=cohort_size), 500).sum(1)) == {cohort_size}


@pytest.mark.parametrize("make", [poisson, fixed_size])
def test_every_client_and_every_pair_is_equally_likely(make):
    drawn = masks(make(NUM_CLIENTS, cohort_size=COHORT_SIZE)).astype(np.float64)
    prob = COHORT_SIZE / NUM_CLIENTS
    singles = drawn.sum(0)
    assert np.all(np.abs(singles / DRAWS - prob) < 5 * np.sqrt(prob * (1 - prob) / DRAWS))
    pairs = (drawn.T @ drawn)[np.triu_indices(NUM_CLIENTS, 1)] / DRAWS
    expected = prob**2 if make is poisson else prob * (COHORT_SIZE - 1) / (NUM_CLIENTS - 1)
    assert abs(pairs.mean() / expected - 1) < 0.02
    assert np.all(np.abs(pairs - expected) < 5 * np.sqrt(expected / DRAWS))


def test_rare_clients_are_as_rare_as_the_event_says():
    """One in 2**24, where float32 uniforms, multiples of 2**-23, would draw twice as many."""
    num_clients, draws = 2**20, 300
    sampler = poisson(num_clients, cohort_size=2**-4)
    count = jax.jit(
        lambda: jax.lax.map(lambda seed: sampler.draw(jax.random.key(seed), 0).sum(), jnp.arange(draws)).sum()
    )()
    assert sampler.dp_event(dp_accounting.NoOpDpEvent()).sampling_probability == 2**-24
    expected = draws * 2**-4
    assert abs(int(count) - expected) < 3 * np.sqrt(expected)


def test_everyone_is_everyone():
    assert masks(full_participation(NUM_CLIENTS), 3).all()
    assert masks(poisson(NUM_CLIENTS, cohort_size=NUM_CLIENTS), 1000).all()


def test_the_same_key_draws_the_same_cohort_and_another_key_another():
    for sampler in (poisson(NUM_CLIENTS, cohort_size=COHORT_SIZE), fixed_size(NUM_CLIENTS, cohort_size=COHORT_SIZE)):
        a, b, c = (np.asarray(sampler.draw(jax.random.key(seed), 0)) for seed in (0, 0, 1))
        np.testing.assert_array_equal(a, b)
        assert np.any(a != c)


def test_events_say_what_is_drawn():
    release = dp_accounting.GaussianDpEvent(1.5)
    sampler = poisson(50, cohort_size=10)
    assert sampler.dp_event(release) == dp_accounting.PoissonSampledDpEvent(0.2, release)
    assert (sampler.expected_size, sampler.sampling_prob, sampler.relation) == (10, 0.2, "add_or_remove_one")
    sampler = fixed_size(50, cohort_size=10)
    assert sampler.dp_event(release) == dp_accounting.SampledWithoutReplacementDpEvent(50, 10, release)
    assert (sampler.expected_size, sampler.sampling_prob, sampler.relation) == (10, 0.2, "replace_one")
    sampler = full_participation(50)
    assert sampler.dp_event(release) == release
    assert (sampler.expected_size, sampler.sampling_prob, sampler.relation) == (50, 1.0, "add_or_remove_one")


def test_a_fractional_expected_size_is_poissons_alone():
    assert poisson(10, cohort_size=2.5).sampling_prob == 0.25
    with pytest.raises(ValueError, match=r"whole number of clients; got 2\.5"):
        fixed_size(10, cohort_size=2.5)
    with pytest.raises(ValueError, match=r"whole number of clients; got 0\.5"):
        fixed_size(10, cohort_size=0.5)


@pytest.mark.parametrize("make", [poisson, fixed_size])
@pytest.mark.parametrize("cohort_size", [11, 0, -3, float("nan")])
def test_cohorts_outside_the_population_refuse(make, cohort_size):
    with pytest.raises(ValueError, match=f"between 1 and the number of clients, 10; got {cohort_size}"):
        make(10, cohort_size=cohort_size)


def test_nobody_refuses():
    with pytest.raises(ValueError, match="the population is empty"):
        full_participation(0)

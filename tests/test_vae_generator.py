"""Risk: virtual users of an autoencoder mix what is apart, or hand out what an encoder says of real ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_worlds import interactions
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from fedjax_rec.federated.cohort import poisson
from fedjax_rec.models.mult_vae import Posterior
from fedjax_rec.privacy.ledger import Ledger
from fedjax_rec.synthesis.generator import draw_histories
from fedjax_rec.synthesis.latent_prior import (
    NUM_STEPS,
    SENSITIVITY,
    LatentMixture,
    contribution,
    draw_mixture,
    mixture_of,
    noised_sum,
)
from fedjax_rec.synthesis.methods import quiet
from fedjax_rec.synthesis.vae import PrivateTraining, VaeGenerator, vae_method

# Two cliques of eight items, users with four items of theirs; and one user id without rows.
NUM_USERS, NUM_ITEMS = 41, 16
RNG = np.random.default_rng(0)
LISTS = [(RNG.permutation(8)[:4] + 8 * (u % 2)).tolist() for u in range(NUM_USERS - 1)]
CLIQUES = interactions([*LISTS, []], num_items=NUM_ITEMS)
PRIVATE = PrivateTraining(latent=3, rounds=3, sampling_prob=0.5)
METHOD = vae_method(latent=3, num_epochs=60, learning_rate=0.03, private=PRIVATE)
MIXED = vae_method(latent=3, num_epochs=3, prior="mixture", num_components=2, private=PRIVATE)


def zeros(method):
    return {phase.name: np.zeros(phase.rounds) for phase in method.phases(NUM_USERS - 1, NUM_ITEMS)}


def noise_of(method, level):
    return {name: np.full(len(z), level) for name, z in zeros(method).items()}


@pytest.fixture(scope="module")
def fitted():
    return METHOD.fit(CLIQUES, zeros(METHOD), jax.random.key(0), quiet)


@pytest.fixture(scope="module")
def private():
    return MIXED.fit(CLIQUES, noise_of(MIXED, 2.0), jax.random.key(0), quiet)


def test_virtual_users_stay_within_a_clique(fitted):
    histories = draw_histories(fitted, np.full(200, 4), key=jax.random.key(1))
    second = (histories >= 8).mean(1)
    assert np.mean((second == 0) | (second == 1)) > 0.9
    assert 0.25 < second.mean() < 0.75  # and of both of them
    assert not fitted.private
    assert fitted.releases == ()


def test_draws_are_deterministic_and_independent_of_the_batch(fitted):
    lengths = np.array([3, 1, 16, 2, 5])
    one = draw_histories(fitted, lengths, key=jax.random.key(1), batch_size=2)
    np.testing.assert_array_equal(one, draw_histories(fitted, lengths, key=jax.random.key(1), batch_size=5))
    np.testing.assert_array_equal(one[:3], draw_histories(fitted, lengths[:3], key=jax.random.key(1), batch_size=2))
    assert np.any(one != draw_histories(fitted, lengths, key=jax.random.key(2), batch_size=2))


@pytest.mark.parametrize("name", ["fitted", "private"])
def test_a_generator_holds_a_decoder_and_a_prior_and_nothing_of_users(name, request):
    """Whatever a caller can reach from it: fields, and what its functions carry with them."""
    generator = request.getfixturevalue(name)
    assert isinstance(generator.params, VaeGenerator)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(generator.params)]
    assert not any("encoder" in path or "'item'" in path for path in paths)
    sizes = {size for leaf in jax.tree.leaves(generator.params) for size in leaf.shape}
    assert not sizes & {NUM_USERS, NUM_USERS - 1}
    assert sizes <= {1, 2, 3, NUM_ITEMS}
    assert generator.scores._fields == ("temperature", "gumbel_scale")
    assert generator.sequence is None
    assert all(isinstance(value, str | int | float | bool | None) for value in generator.choices.values())


def test_every_release_is_charged_as_it_was_planned(private):
    """Phases, counts and cohorts; the number of users is that of users with rows."""
    planned = {phase.name: phase for phase in MIXED.phases(NUM_USERS - 1, NUM_ITEMS)}
    entries = {entry.phase: entry for entry in private.releases}
    assert private.private
    assert set(entries) == set(planned) == {"counts", "training", "mixture"}
    assert {name: entry.count for name, entry in entries.items()} == {"counts": 1, "training": 3, "mixture": NUM_STEPS}
    assert all(p.rounds == entries[name].count for name, p in planned.items())
    sampled = entries["training"].event
    sampler = poisson(NUM_USERS - 1, cohort_size=planned["training"].cohort_size)
    assert entries["training"].sampler == sampler.name == "poisson"
    assert sampled == sampler.dp_event(sampled.event)
    assert sampled.event.noise_multiplier == 2.0
    assert np.isfinite(Ledger(entries=private.releases).spent(1e-3).epsilon)


def test_one_round_of_training_adds_the_planned_noise():
    """With noise far above any signal, the table of items less its first value is the noise: KS at three scales."""
    how = PrivateTraining(latent=64, rounds=1, sampling_prob=0.5, init_stddev=1e-6)
    method = vae_method(private=how)
    noise = {"counts": np.array([1.0]), "training": np.array([1e4])}
    found = method.fit(CLIQUES, noise, jax.random.key(3), quiet)
    table = np.ravel(found.params.decoder.tables["out"])
    expected = how.server_lr * 1e4 / (0.5 * (NUM_USERS - 1))
    assert stats.kstest(table, "norm", args=(0, expected)).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(table, "norm", args=(0, wrong * expected)).pvalue < 1e-6


# The mixture.

NUMBERS = st.floats(-5, 5, width=32) | st.sampled_from([np.inf, -np.inf, np.nan, 1e30, 0.0])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(means=hnp.arrays(np.float32, (5, 3), elements=NUMBERS), logs=hnp.arrays(np.float32, (5, 3), elements=NUMBERS))
def test_one_user_moves_a_step_by_no_more_than_its_sensitivity(means, logs):
    centres = jnp.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    absent = np.where(np.arange(5)[:, None] == 2, np.float32(np.nan), means)  # adds nothing, as if it were not there
    release = [
        noised_sum(centres, Posterior(m, logs), 0.0, jax.random.key(0), num_components=2) for m in (means, absent)
    ]
    assert np.all(np.isfinite(release))
    assert np.linalg.norm(np.float64(release[0]) - release[1]) <= SENSITIVITY * (1 + 1e-5)


def test_the_bound_is_reached_and_short_contributions_pass_as_they_are():
    far = contribution(Posterior(jnp.full(3, 100.0), jnp.zeros(3)), jnp.int32(1), 2)
    assert np.isclose(np.linalg.norm(far), SENSITIVITY, rtol=1e-6)
    assert not np.any(far[0])
    near = contribution(Posterior(jnp.array([0.5, 0.0, 0.0]), jnp.full(3, -9.0)), jnp.int32(0), 2)
    expected = np.array([1, 0.5, 0, 0, 0.25 + np.exp(-9), np.exp(-9), np.exp(-9)]) / np.sqrt([1, 3, 3, 3, 3, 3, 3])
    np.testing.assert_allclose(near[0], expected, rtol=1e-5)


def test_noise_of_a_step():
    posteriors = Posterior(jnp.zeros((4, 3)), jnp.zeros((4, 3)))
    centres = jnp.zeros((300, 3))
    noised, exact = (
        noised_sum(centres, posteriors, s, jax.random.key(1), num_components=300) for s in (SENSITIVITY * 2, 0.0)
    )
    noise = np.ravel(noised - exact)
    assert stats.kstest(noise, "norm", args=(0, 2 * SENSITIVITY)).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(noise, "norm", args=(0, wrong * 2 * SENSITIVITY)).pvalue < 1e-6


def test_a_mixture_has_the_moments_it_was_released_with_and_is_drawn_by_them():
    """Two users at -1 and two at 1, each with variance 0.09, around public centres."""
    means = jnp.repeat(jnp.array([[-1.0, -1.0], [1.0, 1.0]]), 2, axis=0)
    posteriors = Posterior(0.5 * means, jnp.full((4, 2), np.log(0.09)))
    released = noised_sum(means[1:3], posteriors, 0.0, jax.random.key(0), num_components=2)
    mixture = mixture_of(released, 0.0)
    np.testing.assert_allclose(mixture.means, 0.5 * means[1:3], rtol=1e-5)
    np.testing.assert_allclose(mixture.stddevs, 0.3, rtol=1e-4)
    lopsided = LatentMixture(jnp.array([0.25, 0.75]), mixture.means, mixture.stddevs)
    z = jax.vmap(lambda key: draw_mixture(lopsided, key))(jax.random.split(jax.random.key(0), 4000))
    assert abs(np.mean(z[:, 0] > 0) - (0.25 * 0.048 + 0.75 * 0.952)) < 0.03


def test_bad_settings_are_refused_with_the_value():
    with pytest.raises(ValueError, match="variant must be one of mult, rec; got 'beta'"):
        vae_method(variant="beta")
    with pytest.raises(ValueError, match="prior must be one of normal, mixture; got 'posterior'"):
        vae_method(prior="posterior")
    with pytest.raises(ValueError, match="temperature must be positive"):
        vae_method(temperature=0)
    with pytest.raises(ValueError, match=r"sampling_prob in \(0, 1\]"):
        vae_method(private=PrivateTraining(sampling_prob=1.5))
    with pytest.raises(ValueError, match="no user with a row"):
        METHOD.fit(interactions([[]], num_items=NUM_ITEMS), zeros(METHOD), jax.random.key(0), quiet)
    uneven = zeros(MIXED) | {"mixture": np.array([1.0, 2, 2, 2, 2])}
    with pytest.raises(ValueError, match="must be equal"):
        MIXED.fit(CLIQUES, uneven, jax.random.key(0), quiet)

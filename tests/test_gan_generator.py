"""Risk: the relaxed rows are no rows, the penalty is another one, or a generator knows more than was released."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_worlds import interactions
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedjax_rec.models import gan_rows
from fedjax_rec.models.popularity import dp_popularity
from fedjax_rec.synthesis.gan import Moments, gan_method, likely_counts, moment_loss
from fedjax_rec.synthesis.generator import draw_histories
from fedjax_rec.synthesis.plan import fit_generator

NUM_ITEMS = 12
SIZES = gan_rows.GanSizes(latent_dim=4, hidden_size=6, rank=3, critic_rank=3, critic_hidden_size=5)
TASTES = [np.arange(6), np.arange(6, 12)]


def two_cliques(num_users=24):
    """Even users touched four of the first six items, odd ones four of the others."""
    rng = np.random.default_rng(0)
    return interactions([rng.permutation(TASTES[u % 2])[:4] for u in range(num_users)], num_items=NUM_ITEMS)


def within_one(histories):
    """Share of histories of one taste only."""
    return np.mean(np.all(histories < 6, axis=1) | np.all(histories >= 6, axis=1))


TOP_N = jax.jit(gan_rows.top_n)
RELAXED = jax.jit(gan_rows.relaxed_top_n)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    scores=hnp.arrays(np.float32, 9, elements=st.sampled_from([-2.5, -1.0, 0.0, 1e-30, 1.0, 3e38, -3e38, np.inf])),
    n=st.integers(0, 9),
)
def test_top_n_has_exactly_n_ones_and_ties_go_by_place(scores, n):
    expected = np.zeros(9, bool)
    expected[np.argsort(-scores.astype(np.float64), kind="stable")[:n]] = True
    np.testing.assert_array_equal(TOP_N(scores, n), expected)


def test_relaxed_top_n_is_hard_forward_and_soft_backward():
    scores = jax.random.normal(jax.random.key(0), (9,))
    row = np.asarray(RELAXED(scores, 4))
    assert sorted(row) == [0.0] * 5 + [1.0] * 4  # to the last bit
    gradient = jax.grad(lambda s: gan_rows.relaxed_top_n(s, 4) @ jnp.arange(9.0))(scores)
    assert np.all((gradient[1:] > 0) & np.isfinite(gradient[1:]))  # every item can be moved into the row
    sharp = jax.grad(lambda s: gan_rows.relaxed_top_n(s, 4, temperature=0.01) @ jnp.arange(9.0))(scores)
    assert np.count_nonzero(np.asarray(sharp) > 1e-6) < 9


def linear_critic(slope):
    """Biases so large that both leaky units stay above zero: D(x) = 3 (x @ slope) + constant."""
    dense = {
        "in_bias": jnp.array([10.0]),
        "hidden": jnp.array([[3.0]]),
        "hidden_bias": jnp.array([5.0]),
        "out": jnp.array([1.0]),
    }
    return jnp.asarray(slope, jnp.float32)[:, None], dense


def test_gradient_penalty_of_a_linear_critic_by_hand():
    slope, row, fake, weight = np.array([0.3, -0.4, 0.0]), np.array([1.0, 0, 0]), np.array([0, 0.6, 0.8]), 7.0
    table, dense = linear_critic(slope)
    loss = jax.value_and_grad(gan_rows.critic_loss, argnums=(0, 1))
    value, (by_table, by_dense) = loss(table, dense, *map(jnp.float32, (row, fake, 0.3)), weight)
    norm = 3 * 0.5  # |3 slope|, wherever between the rows
    assert value == pytest.approx(3 * slope @ (fake - row) + weight * (norm - 1) ** 2, abs=1e-4)
    expected = 3 * (fake - row) + weight * 2 * (norm - 1) * 3 * slope / 0.5
    np.testing.assert_allclose(by_table[:, 0], expected, rtol=1e-4)
    assert by_dense["hidden"][0, 0] == pytest.approx(slope @ (fake - row) + weight * 2 * (norm - 1) * 0.5, rel=1e-4)


def test_a_constant_critic_has_a_finite_gradient():
    gradient = jax.grad(gan_rows.critic_loss)(*linear_critic(np.zeros(3)), jnp.ones(3), jnp.zeros(3), 0.5, 1.0)
    assert np.all(np.isfinite(gradient))


def test_an_untrained_generator_samples_by_popularity():
    """The first item of a history has probability softmax(log popularity), but for the small start in V."""
    popularity = np.array([1.0, 2.0, 3.0, 6.0], np.float32)
    table, dense = gan_rows.init_generator(jax.random.key(0), SIZES, jnp.log(popularity))
    keys = jax.random.split(jax.random.key(1), 20_000)
    first = jax.vmap(lambda key: jnp.argmax(gan_rows.virtual_scores(table, dense, key)))(keys)
    np.testing.assert_allclose(np.bincount(first, minlength=4) / 20_000, popularity / 12, atol=0.015)


def test_moment_loss_is_the_distance_of_moments():
    """In the mean over batches: |E x x^T - C|^2 + |E x - c|^2, less what no generator can change."""
    rng = np.random.default_rng(0)
    support, real = rng.random((5, 4)), rng.random((30, 4))
    moment, mean = real.T @ real / 30, real.mean(0)
    values, vectors = np.linalg.eigh(moment)
    moments = Moments(*(jnp.asarray(x, jnp.float32) for x in (values, vectors, mean)))
    expected = np.sum((support.T @ support / 5 - moment) ** 2) + np.sum((support.mean(0) - mean) ** 2)
    expected -= np.sum(moment**2) + np.sum(mean**2)
    batches = rng.integers(0, 5, (20_000, 3))
    losses = jax.vmap(moment_loss, in_axes=(0, None))(jnp.asarray(support[batches], jnp.float32), moments)
    assert np.mean(losses) == pytest.approx(expected, abs=float(5 * np.std(losses) / np.sqrt(20_000)))


def test_noise_in_counts_of_rare_items_is_averaged_out():
    train = interactions([[0, 1]] * 4000 + [[2]], num_items=500)
    released = dp_popularity(train, noise_multiplier=30.0, key=jax.random.key(0))
    likely = likely_counts(released)
    assert np.all(likely > 0)
    assert np.all(likely[:2] > 2000)
    assert np.median(likely) < 3
    assert len(np.unique(likely[2:])) < 30  # all but the chance outliers share one value


QUICK = {"row_lengths": (4, 4), "sizes": SIZES, "generator_batch_size": 32}
METHODS = {
    "gan": gan_method(rounds=500, sampling_prob=0.5, generator_lr=1e-2, critic_lr=2e-2, **QUICK),
    "gan without adversary": gan_method(
        adversarial=False, moment_steps=300, moment_lr=2e-2, moment_batch_size=32, **QUICK
    ),
}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_two_cliques_are_found_and_nothing_is_charged_without_privacy(name):
    train, said = two_cliques(), []
    fitted = fit_generator(
        METHODS[name], train, epsilon=np.inf, key=jax.random.key(0), report=lambda *args: said.append(args)
    )
    drawn = draw_histories(fitted.generator, np.full(200, 4), key=jax.random.key(1))
    assert within_one(drawn) > 0.7  # by popularity alone it is 2 * 15 / 495 = 0.06
    assert 0.3 < np.mean(drawn < 6) < 0.7  # and both of them
    popularity = likely_counts(dp_popularity(train, noise_multiplier=0.0, key=jax.random.key(0)))
    np.testing.assert_allclose(fitted.generator.params[0][:, -1], np.log(popularity), rtol=1e-5)  # as it was counted
    assert fitted.spent is None
    assert (fitted.generator.private, fitted.generator.releases) == (False, ())
    assert said[-1][0] == said[-1][1]
    in_parts = draw_histories(fitted.generator, np.full(200, 4), key=jax.random.key(1), batch_size=7)
    np.testing.assert_array_equal(in_parts, drawn)
    assert {
        name for name, value in fitted.generator.choices.items() if not isinstance(value, int | float | list)
    } == set()


PRIVATE = {
    "gan": gan_method(rounds=3, sampling_prob=0.5, **QUICK),
    "gan without adversary": gan_method(adversarial=False, moment_steps=2, **QUICK),
}


@pytest.mark.parametrize("name", sorted(PRIVATE))
def test_a_private_fit_charges_what_it_planned_and_repeats(name):
    phases = {"gan": {"counts": 1, "training": 3}, "gan without adversary": {"counts": 1, "moments": 1}}
    fitted = fit_generator(PRIVATE[name], two_cliques(), epsilon=4.0, key=jax.random.key(0))
    charged = {entry.phase: entry.count for entry in fitted.generator.releases}
    assert fitted.generator.private
    assert charged == phases[name]
    assert 3.9 < fitted.spent.epsilon <= 4.0
    again = fit_generator(PRIVATE[name], two_cliques(), epsilon=4.0, key=jax.random.key(0)).generator
    assert all(map(np.array_equal, jax.tree.leaves(fitted.generator.params), jax.tree.leaves(again.params)))


def test_refusals():
    for settings_, words in (
        ({"counts_share": 1.0}, "counts_share must lie between"),
        ({"sampling_prob": 0.0}, "sampling_prob above 0"),
        ({"rounds": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            gan_method(**settings_)

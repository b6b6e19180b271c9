"""Risk: a student is blamed for something else than the distance to its teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedjax_rec.distillation.losses import NEVER, candidates, kl, ranking, relations, relaxed_ranking

NUM_ITEMS = 12
scores = hnp.arrays(np.float32, NUM_ITEMS, elements=st.floats(-8, 8, width=32), unique=True)
FULL = jax.jit(kl(temperature=2.0, top_k=NUM_ITEMS))
PART = jax.jit(kl(temperature=2.0, top_k=3, num_sampled=4))
RANKING = jax.jit(ranking(top_k=4, num_sampled=6, sharpness=3.0, mu=0.2))
RELAXED = jax.jit(relaxed_ranking(top_k=4, num_sampled=5))


def fresh(seed=0):
    return jax.random.key(seed)


def oracle_kl(teacher, student, weights, temperature):
    """T^2 KL of two weighted softmaxes, in float64 by its definition."""
    p, q = (weights * np.exp(np.asarray(x, np.float64) / temperature) for x in (teacher, student))
    p, q = p / p.sum(), q / q.sum()
    return temperature**2 * sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(teacher=scores, student=scores)
def test_all_items_are_the_plain_divergence(teacher, student):
    ours = FULL(teacher, student, fresh())
    np.testing.assert_allclose(ours, oracle_kl(teacher, student, np.ones(NUM_ITEMS), 2.0), rtol=1e-4, atol=1e-5)


def test_top_k_with_a_sampled_rest_is_the_weighted_divergence():
    rng = np.random.default_rng(0)
    teacher, student = rng.normal(size=(2, NUM_ITEMS)).astype(np.float32)
    for seed in range(5):
        ids, log_weights = candidates(teacher, top_k=3, num_sampled=4, key=fresh(seed))
        assert set(np.asarray(ids[:3])) == set(np.argsort(-teacher)[:3])
        weights = np.where(np.asarray(log_weights) > NEVER / 2, np.exp(np.asarray(log_weights, np.float64)), 0.0)
        assert np.all(weights[3:] == np.where(np.isin(ids[3:], ids[:3]), 0.0, weights[3:].max(initial=0)))
        expected = oracle_kl(teacher[ids], student[ids], weights, 2.0)
        np.testing.assert_allclose(PART(teacher, student, fresh(seed)), expected, rtol=1e-4, atol=1e-6)


def test_draws_stand_for_all_the_rest():
    """The mean of weighted sums over many draws is the sum over the catalogue, within four standard errors."""
    rng = np.random.default_rng(1)
    teacher, value = rng.normal(size=(2, NUM_ITEMS)).astype(np.float32)
    value += 2.0

    def total(key):
        ids, log_weights = candidates(teacher, top_k=3, num_sampled=4, key=key)
        return jnp.sum(jnp.exp(log_weights) * jnp.asarray(value)[ids])

    sums = np.asarray(jax.jit(jax.vmap(total))(jax.random.split(jax.random.key(2), 4000)))
    error = sums.std() / np.sqrt(len(sums))
    assert abs(sums.mean() - value.sum()) < 4 * error
    assert 4 * error < 0.1 * abs(value.sum())  # or the test could not fail


def test_the_gradient_goes_to_the_student_alone_and_vanishes_at_the_teacher():
    teacher = jnp.asarray(np.random.default_rng(3).normal(size=NUM_ITEMS), jnp.float32)
    for_teacher, for_student = jax.grad(FULL, argnums=(0, 1))(teacher, teacher + 1.0, fresh())
    assert np.all(np.asarray(for_teacher) == 0)
    np.testing.assert_allclose(for_student, 0.0, atol=1e-6)
    moved = teacher.at[0].add(1.0)
    gradient = jax.grad(FULL, argnums=1)(teacher, moved, fresh())
    p, q = jax.nn.softmax(teacher / 2.0), jax.nn.softmax(moved / 2.0)
    np.testing.assert_allclose(gradient, 2.0 * (q - p), atol=1e-6)  # T^2 / T (q - p)


@pytest.mark.parametrize("loss", [FULL, PART, RANKING, RELAXED])
def test_items_that_never_count(loss):
    """Items at `NEVER` in both change neither the loss nor its gradient, which is finite."""
    rng = np.random.default_rng(4)
    teacher, student = rng.normal(size=(2, NUM_ITEMS)).astype(np.float32)
    gone = np.arange(NUM_ITEMS) % 5 == 0

    def masked(student):
        return loss(jnp.where(gone, NEVER, teacher), jnp.where(gone, NEVER, student), fresh())

    value, gradient = jax.value_and_grad(masked)(student)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    assert np.all(np.asarray(gradient)[gone] == 0)
    other = np.where(gone, student + 3, student)
    np.testing.assert_allclose(masked(other), value, rtol=1e-6)
    if loss is FULL:
        expected = oracle_kl(teacher[~gone], student[~gone], np.ones((~gone).sum()), 2.0)
        np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_ranking_by_its_definition():
    rng = np.random.default_rng(5)
    for seed in range(5):
        teacher, student = rng.normal(size=(2, NUM_ITEMS)).astype(np.float32)
        drawn = np.asarray(jax.random.randint(fresh(seed), (6,), 0, NUM_ITEMS))
        top = np.argsort(-teacher)[:4]
        by_place = np.exp(-np.arange(1, 5) / 3.0)
        expected = 0.0
        for place, item in enumerate(top, start=1):
            rank = np.floor(NUM_ITEMS * np.mean(student[drawn] > student[item])) + 1
            weight = by_place[place - 1] / by_place.sum() * np.tanh(max(0.2 * (rank - place), 0.0))
            expected += weight * np.log1p(np.exp(-student[item]))
        np.testing.assert_allclose(RANKING(teacher, student, fresh(seed)), expected, rtol=1e-4, atol=1e-6)
    order = jnp.arange(NUM_ITEMS, 0, -1.0)
    assert RANKING(order, order, fresh()) < RANKING(order, -order, fresh())


def test_relaxed_ranking_by_its_definition():
    rng = np.random.default_rng(6)
    for seed in range(5):
        teacher, student = rng.normal(size=(2, NUM_ITEMS)).astype(np.float32)
        drawn = np.asarray(jax.random.randint(fresh(seed), (5,), 0, NUM_ITEMS))
        top = np.argsort(-teacher)[:4]
        rest = sum(np.exp(student[j]) for j in drawn if j not in top)
        chance = 1.0
        for k, item in enumerate(top):
            chance *= np.exp(student[item]) / (sum(np.exp(student[i]) for i in top[k:]) + rest)
        np.testing.assert_allclose(RELAXED(teacher, student, fresh(seed)), -np.log(chance) / 4, rtol=1e-4)


def test_relations_see_angles_alone():
    rng = np.random.default_rng(7)
    teacher, student = rng.normal(size=(6, 5)).astype(np.float32), rng.normal(size=(6, 3)).astype(np.float32)
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0].astype(np.float32)
    np.testing.assert_allclose(relations(teacher, 3.0 * teacher @ rotation), 0.0, atol=1e-6)

    def cosine(x, y):
        return x @ y / np.linalg.norm(x) / np.linalg.norm(y)

    pairs = [(i, j) for i in range(6) for j in range(6)]
    expected = np.mean([(cosine(teacher[i], teacher[j]) - cosine(student[i], student[j])) ** 2 for i, j in pairs])
    np.testing.assert_allclose(relations(teacher, student), expected, rtol=1e-4)
    assert np.all(np.isfinite(jax.grad(relations, argnums=1)(teacher, jnp.zeros((6, 3)))))


@pytest.mark.parametrize(
    "make",
    [lambda: kl(temperature=0.0), lambda: kl(num_sampled=-1), lambda: ranking(mu=0), lambda: relaxed_ranking(top_k=0)],
)
def test_numbers_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="must be"):
        make()

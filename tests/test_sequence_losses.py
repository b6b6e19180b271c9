"""Risk: a loss of the next item is not the formula that it says, or looks at padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_rec.models.items import id_table
from fedjax_rec.models.sequence_losses import (
    Targets,
    binary_cross_entropy,
    full_cross_entropy,
    gbce,
    sampled_softmax,
)

NUM_ITEMS, DIM, PLACES = 7, 3, 5
ITEMS = id_table(NUM_ITEMS, dim=DIM, init_stddev=1.0)
PARAMS = ITEMS.init(jax.random.key(0))
TABLE = np.asarray(PARAMS.tables["item"], np.float64)
QUERIES = jax.random.normal(jax.random.key(1), (PLACES, DIM))
IDS = jnp.array([2, 0, 2, NUM_ITEMS, NUM_ITEMS])
REAL = np.array([True, True, True, False, False])
HISTORY = jnp.array([0, 2, 3, 2, NUM_ITEMS])
TARGETS = Targets(QUERIES, IDS, jnp.asarray(REAL), HISTORY)

SCORES = np.asarray(QUERIES, np.float64) @ TABLE.T
POSITIVE = SCORES[[0, 1, 2], [2, 0, 2]]


def key():
    """The same one every time, but never used twice."""
    return jax.random.key(2)


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


def test_full_cross_entropy_is_the_log_of_a_softmax():
    expected = np.mean(np.log(np.exp(SCORES[:3]).sum(1)) - POSITIVE)
    np.testing.assert_allclose(full_cross_entropy()(ITEMS, PARAMS, TARGETS, key()), expected, rtol=1e-5)


@pytest.mark.parametrize("places", [2, 4])
def test_full_cross_entropy_in_pieces_is_the_same_with_its_gradient(places):
    whole, pieces = full_cross_entropy(), full_cross_entropy(places=places)

    def both(loss):
        gradient = jax.value_and_grad(lambda p, q: loss(ITEMS, p, TARGETS._replace(queries=q), key()), (0, 1))
        return jax.jit(gradient)(PARAMS, QUERIES)

    for a, b in zip(jax.tree.leaves(both(whole)), jax.tree.leaves(both(pieces)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("per_target", [False, True])
def test_sampled_softmax_with_its_draws(per_target):
    k = 4
    drawn = np.asarray(jax.random.randint(key(), (PLACES if per_target else 1, k), 0, NUM_ITEMS))
    terms = []
    for place, target in enumerate([2, 0, 2]):
        others = [j for j in drawn[place if per_target else 0] if j != target]
        total = np.exp(POSITIVE[place]) + (NUM_ITEMS - 1) / k * np.exp(SCORES[place, others]).sum()
        terms.append(np.log(total) - POSITIVE[place])
    assert (drawn[0] == 2).any() or (drawn == 0).any()  # a draw hits a target, and is left out
    loss = sampled_softmax(num_negatives=k, per_target=per_target)
    np.testing.assert_allclose(loss(ITEMS, PARAMS, TARGETS, key()), np.mean(terms), rtol=1e-5)


def test_sampled_softmax_comes_to_the_full_one_with_many_draws():
    many = sampled_softmax(num_negatives=20_000)(ITEMS, PARAMS, TARGETS, key())
    # A uniform draw hits the target by chance 1 / V, and is then left out: (V - 1) / k is a little too little.
    np.testing.assert_allclose(many, full_cross_entropy()(ITEMS, PARAMS, TARGETS, key()), rtol=0.1)


@pytest.mark.parametrize("t", [0.0, 0.75, 1.0])
def test_gbce_is_that_of_its_paper(t):
    k = 2
    drawn = np.asarray(jax.random.randint(key(), (PLACES, k), 0, NUM_ITEMS))
    share = k / (NUM_ITEMS - 1)
    beta = share * (t * (1 - 1 / share) + 1 / share)
    # Its own form: sigmoid to the power of beta for the positive.
    positive = np.log((1 / (1 + np.exp(-POSITIVE))) ** beta)
    negative = log_sigmoid(-np.take_along_axis(SCORES, drawn, axis=1))[:3].sum(1)
    expected = -np.mean((positive + negative) / (k + 1))
    loss = gbce(num_negatives=k, t=t, per_target=True)
    np.testing.assert_allclose(loss(ITEMS, PARAMS, TARGETS, key()), expected, rtol=1e-5)
    assert beta == {0.0: 1.0, 1.0: share}.get(t, beta)


def test_binary_cross_entropy_draws_outside_the_history():
    table = jnp.asarray(TABLE, jnp.float32).at[jnp.array([1, 4, 5, 6])].set(0.0)  # all that may be drawn scores 0
    params = PARAMS._replace(tables={"item": table})
    expected = np.mean(-log_sigmoid(POSITIVE) + np.log(2)) / 2
    keys = jax.random.split(key(), 20)
    values = jax.jit(jax.vmap(lambda k: binary_cross_entropy()(ITEMS, params, TARGETS, k)))(keys)
    # A target whose three tries all hit the history goes without its negative, by chance (3 / 7)^3.
    assert np.isclose(values, expected, rtol=1e-5).sum() >= 10
    assert np.max(values) <= expected * (1 + 1e-5)


LOSSES = {
    "full": full_cross_entropy(),
    "pieces": full_cross_entropy(places=2),
    "sampled": sampled_softmax(num_negatives=3),
    "gbce": gbce(num_negatives=3),
    "bce": binary_cross_entropy(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_padding_is_not_looked_at_and_no_target_is_no_loss(name):
    loss = LOSSES[name]

    @jax.jit
    def gradient(queries, real):
        return jax.value_and_grad(lambda q: loss(ITEMS, PARAMS, TARGETS._replace(queries=q, real=real), key()))(queries)

    _, change = gradient(QUERIES, jnp.asarray(REAL))
    assert np.all(np.any(np.asarray(change[:3]) != 0, axis=1))
    assert np.all(np.asarray(change[3:]) == 0)
    nothing, change = gradient(QUERIES, jnp.zeros(PLACES, bool))
    assert nothing == 0
    assert np.all(np.asarray(change) == 0)


@pytest.mark.parametrize("wrong", [lambda: gbce(t=1.5), lambda: sampled_softmax(num_negatives=0)])
def test_refusals(wrong):
    with pytest.raises(ValueError, match="must"):
        wrong()

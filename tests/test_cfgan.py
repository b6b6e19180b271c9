"""Risk: CFGAN trains on other items than the paper says, or its ablation keeps a part of the adversary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_worlds import interactions

from fedjax_rec.models.cfgan import CfganLoss, cfgan_scorer, init_cfgan, reconstruction, sampled_items, train_cfgan

NUM_ITEMS = 12
WITHHELD = [(u // 2) % 6 + 6 * (u % 2) for u in range(24)]
TRAIN = interactions(
    [[i for i in range(6 * (u % 2), 6 * (u % 2) + 6) if i != WITHHELD[u]] for u in range(24)], num_items=NUM_ITEMS
)
SETTINGS = {"num_epochs": 150, "batch_size": 12, "hidden_size": 8, "generator_lr": 0.02, "zero_weight": 0.3}


def train(**changes):
    return train_cfgan(TRAIN, seed=0, **SETTINGS | changes)


def margin(params):
    """By how much each user's withheld item is above the best of the other taste, the least over users."""
    scorer = cfgan_scorer(params, TRAIN)
    scores = np.asarray(scorer.fn(scorer.params, jnp.arange(24)))
    return min(scores[u, w] - scores[u, 6 - 6 * (u % 2) : 12 - 6 * (u % 2)].max() for u, w in enumerate(WITHHELD))


@pytest.fixture(scope="module")
def trained():
    return {weight: train(adversarial_weight=weight) for weight in (0.0, 1.0)}


def test_the_withheld_item_is_found_without_the_adversary(trained):
    assert margin(trained[0.0]) > 0


def test_the_adversary_alone_pulls_own_items_up(trained):
    """As in the paper: nothing but the discriminator asks for ones, and users' items still end above the others."""
    scorer = cfgan_scorer(trained[1.0], TRAIN)
    scores = np.asarray(scorer.fn(scorer.params, jnp.arange(24)))
    own = np.zeros(scores.shape, bool)
    own[TRAIN.user_ids, TRAIN.item_ids] = True
    assert scores[own].mean() > scores[~own].mean() + 0.5


def test_the_ablation_has_no_adversary_left(trained):
    """Its discriminator is as it was, and its generator does not depend on it."""
    start = init_cfgan(jax.random.split(jax.random.key(0))[0], NUM_ITEMS, 8)
    for a, b in zip(jax.tree.leaves(trained[0.0].discriminator), jax.tree.leaves(start.discriminator), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(trained[1.0].discriminator["out"], start.discriminator["out"])
    other = train(adversarial_weight=0.0, mask_share=0.1, discriminator_lr=0.5)
    assert all(map(np.array_equal, jax.tree.leaves(other.generator), jax.tree.leaves(trained[0.0].generator)))


def test_reconstruction_by_hand():
    completed = jnp.array([[0.9, 0.5, 0.2, 0.4]])
    rows = jnp.array([[1.0, 0.0, 0.0, 1.0]])
    zeros = jnp.array([[False, True, False, False]])
    value = reconstruction(completed, rows, zeros, CfganLoss(1.0, 2.0, 0.1, 0.0, 0.0))
    assert value == pytest.approx(2 * (0.1**2 + 0.6**2) + 0.1 * 0.5**2, rel=1e-5)
    paper = reconstruction(completed, rows, zeros, CfganLoss(1.0, 0.0, 0.1, 0.0, 0.0))
    assert paper == pytest.approx(0.1 * 0.5**2, rel=1e-5)


def test_sampled_items_are_a_share_of_those_that_the_user_did_not_touch():
    rows = jnp.tile(jnp.array([1.0, 0.0, 0.0, 1.0]), (5000, 1))
    drawn = np.asarray(sampled_items(jax.random.key(0), rows, 0.3))
    np.testing.assert_allclose(drawn.mean(0), [0, 0.3, 0.3, 0], atol=0.03)
    assert not sampled_items(jax.random.key(0), rows, 0.0).any()
    assert np.array_equal(sampled_items(jax.random.key(0), rows, 1.0), rows == 0)


def test_the_same_seed_gives_the_same_model():
    one, again, other = (
        train_cfgan(TRAIN, seed=seed, num_epochs=2, batch_size=12, hidden_size=8).generator["out"] for seed in (0, 0, 1)
    )
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"zero_share": 1.5}, r"zero_share and mask_share must lie in \[0, 1\]"),
        ({"zero_weight": -1.0}, "must not be negative"),
        ({"adversarial_weight": 0.0, "positive_weight": 0.0}, "nothing pulls a user's own items up"),
        ({"num_epochs": 0}, "at least 1"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(ValueError, match=words):
        train_cfgan(TRAIN, seed=0, **options)

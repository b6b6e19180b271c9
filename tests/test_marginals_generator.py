"""Risk: the popularity sampler, which every generator is compared with, is weaker or less private than it says."""

import jax
import numpy as np
import pytest
from dp_accounting import GaussianDpEvent
from evaluation_worlds import interactions
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

import fedjax_rec as fr
from fedjax_rec.data import load
from fedjax_rec.models.ease import ease_scorer
from fedjax_rec.synthesis import marginals
from fedjax_rec.synthesis.generator import draw_histories
from fedjax_rec.synthesis.marginals import log_shares, popularity_method, posterior_mean
from fedjax_rec.synthesis.methods import quiet
from fedjax_rec.synthesis.plan import fit_generator
from fedjax_rec.synthesis.virtual import virtual_users

NUM_ITEMS, NUM_USERS = 40, 203


def lists(num_users=NUM_USERS):
    """Item i is three times as likely as item i + 10."""
    rng = np.random.default_rng(0)
    likely = 3.0 ** (-np.arange(NUM_ITEMS) / 10)
    return [np.argsort(-np.log(likely) - rng.gumbel(size=NUM_ITEMS))[: rng.integers(1, 7)] for _ in range(num_users)]


WORLD = interactions(lists(), num_items=NUM_ITEMS)


def fitted(train=WORLD, noise=0.0, seed=0):
    return popularity_method().fit(train, {"counts": np.array([noise])}, jax.random.key(seed), quiet)


def released(monkeypatch, train, noise, seed=0):
    """The vector that `fit` releases."""
    seen = []

    def watched(*args, **options):
        seen.append(dp_popularity(*args, **options))
        return seen[-1]

    dp_popularity = marginals.dp_popularity
    with monkeypatch.context() as patch:
        patch.setattr(marginals, "dp_popularity", watched)
        generator = fitted(train, noise, seed)
    (only,) = seen
    return np.asarray(only.counts, np.float64), generator


def test_one_user_moves_the_release_by_one(monkeypatch):
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(users=st.lists(st.lists(st.integers(0, 11), max_size=20), min_size=1, max_size=5), user=st.integers(0, 4))
    def check(users, user):
        user %= len(users)
        neighbour = [[] if u == user else items for u, items in enumerate(users)]
        both = (released(monkeypatch, interactions(x, num_items=12), 0.0)[0] for x in (users, neighbour))
        moved = np.linalg.norm(np.subtract(*both))
        assert moved == pytest.approx(1.0 if users[user] else 0.0, abs=1e-5)

    check()


def test_the_noise_of_the_fit_is_what_its_release_says(monkeypatch):
    train = interactions([np.arange(5), np.arange(3, 9)], num_items=4000)
    noised, generator = released(monkeypatch, train, 1.7)
    added = noised - released(monkeypatch, train, 0.0)[0]
    p = {factor: kstest(added / (1.7 * factor), "norm").pvalue for factor in (1, 2 / 3, 3 / 2)}
    assert p[1] > 1e-3
    assert max(p[2 / 3], p[3 / 2]) < 1e-9
    assert [entry.event for entry in generator.releases] == [GaussianDpEvent(1.7)]


def test_the_release_is_planned_charged_and_within_epsilon():
    made = fit_generator(popularity_method(), WORLD, epsilon=4.0, key=jax.random.key(0))
    assert [entry.phase for entry in made.ledger.entries] == ["lengths", "counts"]
    assert 3.9 < made.spent.epsilon <= 4.0
    assert fitted().releases == ()
    assert not fitted().private


def test_items_are_drawn_in_proportion_to_their_counts():
    generator = fitted()
    drawn = draw_histories(generator, np.ones(4000, int), key=jax.random.key(2))[:, 0]
    shares = np.exp(np.asarray(generator.params, np.float64))
    found = np.bincount(drawn, minlength=NUM_ITEMS) / 4000
    assert np.abs(found - shares).sum() < 2 * np.sqrt(2 / np.pi * shares / 4000).sum()  # twice the expected
    counts = np.bincount(WORLD.item_ids, WORLD.counts_per_user[WORLD.user_ids] ** -0.5, minlength=NUM_ITEMS)
    np.testing.assert_allclose(shares, counts / counts.sum(), rtol=1e-4, atol=1e-6)
    assert generator.params.shape == (NUM_ITEMS,)  # no user anywhere
    np.testing.assert_array_equal(fitted(noise=1.0, seed=3).params, fitted(noise=1.0, seed=3).params)
    assert not np.array_equal(fitted(noise=1.0, seed=3).params, fitted(noise=1.0, seed=4).params)


def test_noise_does_not_make_rare_items_popular():
    """Half of clipped noise stays in the tail; the posterior mean takes it back, and is nearer everywhere."""
    rng = np.random.default_rng(0)
    counts = 200.0 / (1 + np.arange(1500)) ** 1.1
    noised = counts + 3 * rng.standard_normal(1500)
    found, clipped = posterior_mean(noised, 3.0), np.maximum(noised, 0)
    assert np.square(found - counts).mean() < 0.2 * np.square(clipped - counts).mean()
    assert found.sum() == pytest.approx(counts.sum(), rel=0.15)
    assert clipped.sum() > 1.8 * counts.sum()
    assert np.all(np.diff(found[np.argsort(noised)]) >= -1e-9)
    np.testing.assert_array_equal(posterior_mean(noised, 0.0), clipped)
    assert np.all(np.isfinite(posterior_mean(np.zeros(3), 2.0)))
    assert np.all(np.isfinite(log_shares(np.zeros(3))))


def test_on_movielens_it_carries_half_as_much_as_real_users(data_dir):
    """ndcg of EASE at .47 of real; the list of popular items alone is at .47 too."""
    data = load("movielens/100k", data_dir=data_dir)
    split = fr.strong_generalization(data, num_validation_users=94, num_test_users=188, seed=0)
    made = fit_generator(popularity_method(), split.train, epsilon=np.inf, key=jax.random.key(0))
    virtual = virtual_users(made.generator, made.lengths, num_users=661, key=jax.random.key(1), catalogue=split.train)
    asked = fr.cases(split)

    def ndcg(users, l2):
        return fr.evaluate(ease_scorer(users, l2=l2, history=split.history), asked, ks=(20,)).values["ndcg@20"]

    assert 0.42 < ndcg(virtual, 3000.0) / ndcg(split.train, 300.0) < 0.52

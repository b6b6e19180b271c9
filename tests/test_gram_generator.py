"""Risk: a virtual user of the Gram generator knows more of a real one than its two releases are charged for."""

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
from fedjax_rec.models.dp_gram import svec
from fedjax_rec.models.ease import ease_scorer
from fedjax_rec.synthesis import gram as gram_module
from fedjax_rec.synthesis.generator import draw_histories
from fedjax_rec.synthesis.gram import LatentGaussian, centred_gram, gram_method, head_size, match_marginals, undo_shift
from fedjax_rec.synthesis.methods import quiet
from fedjax_rec.synthesis.plan import LENGTHS, fit_generator
from fedjax_rec.synthesis.virtual import virtual_users

NUM_ITEMS, NUM_USERS = 12, 301
ITEMS = np.arange(NUM_ITEMS)


def cliques():
    """Users of the first or of the last six items, 3 to 5 of them; the last clique is half as large."""
    rng = np.random.default_rng(0)
    return [rng.permutation(6)[: rng.integers(3, 6)] + 6 * (user % 3 == 0) for user in range(NUM_USERS)]


WORLD = interactions(cliques(), num_items=NUM_ITEMS)


def fitted(counts=0.0, gram=0.0, seed=0, **options):
    noise = {"counts": np.array([counts]), "gram": np.array([gram])}
    return gram_method(**options).fit(WORLD, noise, jax.random.key(seed), quiet)


histories = st.lists(st.lists(st.integers(0, NUM_ITEMS - 1), max_size=2 * NUM_ITEMS), min_size=1, max_size=5)
shares = st.lists(st.floats(0, 0.5, width=32), min_size=NUM_ITEMS, max_size=NUM_ITEMS)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lists=histories, user=st.integers(0, 4), mean=shares, head=st.sets(st.sampled_from(ITEMS.tolist()), min_size=2))
def test_one_user_moves_the_matrix_by_one(lists, user, mean, head):
    """With and without all its rows, repeated ones included, about any centre; an empty user adds nothing."""
    user %= len(lists)

    def exact(users):
        data = interactions(users, num_items=NUM_ITEMS)
        key = jax.random.key(0)
        return centred_gram(data, np.array(mean), np.array(sorted(head)), noise_multiplier=0.0, key=key).gram

    neighbour = [[] if u == user else items for u, items in enumerate(lists)]
    moved = np.linalg.norm(svec(exact(lists) - exact(neighbour)))
    assert moved <= 1 + 1e-5
    if not lists[user]:
        assert moved == 0
    elif set(lists[user]) & head and not any(mean):
        assert moved > 1 - 1e-5


def test_the_noise_of_the_fit_is_what_its_releases_say(monkeypatch):
    """KS at the charged deviation, rejected at two thirds and three halves of it, in the matrix that `fit` gets."""
    seen = []

    def watched(*args, **options):
        plain = options | {"noise_multiplier": 0.0, "key": jax.random.key(0)}
        seen.append((centred_gram(*args, **options), centred_gram(*args, **plain)))
        return seen[-1][0]

    monkeypatch.setattr(gram_module, "centred_gram", watched)
    train = interactions([np.arange(5), np.arange(3, 9)], num_items=200)
    method = gram_method(head=200)
    noise = {"counts": np.array([0.9]), "gram": np.array([0.6])}
    generator = method.fit(train, noise, jax.random.key(5), quiet)
    assert [entry.event for entry in generator.releases] == [GaussianDpEvent(0.9), GaussianDpEvent(0.6)]
    ((released, exact),) = seen
    added = svec(released.gram - exact.gram)
    p = {factor: kstest(added / (0.6 * factor), "norm").pvalue for factor in (1, 2 / 3, 3 / 2)}
    assert p[1] > 1e-3
    assert max(p[2 / 3], p[3 / 2]) < 1e-9


def test_all_releases_are_planned_charged_and_within_epsilon():
    method = gram_method()
    made = fit_generator(method, WORLD, epsilon=6.0, key=jax.random.key(0))
    planned = [phase.name for phase in method.phases(NUM_USERS, NUM_ITEMS)]
    assert [entry.phase for entry in made.generator.releases] == planned == ["counts", "gram"]
    assert [entry.phase for entry in made.ledger.entries] == [LENGTHS, *planned]
    assert made.generator.private
    assert 5.9 < made.spent.epsilon <= 6.0
    assert not fitted().private
    assert fitted().releases == ()
    half = fitted(counts=1.0)  # a release without noise is none that one could charge
    assert not half.private
    assert half.releases == ()


def test_virtual_users_keep_to_a_clique_and_only_by_their_directions():
    """The one direction that tells cliques apart, with and without privacy; the same variance item by item does not."""

    def within(generator):
        drawn = draw_histories(generator, np.full(500, 4), key=jax.random.key(1))
        last = (drawn >= 6).mean(axis=1)
        assert 0.15 < last.mean() < 0.5  # a third of users
        return np.maximum(last, 1 - last).mean()

    for options in ({}, {"counts": 1.0, "gram": 1.0, "head": NUM_ITEMS}):
        generator = fitted(rank=1, temperature=0.1, **options)
        offset, loadings, spread = generator.params
        apart = LatentGaussian(offset, 0 * loadings, np.sqrt(np.square(loadings).sum(axis=1) + np.square(spread)))
        assert within(generator) > 0.95 > 0.8 > within(generator._replace(params=apart))


def test_parameters_have_no_row_for_a_user_and_say_who_made_them():
    first, same, other = (fitted(counts=1.0, gram=1.0, seed=seed) for seed in (0, 0, 1))
    for leaf, again in zip(first.params, same.params, strict=True):
        assert NUM_USERS not in leaf.shape
        np.testing.assert_array_equal(leaf, again)
    assert not np.array_equal(first.params.offset, other.params.offset)
    lengths = np.array([3, 5, 2])
    drawn = draw_histories(first, lengths, key=jax.random.key(4))
    np.testing.assert_array_equal(draw_histories(same, lengths, key=jax.random.key(4)), drawn)


def test_items_come_up_as_often_as_was_released():
    """From any offset, and for items without a direction of their own."""
    rng = np.random.default_rng(0)
    shown = np.sort(rng.dirichlet(np.full(60, 0.5)))[::-1]
    latent = LatentGaussian(np.zeros(60, np.float32), np.zeros((60, 1), np.float32), np.full(60, 0.1, np.float32))
    latent = latent._replace(loadings=latent.loadings + (np.arange(60) < 20)[:, None] * np.float32(0.1))
    lengths = np.clip(rng.exponential(8, 4000), 1, 30).astype(int)
    target = np.minimum(shown * np.sqrt(lengths).mean(), 0.2)
    latent = match_marginals(latent, target, target.sum(), key=jax.random.key(0))
    z, own = rng.standard_normal((4000, 1)), rng.standard_normal((4000, 60))
    scores = np.asarray(latent.offset) + z @ np.asarray(latent.loadings).T + np.asarray(latent.spread) * own
    places = np.argsort(np.argsort(-scores, axis=1), axis=1)
    found = ((places < lengths[:, None]) / np.sqrt(lengths)[:, None]).mean(axis=0)
    assert np.abs(found - target).sum() / target.sum() < 0.2


def test_noise_is_undone_where_it_moved_eigenvalues():
    """A planted direction of 20 in noise with its edge at 12 comes out at 20 + 12^2 / 80, and goes back."""
    size = 288
    planted = np.ones((size, size)) * 20 / size
    noise = centred_gram(
        interactions([[]], num_items=size), np.zeros(size), np.arange(size), noise_multiplier=0.5, key=jax.random.key(2)
    )
    top = np.linalg.eigvalsh(planted + noise.gram)[-1:]
    assert top[0] == pytest.approx(20 + 12**2 / 80, abs=0.8)
    assert undo_shift(top, 12.0)[0] == pytest.approx(20, abs=1.2)
    assert head_size(943, 1682, 0.0) == 1682 > head_size(943, 1682, 0.6) > head_size(943, 1682, 2.0)


@pytest.mark.parametrize("bad", [{"rank": 0}, {"temperature": -1.0}, {"counts_weight": 0.0}, {"head": 1}])
def test_numbers_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="gram_method needs"):
        gram_method(**bad)


@pytest.mark.parametrize(("epsilon", "least"), [(np.inf, 0.9), (8.0, 0.7)])
def test_on_movielens_a_recommender_learns_most_from_virtual_users(data_dir, epsilon, least):
    data = load("movielens/100k", data_dir=data_dir)
    split = fr.strong_generalization(data, num_validation_users=94, num_test_users=188, seed=0)
    made = fit_generator(gram_method(), split.train, epsilon=epsilon, key=jax.random.key(0))
    virtual = virtual_users(made.generator, made.lengths, num_users=661, key=jax.random.key(1), catalogue=split.train)
    asked = fr.cases(split)

    def ndcg(users, l2):
        return fr.evaluate(ease_scorer(users, l2=l2, history=split.history), asked, ks=(20,)).values["ndcg@20"]

    assert ndcg(virtual, 1000.0) / ndcg(split.train, 300.0) > least
    assert np.mean(virtual.item_counts > 0) > 0.8

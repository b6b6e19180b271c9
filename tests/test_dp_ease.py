"""Risk: one user moves the released Gram matrix by more than its noise is for, or EASE learns the noise."""

import functools

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_worlds import interactions, make_split
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import fedjax_rec as fr
from fedjax_rec.evaluation import cases, evaluate
from fedjax_rec.models.dp_ease import denoised_gram, dp_ease_scorer, dp_ease_weights, noise_edge
from fedjax_rec.models.dp_gram import DpGram, dp_gram, svec
from fedjax_rec.models.ease import weights_from_gram
from fedjax_rec.models.popularity import dp_popularity

NUM_ITEMS = 12


def exact(lists, **options):
    """The matrix that the noise is added to."""
    return dp_gram(
        interactions(lists, num_items=NUM_ITEMS), noise_multiplier=0.0, key=jax.random.key(7), **options
    ).gram


@functools.cache
def world():
    rng = np.random.default_rng(0)
    return [rng.permutation(NUM_ITEMS)[: rng.integers(0, NUM_ITEMS)].tolist() for _ in range(30)] + [[]]


def by_hand(lists, *, decay, largest, item_ids):
    """Contributions written out pair by pair."""
    gram = np.zeros((len(item_ids), len(item_ids)))
    for items in lists:
        own = [list(item_ids).index(i) for i in dict.fromkeys(items) if i in item_ids]
        one = np.zeros_like(gram)
        for p, a in enumerate(own):
            for q, b in enumerate(own):
                one[a, b] = np.exp(-abs(p - q) / decay)
        norm = np.linalg.norm(one)
        gram += one * min(1.0, largest / max(norm, 1e-9))
    return gram


SETTINGS = [
    {},
    {"decay": 2.0},
    {"max_items_per_user": 4.0},
    {"decay": 1.0, "max_items_per_user": 2.5, "item_ids": np.array([7, 2, 3, 11, 0])},
]


@pytest.mark.parametrize("options", SETTINGS)
def test_it_is_the_sum_of_contributions(options):
    """With repeated pairs, empty users and users without a listed item; positive semi-definite."""
    lists = [*world(), [1, 1, 4, 1], [5, 9, 5, 5, 2]]
    found = exact(lists, **options)
    plain = {"decay": np.inf, "max_items_per_user": 1.0, "item_ids": np.arange(NUM_ITEMS)} | options
    plain["largest"] = plain.pop("max_items_per_user")
    np.testing.assert_allclose(found, by_hand(lists, **plain), atol=1e-5)
    assert np.linalg.eigvalsh(found).min() > -1e-6


histories = st.lists(st.lists(st.integers(0, NUM_ITEMS - 1), max_size=2 * NUM_ITEMS), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(lists=histories, user=st.integers(0, 4), options=st.sampled_from(SETTINGS))
def test_one_user_moves_it_by_at_most_the_sensitivity(lists, user, options):
    """With and without all rows of a user, in the coordinates that are noised; and it uses what it may."""
    user %= len(lists)
    neighbour = [[] if u == user else items for u, items in enumerate(lists)]
    moved = np.linalg.norm(svec(exact(lists, **options) - exact(neighbour, **options)))
    largest = options.get("max_items_per_user", 1.0)
    assert moved <= largest * (1 + 1e-6)
    if largest == 1 and lists[user] and "item_ids" not in options:
        assert moved > 1 - 1e-6


@pytest.mark.parametrize("options", [{}, {"max_items_per_user": 3.0}])
def test_the_noise_is_white_in_the_coordinates_of_the_bound(options):
    """KS at the claimed deviation, rejected at two thirds and three halves of it; on and off the diagonal."""
    train = interactions([[0, 1]], num_items=900)
    released = dp_gram(train, noise_multiplier=0.8, key=jax.random.key(7), **options)
    noise = released.gram - dp_gram(train, noise_multiplier=0.0, key=jax.random.key(7), **options).gram
    np.testing.assert_array_equal(noise, noise.T)
    stddev = 0.8 * options.get("max_items_per_user", 1.0)
    assert released.noise_stddev == pytest.approx(stddev)
    assert abs(np.diag(noise).std() / stddev - 1) < 0.1
    assert abs(noise[np.triu_indices(900, 1)].std() / stddev - np.sqrt(0.5)) < 0.01
    p = {factor: stats.kstest(svec(noise) / (stddev * factor), "norm").pvalue for factor in (1, 2 / 3, 3 / 2)}
    assert p[1] > 1e-3
    assert max(p[2 / 3], p[3 / 2]) < 1e-9


def test_the_key_decides_the_noise():
    train = interactions(world(), num_items=NUM_ITEMS)
    one, same, other = (dp_gram(train, noise_multiplier=1.0, key=jax.random.key(k)).gram for k in (7, 7, 8))
    np.testing.assert_array_equal(one, same)
    assert len(np.intersect1d(one, other)) == 0


def test_the_ledger_composes_it_with_the_popularity_that_chose_the_head():
    train = interactions(world(), num_items=NUM_ITEMS)
    head_key, gram_key = jax.random.split(jax.random.key(1))
    counts = dp_popularity(train, noise_multiplier=6.0, key=head_key)
    head = np.argsort(-np.asarray(counts.counts))[:5]
    released = dp_gram(train, noise_multiplier=1.5, key=gram_key, item_ids=head)
    ledger = fr.Ledger().record(counts.dp_event, phase="popularity", released="counts")
    ledger = ledger.record(released.dp_event, phase="training", released="Gram matrix of the head")
    together = (1 / 6.0**2 + 1 / 1.5**2) ** -0.5
    expected = dp_accounting.get_epsilon_gaussian(together, 1e-5)
    np.testing.assert_allclose(ledger.spent(1e-5).epsilon, expected, rtol=1e-3)
    assert dp_gram(train, noise_multiplier=0.0, key=jax.random.key(7)).dp_event == dp_accounting.GaussianDpEvent(0.0)


# What is made of it.


def released_as(gram, *, stddev=0.0):
    return DpGram(gram, np.arange(len(gram), dtype=np.int32), dp_accounting.GaussianDpEvent(stddev), stddev)


def test_the_edge_is_where_the_noise_ends():
    """Of nothing but noise, nothing is left a little above the edge, and something well below it."""
    empty = interactions([[]], num_items=300)
    released = dp_gram(empty, noise_multiplier=2.0, key=jax.random.key(7))
    assert abs(np.linalg.eigvalsh(released.gram).max() / noise_edge(released) - 1) < 0.06
    assert not np.any(dp_ease_weights(released, l2=1.0, threshold=1.1))
    assert np.any(dp_ease_weights(released, l2=1.0, threshold=0.8))


def test_without_noise_and_threshold_it_is_ease():
    gram = exact(world(), decay=3.0)
    found = dp_ease_weights(released_as(gram), l2=0.7, threshold=0.0)
    np.testing.assert_allclose(found, weights_from_gram(gram, l2=0.7), atol=1e-4)


def test_eigenvalues_are_lowered_by_the_threshold():
    gram = exact(world())
    released = released_as(gram, stddev=0.1)
    values = np.linalg.eigvalsh(gram)
    kept = np.linalg.eigvalsh(denoised_gram(released, threshold=2.0))
    np.testing.assert_allclose(kept, np.maximum(values - 2 * noise_edge(released), 0), atol=1e-8)


@pytest.mark.parametrize("recency", [np.inf, 2.0])
def test_scores_are_sums_over_the_newest_items(recency):
    history, head = interactions(world(), num_items=NUM_ITEMS), np.array([7, 2, 3, 11, 0])
    weights = np.random.default_rng(0).normal(size=(5, 5)).astype(np.float32)
    scorer = dp_ease_scorer(weights, head, history, recency=recency)
    found = np.asarray(scorer.fn(scorer.params, jnp.arange(len(world()))))
    for user, items in enumerate(world()):
        expected = np.full(NUM_ITEMS, -np.inf)
        expected[head] = 0.0
        for j, item in enumerate(reversed(items)):
            if item in head:
                expected[head] += np.exp(-j / recency) * weights[list(head).index(item)]
        np.testing.assert_allclose(found[user], expected, atol=1e-5)


def test_two_cliques_are_told_apart_under_noise():
    """200 users of either of two sets of items; what is left out is found at epsilon 4."""
    rng = np.random.default_rng(0)
    lists, held = [], []
    for user in range(200):
        items = (6 * (user % 2) + rng.permutation(6)).tolist()
        held.append([items.pop()])
        lists.append(items)
    split = make_split(lists, held, num_items=NUM_ITEMS)
    z = dp_accounting.get_sigma_gaussian(4.0, 1e-5)
    released = dp_gram(split.train, noise_multiplier=z, key=jax.random.key(7))
    scorer = dp_ease_scorer(dp_ease_weights(released, l2=1.0), released.item_ids, split.train)
    assert evaluate(scorer, cases(split), ks=(1,)).values["hit@1"] > 0.95


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier must be 0 or more"),
        ({"noise_multiplier": np.nan}, "noise_multiplier must be 0 or more"),
        ({"decay": 0.0}, "decay > 0"),
        ({"max_items_per_user": 0.5}, "max_items_per_user >= 1"),
        ({"item_ids": np.array([1, 1])}, "distinct"),
        ({"item_ids": np.array([NUM_ITEMS])}, "0 .. 11"),
    ],
)
def test_settings_without_a_meaning_refuse(wrong, words):
    with pytest.raises(ValueError, match=words):
        dp_gram(
            interactions(world(), num_items=NUM_ITEMS), **({"noise_multiplier": 1.0, "key": jax.random.key(7)} | wrong)
        )


def test_other_numbers_out_of_range_refuse():
    released = released_as(np.eye(3))
    for wrong in ({"l2": 0.0}, {"l2": 1.0, "threshold": -0.1}):
        with pytest.raises(ValueError, match="l2 > 0 and threshold >= 0"):
            dp_ease_weights(released, **wrong)
    with pytest.raises(ValueError, match="recency must be positive"):
        dp_ease_scorer(np.eye(3), np.arange(3), interactions(world(), num_items=NUM_ITEMS), recency=0.0)

"""Risk: virtual users depend on more than what was released, or a release is not charged."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import GaussianDpEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from fedjax_rec.data import from_rows
from fedjax_rec.privacy.budget import Phase
from fedjax_rec.privacy.ledger import BudgetExceeded, Entry, Ledger
from fedjax_rec.synthesis.generator import Generator, draw_histories
from fedjax_rec.synthesis.lengths import dp_lengths, draw_lengths, length_edges
from fedjax_rec.synthesis.methods import Method
from fedjax_rec.synthesis.plan import fit_generator, usual_delta
from fedjax_rec.synthesis.virtual import virtual_users

ITEMS = 40


def _gumbel(params, key):
    return params + jax.random.gumbel(key, params.shape)


POPULAR = Generator("popular", ITEMS, jnp.linspace(3.0, 0.0, ITEMS), scores=_gumbel)


def _up(params, length, key, max_length):
    start = jax.random.randint(key, (), 0, ITEMS - max_length)
    return start + jnp.arange(max_length, dtype=jnp.int32)


def _data(counts):
    users = np.repeat(np.arange(len(counts)), counts)
    return from_rows(users, np.concatenate([np.arange(c) for c in counts]) % ITEMS, name="made")


def test_a_virtual_user_is_the_same_in_any_batch_and_however_many_are_drawn():
    lengths = np.random.default_rng(0).integers(1, 9, 50)
    key = jax.random.key(3)
    whole = draw_histories(POPULAR, lengths, key=key, batch_size=50)
    np.testing.assert_array_equal(draw_histories(POPULAR, lengths, key=key, batch_size=7), whole)
    fewer = draw_histories(POPULAR, lengths[:20], key=key, batch_size=7)
    np.testing.assert_array_equal(fewer, whole[:20, : fewer.shape[1]])
    assert not np.array_equal(draw_histories(POPULAR, lengths, key=jax.random.key(4), batch_size=50), whole)


def test_histories_are_distinct_items_of_the_asked_number():
    lengths = np.array([1, 5, ITEMS, 3 * ITEMS])
    drawn = draw_histories(POPULAR, lengths, key=jax.random.key(0))
    for row, length in zip(drawn, lengths, strict=True):
        items = row[row < ITEMS]
        assert len(items) == len(set(items.tolist())) == min(length, ITEMS)


def test_popular_items_are_drawn_more_often():
    drawn = draw_histories(POPULAR, np.full(500, 5), key=jax.random.key(0))
    counts = np.bincount(drawn.ravel(), minlength=ITEMS)[:ITEMS]
    assert counts[:10].mean() > 3 * counts[-10:].mean()


def test_sequences_keep_their_order_and_get_places_for_times():
    data = _data([5] * 30)
    lengths = dp_lengths(data, noise_multiplier=0.0, key=jax.random.key(0))
    ordered = POPULAR._replace(scores=None, sequence=_up)
    catalogue = dataclasses.replace(data, num_items=ITEMS, item_labels=np.arange(100, 100 + ITEMS))
    found = virtual_users(ordered, lengths, num_users=12, key=jax.random.key(1), catalogue=catalogue)
    assert found.num_users == 12
    assert found.user_labels.tolist() == list(range(1, 13))
    for user in range(12):
        assert np.all(np.diff(found.items_of(user)) == 1)
    assert found.timestamps[: found.counts_per_user[0]].tolist() == list(range(1, found.counts_per_user[0] + 1))
    assert found.ratings is None
    assert not found.user_attributes
    both = virtual_users(POPULAR, lengths, num_users=3, key=jax.random.key(1), catalogue=catalogue)
    assert both.timestamps is None


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(1, 60), min_size=2, max_size=12), one=st.integers(0, 11))
def test_one_user_moves_one_length_count_by_one(counts, one):
    edges = length_edges(60)

    def exact(some):
        users = np.repeat(np.arange(len(some)), some)
        items = np.concatenate([np.arange(c) for c in some])
        released = dp_lengths(
            from_rows(users, items, name="made"), noise_multiplier=0.0, key=jax.random.key(0), edges=edges
        )
        return released.weights * len(some)

    without = counts[: one % len(counts)] + counts[one % len(counts) + 1 :]
    moved = np.round(exact(counts) - exact(without), 6)
    assert np.abs(moved).sum() == 1


def test_noise_of_lengths_is_what_its_event_says():
    # Ten thousand users in every bin, so that no noised count is taken for an empty one.
    edges = np.arange(1, 62)
    noise = 30.0
    draws = []
    base = dataclasses.replace(_data([3]), name="base")
    counts = np.repeat(np.arange(1, 61), 100)
    crowd = dataclasses.replace(
        base,
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        item_ids=np.zeros(counts.sum(), np.int32),
        file_rows=np.arange(counts.sum()),
        user_labels=np.arange(len(counts)),
    )
    for seed in range(8):
        released = dp_lengths(crowd, noise_multiplier=noise / 10, key=jax.random.key(seed), edges=edges)
        total = 100 / released.weights.mean() * released.weights  # up to the noise of the total itself
        draws.append(total / (total.mean() / 100) - 100)
    draws = np.concatenate(draws) / (noise / 10)
    assert kstest(draws, "norm").pvalue > 0.01
    assert kstest(draws * 1.5, "norm").pvalue < 1e-3
    assert kstest(draws / 1.5, "norm").pvalue < 1e-3
    assert released.dp_event == GaussianDpEvent(noise / 10)


def test_drawn_lengths_follow_the_histogram():
    data = _data([2] * 80 + [32] * 20)
    lengths = dp_lengths(data, noise_multiplier=0.0, key=jax.random.key(0))
    drawn = draw_lengths(lengths, 4000, key=jax.random.key(1))
    assert abs(np.mean(drawn <= 3) - 0.8) < 0.03
    assert drawn.min() >= 1
    assert drawn.max() <= ITEMS


def _toy(*, charge=True, private=True):
    """A method that releases one vector, to see what is planned and charged."""

    def fit(train, noise, key, report):
        (multiplier,) = noise["training"]
        counts = train.item_counts + multiplier * np.asarray(jax.random.normal(key, (train.num_items,)))
        entry = Entry("training", GaussianDpEvent(float(multiplier)), 1, "all", "counts")
        releases = (entry,) if charge and multiplier else ()
        return Generator(
            "toy",
            train.num_items,
            jnp.asarray(counts),
            scores=_gumbel,
            releases=releases,
            private=private and multiplier > 0,
        )

    return Method("toy", lambda users, items: (Phase("training", weight=1.0),), fit)


def test_all_releases_together_stay_within_epsilon_and_are_in_the_ledger():
    data = _data([5] * 200)
    fitted = fit_generator(_toy(), data, epsilon=2.0, key=jax.random.key(0))
    assert [entry.phase for entry in fitted.ledger.entries] == ["lengths", "training"]
    assert 1.99 < fitted.spent.epsilon <= 2.0
    assert fitted.spent.delta == usual_delta(200)
    assert fitted.spent.unit == "user"
    again = fit_generator(_toy(), data, epsilon=2.0, key=jax.random.key(0))
    np.testing.assert_array_equal(again.generator.params, fitted.generator.params)
    open_ = fit_generator(_toy(), data, epsilon=math.inf, key=jax.random.key(0))
    assert open_.spent is None
    np.testing.assert_array_equal(open_.generator.params, data.item_counts)


def test_earlier_releases_count_and_stop_a_fit_before_it_releases():
    data = _data([5] * 200)
    earlier = Ledger().record(GaussianDpEvent(1.0), phase="popularity", released="counts")

    def never(*_):
        raise AssertionError("released something")

    method = _toy()._replace(fit=never)
    with pytest.raises(BudgetExceeded, match="nothing released"):
        fit_generator(method, data, epsilon=2.0, key=jax.random.key(0), ledger=earlier)
    little = Ledger().record(GaussianDpEvent(3.0), phase="popularity", released="counts")
    fitted = fit_generator(_toy(), data, epsilon=2.0, key=jax.random.key(0), ledger=little)
    assert [entry.phase for entry in fitted.ledger.entries] == ["popularity", "lengths", "training"]
    assert 1.99 < fitted.spent.epsilon <= 2.0


def test_a_method_that_forgets_to_charge_is_refused():
    data = _data([5] * 200)
    with pytest.raises(RuntimeError, match="must record each release"):
        fit_generator(_toy(charge=False), data, epsilon=2.0, key=jax.random.key(0))
    with pytest.raises(RuntimeError, match="must record each release"):
        fit_generator(_toy(private=False), data, epsilon=2.0, key=jax.random.key(0))


def test_refusals_are_sentences():
    data = _data([5] * 20)
    lengths = dp_lengths(data, noise_multiplier=0.0, key=jax.random.key(0))
    with pytest.raises(ValueError, match="at least 1; got 0"):
        virtual_users(POPULAR, lengths, num_users=0, key=jax.random.key(1), catalogue=data)
    with pytest.raises(ValueError, match="knows 40 items and the catalogue has 5"):
        virtual_users(POPULAR, lengths, num_users=3, key=jax.random.key(1), catalogue=data)
    with pytest.raises(ValueError, match="either scores or a sequence"):
        draw_histories(POPULAR._replace(scores=None), np.ones(2), key=jax.random.key(0))
    with pytest.raises(ValueError, match="epsilon must be positive"):
        fit_generator(_toy(), data, epsilon=0.0, key=jax.random.key(0))
    with pytest.raises(ValueError, match="rise from 1"):
        dp_lengths(data, noise_multiplier=1.0, key=jax.random.key(0), edges=np.array([2, 3]))

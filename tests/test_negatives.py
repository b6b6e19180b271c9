"""Risk: drawn negatives repeat, hit excluded items, or come with another distribution than the loss is written for."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_worlds import make_split
from scipy import stats

from fedjax_rec.data.clients import client_data
from fedjax_rec.data.negatives import (
    Negatives,
    independent_negatives,
    permute,
    popularity_cdf,
    popularity_negatives,
    uniform_negatives,
)
from fedjax_rec.federated.local import draw_epoch

LARGEST = 300


@jax.jit
@partial(jax.vmap, in_axes=(0, 0))
def permutations(seed, size):
    return permute(jax.random.key(seed), jnp.arange(LARGEST), size)


def test_permute_is_a_bijection_for_every_size():
    sizes = np.arange(1, LARGEST + 1)
    for seed in range(3):
        for size, image in zip(sizes, np.asarray(permutations(seed + 10 * sizes, sizes)), strict=True):
            np.testing.assert_array_equal(np.sort(image[:size]), np.arange(size))


@pytest.mark.parametrize("size", [2**16 - 1, 2**16, 1_000_003])
def test_permute_is_a_bijection_for_large_sizes(size):
    image = np.asarray(jax.jit(permute, static_argnums=2)(jax.random.key(0), jnp.arange(size), size))
    np.testing.assert_array_equal(np.sort(image), np.arange(size))


def test_permute_stays_in_range_whatever_the_index():
    index = jnp.array([-5, 0, 6, 7, 8, 2**31 - 1])
    for size in (0, 1, 7):
        image = permute(jax.random.key(0), index, size)
        assert np.all((image >= 0) & (image < max(size, 1)))


@jax.jit
@partial(jax.vmap, in_axes=(0, None))
def first_two_and_last(seed, size):
    return permute(jax.random.key(seed), jnp.stack([jnp.int32(0), jnp.int32(1), size - 1]), size)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7, 8, 10, 15, 18, 33])
def test_permute_is_uniform_on_positions_and_pairs(size):
    """200,000 keys; a bias of 1 % in the cells of a small table shows. Chi-square at fixed seeds."""
    image = np.asarray(first_two_and_last(jnp.arange(200_000), jnp.int32(size)))
    for place in range(3):
        assert stats.chisquare(np.bincount(image[:, place], minlength=size)).pvalue > 1e-4
    for second in (1, 2) if size > 2 else (1,):
        pairs = np.bincount(image[:, 0] * size + image[:, second], minlength=size * size).reshape(size, size)
        assert not np.any(np.diag(pairs))
        assert stats.chisquare(pairs[~np.eye(size, dtype=bool)]).pvalue > 1e-4


NUM_ITEMS, NUM = 20, 24


@jax.jit
@partial(jax.vmap, in_axes=(0, None, None, None))
def draw_uniform(seed, wanted, excluded, num_excluded):
    return uniform_negatives(
        jax.random.key(seed),
        num=NUM,
        wanted=wanted,
        excluded=excluded,
        num_excluded=num_excluded,
        num_items=NUM_ITEMS,
    )


def padded(items, width=NUM_ITEMS):
    return jnp.asarray(sorted(items) + [NUM_ITEMS] * (width - len(items)), jnp.int32)


@pytest.mark.parametrize("excluded", [[], [0], [19], [0, 1, 2], [17, 18, 19], [3, 4, 9, 12], range(1, 20), range(20)])
@pytest.mark.parametrize("wanted", [0, 1, 5, 24])
def test_uniform_negatives_are_distinct_allowed_and_weighted(excluded, wanted):
    """As many as wanted, or all that are left, their weights adding up to what was wanted; nothing left: no weight."""
    allowed = sorted(set(range(NUM_ITEMS)) - set(excluded))
    drawn = min(wanted, len(allowed))
    ids, weights = map(np.asarray, draw_uniform(jnp.arange(200), jnp.int32(wanted), padded(excluded), len(excluded)))
    assert np.all(ids[:, drawn:] == NUM_ITEMS)
    assert not np.any(weights[:, drawn:])
    assert np.all(np.isin(ids[:, :drawn], allowed))
    assert all(len(set(row)) == drawn for row in ids[:, :drawn])
    np.testing.assert_allclose(weights.sum(1), wanted if drawn else 0, rtol=1e-5)
    if drawn:
        np.testing.assert_array_equal(np.ptp(weights[:, :drawn]), 0)


def test_uniform_negatives_are_uniform():
    excluded = [0, 4, 5, 13, 19]
    ids, _ = draw_uniform(jnp.arange(20_000), jnp.int32(4), padded(excluded), 5)
    for place in range(4):
        counts = np.bincount(np.asarray(ids[:, place]), minlength=NUM_ITEMS)
        assert not np.any(counts[excluded])
        assert stats.chisquare(np.delete(counts, excluded)).pvalue > 1e-4


SHARES = np.array([30.0, 0, 1, 1, 8, 0.5, 0, 20, 2, 0])


@jax.jit
@partial(jax.vmap, in_axes=(0, None, None, None))
def draw_popular(seed, wanted, excluded, item_cdf):
    return popularity_negatives(jax.random.key(seed), num=NUM, wanted=wanted, excluded=excluded, item_cdf=item_cdf)


@pytest.mark.parametrize("excluded", [[], [0], [4, 7], [2, 3, 5, 8]])
@pytest.mark.parametrize("wanted", [0, 1, 2, 7, 24])
def test_popularity_hits_are_proportional_to_share(excluded, wanted):
    """Every item's mean weight is wanted x share; excluded and unseen items have none; hits add up exactly."""
    num_draws = 20_000
    cdf = popularity_cdf(SHARES, exponent=1.0)
    width = jnp.asarray(sorted(excluded) + [len(SHARES)] * (4 - len(excluded)), jnp.int32)
    ids, weights = map(np.asarray, draw_popular(jnp.arange(num_draws), jnp.int32(wanted), width, cdf))
    real = ids < len(SHARES)
    assert np.all(weights[~real] == 0)
    assert np.all(weights[real] >= 1)
    assert np.all(weights[real] == np.round(weights[real]))
    assert not np.any(np.isin(ids, excluded))
    ordered = np.sort(ids, 1)
    assert not np.any((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] < len(SHARES)))  # distinct
    if not excluded:
        np.testing.assert_array_equal(weights.sum(1), wanted)
    mean = np.bincount(ids.ravel(), weights.ravel(), minlength=len(SHARES) + 1)[:-1] / num_draws
    expected = wanted * SHARES / SHARES.sum()
    expected[excluded] = 0
    assert np.all(mean[expected == 0] == 0)
    np.testing.assert_allclose(mean, expected, atol=5 * np.sqrt(0.25 / num_draws))  # one stratum's hit: p (1 - p)


def test_popularity_cdf():
    cdf = popularity_cdf(np.array([16.0, 0.0, 1.0]), exponent=0.75)
    np.testing.assert_allclose(cdf, [8 / 9, 8 / 9, 1.0], rtol=1e-6)
    np.testing.assert_allclose(popularity_cdf(np.zeros(4)), [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(popularity_cdf(np.array([-3.0, 1.0])), [0.0, 1.0])  # a noised histogram may be negative
    assert popularity_cdf(np.ones(10))[-1] == 1.0


TRAIN, VALIDATION, TEST = [[0, 1, 2], [5]], [[3], []], [[4], [6]]
CANDIDATES = np.array([[7, 8], [9, 20]], np.int32)
EXCLUDED = {
    "strict": [{0, 1, 2}, {5}],
    "paper": [{0, 1, 2, 3, 4}, {5, 6}],
    "candidates": [{0, 1, 2, 7, 8}, {5, 9}],
}


@pytest.mark.parametrize("rule", EXCLUDED)
def test_exclusion_rules_are_what_they_say(rule):
    """Strict knows train alone, paper leaks the held-out items, candidates adds the published list."""
    split = make_split(TRAIN, TEST, num_items=NUM_ITEMS, validation=VALIDATION, candidates=CANDIDATES)
    clients = client_data(split, exclusion=rule, num_buckets=1)
    assert clients.exclusion == rule
    (bucket,) = clients.buckets
    for client_id, excluded, num_excluded in zip(bucket.client_id, bucket.excluded, bucket.num_excluded, strict=True):
        assert excluded[:num_excluded].tolist() == sorted(EXCLUDED[rule][client_id])
        assert np.all(excluded[num_excluded:] == NUM_ITEMS)


@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
def test_an_epoch_draws_all_that_the_rule_allows_and_nothing_else(distribution):
    split = make_split(TRAIN, TEST, num_items=NUM_ITEMS, validation=VALIDATION, candidates=CANDIDATES)
    (bucket,) = client_data(split, exclusion="candidates", num_buckets=1).buckets
    cdf = popularity_cdf(np.ones(NUM_ITEMS)) if distribution == "popularity" else None

    @jax.jit
    def draws(client, seeds):
        draw = partial(draw_epoch, client, Negatives(6, distribution, cdf), None)
        examples = jax.vmap(lambda seed: draw(jax.random.key(seed)).examples)(seeds)
        return jnp.where(examples.weights > 0, examples.ids, NUM_ITEMS)[..., 1:]

    for row, user in enumerate(bucket.client_id):
        client = jax.tree.map(lambda x, row=row: jnp.asarray(x[row]), bucket)
        seen = set(np.unique(draws(client, jnp.arange(500))).tolist()) - {NUM_ITEMS}
        assert seen == set(range(NUM_ITEMS)) - EXCLUDED["candidates"][user]


def test_strict_never_looks_at_held_out_rows():
    """Two splits that differ in validation and test alone give the same clients, bit for bit."""
    splits = [
        make_split(TRAIN, test, num_items=NUM_ITEMS, validation=validation)
        for test, validation in ((TEST, VALIDATION), ([[9], [10]], [[11], [12]]))
    ]
    a, b = (jax.tree.leaves(client_data(split).buckets) for split in splits)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def epoch_of(items, per_positive, num_items, batch_size=None, capacity=9):
    """Examples of one client among others that make its arrays longer: ids, labels, weights flattened by positive."""
    train = [items, [i % num_items for i in range(min(capacity, num_items))]]
    clients = client_data(make_split(train, [[], []], num_items=num_items), num_buckets=1)
    (bucket,) = clients.buckets
    row = int(np.flatnonzero(bucket.client_id == 0)[0])
    client = jax.tree.map(lambda x: jnp.asarray(x[row]), bucket)
    epoch = jax.jit(lambda c: draw_epoch(c, Negatives(per_positive), batch_size, jax.random.key(0)))(client)
    assert epoch.slots is None
    return [np.asarray(x).reshape(-1, 1 + per_positive) for x in epoch.examples]


def test_an_epoch_holds_every_positive_once_with_its_negatives():
    items = [3, 14, 7, 0, 11, 5, 2]
    ids, labels, weights = epoch_of(items, 1, NUM_ITEMS, batch_size=3)
    real = weights[:, 0] > 0
    assert sorted(ids[real, 0]) == sorted(items)
    assert ids[real, 0].tolist() != items  # shuffled
    assert np.all(labels[real] == [1, 0])
    assert np.all(weights[real] == 1)
    assert not np.any(weights[~real])
    assert np.all(ids[~real] == NUM_ITEMS)
    everything = ids[real].ravel()
    assert len(set(everything)) == len(everything)  # a row may then ride along with its example
    np.testing.assert_array_equal(np.flatnonzero(real), np.arange(7))  # no gap before the last batch


def test_a_small_catalogue_is_shared_out_fairly():
    """Five positives want 15 negatives of 7 items: all 7 are drawn, each positive has one or two, weights add to 15."""
    ids, _, weights = epoch_of([0, 1, 2, 3, 4], 3, 12)
    drawn = weights[:5, 1:] > 0
    assert set(ids[:5, 1:][drawn]) == set(range(5, 12))
    assert set(drawn.sum(1)) == {1, 2}
    np.testing.assert_allclose(weights[:5, 1:].sum(), 15, rtol=1e-6)
    assert not np.any(weights[5:])


def test_a_client_who_touched_everything_trains_on_positives_alone():
    ids, _, weights = epoch_of(list(range(6)), 2, 6)
    assert sorted(ids[:, 0]) == list(range(6))
    np.testing.assert_array_equal(weights, [[1, 0, 0]] * 6)
    assert np.all(ids[:, 1:] == 6)


def test_independent_draws_are_uniform_over_what_is_allowed_and_repeat():
    excluded = jnp.array([0, 3, 9, 10, 10], jnp.int32)  # of ten items, 0, 3 and 9; padded with 10
    draw = partial(
        independent_negatives, num=70_010, wanted=70_000, excluded=excluded, num_excluded=jnp.int32(3), num_items=10
    )
    ids, weights = map(np.asarray, draw(jax.random.key(0)))
    assert (ids[70_000:] == 10).all()
    assert (weights == (np.arange(70_010) < 70_000)).all()
    counts = np.bincount(ids[:70_000], minlength=10)
    allowed = [1, 2, 4, 5, 6, 7, 8]
    assert counts.sum() == counts[allowed].sum()
    assert stats.chisquare(counts[allowed]).pvalue > 1e-3
    nothing, none = draw(jax.random.key(0), num_excluded=jnp.int32(10), excluded=jnp.arange(10, dtype=jnp.int32))
    assert (np.asarray(nothing) == 10).all()
    assert not np.asarray(none).any()


def test_an_epoch_with_replacement_trains_a_table_of_the_catalogue():
    split = make_split([[0, 1, 2], [1]], [[3], [3]], num_items=6)
    clients = client_data(split, num_buckets=1)
    place = int(np.flatnonzero(np.asarray(clients.buckets[0].client_id) == 0)[0])
    client = jax.tree.map(lambda x: jnp.asarray(x[place]), clients.buckets[0])
    epoch = draw_epoch(client, Negatives(4, replacement=True), 2, jax.random.key(0))
    np.testing.assert_array_equal(epoch.row_ids, np.arange(6))
    np.testing.assert_array_equal(epoch.slots, epoch.examples.ids)
    ids = np.asarray(epoch.examples.ids).reshape(-1, 5)
    real = ids[:, 0] < 6
    assert sorted(ids[real, 0]) == [0, 1, 2]
    assert np.isin(ids[real, 1:], [3, 4, 5]).all()
    assert (ids[~real] == 6).all()
    with pytest.raises(ValueError, match="with replacement are uniform"):
        draw_epoch(client, Negatives(4, "popularity", jnp.ones(6), replacement=True), 2, jax.random.key(0))


def three_positives(num_items=40):
    """A client with items 0, 1 and 2, laid out with a shorter one."""
    clients = client_data(make_split([[0, 1, 2], [1]], [[3], [3]], num_items=num_items), num_buckets=1)
    place = int(np.flatnonzero(np.asarray(clients.buckets[0].client_id) == 0)[0])
    return jax.tree.map(lambda x: jnp.asarray(x[place]), clients.buckets[0])


def test_mixing_keeps_every_example_and_pads_at_the_end():
    plain, mixed = (
        draw_epoch(three_positives(), Negatives(4, mixed=mixed), 2, jax.random.key(5)).examples
        for mixed in (False, True)
    )
    pairs = [sorted(zip(*(np.asarray(x).ravel().tolist() for x in epoch), strict=True)) for epoch in (plain, mixed)]
    assert pairs[0] == pairs[1]
    assert (np.asarray(mixed.weights).ravel() == (np.arange(mixed.weights.size) < 15)).all()
    assert (np.asarray(mixed.labels)[..., 1:] > 0).any()  # a positive left its column


def test_positives_lie_anywhere_among_independent_negatives():
    """Each of the client's own items once, at every place alike; the rest are allowed items, padding comes last."""
    client, negatives = three_positives(), Negatives(4, replacement=True, mixed=True)
    keys = jax.random.split(jax.random.key(0), 2000)
    epochs = jax.vmap(lambda key: draw_epoch(client, negatives, 2, key).examples)(keys)
    ids, labels, weights = (np.asarray(x).reshape(2000, -1) for x in epochs)
    assert np.all(weights == (np.arange(20) < 15))
    assert np.all(ids[:, 15:] == 40)
    for item in range(3):
        places = np.nonzero(ids == item)
        assert np.array_equal(places[0], np.arange(2000))
        assert np.all(labels[places] == 1)
        assert stats.chisquare(np.bincount(places[1], minlength=15)[:15]).pvalue > 1e-3
    drawn = ids[:, :15][labels[:, :15] == 0]
    assert len(drawn) == 2000 * 12
    assert stats.chisquare(np.bincount(drawn, minlength=40)[3:]).pvalue > 1e-3


def test_a_draw_smaller_than_the_catalogue_has_a_row_for_each_item():
    epoch = draw_epoch(three_positives(), Negatives(4, replacement=True), 2, jax.random.key(0))
    ids, slots, row_ids = (np.asarray(x) for x in (epoch.examples.ids, epoch.slots, epoch.row_ids))
    assert not epoch.whole
    np.testing.assert_array_equal(row_ids[slots[ids < 40]], ids[ids < 40])
    assert np.all(slots[ids == 40] == len(row_ids))
    assert len(set(row_ids[row_ids < 40])) == np.sum(row_ids < 40) == len(set(ids[ids < 40]))

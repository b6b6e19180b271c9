"""Risk: laying users out as padded buckets loses, repeats or mislabels an interaction, or wastes the padding."""

import dataclasses
import itertools

import numpy as np
import pytest
from evaluation_worlds import interactions, make_split
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_rec.data.clients import choose_capacities, client_data, client_data_from_examples

NUM_ITEMS = 12
histories = st.lists(
    st.permutations(range(NUM_ITEMS)).flatmap(lambda p: st.integers(0, NUM_ITEMS).map(lambda n: p[:n])),
    min_size=1,
    max_size=9,
).filter(any)


def read_back(clients):
    """(items, labels, excluded, row ids) of every client, after checking that all the rest is padding."""
    found = {}
    for bucket in clients.buckets:
        assert bucket.item_ids.dtype == bucket.length.dtype == bucket.client_id.dtype == np.int32
        assert bucket.labels.dtype == np.float32
        assert bucket.num_items == clients.num_items
        for row, client_id in enumerate(bucket.client_id):
            length, num_excluded = bucket.length[row], bucket.num_excluded[row]
            assert np.all(bucket.item_ids[row, length:] == clients.num_items)
            assert not np.any(bucket.labels[row, length:])
            assert np.all(bucket.excluded[row, num_excluded:] == clients.num_items)
            if client_id == clients.num_clients:
                assert length == num_excluded == 0
                continue
            assert client_id not in found
            items = bucket.item_ids[row, :length]
            if bucket.slots is not None:
                width = bucket.row_ids.shape[1]
                np.testing.assert_array_equal(bucket.row_ids[row][bucket.slots[row, :length]], items)
                assert np.all(bucket.slots[row, length:] == width)
                distinct = bucket.row_ids[row][bucket.row_ids[row] < clients.num_items]
                assert len(set(distinct)) == len(distinct)
                assert set(distinct) == set(items)
            found[int(client_id)] = (
                items.tolist(),
                bucket.labels[row, :length].tolist(),
                bucket.excluded[row, :num_excluded].tolist(),
            )
    assert sorted(found) == list(range(clients.num_clients))
    return found


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lists=histories, num_buckets=st.integers(1, 6), num_shards=st.integers(1, 4))
def test_every_interaction_lands_exactly_once(lists, num_buckets, num_shards):
    num_shards = min(num_shards, len(lists))
    split = make_split(lists, [[] for _ in lists], num_items=NUM_ITEMS)
    clients = client_data(split, num_buckets=num_buckets, num_shards=num_shards)
    found = read_back(clients)
    for user, items in enumerate(lists):
        assert found[user] == (list(items), [1.0] * len(items), sorted(items))
    assert (clients.num_clients, clients.num_interactions) == (len(lists), sum(map(len, lists)))
    assert len(clients.buckets) <= num_buckets
    check_shards(clients)
    slots = sum(b.item_ids.size for b in clients.buckets)
    assert clients.padding_waste == pytest.approx(1 - clients.num_interactions / slots)


def check_shards(clients):
    """Shard s is an equal block of every bucket and holds the ids from s * clients_per_shard, sorted by length."""
    for bucket in clients.buckets:
        blocks = np.split(bucket.client_id, clients.num_shards)
        lengths = np.split(bucket.length, clients.num_shards)
        for shard, (ids, length) in enumerate(zip(blocks, lengths, strict=True)):
            real = ids < clients.num_clients
            assert np.all(ids[real] // clients.clients_per_shard == shard)
            assert np.all(np.diff(length[real]) >= 0)
            assert np.all(real[: real.sum()])  # padding clients come last
    widths = [b.item_ids.shape[1] for b in clients.buckets]
    assert widths == sorted(set(widths))


examples = st.lists(
    st.lists(st.tuples(st.integers(0, NUM_ITEMS - 1), st.floats(-5, 5, width=32)), max_size=9), min_size=1, max_size=8
).filter(any)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=examples, num_buckets=st.integers(1, 4), num_shards=st.integers(1, 3), batch_size=st.integers(1, 4))
def test_ready_made_examples_keep_order_and_repeats(rows, num_buckets, num_shards, batch_size):
    num_shards = min(num_shards, len(rows))
    pairs = [(np.array([i for i, _ in row], np.int64), np.array([r for _, r in row])) for row in rows]
    clients = client_data_from_examples(
        pairs, num_items=NUM_ITEMS, batch_size=batch_size, num_buckets=num_buckets, num_shards=num_shards
    )
    assert all(bucket.item_ids.shape[1] % batch_size == 0 for bucket in clients.buckets)
    found = read_back(clients)
    for user, row in enumerate(rows):
        assert found[user] == ([i for i, _ in row], [r for _, r in row], [])
    check_shards(clients)


def padding(lengths, capacities):
    return sum(min(c for c in capacities if c >= n) for n in lengths)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=20), num_buckets=st.integers(1, 5))
def test_capacities_are_optimal(lengths, num_buckets):
    """Against every choice of at most ``num_buckets`` of the lengths."""
    chosen = choose_capacities(np.array(lengths), num_buckets=num_buckets)
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= num_buckets
    assert chosen[-1] == max(lengths)
    distinct = sorted(set(lengths))
    best = min(
        padding(lengths, choice)
        for size in range(1, num_buckets + 1)
        for choice in itertools.combinations(distinct, min(size, len(distinct)))
        if choice[-1] == distinct[-1]
    )
    assert padding(lengths, chosen) == best


def test_capacities_of_many_distinct_lengths():
    """More than 256 lengths are thinned to quantiles first: still covering, and within 2 % of the exact optimum."""
    lengths = np.unique(np.random.default_rng(0).lognormal(5, 1, 3000).astype(int) + 1)
    assert len(lengths) > 256
    chosen = choose_capacities(lengths, num_buckets=2)
    assert chosen[-1] == lengths.max()
    best = min(padding(lengths, (int(c), int(lengths.max()))) for c in lengths[:-1])
    assert padding(lengths, chosen) <= 1.02 * best


def test_ratings_become_labels_and_unknown_ones_are_left_out():
    rated = dataclasses.replace(
        interactions([[0, 1, 2], [3], []], num_items=5), ratings=np.array([4, np.nan, 1.5, 3], np.float32)
    )
    split = dataclasses.replace(make_split([[], [], []], [[], [], []], num_items=5), train=rated)
    found = read_back(client_data(split, use_ratings=True))
    assert found == {0: ([0, 2], [4.0, 1.5], [0, 1, 2]), 1: ([3], [3.0], [3]), 2: ([], [], [])}
    found = read_back(client_data(split))
    assert found[0] == ([0, 1, 2], [1.0, 1.0, 1.0], [0, 1, 2])


def tiny(**parts):
    return make_split([[0, 1], [2]], [[3], [4]], num_items=5, **parts)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"exclusion": "none"}, "strict, paper, candidates; got 'none'"),
        ({"exclusion": "candidates"}, "needs a split with a candidate file"),
        ({"use_ratings": True}, "tiny has no ratings"),
        ({"num_shards": 3}, "between 1 and the 2 clients; got 3"),
        ({"num_shards": 0}, "between 1 and the 2 clients; got 0"),
        ({"num_buckets": 0}, "num_buckets must be at least 1; got 0"),
    ],
)
def test_bad_arguments_refuse(arguments, words):
    with pytest.raises(ValueError, match=words):
        client_data(tiny(), **arguments)


def test_nothing_to_train_on_refuses():
    with pytest.raises(ValueError, match="every client is empty"):
        client_data(make_split([[], []], [[3], [4]], num_items=5))
    with pytest.raises(ValueError, match="every client is empty"):
        client_data_from_examples([(np.zeros(0, int), np.zeros(0))], num_items=5)


def test_an_item_twice_refuses():
    """Its row would count twice in the sum and once in the clipped norm."""
    with pytest.raises(ValueError, match="tiny has users who touch an item twice"):
        client_data(make_split([[0, 1, 0], [2]], [[], []], num_items=5))

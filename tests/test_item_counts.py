"""Risk: federated popularity counts other things than popularity does, or a client weighs more than its norm says."""

import jax
import numpy as np
import pytest
from evaluation_worlds import make_split
from test_noise import keys

from fedjax_rec.algorithms.item_counts import item_counts, item_counts_score
from fedjax_rec.data.clients import client_data, client_data_from_examples
from fedjax_rec.federated.cohort import fixed_size, full_participation
from fedjax_rec.federated.round import make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.popularity import dp_popularity
from fedjax_rec.privacy.mechanisms import clip_by_global_norm

NUM_ITEMS = 9
HISTORIES = [[0, 1, 2, 3, 4], [1], [1, 2], [], [0, 1, 2, 8]]
SPLIT = make_split(HISTORIES, [[] for _ in HISTORIES], num_items=NUM_ITEMS)


def counts(num_rounds=1, sampler=None, data=None, links=None, chunk_size=4, **options):
    sampler = full_participation(len(HISTORIES)) if sampler is None else sampler
    data = client_data(SPLIT, num_buckets=1) if data is None else data
    rounds = make_rounds(
        item_counts(NUM_ITEMS, **options), links or chain(), sampler, data, span_size=200, chunk_size=chunk_size
    )
    state, _, _ = rounds.run(*rounds.init(jax.random.key(0)), keys(), num_rounds)
    return len(HISTORIES) * np.asarray(item_counts_score(state.shared, ()))


@pytest.mark.parametrize("most", [1, 2])
def test_clipped_counts_are_those_of_popularity(most):
    expected = dp_popularity(SPLIT.train, noise_multiplier=0.0, key=jax.random.key(0), max_items_per_user=most).counts
    np.testing.assert_allclose(counts(max_items_per_client=most), expected, rtol=1e-5)
    links = chain(clip_by_global_norm(np.sqrt(most)))  # the link does the same to plain counts
    np.testing.assert_allclose(counts(normalize="none", links=links), expected, rtol=1e-5)


def test_plain_counts_whatever_the_layout():
    truth = np.bincount(np.concatenate(HISTORIES).astype(int), minlength=NUM_ITEMS)
    np.testing.assert_allclose(counts(3, normalize="none"), truth, rtol=1e-6)
    data = client_data(SPLIT, num_buckets=3)
    np.testing.assert_allclose(counts(data=data, chunk_size=1, normalize="none"), truth, rtol=1e-6)
    twice = [(np.array(h + h, np.int64), np.ones(2 * len(h))) for h in HISTORIES]  # repeats count once
    data = client_data_from_examples(twice, num_items=NUM_ITEMS, num_buckets=1)
    np.testing.assert_allclose(counts(data=data, normalize="none"), truth, rtol=1e-6)


def test_sampled_counts():
    """Two items of each client, or all of one that has fewer: uniform over rounds, never more than two."""
    assert counts(normalize="sample", max_items_per_client=2).sum() == pytest.approx(2 + 1 + 2 + 0 + 2)
    expected = np.zeros(NUM_ITEMS)
    for items in HISTORIES:
        expected[items] += min(1.0, 2 / max(len(items), 1))
    found = counts(200, normalize="sample", max_items_per_client=2)
    np.testing.assert_allclose(found, expected, atol=0.2)
    assert np.all(found[[5, 6, 7]] == 0)


def test_rounds_of_small_cohorts_average_to_the_population():
    truth = np.bincount(np.concatenate(HISTORIES).astype(int), minlength=NUM_ITEMS)
    found = counts(200, sampler=fixed_size(len(HISTORIES), cohort_size=2), normalize="none")
    np.testing.assert_allclose(found, truth, atol=0.5)


def test_other_arguments_refuse():
    with pytest.raises(ValueError, match="clip, none, sample; got 'l1'"):
        item_counts(NUM_ITEMS, normalize="l1")
    with pytest.raises(ValueError, match="at least 1; got 0"):
        item_counts(NUM_ITEMS, max_items_per_client=0)

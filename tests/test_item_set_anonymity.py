"""Risk: a set of items that an attacker may know still belongs to fewer than k users."""

import itertools

import numpy as np
import pytest
from anonymous_worlds import assert_nothing_old, make_interactions, random_world, sets_of, worlds
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_rec.anonymization import item_sets, item_supports
from fedjax_rec.anonymization.item_sets import enforce_km, km_anonymity

# Supports: 0: 3, 1: 3, 2: 2, 3: 1. Pairs: 01: 2, 02: 1, 12: 2, 13: 1, 23: 1. Triples: 012: 1, 123: 1.
HAND = make_interactions([[0, 1], [0, 1, 2], [1, 2, 3], [0]])


def slow_report(interactions, k, m):
    """Violations of each size, item sets and the smallest support, by looking up every set of items in every record."""
    records, sizes, supports = sets_of(interactions), [], []
    for size in range(1, m + 1):
        counts = [
            sum(set(chosen) <= record for record in records)
            for chosen in itertools.combinations(range(interactions.num_items), size)
        ]
        supports += [count for count in counts if count]
        sizes.append(sum(0 < count < k for count in counts))
    return tuple(sizes), len(supports), min(supports, default=0)


def test_supports_by_hand():
    assert km_anonymity(HAND, 2, 1)[2:] == (1, 1, 4, (1,))
    assert km_anonymity(HAND, 2, 2)[2:] == (1, 4, 9, (1, 3))
    assert km_anonymity(HAND, 2, 3)[2:] == (1, 6, 11, (1, 3, 2))
    assert km_anonymity(HAND, 1, 3).holds
    assert not km_anonymity(HAND, 2, 1).holds


@settings(max_examples=50, deadline=None, derandomize=True)
@given(worlds(), st.integers(1, 4), st.integers(1, 3), st.sampled_from(["local", "global"]))
def test_reports_agree_with_a_slow_count_and_releases_hold(world, k, m, suppression):
    k = min(k, world.num_users)
    report = km_anonymity(world, k, m)
    assert (report.violations_by_size, report.num_itemsets, report.smallest_support) == slow_report(world, k, m)
    release, done = enforce_km(world, k, m, suppression=suppression)
    violations, num_itemsets, smallest = slow_report(release, k, m)
    assert violations == (0,) * m
    assert done.after.holds
    assert (done.after.num_itemsets, done.after.smallest_support) == (num_itemsets, smallest)
    assert all(after <= before for before, after in zip(sets_of(world), sets_of(release), strict=True))
    assert done.removed_rows == world.num_interactions - release.num_interactions
    assert_nothing_old(release, world)
    if report.holds:
        assert done.removed_rows == 0


def test_a_rare_triple_of_common_pairs_goes():
    world = make_interactions([[0, 1], [0, 1], [1, 2], [1, 2], [0, 2], [0, 2], [0, 1, 2]])
    assert km_anonymity(world, 2, 2).holds
    assert km_anonymity(world, 2, 3).violations_by_size == (0, 0, 1)
    done = enforce_km(world, 2, 3).suppression
    assert done.after.holds
    assert done.removed_rows > 0


def test_rows_keep_their_ratings_and_times():
    world = random_world()
    release, done = enforce_km(world, 3)
    assert 0 < done.removed_rows < world.num_interactions
    before = {
        (u, i): (r, t)
        for u, i, r, t in zip(world.user_ids, world.item_ids, world.ratings, world.timestamps, strict=True)
    }
    for row in range(release.num_interactions):
        rating, time = before[release.user_ids[row], release.item_ids[row]]
        assert release.timestamps[row] == time
        assert np.array_equal(release.ratings[row], rating, equal_nan=True)
    assert done.removed_share == done.removed_rows / world.num_interactions
    assert 0 < done.information_loss < 1
    assert done.removed_items == np.count_nonzero((world.item_counts > 0) & (release.item_counts == 0))
    assert done.emptied_users == np.count_nonzero(release.counts_per_user == 0)


def test_items_given_back_to_single_records_leave_more():
    world = random_world(200, 40, explicit=False)
    whole, local = enforce_km(world, 3, suppression="global"), enforce_km(world, 3)
    assert local.suppression.removed_rows < whole.suppression.removed_rows
    assert set(map(tuple, np.c_[whole.interactions.user_ids, whole.interactions.item_ids])) <= set(
        map(tuple, np.c_[local.interactions.user_ids, local.interactions.item_ids])
    )


def test_blocks_and_sparse_products_count_alike(monkeypatch):
    world = random_world()
    whole = km_anonymity(world, 3, 2), enforce_km(world, 3).interactions.fingerprint
    for module in (item_sets, item_supports):
        monkeypatch.setattr(module, "BLOCK_ITEMS", 4)
    assert (km_anonymity(world, 3, 2), enforce_km(world, 3).interactions.fingerprint) == whole
    monkeypatch.setattr(item_supports, "_MOST_CELLS", 1)
    assert (km_anonymity(world, 3, 2), enforce_km(world, 3).interactions.fingerprint) == whole


def test_what_cannot_be_counted_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="between 1 and the 4 users of the data; got 5"):
        km_anonymity(HAND, 5)
    with pytest.raises(ValueError, match="got 0"):
        enforce_km(HAND, 0)
    with pytest.raises(ValueError, match="m = 4"):
        km_anonymity(HAND, 2, 4)
    with pytest.raises(ValueError, match="'random'"):
        enforce_km(HAND, 2, suppression="random")
    monkeypatch.setattr(item_supports, "_MOST_TRIPLES", 3)
    with pytest.raises(ValueError, match="take m = 2"):
        km_anonymity(HAND, 2, 3)
    monkeypatch.setattr(item_sets, "_MOST_CELLS", 3)
    with pytest.raises(ValueError, match='suppression="global"'):
        enforce_km(HAND, 2)
    monkeypatch.setattr(item_sets, "_MOST_PAIRS", 3)
    with pytest.raises(ValueError, match="first keep the most popular"):
        enforce_km(HAND, 2)


def test_users_without_rows_stay_without():
    world = make_interactions([[], [0], [0], []], num_items=3)
    release, done = enforce_km(world, 2)
    assert sets_of(release) == [set(), {0}, {0}, set()]
    assert done.emptied_users == 0
    assert enforce_km(world, 3).suppression.emptied_users == 2
    assert enforce_km(world, 3).suppression.after.smallest_support == 0

"""Risk: members of a group differ in the release, a group is too small, or what one member had is told."""

import numpy as np
import pytest
from anonymous_worlds import assert_nothing_old, make_interactions, random_world, record, sets_of, worlds
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_rec.anonymization.microaggregation import mdav, microaggregate


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 40), st.integers(2, 7), st.integers(0, 5), st.booleans())
def test_groups_have_k_to_twice_k_members(num_points, k, seed, tied):
    points = np.zeros((num_points, 2)) if tied else np.random.default_rng(seed).normal(size=(num_points, 2))
    if num_points >= k:
        sizes = np.bincount(mdav(points, k))
        assert sizes.min() >= k
        assert sizes.max() <= 2 * k - 1
        assert sizes.sum() == num_points


def test_groups_are_near_points():
    clusters = np.repeat([0.0, 10.0, 20.0, 31.0], 3)
    points = clusters[:, None] + np.tile([0.0, 0.1, 0.2], 4)[:, None]
    shuffled = np.random.default_rng(0).permutation(12)
    groups = mdav(points[shuffled], 3)
    assert len(set(zip(groups.tolist(), clusters[shuffled].tolist(), strict=True))) == 4


def assert_members_agree(found, k):
    release, groups = found.interactions, found.group_of
    for group in range(found.num_groups):
        members = np.flatnonzero(groups == group)
        assert k <= len(members) <= 2 * k - 1
        assert len({str(record(release, user)) for user in members}) == 1, "the members of a group can be told apart"
    assert not release.user_attributes


@settings(max_examples=40, deadline=None, derandomize=True)
@given(worlds(most_users=12), st.integers(2, 4), st.integers(1, 2))
def test_members_of_a_group_are_identical(world, k, min_members):
    if np.count_nonzero(world.counts_per_user) >= k:
        found = microaggregate(world, k, seed=0, min_members=min_members)
        assert_members_agree(found, k)
        assert np.array_equal(found.group_of < 0, world.counts_per_user == 0)
        assert np.all(found.interactions.counts_per_user[found.group_of < 0] == 0)
        before, after = sets_of(world), sets_of(found.interactions)
        for user in np.flatnonzero(found.group_of >= 0):
            members = np.flatnonzero(found.group_of == found.group_of[user])
            supports = [sum(item in before[member] for member in members) for item in after[user]]
            assert min(supports, default=min_members) >= min_members
            assert len(after[user]) <= np.median([len(before[member]) for member in members])
        assert_nothing_old(found.interactions, world)


@pytest.mark.parametrize("times", ["drop", "group"])
def test_ratings_and_times_are_identical_too(times):
    world = random_world()
    found = microaggregate(world, 4, seed=0, times=times)
    assert_members_agree(found, 4)
    assert (found.interactions.timestamps is None) == (times == "drop")
    assert found.interactions.ratings is not None
    assert_nothing_old(found.interactions, world)
    again = microaggregate(world, 4, seed=0, times=times)
    assert again.interactions.fingerprint == found.interactions.fingerprint


def test_a_group_by_hand():
    histories = [[0, 1, 2], [0, 1, 3], [0, 1, 2, 3, 4]]
    ratings = [5, 1, 2, *[4, np.nan, 3], *[3, np.nan, 4, 1, 1]]
    timestamps = [100, 200, 300, *[300, 0, 900], *[800, 0, 500, 100, 100]]
    world = make_interactions(histories, ratings=ratings, timestamps=timestamps)
    found = microaggregate(world, 3, seed=0, times="group")
    assert found.num_groups == 1
    # The median record has three items: 0 and 1 of everybody, and 2, which ties with 3 and comes first.
    assert sets_of(found.interactions) == [{0, 1, 2}] * 3
    assert sorted(record(found.interactions, 0)) == [(0, 4, 400), (1, 1, 200), (2, 3, 400)]
    assert found.information_loss == pytest.approx((0 + 1 / 2 + 2 / 5) / 3)
    assert found.single_share == 0


def test_what_one_member_alone_had_is_left_out_unless_asked_for():
    world = make_interactions([[0, 1], [0, 2], [0, 3]], ratings=[1, 2, 3, 4, 5, np.nan])
    assert sets_of(microaggregate(world, 3, seed=0).interactions) == [{0}] * 3
    found = microaggregate(world, 3, seed=0, min_members=1)
    assert sets_of(found.interactions) == [{0, 1}] * 3
    assert found.single_share == 1 / 2
    strangers = make_interactions([[0], [1], [2]])
    assert microaggregate(strangers, 3, seed=0).num_emptied == 3
    assert microaggregate(strangers, 3, seed=0, min_members=1).num_emptied == 0


def test_similar_users_are_grouped_whatever_the_length_of_their_records():
    rng = np.random.default_rng(0)
    who = rng.permutation(np.repeat(range(3), 5))
    lengths = rng.permutation(np.repeat([6, 14, 20], 5))
    histories = [(20 * one + rng.permutation(20)[:n]).tolist() for one, n in zip(who, lengths, strict=True)]
    found = microaggregate(make_interactions(histories, num_items=60), 5, seed=0)
    assert len(set(zip(who.tolist(), found.group_of.tolist(), strict=True))) == 3


def test_what_cannot_be_is_refused():
    world = make_interactions([[0], [1], []])
    with pytest.raises(ValueError, match="between 2 and the 2 users with rows; got 3"):
        microaggregate(world, 3, seed=0)
    with pytest.raises(ValueError, match="got 1"):
        microaggregate(world, 1, seed=0)
    with pytest.raises(ValueError, match="'keep'"):
        microaggregate(world, 2, seed=0, times="keep")
    with pytest.raises(ValueError, match="from 1 to k; got 16 and 3"):
        microaggregate(world, 2, seed=0, min_members=3)

"""Risk: fewer items are replaced than a user asked for, or the substitutes can be told from what is real."""

import dataclasses

import numpy as np
import pytest
from anonymous_worlds import assert_nothing_old, make_interactions, random_world, record, sets_of
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_rec.anonymization.replacement import replace_items

WORLD, VIRTUAL = random_world(), random_world(seed=1)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 50), st.sampled_from(["jaccard", "random"]))
def test_every_user_gets_the_share_chosen(seed, match):
    shares = np.random.default_rng(seed).choice([0, 0.1, 0.5, 0.9, 1], WORLD.num_users)
    found = replace_items(WORLD, VIRTUAL, share=shares, seed=seed, match=match)
    release = found.interactions
    assert np.array_equal(release.counts_per_user, WORLD.counts_per_user)
    for user, (before, after) in enumerate(zip(sets_of(WORLD), sets_of(release), strict=True)):
        assert len(after) == len(before)
        gone = len(before - after)
        assert gone == found.num_replaced[user]
        assert shares[user] * len(before) <= gone + 1e-9 < shares[user] * len(before) + 1
        if shares[user] == 0:
            assert record(release, user) == record(WORLD, user) or WORLD.timestamps is not None
            assert found.virtual_user[user] == -1
    assert_nothing_old(release, WORLD)


def test_a_user_depends_on_nobody_elses_choice():
    share = np.zeros(WORLD.num_users)
    share[7] = 0.5
    alone = replace_items(WORLD, VIRTUAL, share=share, seed=3).interactions
    together = replace_items(WORLD, VIRTUAL, share=0.5, seed=3).interactions
    other = replace_items(WORLD, VIRTUAL, share=0.5, seed=4).interactions
    assert record(alone, 7) == record(together, 7)
    assert sets_of(other) != sets_of(together)
    twins = make_interactions([list(range(12))] * 20, num_items=25)
    releases = sets_of(replace_items(twins, VIRTUAL, share=0.5, seed=0).interactions)
    assert len({frozenset(release) for release in releases}) == 20  # the same record, other choices


def test_substitutes_take_over_time_and_have_a_rating():
    bare = dataclasses.replace(VIRTUAL, ratings=None, timestamps=None)
    for virtual in (VIRTUAL, bare):
        release = replace_items(WORLD, virtual, share=0.6, seed=0).interactions
        for user in range(WORLD.num_users):
            rows = slice(WORLD.offsets[user], WORLD.offsets[user + 1])
            assert np.array_equal(np.sort(release.timestamps[rows]), np.sort(WORLD.timestamps[rows]))
    # Without ratings of the virtual users the multiset of ratings stays, row by row.
    unknown = np.isnan(WORLD.ratings)
    assert np.count_nonzero(np.isnan(release.ratings)) == np.count_nonzero(unknown)
    implicit = random_world(explicit=False)
    release = replace_items(implicit, VIRTUAL, share=0.5, seed=0).interactions
    assert release.ratings is None
    assert release.timestamps is None


def test_a_virtual_rating_is_used_where_there_is_one():
    world = make_interactions([[0, 1]], num_items=4, ratings=[1, 1])
    virtual = make_interactions([[2, 3]], num_items=4, ratings=[5, np.nan])
    assert record(replace_items(world, virtual, share=1.0, seed=0).interactions, 0) == [(2, 5, None), (3, 1, None)]


def test_the_most_similar_virtual_user_gives():
    world = make_interactions([[0, 1, 2, 3, 4]], num_items=30)
    virtual = make_interactions([[10, 11, 12], [0, 1, 2, 3, 4, 20, 21], [20, 22, 23, 24]], num_items=30)
    for seed in range(10):
        found = replace_items(world, virtual, share=0.4, seed=seed)
        assert found.virtual_user.tolist() == [1]
        assert sets_of(found.interactions)[0] - {0, 1, 2, 3, 4} == {20, 21}
    givers = {int(replace_items(world, virtual, share=0.4, seed=s, match="random").virtual_user[0]) for s in range(30)}
    assert givers == {0, 1, 2}


def test_others_help_out_when_the_candidates_have_too_few():
    world = make_interactions([[0, 1, 2, 3]], num_items=9)
    virtual = make_interactions([[4], [5], [6], [7, 0]], num_items=9)
    found = replace_items(world, virtual, share=1.0, seed=0, num_candidates=1)
    assert sets_of(found.interactions) == [{4, 5, 6, 7}]
    with pytest.raises(ValueError, match="gives up 4, and the virtual users have only 3 others"):
        replace_items(world, make_interactions([[4], [5], [6]], num_items=9), share=1.0, seed=0)


def test_loss_grows_with_the_share():
    losses = [replace_items(WORLD, VIRTUAL, share=share, seed=0).information_loss for share in (0.0, 0.3, 0.6, 1.0)]
    assert losses == sorted(losses)
    assert (losses[0], losses[-1]) == (0, 1)


def test_users_without_rows_stay_without():
    world, nobody = make_interactions([[], [0, 1]], num_items=5), make_interactions([[]], num_items=5)
    assert sets_of(replace_items(world, VIRTUAL_5, share=1.0, seed=0).interactions)[0] == set()
    assert sets_of(replace_items(world, nobody, share=0.0, seed=0).interactions) == sets_of(world)
    with pytest.raises(ValueError, match="have only 0 others"):
        replace_items(world, nobody, share=0.5, seed=0)


VIRTUAL_5 = make_interactions([[2, 3], [4]], num_items=5)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"got 1\.5"):
        replace_items(WORLD, VIRTUAL, share=1.5, seed=0)
    with pytest.raises(ValueError, match="got nan"):
        replace_items(WORLD, VIRTUAL, share=np.nan, seed=0)
    with pytest.raises(ValueError, match=r"a number or \[40\], and is \[3\]"):
        replace_items(WORLD, VIRTUAL, share=np.ones(3), seed=0)
    with pytest.raises(ValueError, match="over the catalogue of the data"):
        replace_items(WORLD, VIRTUAL_5, share=0.5, seed=0)
    with pytest.raises(ValueError, match="'cosine'"):
        replace_items(WORLD, VIRTUAL, share=0.5, seed=0, match="cosine")

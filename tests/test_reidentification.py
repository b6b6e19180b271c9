"""Risk: a release is called safe because the attack is weak, wrongly scored, or counts a group's member as no hit."""

import dataclasses
import math

import numpy as np
import pytest

from fedjax_rec.anonymization.hierarchies import coarsen_ratings, coarsen_times
from fedjax_rec.attacks.reidentification import Knowledge, day_column, record_scores, reidentify
from fedjax_rec.attacks.uniqueness import item_places, uniqueness
from fedjax_rec.data import load, synthetic
from fedjax_rec.data.interactions import from_rows

DAY = 86_400


@pytest.fixture(scope="module")
def world():
    return synthetic(num_users=150, num_items=120, num_interactions=3000, min_per_user=12, ratings=True, seed=3)


def reordered(data, order, *, labels):
    """The same histories with user `order[r]` at place r, under other labels."""
    counts = data.counts_per_user[order]
    rows = np.concatenate([np.arange(data.offsets[user], data.offsets[user + 1]) for user in order])
    return dataclasses.replace(
        data,
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        item_ids=data.item_ids[rows],
        file_rows=data.file_rows[rows],
        timestamps=data.timestamps[rows],
        ratings=data.ratings[rows],
        user_labels=labels,
        user_attributes={},
    )


def test_score_by_hand():
    data = from_rows(
        [1, 1, 2, 2, 3, 3, 3],
        [10, 11, 10, 12, 10, 11, 12],
        name="hand",
        ratings=[5, 3, 4, 2, 1, 3, 2],
        timestamps=[100 * DAY, 101 * DAY, 130 * DAY, 90 * DAY, 70 * DAY, 101 * DAY, 90 * DAY],
    )
    # One target: item 10 rated 5 on day 100, item 11 rated 4 on day 101, and an item that the release does not list.
    known = Knowledge(np.array([[0, 1, -1]]), np.array([[5.0, 4.0, 5.0]]), np.array([[100.0, 101.0, 9.0]]))
    w10, w11 = 1 / math.log(3), 1 / math.log(2)
    expected = [
        w10 * 2 + w11 * (math.exp(-1 / 1.5) + 1),
        w10 * (math.exp(-1 / 1.5) + math.exp(-1)),
        w10 * (math.exp(-4 / 1.5) + math.exp(-1)) + w11 * (math.exp(-1 / 1.5) + 1),
    ]
    np.testing.assert_allclose(record_scores(known, data), [expected], rtol=1e-12)
    bare = record_scores(Knowledge(known.item_ids, None, None), data)
    np.testing.assert_allclose(bare, [[w10 + w11, w10, w10 + w11]], rtol=1e-12)
    no_dates = dataclasses.replace(data, timestamps=np.zeros_like(data.timestamps))
    assert day_column(no_dates) is None
    rated = record_scores(known, no_dates)
    assert rated[0, 1] == pytest.approx(w10 * math.exp(-1 / 1.5))


def test_support_of_one_does_not_divide_by_zero():
    data = from_rows([1, 1, 2], [1, 2, 2], name="rare")
    scores = record_scores(Knowledge(np.array([[0, 1]]), None, None), data)
    np.testing.assert_allclose(scores, [[2 / math.log(2), 1 / math.log(2)]])


def test_two_users():
    """User 1 has items 1..4, user 2 has 3..6: two known items single out a user unless both are shared ones."""
    data = from_rows([1] * 4 + [2] * 4, [1, 2, 3, 4, 3, 4, 5, 6], name="two")
    found = uniqueness(data, known_items=(3, 4, 5))
    assert found[3] == found[4] == (1.0, 0.0, 2)
    assert math.isnan(found[5].share)
    assert found[5].num_targets == 0
    shared = np.mean([uniqueness(data, known_items=(2,), seed=seed)[2].share for seed in range(200)])
    assert shared == pytest.approx(1 - 1 / 6, abs=0.05)  # 1 of the 6 pairs of a user's items is the shared one
    found = reidentify(data, data, num_known=4)
    assert (found.top1, found.top1_error, found.num_targets, found.num_records) == (1.0, 0.0, 2, 2)
    same = from_rows([1, 1, 2, 2], [1, 2, 1, 2], name="twins")
    found = reidentify(same, same, num_known=2)
    assert (found.top1, found.matched, found.entropy) == (0.5, 0.0, 1.0)
    assert math.isnan(found.precision)
    assert uniqueness(same, known_items=(2,))[2].share == 0


def test_a_permutation_hides_nobody_who_is_looked_for_rightly(world):
    order = np.random.default_rng(0).permutation(world.num_users)
    released = reordered(world, order, labels=np.arange(world.num_users))
    truth = np.argsort(order)
    found = reidentify(world, released, truth, num_targets=None)
    same = reidentify(world, world, num_targets=None)
    assert (found.top1, found.matched, found.precision) == (same.top1, same.matched, same.precision)
    assert found.entropy == pytest.approx(same.entropy)
    assert found.top1 > 0.95
    assert found.precision > 0.99
    guess = reidentify(world, released, np.roll(truth, 1), num_targets=None)
    assert guess.top1 < 0.1  # and a wrong truth scores what chance does
    assert uniqueness(world, released=released, truth=truth) == uniqueness(world)


def test_less_and_wrong_knowledge_finds_fewer(world):
    def top1(**settings):
        return reidentify(world, world, num_targets=None, num_known=6, **settings).top1

    bare, full = top1(known=("items",)), top1()
    wrong = top1(wrong_share=0.5, rating_error=1, date_error_days=14)
    assert wrong < full
    assert bare < full
    no_times = dataclasses.replace(world, timestamps=None)
    fewer = reidentify(world, no_times, num_targets=None, num_known=6).top1
    assert fewer == reidentify(world, world, num_targets=None, num_known=6, known=("items", "ratings")).top1
    assert top1(wrong_share=1.0) < 0.1


def test_scores_that_do_not_favour_long_records(world):
    bare = {"known": ("items",), "num_targets": None, "num_known": 6}
    assert reidentify(world, world, length_power=0.25, **bare).top1 > reidentify(world, world, **bare).top1


def test_an_attacker_who_knows_how_times_and_ratings_were_coarsened(world):
    def coarse(data):
        return coarsen_ratings(coarsen_times(data, to="year"), to="liked")

    settings = {"num_targets": None, "num_known": 6}
    without, with_it = (reidentify(world, coarse(world), view=view, **settings).top1 for view in (None, coarse))
    assert with_it > without + 0.1
    assert with_it < reidentify(world, world, **settings).top1


def test_wrong_knowledge_is_wrong(world, monkeypatch):
    from fedjax_rec.attacks import reidentification

    seen = []
    monkeypatch.setattr(
        reidentification, "record_scores", lambda part, released: seen.append(part) or record_scores(part, released)
    )
    settings = dict(num_targets=None, num_known=8, seed=5)
    reidentify(world, world, **settings)
    reidentify(world, world, wrong_share=0.25, rating_error=1, date_error_days=14, **settings)
    right, wrong = seen
    own = np.zeros((world.num_users, world.num_items), bool)
    own[world.user_ids, world.item_ids] = True
    users = np.arange(world.num_users)[:, None]
    assert own[users, right.item_ids].all()
    np.testing.assert_array_equal(own[users, wrong.item_ids].sum(1), 6)
    np.testing.assert_allclose(np.abs(wrong.days - right.days), 14)
    np.testing.assert_allclose(np.abs(wrong.ratings - right.ratings), 1)
    assert wrong.ratings.min() >= 1
    assert wrong.ratings.max() <= 5


def test_a_record_of_five_people_names_each_with_a_fifth(world):
    truth = np.arange(world.num_users) // 5
    released = from_rows(
        truth[world.user_ids], world.item_labels[world.item_ids], name="groups", timestamps=world.timestamps
    )
    found = reidentify(world, released, truth, num_targets=None)
    assert 0.1 < found.top1 <= 0.2 + 1e-12
    assert all(value.share == 0 for value in uniqueness(world, released=released, truth=truth).values())


def test_users_who_were_left_out_are_not_found(world):
    without = world.take(world.user_ids >= 75)
    found = reidentify(world, without, num_targets=None)
    assert found.num_records == 75
    assert found.top1 < 0.6  # half of the targets have no record
    gone = np.where(np.arange(world.num_users) < 75, -1, np.arange(world.num_users))
    assert reidentify(world, without, gone, num_targets=None).top1 == pytest.approx(found.top1)


def test_items_are_matched_by_label(world):
    kept = np.unique(world.item_ids[world.item_ids % 2 == 0])
    rows = np.isin(world.item_ids, kept)
    half = from_rows(world.user_ids[rows], world.item_labels[world.item_ids[rows]], name="half")
    places = item_places(world, half)
    np.testing.assert_array_equal(half.item_labels[places[places >= 0]], world.item_labels[places >= 0])
    as_text = dataclasses.replace(world, item_labels=world.item_labels.astype(str))
    np.testing.assert_array_equal(item_places(world, as_text), np.arange(world.num_items))


def test_requests_that_cannot_be_met_are_sentences(world):
    with pytest.raises(ValueError, match="has 500 items; ask for fewer"):
        reidentify(world, world, num_known=500)
    with pytest.raises(ValueError, match="known is"):
        reidentify(world, world, known=("ratings",))
    with pytest.raises(ValueError, match="wrong_share from 0 to 1"):
        reidentify(world, world, wrong_share=2)
    with pytest.raises(ValueError, match="truth must be integers"):
        reidentify(world, world, np.full(world.num_users, world.num_users))
    with pytest.raises(ValueError, match="say with `truth`"):
        reidentify(world, synthetic(num_users=20, num_items=120))
    with pytest.raises(ValueError, match="known_items"):
        uniqueness(world, known_items=())


@pytest.mark.parametrize(("name", "shares"), [("100k", (0.081, 0.383, 0.635)), ("1m", (0.024, 0.166, 0.389))])
def test_uniqueness_of_movielens(data_dir, name, shares):
    data = load(f"movielens/{name}", data_dir=data_dir)
    found = uniqueness(data, known_items=(4, 8), num_targets=1500) | uniqueness(data, known_items=(12,))
    for value, expected in zip(found.values(), shares, strict=True):
        assert value.share == pytest.approx(expected, abs=0.04)

"""Risk: a pseudonym, an order or a coarse time still says who somebody is."""

import dataclasses
import hashlib
import itertools
import os

import numpy as np
import pytest
from anonymous_worlds import assert_nothing_old, make_interactions, random_world, record

from fedjax_rec.anonymization.hierarchies import coarsen_ratings, coarsen_times
from fedjax_rec.anonymization.losses import jaccard_distances, mean_jaccard_distance, suppressed_share
from fedjax_rec.anonymization.pseudonyms import load_key, new_key, pseudonymize, pseudonyms, save_key
from fedjax_rec.anonymization.released import keep_users

KEY = bytes(range(32))
WORLD = random_world()


def enumerated(names, hash_of, num_ids=5000):
    """Share of names that the hashes of all ids in a small space give away."""
    known = {hash_of(str(number)) for number in range(num_ids)}
    return np.mean([name in known for name in names])


def test_plain_hashes_fall_to_enumeration_and_keyed_ones_do_not():
    labels = np.random.default_rng(0).choice(5000, 300, replace=False)

    def plain(text):
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    assert enumerated([plain(str(label)) for label in labels], plain) == 1
    names = pseudonyms(labels, new_key())
    assert enumerated(names, plain) == 0
    wrong = new_key()
    assert enumerated(names, lambda text: pseudonyms(np.array([text]), wrong)[0], 500) == 0


def test_a_pseudonym_is_hmac_sha256_as_others_compute_it():
    # RFC 2104 written out: H(key ^ opad, H(key ^ ipad, text)).
    inner, outer = (bytes(b ^ pad for b in KEY.ljust(64, b"\0")) for pad in (0x36, 0x5C))
    digest = hashlib.sha256(outer + hashlib.sha256(inner + b"42").digest()).hexdigest()
    assert pseudonyms(np.array([42]), KEY).tolist() == [digest[:32]]
    assert pseudonyms(np.array(["42"]), KEY).tolist() == [digest[:32]]  # 42 and "42" are one label elsewhere too


def test_pseudonyms_are_stable_under_one_key_and_unlinkable_under_two():
    labels = np.array(["ann", "bob", "ann", "eve"])
    names, other = pseudonyms(labels, KEY), pseudonyms(labels, new_key())
    assert names[0] == names[2]
    assert len(set(names)) == 3
    assert not set(names) & set(other)
    assert pseudonyms(np.array([], np.int64), KEY).shape == (0,)
    assert new_key() != new_key()


def test_a_collision_is_refused(monkeypatch):
    monkeypatch.setattr("fedjax_rec.anonymization.pseudonyms._digest", lambda key, label: "00")
    with pytest.raises(ValueError, match="make another key"):
        pseudonyms(np.array([1, 2]), KEY)


@pytest.mark.parametrize("explicit", [True, False])
def test_pseudonymized_users_keep_their_rows_and_nothing_of_their_order(explicit):
    source = random_world(explicit=explicit)
    release = pseudonymize(source, KEY)
    assert_nothing_old(release, source)
    assert np.array_equal(release.user_labels, np.sort(release.user_labels))
    names = pseudonyms(source.user_labels, KEY)
    places = np.searchsorted(release.user_labels, names)
    assert not np.array_equal(places, np.arange(len(places)))  # the order is another one
    for user, place in enumerate(places):
        assert sorted(map(str, record(source, user))) == sorted(map(str, record(release, place)))
        for name, values in source.user_attributes.items():
            assert release.user_attributes[name][place] == values[user]


def test_the_release_does_not_depend_on_the_order_of_the_source():
    """Users relabelled so that their old order is reversed, and rows read from the file backwards: the same release."""
    rows = list(zip(WORLD.user_ids, WORLD.item_ids, WORLD.timestamps, strict=True))
    backwards = [[int(item) for u, item, _ in reversed(rows) if u == user] for user in range(WORLD.num_users)]
    again = make_interactions(backwards, num_items=WORLD.num_items)
    forwards = dataclasses.replace(WORLD, ratings=None, timestamps=None, user_attributes={})
    first, second = pseudonymize(forwards, KEY), pseudonymize(again, KEY)
    assert first.fingerprint == second.fingerprint
    assert np.array_equal(first.item_ids, second.item_ids)


def test_keys_are_kept_in_a_file_for_the_owner_alone(tmp_path):
    path, key = tmp_path / "key", new_key()
    old = os.umask(0)
    try:
        save_key(path, key)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_key(path) == key
    with pytest.raises(FileExistsError, match="another release"):
        save_key(path, new_key())
    assert load_key(path) == key
    path.chmod(0o644)
    with pytest.raises(ValueError, match="0644"):
        load_key(path)
    path.chmod(0o600)
    path.write_text("not hexadecimal")
    with pytest.raises(ValueError, match="holds no key"):
        load_key(path)


def test_short_keys_and_odd_labels_are_refused():
    with pytest.raises(ValueError, match="can be guessed"):
        pseudonyms(np.array([1]), b"secret")
    with pytest.raises(ValueError, match="float64"):
        pseudonyms(np.array([1.5]), KEY)


SPANS = ("hour", "day", "week", "month", "quarter", "year")
MOMENT = np.datetime64("2000-05-17T13:45:10").astype("datetime64[s]").astype(np.int64)  # a Wednesday
STARTS = ("2000-05-17T13", "2000-05-17", "2000-05-15", "2000-05-01", "2000-04-01", "2000-01-01")


@pytest.mark.parametrize(("to", "start"), list(zip(SPANS, STARTS, strict=True)))
def test_times_are_cut_to_the_start_of_their_span(to, start):
    world = make_interactions([[0, 1]], timestamps=[int(MOMENT), 0])
    coarse = coarsen_times(world, to=to)
    assert np.datetime64(int(coarse.timestamps.max()), "s") == np.datetime64(start)
    assert coarse.timestamps.min() == 0  # unknown stays unknown


def test_coarser_times_join_no_later_span_and_forget_the_order_within():
    for fine, coarse in itertools.pairwise(SPANS):
        if fine != "week":  # weeks cross the ends of months
            twice = coarsen_times(coarsen_times(WORLD, to=fine), to=coarse)
            assert np.array_equal(twice.timestamps, coarsen_times(WORLD, to=coarse).timestamps)
    for to in (*SPANS, "none"):
        assert_nothing_old(coarsen_times(WORLD, to=to), WORLD)
    late = make_interactions([[3, 1, 2]], timestamps=[1000, 1001, 1002])
    assert late.item_ids.tolist() == [3, 1, 2]
    assert coarsen_times(late, to="none").item_ids.tolist() == [1, 2, 3]
    assert coarsen_times(late, to="none").timestamps is None
    assert coarsen_times(make_interactions([[0]], timestamps=[86_400]), to="week").timestamps.tolist() == [0]
    assert coarsen_times(random_world(explicit=False), to="day").timestamps is None
    with pytest.raises(ValueError, match="'decade'"):
        coarsen_times(WORLD, to="decade")


def test_ratings_are_rounded_reduced_or_dropped():
    world = make_interactions([[0, 1, 2, 3]], ratings=[0.5, 3.5, 4.0, np.nan])
    assert np.array_equal(coarsen_ratings(world, to="whole").ratings, [1, 4, 4, np.nan], equal_nan=True)
    assert np.array_equal(coarsen_ratings(world, to="liked").ratings, [0, 0, 1, np.nan], equal_nan=True)
    assert coarsen_ratings(world, to="none").ratings is None
    assert coarsen_ratings(random_world(explicit=False), to="liked").ratings is None
    with pytest.raises(ValueError, match="'stars'"):
        coarsen_ratings(world, to="stars")


def test_losses_of_item_sets():
    before = make_interactions([[0, 1], [2], [], [3]], num_items=5)
    after = make_interactions([[1, 2], [], [], [3]], num_items=5)
    assert jaccard_distances(before, after).tolist() == pytest.approx([2 / 3, 1, 0, 0])
    assert mean_jaccard_distance(before, after) == pytest.approx(5 / 9)  # of the three that had rows
    assert suppressed_share(before, after) == pytest.approx(1 / 4)
    assert suppressed_share(after, before) == 0
    with pytest.raises(ValueError, match="before pseudonyms"):
        mean_jaccard_distance(before, pseudonymize(after, KEY))


def test_users_leave_with_all_that_is_theirs():
    mask = np.arange(WORLD.num_users) % 3 == 0
    kept = keep_users(WORLD, mask)
    assert_nothing_old(kept, WORLD)
    for place, user in enumerate(np.flatnonzero(mask)):
        assert sorted(map(str, record(kept, place))) == sorted(map(str, record(WORLD, user)))
        assert kept.user_attributes["age"][place] == WORLD.user_attributes["age"][user]
        assert kept.user_labels[place] == WORLD.user_labels[user]
    with pytest.raises(ValueError, match="Nobody"):
        keep_users(WORLD, np.zeros(WORLD.num_users, bool))
    with pytest.raises(ValueError, match="bool mask"):
        keep_users(WORLD, np.ones(3, bool))

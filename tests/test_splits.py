"""Splits lose no row, repeat themselves, and depend on nothing but what they name."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_rec.data import (
    TIE_RULES,
    Interactions,
    Split,
    from_rows,
    global_temporal,
    leave_given_out,
    leave_one_out,
    load,
    load_file,
    load_split,
    predefined_split,
    ratio_split,
    shown_at_test,
    strong_generalization,
    with_candidates,
)
from fedjax_rec.data.ties import label_hash, mix64

# Few distinct times, so that most users have tied ones.
rows = st.lists(
    st.tuples(st.integers(1, 7), st.integers(1, 12), st.integers(1, 4)),
    min_size=1,
    max_size=60,
    unique_by=lambda row: row[:2],
)


def build(table: list[tuple[int, int, int]]) -> Interactions:
    users, items, times = np.array(table).T
    return from_rows(users, items, timestamps=times, name="drawn")


def pairs(part: Interactions) -> list[tuple[int, int]]:
    return list(zip(part.user_labels[part.user_ids].tolist(), part.item_labels[part.item_ids].tolist(), strict=True))


def all_pairs(split: Split) -> list[tuple[int, int]]:
    return [pair for part in (split.train, split.validation, split.test, split.history) for pair in pairs(part)]


def every_split(interactions: Interactions, tie_rule: str, seed: int) -> list[Split]:
    splits = [
        leave_one_out(interactions, tie_rule=tie_rule, seed=seed),
        ratio_split(interactions, test_ratio=0.3, validation_ratio=0.2, tie_rule=tie_rule, seed=seed),
        ratio_split(interactions, test_ratio=0.3, validation_ratio=0.2, by="random", seed=seed),
    ]
    usable = int(np.count_nonzero(interactions.counts_per_user >= 2))
    if usable >= 3:
        users = {"num_validation_users": 1, "num_test_users": 1}
        splits.append(strong_generalization(interactions, **users, seed=seed))
        splits.append(strong_generalization(interactions, **users, by="time", tie_rule=tie_rule, seed=seed))
    if len(np.unique(interactions.timestamps)) >= 3:
        low, _, high = np.quantile(interactions.timestamps, [0, 0.5, 1]).astype(int)
        splits.append(global_temporal(interactions, validation_from=int(low) + 1, test_from=int(high)))
    return splits


@settings(max_examples=60, deadline=None)
@given(table=rows, tie_rule=st.sampled_from(TIE_RULES), seed=st.integers(-3, 2**70))
def test_no_row_is_lost_or_doubled_and_the_same_call_gives_the_same_split(table, tie_rule, seed):
    interactions = build(table)
    first, second = (every_split(interactions, tie_rule, seed) for _ in range(2))
    for split, again in zip(first, second, strict=True):
        assert sorted(all_pairs(split)) == sorted(pairs(interactions)), split.rule
        assert split.fingerprint == again.fingerprint, split.rule


@settings(max_examples=60, deadline=None)
@given(table=rows, shuffle=st.randoms(use_true_random=False), seed=st.integers(0, 9))
def test_file_order_decides_nothing_under_the_rules_that_do_not_name_it(table, shuffle, seed):
    shuffled = list(table)
    shuffle.shuffle(shuffled)
    for tie_rule in ("hash", "item_smallest", "item_largest"):
        for one, other in zip(
            every_split(build(table), tie_rule, seed), every_split(build(shuffled), tie_rule, seed), strict=True
        ):
            assert one.fingerprint == other.fingerprint, (tie_rule, one.rule)


@settings(max_examples=60, deadline=None)
@given(table=rows, tie_rule=st.sampled_from(TIE_RULES))
def test_leave_one_out_takes_the_latest_and_the_second_latest(table, tie_rule):
    interactions = build(table)
    split = leave_one_out(interactions, tie_rule=tie_rule)
    order = {  # ascending: the last is the latest
        "file_last": lambda row: (row[2], table.index(row)),
        "file_first": lambda row: (row[2], -table.index(row)),
        "item_largest": lambda row: (row[2], row[1]),
        "item_smallest": lambda row: (row[2], -row[1]),
        "hash": lambda row: row[2],
    }[tie_rule]
    for user in {row[0] for row in table}:
        mine = sorted((row for row in table if row[0] == user), key=order)
        test = [item for who, item in pairs(split.test) if who == user]
        validation = [item for who, item in pairs(split.validation) if who == user]
        if len(mine) < 3:
            assert (test, validation) == ([], [])
        elif tie_rule == "hash":
            times = {row[1]: row[2] for row in mine}
            assert [times[test[0]], times[validation[0]]] == [mine[-1][2], mine[-2][2]]
        else:
            assert (test, validation) == ([mine[-1][1]], [mine[-2][1]])


def test_hash_ties_break_differently_by_seed_and_about_evenly():
    users = np.repeat(np.arange(1, 2001), 3)
    interactions = from_rows(users, np.tile([5, 6, 7], 2000), timestamps=np.ones(6000), name="tied")
    share = [np.bincount(leave_one_out(interactions, seed=seed).test.item_ids, minlength=3) / 2000 for seed in range(3)]
    np.testing.assert_allclose(share, 1 / 3, atol=0.04)  # standard error .0105
    assert len({leave_one_out(interactions, seed=seed).fingerprint for seed in range(3)}) == 3


def test_hashes_are_the_published_function_on_every_platform():
    # First three outputs of splitmix64 from seed 0, as in Vigna's reference implementation.
    golden = 0x9E3779B97F4A7C15
    states = np.array([0, golden, 2 * golden % 2**64], np.uint64)
    assert [f"{value:016x}" for value in mix64(states)] == ["e220a8397b1dcdaf", "6e789e6aa1b965f4", "06c45d188009454f"]


def test_a_text_label_hashes_alike_in_arrays_of_any_width():
    narrow, wide = label_hash(np.array(["ab", "b"])), label_hash(np.array(["ab", "b", "a much longer label"]))
    np.testing.assert_array_equal(narrow, wide[:2])
    assert len(set(wide.tolist())) == 3


def test_users_too_short_to_hold_out_stay_in_train_and_are_counted():
    interactions = from_rows([1, 1, 2, 2, 2], [1, 2, 1, 2, 3], timestamps=[1, 2, 1, 2, 3], name="short")
    split = leave_one_out(interactions)
    assert pairs(split.train) == [(1, 1), (1, 2), (2, 1)]
    assert split.repairs == {"users with fewer than 3 interactions kept in train": 1}


def test_global_temporal_counts_what_train_never_saw():
    interactions = from_rows([1, 1, 2, 2, 3], [1, 2, 1, 3, 4], timestamps=[0, 5, 6, 10, 11], name="calendar")
    split = global_temporal(interactions, validation_from=6, test_from=10)
    assert [pairs(part) for part in (split.train, split.validation, split.test)] == [
        [(1, 1), (1, 2)],
        [(2, 1)],
        [(2, 3), (3, 4)],
    ]
    assert split.repairs == {"users unseen in train": 2, "items unseen in train": 2}


def test_strong_generalization_trains_on_no_row_of_a_held_out_client():
    rng = np.random.default_rng(0)
    interactions = from_rows(rng.integers(1, 60, 3000), rng.integers(1, 90, 3000), name="random")
    split = strong_generalization(interactions, num_validation_users=7, num_test_users=11)
    held_out = (split.validation.counts_per_user > 0) | (split.test.counts_per_user > 0)
    assert [np.count_nonzero(part.counts_per_user) for part in (split.validation, split.test)] == [7, 11]
    assert not split.train.counts_per_user[held_out].any()
    assert split.train.counts_per_user[~held_out].all()
    expected = np.floor(interactions.counts_per_user[held_out] * 0.8 + 1e-9)
    np.testing.assert_array_equal(split.history.counts_per_user[held_out], expected)


def test_ratio_split_counts_by_the_decimal_that_was_meant():
    interactions = from_rows(np.ones(100), np.arange(100), name="hundred")
    split = ratio_split(interactions, test_ratio=0.29, validation_ratio=0.1)
    assert [part.num_interactions for part in (split.train, split.validation, split.test)] == [61, 10, 29]


@given(rows)
@settings(max_examples=20, deadline=None)
def test_what_is_shown_at_test_time_is_all_but_the_test_rows_in_time_order(table):
    for split in every_split(build(table), "file_last", 0):
        shown = shown_at_test(split)
        assert sorted(pairs(shown) + pairs(split.test)) == sorted(all_pairs(split))
        for user in range(split.num_users):
            before, kept = split.train.items_of(user), shown.items_of(user)
            np.testing.assert_array_equal(kept[: len(before)], before)
            if split.rule == "leave_one_out" and len(kept) > len(before):
                assert kept[-1] == split.validation.items_of(user)[0]


def test_candidates_lose_the_positive_and_say_so():
    interactions = from_rows(np.repeat([1, 2], 3), [1, 2, 3, 1, 2, 4], timestamps=[1, 2, 3] * 2, name="pair")
    split = with_candidates(leave_one_out(interactions), np.array([[2, 3, 0], [0, 2, 4]]))  # item 3 has id 2
    np.testing.assert_array_equal(split.candidates, [[3, 0, 4], [0, 2, 4]])
    assert split.repairs == {"users with their positive among their candidates, dropped there": 1}
    assert split.fingerprint != leave_one_out(interactions).fingerprint


def test_given_test_items_are_taken_and_the_latest_of_the_rest_validates():
    interactions = from_rows([1, 1, 1, 2, 2], [1, 2, 3, 1, 2], timestamps=[1, 2, 3, 1, 2], name="given")
    split = leave_given_out(interactions, np.array([1, interactions.num_items]))
    assert [pairs(part) for part in (split.train, split.validation, split.test)] == [
        [(1, 1), (2, 1), (2, 2)],
        [(1, 3)],
        [(1, 2)],
    ]


def test_predefined_parts_meet_on_one_id_space():
    train = from_rows([1, 2, 2], [10, 10, 20], name="train")
    test = from_rows([2, 3, 2], [30, 10, 20], name="test")
    split = predefined_split(train, test)
    assert split.train.user_labels.tolist() == [1, 2, 3]
    assert split.train.item_labels.tolist() == [10, 20, 30]
    assert (pairs(split.train), pairs(split.test)) == ([(1, 10), (2, 10), (2, 20)], [(2, 30), (3, 10)])
    assert split.repairs == {"test rows that also occur in train, dropped": 1}


def test_parts_keep_titles_and_attributes_that_all_of_them_have():
    full = from_rows([1, 2], [10, 20], name="full")
    titled = dataclasses.replace(
        full, item_titles=np.array(["ten", "twenty"]), user_attributes={"age": np.array([3, 4])}
    )
    other = from_rows([2, 5], [20, 7], name="other")
    other = dataclasses.replace(
        other, item_titles=np.array(["seven", "twenty"]), user_attributes={"age": np.array([4, 6])}
    )
    both = predefined_split(titled, other).train
    assert both.item_titles.tolist() == ["seven", "ten", "twenty"]
    assert both.user_attributes["age"].tolist() == [3, 4, 6]
    assert predefined_split(titled, from_rows([1], [1], name="bare")).train.item_titles is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda data: leave_one_out(data, tie_rule="newest"), "Unknown tie rule 'newest'; choose one of hash"),
        (lambda data: ratio_split(data, test_ratio=0.7, validation_ratio=0.3), "leave nothing to train"),
        (lambda data: ratio_split(data, test_ratio=-0.1), r"test_ratio must lie in \[0, 1\), and is -0.1"),
        (lambda data: ratio_split(data, by="mood"), "Unknown order by='mood'"),
        (lambda data: global_temporal(data, validation_from=9, test_from=3), "swap them"),
        (lambda data: global_temporal(data, validation_from=90, test_from=99), "leave train or test empty"),
        (lambda data: strong_generalization(data, num_validation_users=1, num_test_users=1), "Cannot hold out 1"),
        (lambda data: leave_given_out(data, np.array([4, 0])), "is none of that user's 3 items"),
        (lambda data: leave_given_out(data, np.array([0])), r"must have shape \[2\]"),
        (lambda data: with_candidates(leave_one_out(data), np.array([[9], [0]])), r"candidates must lie in 0..5"),
        (
            lambda data: with_candidates(leave_one_out(data), np.zeros((3, 1), int)),
            r"candidates must be integers \[2, C\]",
        ),
    ],
)
def test_impossible_splits_say_what_to_change(call, message):
    data = from_rows([1, 1, 1, 2, 2], [1, 2, 3, 4, 5], timestamps=[1, 2, 3, 4, 5], name="tiny")
    with pytest.raises(ValueError, match=message):
        call(data)


def test_global_temporal_refuses_data_without_times():
    with pytest.raises(ValueError, match="has no timestamps"):
        global_temporal(from_rows([1], [1], name="timeless"), validation_from=1, test_from=2)


def test_parts_with_other_id_spaces_are_refused():
    one, two = from_rows([1], [1], name="one"), from_rows([1, 2], [1, 1], name="two")
    with pytest.raises(ValueError, match="they must share id spaces"):
        Split(train=one, validation=one, test=two, history=one, rule="mine")


def test_movielens_100k_hash_split_is_the_same_from_two_file_orders(data_dir):
    ours = load("movielens/100k", data_dir=data_dir, cache=False)
    theirs = load_file(data_dir / "ml-100k" / "pfedrec_order.csv", format="triplets", separator=",")
    assert ours.fingerprint == theirs.fingerprint
    assert leave_one_out(ours).fingerprint == leave_one_out(theirs).fingerprint
    file_last = [leave_one_out(data, tie_rule="file_last").fingerprint for data in (ours, theirs)]
    assert file_last[0] != file_last[1]


def test_movielens_1m_published_latest_items_are_those_of_file_first(data_dir):
    interactions = load("movielens/1m", data_dir=data_dir, cache=False)
    split = leave_one_out(interactions, tie_rule="file_first")
    published = np.loadtxt(data_dir / "ml-1m" / "loo_pfedrec_rule.tsv", dtype=np.int64, skiprows=1)
    for part, column in ((split.test, 1), (split.validation, 3)):
        np.testing.assert_array_equal(part.user_labels[part.user_ids], published[:, 0])
        np.testing.assert_array_equal(part.item_labels[part.item_ids], published[:, column])
        np.testing.assert_array_equal(part.timestamps, published[:, column + 1])


def test_movielens_1m_candidate_file_drops_156_positives(data_dir):
    split = load_split("movielens/1m/ncf", data_dir=data_dir, cache=False)
    assert split.repairs == {"users with their positive among their candidates, dropped there": 156}
    assert split.candidates.shape == (6040, 99)
    real = split.candidates < split.num_items
    np.testing.assert_array_equal(np.bincount(real.sum(axis=1)), [0] * 98 + [156, 5884])
    # The ratings file beside it names the same test items, with the time each one was rated at.
    published = np.loadtxt(data_dir / "ml-1m" / "ml-1m.test.rating", dtype=np.int64)
    np.testing.assert_array_equal(split.test.timestamps, published[:, 3])


def test_movielens_100k_folds_and_gowalla_lists_keep_their_sizes(data_dir):
    fold = load_split("movielens/100k/u1", data_dir=data_dir, cache=False)
    assert (fold.train.num_interactions, fold.test.num_interactions) == (80_000, 20_000)
    gowalla = load_split("gowalla", data_dir=data_dir, cache=False)
    assert (gowalla.num_users, gowalla.num_items) == (29_858, 40_981)
    assert (gowalla.train.num_interactions, gowalla.test.num_interactions) == (810_128, 217_242)

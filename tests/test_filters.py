"""Filters keep what they promise, and say whether other users decide about mine."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_rec.data import Interactions, binarize, from_rows, k_core, min_interactions_per_user

tables = st.lists(
    st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 5)),
    min_size=1,
    max_size=50,
    unique_by=lambda row: row[:2],
)


def build(table) -> Interactions:
    users, items, ratings = np.array(table).T
    return from_rows(users, items, ratings=ratings, name="drawn")


def pairs(data: Interactions) -> set[tuple[int, int]]:
    return set(zip(data.user_labels[data.user_ids].tolist(), data.item_labels[data.item_ids].tolist(), strict=True))


def peeled(rows: set[tuple[int, int]], k: int) -> set[tuple[int, int]]:
    """The k-core by removing one poor row at a time."""
    rows = set(rows)
    while True:
        poor = [
            (user, item)
            for user, item in rows
            if sum(who == user for who, _ in rows) < k or sum(what == item for _, what in rows) < k
        ]
        if not poor:
            return rows
        rows.remove(poor[0])


@settings(max_examples=80, deadline=None)
@given(table=tables, k=st.integers(1, 4))
def test_k_core_is_the_largest_one(table, k):
    interactions = build(table)
    expected = peeled(pairs(interactions), k)
    if not expected:
        with pytest.raises(ValueError, match=rf"k_core\(k={k}\) leaves nothing"):
            k_core(interactions, k)
        return
    filtered, note = k_core(interactions, k)
    assert pairs(filtered) == expected
    assert filtered.counts_per_user.min() >= k
    assert filtered.item_counts.min() >= k
    assert note.dropped_rows == len(table) - len(expected)
    assert note.dropped_users == interactions.num_users - filtered.num_users
    assert note.dropped_items == interactions.num_items - filtered.num_items
    assert note.data_dependent


@settings(max_examples=60, deadline=None)
@given(table=tables, minimum=st.integers(1, 4), user=st.integers(1, 8))
def test_filters_said_to_be_independent_treat_a_user_alike_whoever_else_is_there(table, minimum, user):
    mine = [row for row in table if row[0] == user]

    def kept_of_mine(rows, call):
        try:
            filtered, note = call(build(rows))
        except ValueError:
            return set()
        assert not note.data_dependent
        return {pair for pair in pairs(filtered) if pair[0] == user}

    if mine:
        for call in (lambda data: min_interactions_per_user(data, minimum), lambda data: binarize(data, minimum)):
            assert kept_of_mine(mine, call) == kept_of_mine(table, call)


def test_k_core_is_said_to_be_dependent_because_one_user_decides_about_another():
    with_three = build([(1, 1, 5), (1, 2, 5), (2, 1, 5), (2, 2, 5)])
    without_two = build([(1, 1, 5), (1, 2, 5)])
    filtered, note = k_core(with_three, 2)
    assert note.data_dependent
    assert 1 in filtered.user_labels
    with pytest.raises(ValueError, match="ask for less"):
        k_core(without_two, 2)


def test_binarize_drops_low_and_unknown_ratings_and_the_ratings_themselves():
    data = from_rows([1, 1, 2, 3], [1, 2, 1, 3], ratings=[4, 3.5, 0, 5], unknown_rating=0, name="stars")
    filtered, note = binarize(data, 4)
    assert pairs(filtered) == {(1, 1), (3, 3)}
    assert filtered.ratings is None
    assert filtered.num_items == 3
    assert (note.name, note.dropped_rows, note.dropped_users) == ("binarize(threshold=4)", 2, 1)


def test_filtering_keeps_labels_beside_their_rows():
    data = from_rows(["c", "a", "b", "a"], ["x", "x", "y", "z"], name="letters")
    filtered = min_interactions_per_user(data, 2).interactions
    assert (filtered.user_labels.tolist(), filtered.item_labels.tolist()) == (["a"], ["x", "y", "z"])
    assert filtered.items_of(0).tolist() == [0, 2]


@pytest.mark.parametrize("call", [k_core, min_interactions_per_user])
def test_a_threshold_below_one_is_refused(call):
    with pytest.raises(ValueError, match="at least 1, and got 0"):
        call(build([(1, 1, 1)]), 0)


def test_binarize_without_ratings_is_refused():
    with pytest.raises(ValueError, match="implicit has no ratings to compare with the threshold 4"):
        binarize(from_rows([1], [1], name="implicit"), 4)

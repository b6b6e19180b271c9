"""Small data sets for the tests of anonymisation."""

import dataclasses

import numpy as np
from hypothesis import strategies as st

from fedjax_rec.data.interactions import Interactions, from_rows


def make_interactions(histories, *, num_items=None, ratings=None, timestamps=None, attributes=None) -> Interactions:
    """Users 10, 20, .. with these items; item labels are the item numbers, users without items stay."""
    num_items = num_items or 1 + max((item for history in histories for item in history), default=0)
    # Someone with every item, dropped below, makes catalogue and item numbers one.
    everything = list(range(num_items))
    users = [10 * (user + 1) for user, history in enumerate(histories) for _ in history]
    items = [item for history in histories for item in history]

    def with_everything(values):
        return None if values is None else [*values, *[1] * num_items]

    made = from_rows(
        [*users, *[10**6] * num_items],
        [*items, *everything],
        name="world",
        ratings=None,
        timestamps=with_everything(timestamps),
    )
    counts = [len(history) for history in histories]
    kept = made.take(made.user_ids < made.num_users - 1)
    if ratings is not None:
        ratings = np.asarray(ratings, np.float32)[kept.file_rows]
    return dataclasses.replace(
        kept,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        ratings=ratings,
        user_labels=10 * (1 + np.arange(len(histories))),
        user_attributes=attributes or {},
        repairs={"rows mended": 3},
    )


def random_world(num_users=40, num_items=25, seed=0, *, explicit=True) -> Interactions:
    """Records of 1 to 12 items that lean to the first ones, with ratings, times and attributes if explicit."""
    rng = np.random.default_rng(seed)
    odds = 1 / (1 + np.arange(num_items))
    histories = [
        rng.choice(num_items, rng.integers(1, 13), replace=False, p=odds / odds.sum()).tolist()
        for _ in range(num_users)
    ]
    rows = sum(map(len, histories))
    if not explicit:
        return make_interactions(histories, num_items=num_items)
    return make_interactions(
        histories,
        num_items=num_items,
        ratings=np.where(rng.random(rows) < 0.2, np.nan, rng.integers(1, 6, rows)),
        timestamps=np.where(rng.random(rows) < 0.2, 0, rng.integers(10**9, 10**9 + 10**7, rows)),
        attributes={"age": rng.integers(18, 60, num_users), "gender": rng.choice(["F", "M"], num_users)},
    )


def sets_of(interactions: Interactions) -> list[set[int]]:
    return [set(interactions.items_of(user).tolist()) for user in range(interactions.num_users)]


def record(interactions: Interactions, user: int) -> list[tuple]:
    """All that a user's rows say, in their order; NaN as None."""
    rows = range(interactions.offsets[user], interactions.offsets[user + 1])

    def value(column, row):
        return None if column is None or np.isnan(column[row]) else float(column[row])

    return [
        (int(interactions.item_ids[row]), value(interactions.ratings, row), value(interactions.timestamps, row))
        for row in rows
    ]


def assert_nothing_old(release: Interactions, source: Interactions) -> None:
    """No order, row number or count of the source is left, and the catalogue is."""
    assert np.array_equal(release.file_rows, np.arange(release.num_interactions))
    assert not release.repairs
    assert release.num_items == source.num_items
    assert np.array_equal(release.item_labels, source.item_labels)
    times = np.zeros(release.num_interactions) if release.timestamps is None else release.timestamps
    order = np.lexsort((release.item_ids, times, release.user_ids))
    assert np.array_equal(order, np.arange(release.num_interactions)), "rows of equal time must stand by item"


@st.composite
def worlds(draw, *, most_users=9, num_items=6):
    """Histories of a few users, some of them empty."""
    history = st.lists(st.integers(0, num_items - 1), max_size=num_items, unique=True)
    histories = draw(st.lists(history, min_size=2, max_size=most_users).filter(lambda drawn: any(drawn)))
    return make_interactions(histories, num_items=num_items)

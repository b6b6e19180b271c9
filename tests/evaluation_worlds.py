"""Tiny data sets for the tests of evaluation and reference models, written as lists of items a user."""

import numpy as np

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.data.split import Split
from fedjax_rec.evaluation import Cases, cases


def interactions(lists, *, num_items: int) -> Interactions:
    """User u touched `lists[u]`, in that order."""
    item_ids = np.array([item for items in lists for item in items], np.int32)
    return Interactions(
        name="tiny",
        offsets=np.cumsum([0, *(len(items) for items in lists)]).astype(np.int64),
        item_ids=item_ids,
        file_rows=np.arange(len(item_ids)),
        num_items=num_items,
        timestamps=None,
        ratings=None,
        user_labels=np.arange(len(lists)),
        item_labels=np.arange(num_items),
    )


def make_split(train, test, *, num_items: int, validation=None, history=None, candidates=None) -> Split:
    nobody = [[] for _ in train]
    parts = [interactions(lists or nobody, num_items=num_items) for lists in (train, validation, test, history)]
    return Split(*parts, rule="by hand", candidates=candidates)


def make_cases(train, test, *, num_items: int, **parts) -> Cases:
    return cases(make_split(train, test, num_items=num_items, **parts))

"""Users with one of a few tastes: what goes together has little to do with what is popular."""

import dataclasses

import numpy as np
from evaluation_worlds import interactions

from fedjax_rec.data.interactions import Interactions


def taste_world(num_users: int, *, num_items: int = 60, num_tastes: int = 6, seed: int = 0) -> Interactions:
    """Each user likes one sixth of the catalogue: 5 to 9 items of it, and 2 to 4 others by popularity; with times."""
    rng = np.random.default_rng(seed)
    popular = np.arange(num_items, 0, -1) / np.arange(num_items, 0, -1).sum()
    lists = []
    for _ in range(num_users):
        own = rng.permutation(np.arange(rng.integers(num_tastes), num_items, num_tastes))[: rng.integers(5, 10)]
        others = rng.choice(num_items, rng.integers(2, 5), replace=False, p=popular)
        lists.append(rng.permutation(np.union1d(own, others)).tolist())
    rows = interactions(lists, num_items=num_items)
    places = np.concatenate([np.arange(1, len(items) + 1) for items in lists])
    return dataclasses.replace(rows, timestamps=places)

"""Floors of click prediction that train nothing: a user's own click rate, and item rates released once."""

import numpy as np

from fedjax_rec.data.interactions import Interactions

OWN_RATE_WEIGHT = 5.0  # examples that a user's click rate is drawn towards one half by
DOUBT, NOISE_DOUBT = 0.4, 3.0  # by how much an item's excess clicks are shrunk, as they are and in noise; both public


def own_rates(train: Interactions) -> np.ndarray:
    """Every user's own click rate, which it knows without anybody, float64 ``[users]``."""
    clicks = np.bincount(train.user_ids, train.ratings, minlength=train.num_users)
    return (clicks + OWN_RATE_WEIGHT / 2) / (train.counts_per_user + OWN_RATE_WEIGHT)


def item_sums(train: Interactions, own: np.ndarray) -> np.ndarray:
    """Sums over users of (y - own rate, shown / 2) for each item, float64 ``[2, items]``; a user's part has norm 1."""
    excess = train.ratings - own[train.user_ids]
    norm = np.sqrt(np.bincount(train.user_ids, excess**2 + 0.25, minlength=train.num_users))
    scale = 1 / np.maximum(norm[train.user_ids], 1e-9)
    return np.stack([np.bincount(train.item_ids, x, minlength=train.num_items) for x in (excess * scale, 0.5 * scale)])


def lifts(sums: np.ndarray, noise: float) -> np.ndarray:
    """By how much an item is clicked more than its users click, shrunk; reads the released sums alone."""
    return 0.5 * sums[0] / (np.maximum(sums[1], 0) + DOUBT + NOISE_DOUBT * noise)

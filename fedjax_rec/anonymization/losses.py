"""What an anonymisation costs: generality of a table's values, rows that are gone, and how far item sets moved."""

import numpy as np

from fedjax_rec.data.interactions import Interactions


def generalisation_loss(exact: np.ndarray, general: np.ndarray) -> np.ndarray:
    """The normalised certainty penalty of each value, float64 ``[rows]``: 0 = exact, 1 = could be any.

    ``(v - 1) / (V - 1)`` for a value that stands for v of the V distinct exact values of the column (after Xu, Wang,
    Pei, Wang, Shi and Fu, 2006, "Utility-Based Anonymization Using Local Recoding").

    Args:
      exact: codes or values ``[rows]``.
      general: of the same rows, equal wherever ``exact`` is equal.
    """
    distinct, first = np.unique(exact, return_index=True)
    if len(distinct) < 2:
        return np.zeros(len(exact))
    _, groups, sizes = np.unique(general[first], return_inverse=True, return_counts=True)
    of_value = (sizes[groups] - 1) / (len(distinct) - 1)
    return of_value[np.searchsorted(distinct, exact)]


def jaccard_distances(before: Interactions, after: Interactions) -> np.ndarray:
    """One minus the Jaccard index of each user's item sets, float64 ``[users]``; 0 for two empty sets.

    Args:
      before: the source.
      after: a release with the same users, in the same order: measure it before labels are replaced.

    Raises:
      ValueError: when users or catalogue differ.
    """
    if not np.array_equal(before.user_labels, after.user_labels) or before.num_items != after.num_items:
        raise ValueError(
            f"{before.name} and {after.name} do not hold the same users and items in the same order, so their item "
            "sets cannot be compared user by user; compare before pseudonyms and before users are dropped."
        )
    codes = [part.user_ids * np.int64(part.num_items) + part.item_ids for part in (before, after)]
    users = np.intersect1d(*codes, assume_unique=True) // max(before.num_items, 1)
    shared = np.bincount(users, minlength=before.num_users)
    either = before.counts_per_user + after.counts_per_user - shared
    return 1 - np.where(either > 0, shared / np.maximum(either, 1), 1.0)


def mean_jaccard_distance(before: Interactions, after: Interactions) -> float:
    """The mean of `jaccard_distances` over users that had rows; 0 if nobody had."""
    had = before.counts_per_user > 0
    return float(jaccard_distances(before, after)[had].mean()) if had.any() else 0.0


def suppressed_share(before: Interactions, after: Interactions) -> float:
    """Share of rows that are gone, between 0 and 1; 0 where rows were added on balance."""
    return max(0.0, 1 - after.num_interactions / before.num_interactions) if before.num_interactions else 0.0

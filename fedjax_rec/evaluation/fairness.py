"""Who pays for a change: quality by group before and after it, and the largest difference between groups.

With the mean m_g of a metric in group g after a change and m0_g before it, the relative change of g is

    c_g = (m_g - m0_g) / m0_g,   MDAC = max_{g, h} |c_g - c_h|,

the maximum difference in accuracy change: 0 if all groups lose or gain the same share of what they had. Maeng et al.,
2022, "Towards Fair Federated Recommendation Learning: Characterizing the Inter-Dependence of System and Data
Heterogeneity" (RecSys).
"""

from dataclasses import dataclass

import numpy as np

from fedjax_rec.evaluation.statistics import GroupMeans, Interval, group_means


@dataclass(frozen=True)
class GroupChanges:
    """What a change did to each group.

    Attributes:
      before: means by group.
      after: means by group.
      relative: c_g by group; -0.1 is a tenth lost.
      mdac: largest difference of two of them.
    """

    before: GroupMeans
    after: GroupMeans
    relative: dict[str, float]
    mdac: float


def group_changes(before: np.ndarray, after: np.ndarray, groups: np.ndarray) -> GroupChanges:
    """Relative change of a metric in each group of the same users, and MDAC.

    Args:
      before: float ``[users]``, e.g. ``evaluation.per_user["ndcg@10"]`` of the homogeneous run.
      after: float ``[users]``, of the same users in the same order.
      groups: ``[users]``, a label each, such as the name of its device tier.

    Raises:
      ValueError: when lengths differ, there is no user, or a group's mean was 0 before, so that it has no relative
        change.
    """
    first, second = group_means(before, groups), group_means(after, groups)
    without = [name for name, mean in first.means.items() if mean == 0]
    if without:
        raise ValueError(
            f"The mean of group {without[0]!r} was 0 before the change, so its relative change is undefined; use "
            "larger groups or a larger cut-off."
        )
    relative = {name: (second.means[name] - mean) / mean for name, mean in first.means.items()}
    return GroupChanges(first, second, relative, max(relative.values()) - min(relative.values()))


def mdac(before: np.ndarray, after: np.ndarray, groups: np.ndarray) -> float:
    """`group_changes`' MDAC alone."""
    return group_changes(before, after, groups).mdac


def mdac_interval(
    before: np.ndarray,
    after: np.ndarray,
    groups: np.ndarray,
    *,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """MDAC with a percentile bootstrap interval: users are resampled within their groups, both metrics together.

    A largest difference of noisy means is biased upwards, so a change that does nothing to anybody on average has a
    positive interval too: compare with the interval of two runs that differ in their seeds alone.

    Args:
      before, after, groups: as in `group_changes`.
      confidence: between 0 and 1.
      num_resamples: draws.
      seed: of the draws.

    Raises:
      ValueError: as in `group_changes`, or if a group's metric is 0 for so many users that a draw has none above it.
    """
    found = mdac(before, after, groups)
    rng = np.random.default_rng(seed)
    pair = np.stack([np.asarray(before, np.float64), np.asarray(after, np.float64)])
    changes = []
    for group in np.unique(groups):
        mine = pair[:, np.asarray(groups) == group]
        means = mine[:, rng.integers(0, mine.shape[1], (num_resamples, mine.shape[1]))].mean(axis=2)
        if not np.all(means[0] > 0):
            raise ValueError(f"Group {str(group)!r} has too few users above 0 for an interval; use a larger cut-off.")
        changes.append(means[1] / means[0] - 1)
    draws = np.ptp(np.stack(changes), axis=0)
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(found, float(low), float(high), confidence)

"""How sure is a difference, and who bears it: intervals, paired tests, spread over users and gaps between groups."""

from dataclasses import dataclass

import numpy as np
import scipy.stats

from fedjax_rec.evaluation.exact import Evaluation

_RESAMPLES_AT_A_TIME = 64  # bounds memory to 64 float64 rows of users


@dataclass(frozen=True)
class Interval:
    """A mean with a confidence interval."""

    mean: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class PairedTest:
    """Comparison of two models over the same users.

    Attributes:
      difference: mean of `first - second` with its bootstrap interval.
      permutation_p: two-sided p-value of the sign-flip permutation test of the mean difference.
      wilcoxon_p: two-sided p-value of Wilcoxon's signed-rank test, ties split (Pratt); 1.0 when no user differs.
      num_users: users compared.
      num_differ: users on whom the models differ.
    """

    difference: Interval
    permutation_p: float
    wilcoxon_p: float
    num_users: int
    num_differ: int


@dataclass(frozen=True)
class Spread:
    """How a metric is distributed over users."""

    p10: float
    p50: float
    p90: float
    worst_decile_mean: float


@dataclass(frozen=True)
class GroupMeans:
    """Means of a metric by group; `gap` is the largest mean less the smallest."""

    means: dict[str, float]
    num_users: dict[str, int]
    gap: float


def bootstrap_interval(
    values: np.ndarray, *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of a mean over users.

    Efron (1979), "Bootstrap Methods: Another Look at the Jackknife". Users are resampled, not interactions: they are
    what is independent. The interval says nothing about seeds of training.

    Args:
      values: float `[users]`.
      confidence: between 0 and 1.
      num_resamples: draws of as many users with replacement.
      seed: of the draws.

    Raises:
      ValueError: without users, or for a confidence outside (0, 1).
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values) or not 0 < confidence < 1:
        raise ValueError(
            f"bootstrap_interval needs at least one user and a confidence between 0 and 1, and got values "
            f"{list(values.shape)} and confidence={confidence}."
        )
    rng = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    for start in range(0, num_resamples, _RESAMPLES_AT_A_TIME):
        size = min(_RESAMPLES_AT_A_TIME, num_resamples - start)
        means[start : start + size] = values[rng.integers(0, len(values), (size, len(values)))].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high), confidence)


def paired_test(
    first: Evaluation,
    second: Evaluation,
    *,
    metric: str = "ndcg@10",
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> PairedTest:
    """Is `first` better than `second` on the same users, beyond the luck of which users there are?

    Args:
      first, second: evaluations of the same cases.
      metric: a name in `per_user` of both.
      confidence: of the interval.
      num_resamples: bootstrap draws, and sign flips of the permutation test.
      seed: of both.

    Raises:
      ValueError: when the evaluations are of different splits or users, or lack the metric.
    """
    if first.fingerprint != second.fingerprint or not np.array_equal(first.user_ids, second.user_ids):
        raise ValueError(
            f"A paired test needs two evaluations of the same users of the same split, and got {first.num_users} users "
            f"of {first.fingerprint[:12]} and {second.num_users} of {second.fingerprint[:12]}."
        )
    for evaluation in (first, second):
        if metric not in evaluation.per_user:
            raise ValueError(f"No per-user values of {metric!r}; choose one of {', '.join(evaluation.per_user)}.")
    difference = first.per_user[metric].astype(np.float64) - second.per_user[metric]
    return difference_test(difference, confidence=confidence, num_resamples=num_resamples, seed=seed)


def difference_test(
    difference: np.ndarray, *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> PairedTest:
    """Is the mean of a difference between two things, measured on the same users, other than zero?

    Args:
      difference: float `[users]`.
      confidence: of the interval.
      num_resamples: bootstrap draws, and sign flips of the permutation test.
      seed: of both.
    """
    difference = np.asarray(difference, np.float64)
    differ = difference != 0
    interval = bootstrap_interval(difference, confidence=confidence, num_resamples=num_resamples, seed=seed)
    wilcoxon_p = scipy.stats.wilcoxon(difference, zero_method="pratt").pvalue if differ.any() else 1.0
    return PairedTest(
        difference=interval,
        permutation_p=_sign_flip_p(difference[differ], num_resamples=num_resamples, seed=seed),
        wilcoxon_p=float(wilcoxon_p),
        num_users=len(difference),
        num_differ=int(differ.sum()),
    )


def spread(values: np.ndarray) -> Spread:
    """Percentiles over users, and the mean of the worst tenth (at least one user).

    Raises:
      ValueError: without users.
    """
    values = np.sort(np.asarray(values, np.float64))
    if not len(values):
        raise ValueError("The spread over 0 users is undefined.")
    p10, p50, p90 = np.percentile(values, [10, 50, 90])
    return Spread(float(p10), float(p50), float(p90), float(values[: -(-len(values) // 10)].mean()))


def group_means(values: np.ndarray, groups: np.ndarray) -> GroupMeans:
    """Mean of a metric in each group of users, and the gap between the best and the worst served group.

    Args:
      values: float `[users]`, e.g. `evaluation.per_user["ndcg@10"]`.
      groups: `[users]`, a label each, e.g. `train.user_attributes["gender"][evaluation.user_ids]`.

    Raises:
      ValueError: when lengths differ or there is no user.
    """
    values, groups = np.asarray(values, np.float64), np.asarray(groups)
    if values.shape != groups.shape or not len(values):
        raise ValueError(f"group_means needs one group a user, and got {list(values.shape)} and {list(groups.shape)}.")
    labels, place, counts = np.unique(groups, return_inverse=True, return_counts=True)
    means = np.bincount(place, values) / counts
    names = [str(label) for label in labels]
    return GroupMeans(
        means=dict(zip(names, means.tolist(), strict=True)),
        num_users=dict(zip(names, counts.tolist(), strict=True)),
        gap=float(means.max() - means.min()),
    )


def activity_quartiles(counts: np.ndarray) -> np.ndarray:
    """The quartile of each user by number of train rows, "q1" (least active) to "q4"; str `[users]`.

    Args:
      counts: int `[users]`, e.g. `train.counts_per_user[evaluation.user_ids]`. Equal counts fall in one quartile.
    """
    edges = np.quantile(counts, [0.25, 0.5, 0.75])
    return np.array(["q1", "q2", "q3", "q4"])[np.searchsorted(edges, counts, side="left")]


def _sign_flip_p(difference: np.ndarray, *, num_resamples: int, seed: int) -> float:
    """Share of random sign flips whose mean is at least as far from 0, the observed one included."""
    if not len(difference):
        return 1.0
    rng = np.random.default_rng([seed, 1])
    observed = abs(difference.sum())
    extreme = 1
    for start in range(0, num_resamples, _RESAMPLES_AT_A_TIME):
        size = min(_RESAMPLES_AT_A_TIME, num_resamples - start)
        signs = rng.integers(0, 2, (size, len(difference))) * 2 - 1
        extreme += int(np.count_nonzero(np.abs(signs @ difference) >= observed * (1 - 1e-12)))
    return extreme / (num_resamples + 1)

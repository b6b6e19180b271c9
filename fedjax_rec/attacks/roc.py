"""ROC curves of attacks, with their errors, and the ceilings that differential privacy puts on them."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from dp_accounting import get_sigma_gaussian
from scipy.stats import norm, rankdata

STANDARD_ERRORS = 2.0
LOW_RATES = (0.001, 0.01)


@dataclasses.dataclass(frozen=True, eq=False)
class Roc:
    """A receiver operating characteristic: what share of members is found at what share of false alarms.

    Attributes:
      fpr, tpr: float64 ``[points]`` from (0, 0) to (1, 1).
      auc: area, ties counted half; the mean over target models.
      auc_error: its standard error.
      num_members, num_others: scored, over all target models.
    """

    fpr: np.ndarray
    tpr: np.ndarray
    auc: float
    auc_error: float
    num_members: int
    num_others: int

    def tpr_at(self, fpr: float) -> float:
        """The true positive rate of the curve, linear between thresholds (a coin decides there)."""
        return float(np.interp(fpr, self.fpr, self.tpr))

    def tpr_error(self, fpr: float, tpr: float, *, slope: float) -> float:
        """Standard error of `tpr_at` where the true curve has this height and slope: both rates are counted."""
        return math.sqrt(tpr * (1 - tpr) / self.num_members + slope**2 * fpr * (1 - fpr) / self.num_others)


def roc(scores: Sequence[np.ndarray], members: Sequence[np.ndarray]) -> Roc:
    """The curve of an attack on one or several target models.

    Scores of all targets share a threshold. The area is the mean of the targets' own; its standard error is that of
    DeLong, DeLong and Clarke-Pearson (1988), "Comparing the Areas under Two or More Correlated Receiver Operating
    Characteristic Curves: A Nonparametric Approach", for one target, and for several the larger of that and the spread
    between them.

    Args:
      scores: for each target, float ``[candidates]``, higher = rather a member.
      members: for each target, bool ``[candidates]``.

    Raises:
      ValueError: for scores that are NaN, or a target without members or without others.
    """
    scores = [np.asarray(s, np.float64) for s in scores]
    members = [np.asarray(m, bool) for m in members]
    if any(np.isnan(s).any() for s in scores):
        raise ValueError("An attack scored a candidate with NaN: the model, or a shadow of it, diverged.")
    areas, variances = zip(*(_delong(s, m) for s, m in zip(scores, members, strict=True)), strict=True)
    error = math.sqrt(sum(variances)) / len(areas)
    if len(areas) > 1:
        error = max(error, float(np.std(areas, ddof=1)) / math.sqrt(len(areas)))
    pooled, truth = np.concatenate(scores), np.concatenate(members)
    order = np.argsort(-pooled, kind="stable")
    pooled, truth = pooled[order], truth[order]
    last = np.append(pooled[1:] != pooled[:-1], True)  # of equal scores
    found, wrong = np.cumsum(truth)[last], np.cumsum(~truth)[last]
    return Roc(
        fpr=np.append(0.0, wrong / wrong[-1]),
        tpr=np.append(0.0, found / found[-1]),
        auc=float(np.mean(areas)),
        auc_error=error,
        num_members=int(truth.sum()),
        num_others=int((~truth).sum()),
    )


def placements(scores: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of others below each member, and of members above each other, ties half: float64 each, from midranks.

    The mean of either is the area under the curve; their spread is its variance.

    Raises:
      ValueError: for fewer than two members or others.
    """
    inside, outside = scores[members], scores[~members]
    m, n = len(inside), len(outside)
    if m < 2 or n < 2:
        raise ValueError(f"A target needs two members and two others at least; got {m} and {n}.")
    ranks = rankdata(np.concatenate([inside, outside]))
    above = (ranks[:m] - rankdata(inside)) / n
    below = 1 - (ranks[m:] - rankdata(outside)) / m
    return above, below


def _delong(scores: np.ndarray, members: np.ndarray) -> tuple[float, float]:
    """Area and its variance."""
    above, below = placements(scores, members)
    return float(above.mean()), float(above.var(ddof=1) / len(above) + below.var(ddof=1) / len(below))


def gaussian_dp_mu(epsilon: float, *, delta: float) -> float:
    """The mu of the Gaussian mechanism that just satisfies (epsilon, delta): one over its noise multiplier."""
    return 1 / get_sigma_gaussian(epsilon, delta)


def gaussian_dp_ceiling(fpr: np.ndarray | float, mu: float) -> np.ndarray:
    """The most any test between two mu-Gaussian-DP neighbours reaches: TPR <= Phi(Phi^-1(FPR) + mu).

    Dong, Roth and Su (2022), "Gaussian Differential Privacy". Exact for Gaussian releases to which every client
    contributes, however many; after sampling, a mechanism that satisfies (epsilon, delta) need not be mu-GDP with the
    mu of that pair, and this curve is the usual reading of it and not a theorem: see `epsilon_delta_ceiling`.

    Args:
      fpr: false positive rates, in [0, 1].
      mu: of `gaussian_dp_mu`.
    """
    return norm.cdf(norm.ppf(fpr) + mu)


def epsilon_delta_ceiling(fpr: np.ndarray | float, epsilon: float, *, delta: float) -> np.ndarray:
    """The same for whatever satisfies (epsilon, delta): TPR <= min(e^eps FPR + delta, 1 - e^-eps (1 - delta - FPR)).

    Kairouz, Oh and Viswanath (2015), "The Composition Theorem for Differential Privacy".
    """
    fpr = np.asarray(fpr, np.float64)
    with np.errstate(over="ignore"):
        rising = np.exp(epsilon) * fpr + delta
    return np.clip(np.minimum(rising, 1 - np.exp(-epsilon) * (1 - delta - fpr)), 0.0, 1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Ceiling:
    """What a privacy guarantee leaves to any attack.

    Attributes:
      tpr: from false positive rates to the highest true positive rates.
      auc: area under that.
      label: names it in tables and figures.
    """

    tpr: Callable[[np.ndarray | float], np.ndarray]
    auc: float
    label: str


def gaussian_ceiling(mu: float) -> Ceiling:
    """`gaussian_dp_ceiling` with its area, Phi(mu / sqrt 2)."""
    return Ceiling(partial(gaussian_dp_ceiling, mu=mu), float(norm.cdf(mu / math.sqrt(2))), f"{mu:.2f}-Gaussian DP")


def guarantee_ceiling(epsilon: float, *, delta: float) -> Ceiling:
    """`epsilon_delta_ceiling` with its area."""
    tpr = partial(epsilon_delta_ceiling, epsilon=epsilon, delta=delta)
    grid = np.concatenate([[0.0], np.geomspace(1e-9, 1.0, 20_001)])
    return Ceiling(tpr, float(np.trapezoid(tpr(grid), grid)), f"({epsilon:.3g}, {delta:.1g})-DP")


def excess(curve: Roc, ceiling: Ceiling) -> list[str]:
    """What of a curve lies above a ceiling by more than two standard errors, a phrase for each.

    Looks at the area and at the true positive rates at 0.1 % and 1 % false positives.
    """
    checks = [("AUC", curve.auc, ceiling.auc, curve.auc_error)]
    for fpr in LOW_RATES:
        low, height, high = (float(x) for x in ceiling.tpr(fpr * np.array([0.9, 1.0, 1.1])))
        error = curve.tpr_error(fpr, height, slope=(high - low) / (0.2 * fpr))
        checks.append((f"TPR at {fpr:.1%} FPR", curve.tpr_at(fpr), height, error))
    return [
        f"{name} {value:.3f} against a ceiling of {height:.3f} (standard error {error:.3f})"
        for name, value, height, error in checks
        if value > height + STANDARD_ERRORS * error
    ]

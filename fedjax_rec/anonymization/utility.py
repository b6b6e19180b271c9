"""What a release is still good for: a recommender trained on it, tested on real users that it never saw."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_rec.anonymization.released import keep_users
from fedjax_rec.data.interactions import Interactions
from fedjax_rec.data.split import Split, strong_generalization
from fedjax_rec.evaluation.heldout import cases
from fedjax_rec.synthesis.downstream import METRIC, choose, ease, tested

L2S = (100.0, 300.0, 1000.0, 3000.0)
_RESAMPLES = 1000


class Quality(NamedTuple):
    """How well a recommender does.

    Attributes:
      per_user: the metric of each test user, float64 ``[test users]``.
      l2: the penalty that was best on the validation users.
    """

    per_user: np.ndarray
    l2: float


def held_out(original: Interactions, *, seed: int = 0) -> Split:
    """A fifth of the users for the test, a tenth for the choice of l2; they show 80 % of their items, at random."""
    n = original.num_users
    return strong_generalization(original, num_validation_users=n // 10, num_test_users=max(n // 5, 1), seed=seed)


def training_users(split: Split) -> Interactions:
    """The users that are not held out, as a data set of their own on the same catalogue."""
    return keep_users(split.train, split.train.counts_per_user > 0, suffix="training users")


def ease_quality(released: Interactions, split: Split, *, l2s: Sequence[float] = L2S) -> Quality:
    """EASE trained on a release, asked for the held-out items of real users that it never saw.

    Args:
      released: histories on the catalogue of the split; whose they are does not matter.
      split: from `held_out`.
      l2s: fixed grid of EASE's penalty, the best on the validation users is taken.
    """
    chosen = choose(ease(l2=l2s), released, split.history, cases(split, "validation"), seed=0)
    values = tested(chosen, split.history, cases(split)).per_user[METRIC]
    return Quality(values.astype(np.float64), chosen.setting["l2"])


def downstream_cost(after: Quality, before: Quality, *, seed: int = 0) -> dict[str, Any]:
    """ndcg@20 after and before, and their ratio with a 95 % interval (paired bootstrap over test users), for JSON.

    Train `before` on `training_users` and `after` on what the policy makes of these, anonymised as a data set of their
    own: a held-out user must not shape what is trained on, as she would in a group of users who share their items.
    """
    low, high = _ratio_interval(after.per_user, before.per_user, seed)
    return {
        "metric": METRIC,
        "model": "EASE",
        "before": float(before.per_user.mean()),
        "after": float(after.per_user.mean()),
        "ratio": float(after.per_user.mean() / before.per_user.mean()),
        "ratio_low": low,
        "ratio_high": high,
        "l2_before": before.l2,
        "l2_after": after.l2,
        "num_test_users": len(before.per_user),
    }


def _ratio_interval(after: np.ndarray, before: np.ndarray, seed: int) -> tuple[float, float]:
    rng = np.random.default_rng([seed, 20])
    drawn = rng.integers(0, len(after), (_RESAMPLES, len(after)))
    low, high = np.quantile(after[drawn].mean(1) / before[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)

"""How well log-odds of clicks order and fit what was clicked: AUC, AUC within users, and logloss. On the host."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata


@dataclass(frozen=True)
class UserAuc:
    """AUC within users.

    Attributes:
      value: the mean of users' own AUC, each weighing its examples.
      num_users: those that it is over: users with clicks and with other examples.
      left_out: users with examples of one kind only, whose AUC does not exist.
    """

    value: float
    num_users: int
    left_out: int


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """The chance that a random click has a higher score than a random other example; a tie counts one half.

    AUC = (R - p (p + 1) / 2) / (p n), R being the sum of the clicks' mean ranks (Mann and Whitney), p clicks, n others.

    Args:
      labels: ``[n]``, 1 for a click and 0 else.
      scores: ``[n]``, any increasing function of the log-odds.

    Raises:
      ValueError: for other labels or lengths, for NaN, or for examples of one kind only.
    """
    clicked, scores = _checked(labels, scores)
    positives = int(clicked.sum())
    negatives = len(clicked) - positives
    if not positives or not negatives:
        raise ValueError(f"AUC needs clicks and other examples; got {positives} clicks among {len(clicked)} examples.")
    ranks = rankdata(scores)
    return float((ranks[clicked].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def user_auc(labels: np.ndarray, scores: np.ndarray, user_ids: np.ndarray) -> UserAuc:
    """AUC of each user's own examples, averaged with the number of examples as weight.

    Zhu et al., 2017, "Optimized Cost per Click in Taobao Display Advertising" (KDD), call it GAUC. Unlike AUC it does
    not see which users click more: what orders one user's list.

    Args:
      labels: ``[n]``, 1 for a click and 0 else.
      scores: ``[n]``.
      user_ids: ``[n]``.

    Raises:
      ValueError: as `auc`, or if no user has examples of both kinds.
    """
    clicked, scores = _checked(labels, scores)
    user_ids = np.asarray(user_ids)
    if user_ids.shape != clicked.shape:
        raise ValueError(f"user_ids must be like labels, {clicked.shape}; got {user_ids.shape}.")
    order = np.argsort(user_ids, kind="stable")
    starts = np.flatnonzero(np.diff(user_ids[order])) + 1
    groups = [rows for rows in np.split(order, starts) if len(rows)]
    mixed = [rows for rows in groups if 0 < clicked[rows].sum() < len(rows)]
    if not mixed:
        raise ValueError("No user has clicks and other examples, so AUC within users does not exist; use auc.")
    values = [auc(clicked[rows], scores[rows]) for rows in mixed]
    value = float(np.average(values, weights=[len(rows) for rows in mixed]))
    return UserAuc(value, len(mixed), len(groups) - len(mixed))


def logloss(labels: np.ndarray, logits: np.ndarray) -> float:
    """Mean of -log of the probability given to what happened, in nats, from log-odds.

    Args:
      labels: ``[n]``, 1 for a click and 0 else.
      logits: ``[n]``, log-odds of a click.

    Raises:
      ValueError: for other labels or lengths, for NaN, or for no example.
    """
    clicked, logits = _checked(labels, logits)
    return float(np.mean(np.logaddexp(0.0, np.where(clicked, -logits, logits))))


def _checked(labels, scores) -> tuple[np.ndarray, np.ndarray]:
    labels, scores = np.asarray(labels), np.asarray(scores, np.float64)
    if labels.ndim != 1 or labels.shape != scores.shape or not len(labels):
        raise ValueError(f"labels and scores must be of one length, at least 1; got {labels.shape} and {scores.shape}.")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("Labels must be 0 or 1; turn ratings into clicks first.")
    if np.isnan(scores).any():
        raise ValueError(f"{np.isnan(scores).sum()} of {len(scores)} scores are NaN; training has diverged.")
    return labels.astype(bool), scores

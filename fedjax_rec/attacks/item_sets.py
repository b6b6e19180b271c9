"""Which items did a client interact with? Read from one upload, or guessed from the sum of several.

Three attacks, from blunt to learned. `named_items` reads the row ids; `positive_items` reads signs, for clients that
train on negatives too; `fit_scorer` learns from clients whose items the attacker knows how rows of positives look, with
the items' popularity as its prior. All take what the server sees of one client and nothing else of it.
"""

from typing import NamedTuple

import jax
import numpy as np

from fedjax_rec.attacks.ridge import Linear, fit_ridge
from fedjax_rec.attacks.uploads import Uploads, joined_rows, leading_direction

_RARE = 0.5  # added to counts, so that an item nobody known has touched keeps a finite prior


class Found(NamedTuple):
    """How well item sets were recovered.

    Attributes:
      f1: float64 ``[clients]``, the harmonic mean of precision and recall.
      mean: of those.
      error: standard error of the mean over clients.
    """

    f1: np.ndarray
    mean: float
    error: float


def named_items(uploads: Uploads) -> np.ndarray:
    """bool ``[uploads, items]``: rows sent with a value that is not zero.

    The attacker knows nothing but the upload. Without negatives these are the client's items, all of them; with
    negatives, those and what it drew.
    """
    return uploads.sent & np.any(joined_rows(uploads) != 0, axis=2)


def positive_items(uploads: Uploads) -> np.ndarray:
    """bool ``[uploads, items]``: rows whose residual is positive, so that the client's score was too low.

    With logistic loss the bias of a positive rises and that of a negative falls, whatever the scores: the sign is the
    label. For ratings the sign says whether the rating was above its prediction, and this attack is of no use.
    """
    return uploads.sent & (joined_rows(uploads)[:, :, 0] > 0)


def popularity_prior(known_items: np.ndarray) -> np.ndarray:
    """Log odds of each item among clients whose items the attacker knows, float64 ``[items]``.

    Args:
      known_items: bool ``[clients, items]``.
    """
    counts = known_items.sum(0) + _RARE
    return np.log(counts / (len(known_items) + 2 * _RARE - counts))


def evidence(uploads: Uploads, prior: np.ndarray) -> np.ndarray:
    """What the scorer sees of each item, float32 ``[uploads, items, features]``.

    The prior; whether the row was sent; and the residual along the upload's leading direction, the bias and the row's
    norm, each in units of its root mean square over the rows sent, with absolute values or squares, as a rating's
    residual may have either sign.

    Args:
      uploads: of matrix factorisation.
      prior: from `popularity_prior`.
    """
    rows = joined_rows(uploads)
    residual, _ = jax.lax.map(leading_direction, rows)
    num_sent = np.maximum(uploads.sent.sum(1, keepdims=True), 1)

    def in_units(values):
        scale = np.sqrt(np.square(values).sum(1, keepdims=True) / num_sent)
        return values / np.maximum(scale, np.finfo(np.float32).tiny)

    residual, bias = in_units(np.asarray(residual)), in_units(rows[:, :, 0])
    norm = in_units(np.linalg.norm(rows, axis=2))
    prior = np.broadcast_to(prior.astype(np.float32), norm.shape)
    sent = uploads.sent.astype(np.float32)
    columns = (prior, sent, residual, np.abs(residual), bias, np.abs(bias), norm, np.square(norm))
    return np.stack(columns, axis=2, dtype=np.float32)


def fit_scorer(known: np.ndarray, items: np.ndarray) -> Linear:
    """Learns from clients whose items the attacker knows: its own accounts, or people who told.

    Args:
      known: their `evidence`, ``[clients, items, features]``; of the sums they are in, for sums.
      items: bool ``[clients, items]``, their items.
    """
    return fit_ridge(known.reshape(-1, known.shape[2]), items.reshape(-1, 1).astype(np.float64))


def item_scores(scorer: Linear, seen: np.ndarray) -> np.ndarray:
    """float64 ``[uploads, items]``, higher = rather one of the client's items."""
    return scorer(seen.reshape(-1, seen.shape[2])).reshape(seen.shape[:2])


def top_items(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The best-scored items of each client, bool ``[uploads, items]``: as many as it has, as the attacker is told.

    Args:
      scores: float ``[uploads, items]``; ties go to lower ids.
      counts: int ``[uploads]``.
    """
    order = np.argsort(-scores, axis=1, kind="stable")
    found = np.zeros(scores.shape, bool)
    np.put_along_axis(found, order, np.arange(scores.shape[1]) < counts[:, None], axis=1)
    return found


def f1_scores(found: np.ndarray, truth: np.ndarray) -> Found:
    """F1 of each client, its mean and standard error; 0 where both sets are empty.

    Args:
      found, truth: bool ``[clients, items]``.
    """
    right, both = (found & truth).sum(1), found.sum(1) + truth.sum(1)
    f1 = 2 * right / np.maximum(both, 1)
    error = float(f1.std(ddof=1)) / len(f1) ** 0.5 if len(f1) > 1 else float("nan")
    return Found(f1, float(f1.mean()), error)

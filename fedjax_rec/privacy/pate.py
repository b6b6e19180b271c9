"""PATE with confident GNMax: many teachers vote on public queries, and only noisy votes that agree are answered.

Users are split into disjoint groups, by their ids alone, and each group trains a teacher. For a public query with n_c
votes for class c (Papernot et al., 2018, "Scalable Private Learning with PATE"),

    answer argmax_c (n_c + N(0, sigma_vote^2))    if    max_c n_c + N(0, sigma_threshold^2) >= threshold,

and nothing otherwise. A student is trained on the answers, which costs nothing more.

What one user can change. Adding, removing or replacing a user changes one teacher, whatever it does to that one, so on
each query one vote moves from a class to another. The votes move by sqrt(2) in L2 norm, the largest count by at most 1.
The check is a Gaussian mechanism of noise multiplier sigma_threshold; an answer is post-processing of one on the whole
histogram, of noise multiplier sigma_vote / sqrt(2).

The accounting does not look at the votes. Papernot et al. also have a bound that falls where teachers agree; it depends
on the private votes, so that it would have to be released with noise itself, and it is left out here. Nor may the bill
depend on how many queries the check let through, for that number is an outcome: `confident_gnmax` stops at
``max_answers``, and `charge` counts that many answers and one check for each query, whatever happens.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from dp_accounting import GaussianDpEvent

from fedjax_rec.privacy.ledger import Ledger
from fedjax_rec.privacy.mechanisms import check_stddev
from fedjax_rec.privacy.noise import standard_normal

VOTE_SENSITIVITY = math.sqrt(2.0)
UNANSWERED = -1


class Answers(NamedTuple):
    """What is released.

    Attributes:
      labels: int32 ``[queries]``, a class, or -1 where there is no answer.
      answered: bool ``[queries]``.
    """

    labels: np.ndarray
    answered: np.ndarray


def vote_counts(predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Votes n_c: int64 ``[queries, classes]``, of predicted classes int ``[teachers, queries]``."""
    counts = np.zeros((predictions.shape[1], num_classes), np.int64)
    np.add.at(counts, (np.arange(predictions.shape[1])[None, :], predictions), 1)
    return counts


def confident_gnmax(
    votes: np.ndarray,
    *,
    threshold: float,
    sigma_threshold: float,
    sigma_vote: float,
    key: jax.Array,
    max_answers: int | None = None,
) -> Answers:
    """Answers queries in order until ``max_answers`` have passed the check, and none after that.

    Guarantee: user-level, adding or removing one user (or replacing one: the same numbers hold, with nothing doubled),
    if each user is in the training data of one teacher, and in which one does not depend on other users. Released are
    which queries passed, and the answers of those. `charge` with the same numbers is the whole cost. Queries are
    public. ``key`` must be secret and used for nothing else.

    Args:
      votes: ``[queries, classes]`` from `vote_counts`.
      threshold: in votes.
      sigma_threshold: standard deviation of the check's noise, in votes; 0 adds none.
      sigma_vote: of the noise on each class's votes; 0 adds none.
      key: of both noises.
      max_answers: at most so many; by default all.

    Raises:
      ValueError: for numbers out of range.
    """
    check_stddev(sigma_threshold)
    check_stddev(sigma_vote)
    max_answers = _answers(len(votes), max_answers)
    check_key, vote_key = jax.random.split(key)
    counts = jnp.asarray(votes, jnp.float32)
    top = counts.max(1) + sigma_threshold * standard_normal(check_key, (len(votes),))
    passed = np.asarray(top >= threshold)
    answered = passed & (np.cumsum(passed) <= max_answers)
    noisy = np.asarray(counts + sigma_vote * standard_normal(vote_key, counts.shape))
    return Answers(np.where(answered, noisy.argmax(1), UNANSWERED).astype(np.int32), answered)


def charge(
    ledger: Ledger,
    *,
    num_queries: int,
    sigma_threshold: float,
    sigma_vote: float,
    max_answers: int | None = None,
) -> Ledger:
    """The ledger with what `confident_gnmax` releases at most, given the same numbers.

    Args:
      ledger: user-level, add-or-remove-one. (Under replace-one an accountant doubles sensitivities, and here is none to
        double.)
      num_queries: how many were asked.
      sigma_threshold: in votes, positive.
      sigma_vote: in votes, positive.
      max_answers: as there.

    Raises:
      ValueError: for another ledger, or numbers out of range.
    """
    max_answers = _answers(num_queries, max_answers)
    if not (sigma_threshold > 0 and sigma_vote > 0):
        raise ValueError(
            f"Without noise there is nothing to charge; got sigma_threshold={sigma_threshold}, sigma_vote={sigma_vote}."
        )
    same = {"unit": "user", "relation": "add_or_remove_one", "phase": "teachers"}
    ledger = ledger.record(
        GaussianDpEvent(sigma_threshold), count=num_queries, released="whether the largest vote passes", **same
    )
    return ledger.record(
        GaussianDpEvent(sigma_vote / VOTE_SENSITIVITY), count=max_answers, released="class of most noised votes", **same
    )


def noise_for(
    noise_multiplier: float, *, num_queries: int, max_answers: int, check_share: float
) -> tuple[float, float]:
    """Standard deviations (sigma_threshold, sigma_vote) that together cost what one Gaussian of that multiplier does.

    ``num_queries / sigma_threshold^2 + 2 max_answers / sigma_vote^2 = 1 / noise_multiplier^2``.

    Args:
      noise_multiplier: of the one Gaussian.
      num_queries: checks.
      max_answers: answers.
      check_share: of the right-hand side that goes to the checks, in (0, 1).

    Raises:
      ValueError: for numbers out of range.
    """
    if not noise_multiplier > 0 or not 0 < check_share < 1:
        raise ValueError(
            f"noise_multiplier must be positive and check_share between 0 and 1; got {noise_multiplier} and "
            f"{check_share}."
        )
    max_answers = _answers(num_queries, max_answers)
    sigma_threshold = noise_multiplier * math.sqrt(num_queries / check_share)
    sigma_vote = noise_multiplier * VOTE_SENSITIVITY * math.sqrt(max_answers / (1 - check_share))
    return sigma_threshold, sigma_vote


def _answers(num_queries: int, max_answers: int | None) -> int:
    max_answers = num_queries if max_answers is None else max_answers
    if not 1 <= max_answers <= num_queries:
        raise ValueError(f"max_answers must be from 1 to the {num_queries} queries; got {max_answers}.")
    return max_answers

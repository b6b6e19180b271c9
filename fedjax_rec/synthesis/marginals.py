"""Popularity alone: released item shares, and histories drawn from them. What every other generator must beat.

A virtual user's history of n items is n draws without repeats, the next item with probability proportional to its share
p: the n largest of log p_i + Gumbel noise (Plackett, 1975, "The Analysis of Permutations").
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.models.popularity import dp_popularity
from fedjax_rec.privacy.budget import Phase
from fedjax_rec.privacy.ledger import Entry
from fedjax_rec.synthesis.generator import Generator
from fedjax_rec.synthesis.methods import Method

COUNTS = "counts"
RELEASED_COUNTS = "sum over users of x / |x|, their 0/1 row of items at length 1"
_SMALLEST_SHARE = 1e-6  # of what the average item has: keeps logarithms finite


class ReleasedCounts(NamedTuple):
    """sum_u x_u / |x_u|, released once.

    Attributes:
      noised: float64 ``[items]``, as released.
      clean: float64 ``[items]``, `posterior_mean` of it.
      entry: for the ledger.
    """

    noised: np.ndarray
    clean: np.ndarray
    entry: Entry


def release_counts(train: Interactions, *, noise_multiplier: float, key: jax.Array) -> ReleasedCounts:
    """The item counts that generators start from, each user's row at length 1.

    Guarantee: that of `models.popularity.dp_popularity` with its defaults: user-level, adding or removing one user, one
    Gaussian mechanism of L2 sensitivity 1 on all users. ``key`` must be secret and used for nothing else.
    """
    released = dp_popularity(train, noise_multiplier=noise_multiplier, key=key)
    noised = np.asarray(released.counts, np.float64)
    entry = Entry(COUNTS, released.dp_event, 1, "all", RELEASED_COUNTS)
    return ReleasedCounts(noised, posterior_mean(noised, released.noise_stddev), entry)


def popularity_method() -> Method:
    """Histories by popularity alone, from one release.

    Released is sum_u x_u / |x_u|, x_u the 0/1 row of a user's items, plus Gaussian noise (`models.dp_popularity`). What
    the noise adds to rare items is taken back by `posterior_mean` before shares are made of it.

    Guarantee: user-level, adding or removing one user with all of its rows. One release of L2 sensitivity 1 on all
    users, without amplification by sampling, at the noise multiplier that the phase "counts" is given; all else is
    post-processing. The catalogue and the number of users are public.
    """

    def phases(num_users, num_items):
        del num_users
        return (Phase(COUNTS, num_numbers=num_items),)

    def fit(train, noise, key, report):
        multiplier = float(noise[COUNTS][0])
        released = release_counts(train, noise_multiplier=multiplier, key=key)
        report(1, 1, "item counts released")
        private = multiplier > 0
        return Generator(
            name="popularity",
            num_items=train.num_items,
            params=jnp.asarray(log_shares(released.clean)),
            scores=_scores,
            releases=(released.entry,) if private else (),
            choices={"sampler": "without repeats, in proportion to released counts", "noise_multiplier": multiplier},
            private=private,
        )

    return Method("popularity", phases, fit)


def posterior_mean(noised: np.ndarray, stddev: float, *, num_points: int = 80, num_steps: int = 300) -> np.ndarray:
    """Counts under Gaussian noise, each replaced by its mean given what was seen; float64 ``[items]``, not negative.

        E[c | y] = sum_k w_k c_k N(y; c_k, stddev^2) / sum_k w_k N(y; c_k, stddev^2)

    with a prior w on a fixed grid of counts that is itself fitted to all y by expectation maximisation (Robbins, 1956,
    "An Empirical Bayes Approach to Statistics"). Clipping negative counts to 0 instead would add half of the noise to
    the tail of the catalogue, which is most of it. Post-processing of a release; without noise it only clips.

    Args:
      noised: float ``[items]``, released.
      stddev: of the noise in each.
      num_points: of the grid, from a tenth of ``stddev`` to the largest count, and 0.
      num_steps: of the fit of the prior.
    """
    if stddev == 0:
        return np.maximum(noised, 0.0)
    grid = np.append(0.0, np.geomspace(stddev / 10, max(noised.max(), stddev), num_points))
    log_likelihood = -0.5 * np.square((noised[:, None] - grid[None, :]) / stddev)
    likelihood = np.exp(log_likelihood - log_likelihood.max(axis=1, keepdims=True))
    prior = np.full(len(grid), 1.0 / len(grid))
    for _ in range(num_steps):
        posterior = likelihood * prior[None, :]
        posterior /= posterior.sum(axis=1, keepdims=True)
        prior = posterior.mean(axis=0)
    return posterior @ grid


def log_shares(counts: np.ndarray) -> np.ndarray:
    """Logarithms of shares with sum 1, float32 ``[items]``, of counts that are not negative; finite also for zeros."""
    total = float(counts.sum())
    shares = counts / total if total > 0 else np.full(len(counts), 1 / len(counts))
    return np.log(np.maximum(shares, _SMALLEST_SHARE / len(counts))).astype(np.float32)


def _scores(params: jax.Array, key: jax.Array) -> jax.Array:
    return params + jax.random.gumbel(key, params.shape, jnp.float32)

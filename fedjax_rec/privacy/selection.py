"""Choosing hyper-parameters inside the budget: run a random number of candidates, release the best one only.

Trying k settings and keeping the best releases something about all k runs. If their number is random and stays secret,
the best one costs far less than their sum: Papernot and Steinke, 2022, "Hyperparameter Tuning with Renyi Differential
Privacy", Theorems 2 and 6.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from dp_accounting.dp_event import DpEvent, RepeatAndSelectDpEvent
from scipy import optimize, stats

from fedjax_rec.privacy.events import check_event


@dataclass(frozen=True, eq=False)
class Selection:
    """The only things that are released.

    Attributes:
      candidate: the winner; None if no run was made, which Poisson repetitions allow.
      score: of its run.
      output: of its run.
      event: what the whole selection released, for the ledger.
    """

    candidate: Any
    score: float
    output: Any
    event: DpEvent


class _Trial(NamedTuple):
    score: float
    place: int
    output: Any


def selection_event(event: DpEvent, *, mean: float, shape: float) -> RepeatAndSelectDpEvent:
    """The event of a selection; ask it what a search would cost before starting one.

    Only the Renyi accountant knows it, so it is looser than one run accounted by privacy loss distributions.

    Args:
      event: of one run, its score included.
      mean: as in `draw_repetitions`.
      shape: as in `draw_repetitions`.

    Raises:
      ValueError: for numbers out of range.
    """
    _check(mean, shape)
    return check_event(RepeatAndSelectDpEvent(event, float(mean), float(shape)))


def draw_repetitions(key: jax.Array, *, mean: float, shape: float) -> int:
    """How many runs a selection makes.

    Truncated negative binomial with shape eta: for k = 1, 2, ...

        P(k) = (1 - gamma)^k / (gamma^-eta - 1)  prod_{l<k} (l + eta) / (l + 1),

    gamma such that the mean is as asked. eta = 1 is the geometric distribution and eta = 0 the logarithmic one, whose
    limit is P(k) = (1 - gamma)^k / (k log(1 / gamma)). eta = infinity stands for Poisson, which may be 0.

    Args:
      key: secret, of this draw and no others.
      mean: of the distribution, at least 1.
      shape: eta, at least 0 and possibly infinite.

    Raises:
      ValueError: for numbers out of range.
    """
    _check(mean, shape)
    words = np.asarray(jax.random.bits(key, (2,), "uint32"), np.uint64)
    uniform = (float((words[0] << np.uint64(21)) ^ (words[1] >> np.uint64(11))) + 0.5) * 2.0**-53
    return _quantile(uniform, mean, shape)


def select_privately(
    candidates: Sequence[Any],
    run: Callable[[Any, jax.Array], tuple[float, Any]],
    *,
    event: DpEvent,
    mean: float,
    shape: float = 1.0,
    key: jax.Array,
) -> Selection:
    """Runs a random number of uniformly drawn candidates, and returns the best and nothing else.

    Guarantee: that of `selection_event`, for the unit and relation of ``event``, if (a) each run, its score included,
    releases at most what ``event`` says, for every candidate: a score measured on private data must be noised, and
    the noise be in ``event``; (b) only the result is ever seen: not the number of runs, their time, logs or
    checkpoints, nor other scores; (c) candidates and ``event`` were fixed without looking at the data. A candidate may
    be drawn more than once, or never.

    Args:
      candidates: settings to choose from.
      run: ``run(candidate, key) -> (score, output)``, greater scores are better, NaN is the worst.
      event: an upper bound on what any one run releases.
      mean: expected number of runs; the search costs little more for more of them.
      shape: of their distribution, see `draw_repetitions`. 1 is the geometric one; 0 is cheaper and more often runs
        only once.
      key: secret; folded for each run.

    Raises:
      ValueError: if there are no candidates, or a number is out of range.
    """
    if not len(candidates):
        raise ValueError("There is nothing to select from: give at least one candidate.")
    whole = selection_event(event, mean=mean, shape=shape)
    repetitions_key, runs_key = jax.random.split(key)
    best: _Trial | None = None
    for index in range(draw_repetitions(repetitions_key, mean=mean, shape=shape)):
        draw_key, run_key = jax.random.split(jax.random.fold_in(runs_key, index))
        place = int(jax.random.randint(draw_key, (), 0, len(candidates)))
        score, output = run(candidates[place], run_key)
        score = -math.inf if math.isnan(score) else float(score)
        # One fixed order of outcomes: by score, then the earlier candidate, then the earlier run.
        if best is None or (score, -place) > (best.score, -best.place):
            best = _Trial(score, place, output)
    if best is None:
        return Selection(None, -math.inf, None, whole)
    return Selection(candidates[best.place], best.score, best.output, whole)


def _check(mean: float, shape: float) -> None:
    if not 1 <= mean < math.inf:
        raise ValueError(f"The mean number of runs must be at least 1 and finite; got {mean!r}.")
    if not shape >= 0:
        raise ValueError(f"The shape of the number of runs must be at least 0, or infinite; got {shape!r}.")


def _quantile(uniform: float, mean: float, shape: float) -> int:
    """The least k whose cumulative probability is above ``uniform``, a number in (0, 1]."""
    if shape == math.inf:
        return int(stats.poisson.ppf(min(uniform, 1 - 2**-53), mean))
    if mean == 1:
        return 1
    gamma = _gamma(mean, shape)
    k, prob = 1, _first_probability(gamma, shape)
    cumulative = prob
    # Past the mean, with nothing left to add, rounding alone keeps the sum below: that is the end of the tail.
    while cumulative <= uniform and (k <= mean or prob > 1e-18):
        prob *= (1 - gamma) * (k + shape) / (k + 1)
        k += 1
        cumulative += prob
    return k


def _first_probability(gamma: float, shape: float) -> float:
    if shape == 0:
        return (1 - gamma) / -math.log(gamma)
    exponent = -shape * math.log(gamma)
    if exponent > 700:
        raise ValueError(f"A shape of {shape:g} with so many runs is all but Poisson; use an infinite shape.")
    return (1 - gamma) * shape / math.expm1(exponent)


def _gamma(mean: float, shape: float) -> float:
    """The parameter of the truncated negative binomial distribution with this mean, which falls with gamma."""

    def distance(log_gamma):
        gamma = math.exp(log_gamma)
        if shape == 0:
            found = (1 / gamma - 1) / -log_gamma
        else:
            found = shape * -math.expm1(log_gamma) / (gamma * -math.expm1(shape * log_gamma))
        return found - mean

    low = -1.0
    while distance(low) < 0:
        low *= 2
    return math.exp(optimize.brentq(distance, low, -1e-12, xtol=1e-14, rtol=1e-14))

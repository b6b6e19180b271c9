"""Metrics under differential privacy: noise on the sum over users, and early stopping on nothing but released numbers.

Rank metrics of one user lie in [0, 1] and add up over users (`metrics.MetricState`), so their sum is a query of known
sensitivity: adding or removing one user moves m of them by at most sqrt(m) in L2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from dp_accounting.dp_event import DpEvent, GaussianDpEvent, SelfComposedDpEvent

from fedjax_rec.evaluation.metrics import MetricState, metric_names
from fedjax_rec.privacy.ledger import Ledger

PHASE = "evaluation"


@dataclass(frozen=True)
class PrivateMetrics:
    """A released evaluation.

    Attributes:
      values: noised sum over users / public number of users, by name. Not cut to [0, 1]: that would be biased.
      standard_errors: of the noise, by name; sampling of users comes on top.
      event: what was released.
    """

    values: dict[str, float]
    standard_errors: dict[str, float]
    event: DpEvent

    def charge(self, ledger: Ledger) -> Ledger:
        """A ledger with this release, in the phase "evaluation"."""
        return _charge(ledger, self.event, f"noised means of {', '.join(self.values)}")


def noise_standard_error(num_metrics: int, *, noise_multiplier: float, num_users: int) -> float:
    """Standard deviation of the noise in a released mean: ``noise_multiplier sqrt(num_metrics) / num_users``."""
    return noise_multiplier * math.sqrt(num_metrics) / num_users


def release_metrics(
    state: MetricState,
    *,
    ks: Sequence[int],
    names: Sequence[str],
    noise_multiplier: float,
    num_users: int,
    key: jax.Array,
) -> PrivateMetrics:
    """Means over users of a few metrics, with Gaussian noise on their sums.

    Guarantee: user-level, add-or-remove-one (the accountant doubles under replace-one): one Gaussian mechanism with
    noise multiplier ``noise_multiplier``, because a user's vector of m metrics in [0, 1] has L2 norm at most sqrt(m).
    It covers the released means; exposure, the true number of users and per-user values stay where they are. The model
    that is evaluated must be released or trained under the same ledger, and a user's metrics must depend on others'
    data only through it.

    Args:
      state: sums over users, as `metrics.metric_state` makes and device sums or secure sums add up.
      ks: the cut-offs that the state was made with.
      names: the metrics to release, e.g. ("ndcg@10",); each one more raises the noise of all.
      noise_multiplier: positive; standard deviation of the noise over sqrt(m).
      num_users: public divisor, such as the number of registered users; never the realised number.
      key: secret, of this release and no others.

    Raises:
      ValueError: for unknown or repeated names, a number out of range, or a state that is not finite.
    """
    known = metric_names(ks)
    names = tuple(names)
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) != len(names):
        raise ValueError(f"Choose one or more different metrics of {', '.join(known)}; got {names!r}.")
    if not 0 < noise_multiplier < math.inf:
        raise ValueError(
            f"The noise multiplier of an evaluation must be positive and finite; got {noise_multiplier!r}."
        )
    if num_users < 1:
        raise ValueError(f"The public number of users must be at least 1; got {num_users!r}.")
    sums = np.asarray(state.sums, np.float64)[[known.index(name) for name in names]]
    if not np.all(np.isfinite(sums)):
        raise ValueError("Metrics of some user are not finite, so their sum has no bound; evaluate again without NaN.")
    stddev = noise_multiplier * math.sqrt(len(names))
    noised = sums + stddev * np.asarray(jax.random.normal(key, sums.shape), np.float64)
    error = noise_standard_error(len(names), noise_multiplier=noise_multiplier, num_users=num_users)
    return PrivateMetrics(
        values=dict(zip(names, (noised / num_users).tolist(), strict=True)),
        standard_errors=dict.fromkeys(names, error),
        event=GaussianDpEvent(noise_multiplier),
    )


class StoppingState(NamedTuple):
    """What early stopping remembers: released numbers only.

    Attributes:
      num_releases: made so far.
      best: the best released value.
      best_release: its place, from 0; the model of that release is the one to keep.
      since_best: releases in a row that did not improve on it.
      stopped: True from the release on after which training should end.
    """

    num_releases: int = 0
    best: float = -math.inf
    best_release: int = -1
    since_best: int = 0
    stopped: bool = False


@dataclass(frozen=True)
class PrivateEarlyStopping:
    """Stop when a privately released metric has not improved for a while; a post-processing of the releases.

    Guarantee: the decision reveals nothing beyond the releases. When a run stops is however known from their values, so
    an epsilon that counts only the rounds that happened to run is of a data-dependent length. State the epsilon of the
    plan, all ``max_releases`` and all rounds between them (`planned`): it holds wherever training stops, and what was
    not used may not be spent otherwise. To spend it after all, ask a `privacy.renyi_filter.RenyiFilter` before each
    release.

    Attributes:
      patience: releases in a row without improvement after which to stop.
      max_releases: that are planned; none is made after them.
      min_improvement: in standard errors of the noise, by which a release must beat the best one; 0 follows the noise.
    """

    patience: int
    max_releases: int
    min_improvement: float = 0.0

    def __post_init__(self):
        for name in ("patience", "max_releases"):
            value = getattr(self, name)
            if value != int(value) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}.")
        if not 0 <= self.min_improvement < math.inf:
            raise ValueError(f"min_improvement must be finite and not negative; got {self.min_improvement!r}.")

    def planned(self, noise_multiplier: float) -> DpEvent:
        """What all planned releases cost; part of the event that a run is calibrated with."""
        return SelfComposedDpEvent(GaussianDpEvent(noise_multiplier), self.max_releases)

    def step(self, state: StoppingState, value: float, *, standard_error: float = 0.0) -> StoppingState:
        """The state after one more released value; greater is better.

        Raises:
          ValueError: if the run was to stop, or all planned releases were made: this one is not in the plan's epsilon.
        """
        if state.stopped or state.num_releases >= self.max_releases:
            raise ValueError(
                f"Release {state.num_releases + 1} is not planned: at most {self.max_releases} are, and none after "
                "stopping. Raise max_releases before the run, and calibrate with it."
            )
        improved = value > state.best + (self.min_improvement * standard_error if state.num_releases else 0.0)
        since_best = 0 if improved else state.since_best + 1
        num_releases = state.num_releases + 1
        return StoppingState(
            num_releases=num_releases,
            best=value if improved else state.best,
            best_release=state.num_releases if improved else state.best_release,
            since_best=since_best,
            stopped=since_best >= self.patience or num_releases >= self.max_releases,
        )

    def observe(
        self, state: StoppingState, released: PrivateMetrics, ledger: Ledger, *, metric: str
    ) -> tuple[StoppingState, Ledger]:
        """`step` on one metric of a release, with the release charged to the ledger."""
        value, error = released.values[metric], released.standard_errors[metric]
        return self.step(state, value, standard_error=error), released.charge(ledger)

    def charge_plan(self, state: StoppingState, ledger: Ledger, *, noise_multiplier: float) -> Ledger:
        """A ledger with the planned releases that were not made, so that its epsilon is of the plan."""
        left = self.max_releases - state.num_releases
        return (
            _charge(ledger, GaussianDpEvent(noise_multiplier), "planned evaluations, not made", left)
            if left
            else ledger
        )


def _charge(ledger: Ledger, event: DpEvent, released: str, count: int = 1) -> Ledger:
    return ledger.record(event, phase=PHASE, released=released, sampler="all", count=count, unit="user")


def state_of(evaluation) -> MetricState:
    """The additive state behind an `evaluation.exact.Evaluation`: sums over its users, clipped to [0, 1] each."""
    values = [np.clip(column.astype(np.float64), 0.0, 1.0) for column in evaluation.per_user.values()]
    sums = np.stack(values, axis=1).sum(axis=0)
    exposure = np.stack(list(evaluation.exposure.values()))
    return MetricState(sums, np.float64(len(evaluation.user_ids)), exposure)

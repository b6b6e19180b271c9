"""A plan of all releases of a project, and the noise that keeps all of them together within one epsilon.

    plan = Plan(
        phases=(
            Phase("popularity", weight=4.0, num_numbers=1682),
            Phase("training", rounds=200, sampler="poisson", cohort_size=94, num_numbers=1682 * 8, ratio=2.0),
            Phase("evaluation", rounds=5, weight=10.0, num_numbers=1),
        ),
        epsilon=8.0, delta=1e-4, num_users=943,
    )
    solved = solve(plan)

Weights fix how the noise multipliers relate; one scale is solved for. All phases are accounted jointly, which is
tighter than to add up what each of them spends alone.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from dp_accounting.dp_event import ComposedDpEvent, DpEvent, GaussianDpEvent, LaplaceDpEvent, SelfComposedDpEvent

from fedjax_rec.federated.cohort import Sampler, fixed_size, full_participation, poisson
from fedjax_rec.federated.releases import Releases
from fedjax_rec.privacy import accounting
from fedjax_rec.privacy.calibration import calibrate_noise_multiplier
from fedjax_rec.privacy.curve import epsilon_after
from fedjax_rec.privacy.schedule import geometric

MECHANISMS = {"gaussian": GaussianDpEvent, "laplace": LaplaceDpEvent}
SAMPLERS = ("all", "poisson", "fixed_size")


@dataclass(frozen=True)
class Phase:
    """Releases of one kind: ``rounds`` noised sums over users.

    Attributes:
      name: of the phase in the ledger.
      mechanism: "gaussian" or "laplace".
      rounds: how many releases.
      sampler: "all", "poisson" or "fixed_size": who takes part in each.
      cohort_size: users in a release, in expectation (poisson) or exactly (fixed_size).
      weight: noise multiplier of the last round in units of the plan's scale; 1 unless the noise is given.
      noise_multiplier: given noise of the last round; then it is not scaled.
      ratio: noise of the first round over that of the last (`schedule.geometric`); 1 is constant.
      sensitivity: the largest norm of one user's contribution (L2; L1 for laplace): the clip norm, or sqrt(m) for m
        metrics in [0, 1].
      num_numbers: numbers that each release holds.
      signal: norm of what one user on average adds in the common direction, over the sensitivity: 1 is the largest mean
        there can be, and what an honest first guess divides by 3 to 10.
    """

    name: str
    _: dataclasses.KW_ONLY
    mechanism: str = "gaussian"
    rounds: int = 1
    sampler: str = "all"
    cohort_size: float | None = None
    weight: float | None = None
    noise_multiplier: float | None = None
    ratio: float = 1.0
    sensitivity: float = 1.0
    num_numbers: int = 1
    signal: float = 1.0

    def __post_init__(self):
        def check(holds: bool, key: str, rule: str) -> None:
            if not holds:
                raise ValueError(f"{key} of phase {self.name!r} must be {rule}; got {getattr(self, key)!r}.")

        def positive(value) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf

        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name of a phase must be a word; got {self.name!r}.")
        check(self.mechanism in MECHANISMS, "mechanism", f"one of {', '.join(MECHANISMS)}")
        check(self.sampler in SAMPLERS, "sampler", f"one of {', '.join(SAMPLERS)}")
        for key in ("rounds", "num_numbers"):
            value = getattr(self, key)
            check(positive(value) and value == int(value), key, "a whole number of at least 1")
        for key in ("ratio", "sensitivity", "signal"):
            check(positive(getattr(self, key)), key, "positive and finite")
        for key in ("weight", "noise_multiplier", "cohort_size"):
            check(getattr(self, key) is None or positive(getattr(self, key)), key, "positive and finite")
        if self.weight is not None and self.noise_multiplier is not None:
            raise ValueError(
                f"weight of phase {self.name!r} stands beside a noise_multiplier; give a weight, to solve for the "
                "noise, or the noise itself."
            )
        if (self.sampler == "all") == (self.cohort_size is not None):
            way = "leave cohort_size out" if self.sampler == "all" else "give it a cohort_size"
            raise ValueError(f"sampler of phase {self.name!r} is {self.sampler!r}; {way}.")

    @property
    def free(self) -> bool:
        """Whether the plan solves for this phase's noise."""
        return self.noise_multiplier is None

    def noise_multipliers(self, scale: float) -> np.ndarray:
        """Float64 ``[rounds]``: noise over sensitivity in each round, at a scale of the plan."""
        last = (1.0 if self.weight is None else self.weight) * scale if self.free else self.noise_multiplier
        return last * geometric(self.rounds, self.ratio)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All releases of a project, under one epsilon.

    Attributes:
      phases: in the order of the releases, with different names.
      epsilon: target for all of them together.
      delta: of the guarantee.
      num_users: in the population; public.
      relation: "add_or_remove_one" or "replace_one"; fixed-size cohorts need the latter.
      unit: "user" or "example".
    """

    phases: tuple[Phase, ...]
    epsilon: float
    delta: float
    num_users: int
    relation: str = "add_or_remove_one"
    unit: str = "user"

    def __post_init__(self):
        accounting.check_claim(delta=self.delta, relation=self.relation, unit=self.unit)
        if not isinstance(self.epsilon, int | float) or not 0 < self.epsilon < math.inf:
            raise ValueError(f"epsilon of the plan must be positive and finite; got {self.epsilon!r}.")
        if not isinstance(self.num_users, int) or self.num_users < 1:
            raise ValueError(f"num_users of the plan must be a whole number of at least 1; got {self.num_users!r}.")
        names = [phase.name for phase in self.phases]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"A plan needs phases with different names; got {names!r}.")
        for phase in self.phases:
            if phase.sampler == "fixed_size" and self.relation != "replace_one":
                raise ValueError(
                    f"sampler of phase {phase.name!r} is 'fixed_size', which has a bound under replace_one only; set "
                    "the plan's relation, or sample by poisson."
                )
            sampler_of(phase, self.num_users)

    def phase(self, name: str) -> Phase:
        """The phase of that name.

        Raises:
          ValueError: if there is none.
        """
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise ValueError(f"The plan has no phase {name!r}; it has {', '.join(phase.name for phase in self.phases)}.")

    def changed(self, changes: Mapping[str, Mapping[str, float]]) -> "Plan":
        """The plan with other values for some keys of some phases: ``{"training": {"ratio": 2.0}}``."""
        for name in changes:
            self.phase(name)
        phases = tuple(dataclasses.replace(phase, **changes.get(phase.name, {})) for phase in self.phases)
        return dataclasses.replace(self, phases=phases)


class PhaseNoise(NamedTuple):
    """What was solved for one phase.

    Attributes:
      noise_multipliers: float64 ``[rounds]``.
      epsilon_alone: of this phase by itself, at the plan's delta.
      epsilon_after: of this phase and all before it, jointly.
      snr: float64 ``[rounds]``, norm of the expected sum over the norm of the noise in it: cohort x signal /
        (z sqrt(num_numbers)). Below 1 the noise is longer than the signal; how much of it a model averages out over
        rounds is its own matter.
    """

    noise_multipliers: np.ndarray
    epsilon_alone: float
    epsilon_after: float
    snr: np.ndarray

    @property
    def last_noise_multiplier(self) -> float:
        """Of the last round, which the weight or the given noise is about."""
        return float(self.noise_multipliers[-1])


@dataclass(frozen=True, eq=False)
class SolvedPlan:
    """A plan with its noise.

    Attributes:
      plan: as given.
      scale: the noise multiplier of weight 1; None if all noise was given.
      spent: the guarantee of all phases together.
      phases: by name, in order.
    """

    plan: Plan
    scale: float | None
    spent: accounting.PrivacySpent
    phases: dict[str, PhaseNoise]

    @property
    def event(self) -> DpEvent:
        """All releases as one event."""
        return _event(self.plan.phases, self.scale or 1.0, self.plan.num_users)

    def stddevs(self, name: str) -> np.ndarray:
        """Float64 ``[rounds]`` in units of the phase's sensitivity: for `schedule.scheduled_gaussian`."""
        return self.plan.phase(name).sensitivity * self.phases[name].noise_multipliers

    def epsilon_curve(self, num_points: int = 60) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of releases, and the epsilon of so many first ones, good to about 1 %."""
        every = _releases(self.plan.phases, self.scale or 1.0, self.plan.num_users)
        total = sum(count for _, count in every)
        ends = np.cumsum([phase.rounds for phase in self.plan.phases])
        points = np.unique(np.concatenate([ends, np.linspace(1, total, min(num_points, total)).astype(int)]))
        flat = list(itertools.chain.from_iterable(itertools.repeat(event, count) for event, count in every))

        def some(first: int, count: int) -> Releases:
            return tuple((e, len(list(same))) for e, same in itertools.groupby(flat[first : first + count]))

        relation = self.plan.relation
        return points, epsilon_after(some, points.tolist(), delta=self.plan.delta, relation=relation)


def solve(plan: Plan, *, prior: DpEvent | None = None) -> SolvedPlan:
    """Solves for the one scale at which all phases together meet the plan's epsilon, from below.

    Guarantee: all releases of the plan together are (epsilon, delta)-differentially private for the plan's unit and
    relation, if each is made as planned: noise of the stated multiple of the sensitivity, cohorts drawn as stated and
    kept secret, no round more. Phases may depend on the outputs of earlier ones, but the noise and the number of rounds
    of the plan may not.

    Args:
      plan: what will be released.
      prior: what was released before on the same users: it is part of the epsilon, and of `SolvedPlan.spent`.

    Raises:
      ValueError: a sentence, if no accountant applies, or no noise reaches the target, or all noise is given and
        exceeds it.
    """
    claim = {"delta": plan.delta, "relation": plan.relation, "unit": plan.unit}

    def everything(z: float) -> DpEvent:
        made = _event(plan.phases, z, plan.num_users)
        return made if prior is None else ComposedDpEvent([prior, made])

    scale = None
    if any(phase.free for phase in plan.phases):
        scale = calibrate_noise_multiplier(everything, target_epsilon=plan.epsilon, **claim).noise_multiplier
    spent = accounting.privacy_spent(everything(scale or 1.0), **claim)
    if spent.epsilon > plan.epsilon:
        raise ValueError(
            f"The given noise spends epsilon {spent.epsilon:.4g} at delta {plan.delta:g}, above the plan's "
            f"{plan.epsilon:g}. Give a phase a weight instead of a noise_multiplier, or raise epsilon."
        )
    found = {}
    for index, phase in enumerate(plan.phases):
        noise = phase.noise_multipliers(scale or 1.0)
        alone = accounting.privacy_spent(_event((phase,), scale or 1.0, plan.num_users), **claim).epsilon
        before = plan.phases[: index + 1]
        after = spent.epsilon if len(before) == len(plan.phases) and prior is None else alone
        if 0 < index < len(plan.phases) - (prior is None):
            after = accounting.privacy_spent(_event(before, scale or 1.0, plan.num_users), **claim).epsilon
        found[phase.name] = PhaseNoise(noise, alone, after, _snr(phase, noise, plan.num_users))
    return SolvedPlan(plan, scale, spent, found)


def sampler_of(phase: Phase, num_users: int) -> Sampler:
    """The sampler that the rounds of a phase must run with.

    Raises:
      ValueError: naming the phase, if its cohort does not fit the population.
    """
    try:
        if phase.sampler == "poisson":
            return poisson(num_users, cohort_size=phase.cohort_size)
        if phase.sampler == "fixed_size":
            return fixed_size(num_users, cohort_size=phase.cohort_size)
    except ValueError as error:
        raise ValueError(f"cohort_size of phase {phase.name!r}: {error}") from error
    return full_participation(num_users)


def _releases(phases: Sequence[Phase], scale: float, num_users: int) -> Releases:
    """Each round's event with its sampling, equal rounds in a row together."""
    found = []
    for phase in phases:
        sample, mechanism = sampler_of(phase, num_users).dp_event, MECHANISMS[phase.mechanism]
        for noise, same in itertools.groupby(phase.noise_multipliers(scale).tolist()):
            found.append((sample(mechanism(noise)), len(list(same))))
    return tuple(found)


def _event(phases: Sequence[Phase], scale: float, num_users: int) -> DpEvent:
    return ComposedDpEvent([SelfComposedDpEvent(e, count) for e, count in _releases(phases, scale, num_users)])


def _snr(phase: Phase, noise: np.ndarray, num_users: int) -> np.ndarray:
    cohort = num_users if phase.cohort_size is None else phase.cohort_size
    per_number = noise * (math.sqrt(2) if phase.mechanism == "laplace" else 1.0)  # Laplace(b) has deviation b sqrt(2)
    return cohort * phase.signal / (per_number * math.sqrt(phase.num_numbers))

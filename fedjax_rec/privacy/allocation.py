"""Choosing the parts of a plan, noise schedules and weights of phases, by simulation on data that is not private."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedjax_rec.privacy.budget import Plan, SolvedPlan, solve
from fedjax_rec.privacy.schedule import noise_energy


@dataclass(frozen=True, eq=False)
class Allocation:
    """What was tried, and the best of it.

    Attributes:
      best: the solved plan with the least loss.
      changes: of its phases.
      losses: of every candidate, in order.
    """

    best: SolvedPlan
    changes: Mapping[str, Mapping[str, float]]
    losses: tuple[float, ...]


def allocate(
    plan: Plan,
    simulate: Callable[[SolvedPlan], float],
    candidates: Sequence[Mapping[str, Mapping[str, float]]],
) -> Allocation:
    """Chooses ratios and weights by simulation: each candidate is solved for the plan's epsilon and then tried.

    ``simulate`` must not look at private data, or its choice is a release that no ledger holds: run it on made-up data
    (`fedjax_rec.load("synthetic")`) or take `quadratic_loss`. To choose on private data use
    `selection.select_privately`.

    Args:
      plan: the plan to change.
      simulate: loss of a solved plan, smaller is better; NaN never wins.
      candidates: changes of phases, e.g. ``{"training": {"ratio": 2.0}, "popularity": {"weight": 4.0}}``, see `grid`.

    Raises:
      ValueError: if there are no candidates, or none has a finite loss.
    """
    solved = [solve(plan.changed(changes)) for changes in candidates]
    losses = tuple(float(simulate(one)) for one in solved)
    finite = [place for place, loss in enumerate(losses) if math.isfinite(loss)]
    if not finite:
        raise ValueError(f"None of {len(losses)} candidates has a finite loss; give some, and check the simulation.")
    best = min(finite, key=losses.__getitem__)
    return Allocation(solved[best], candidates[best], losses)


def grid(choices: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict[str, dict[str, float]]]:
    """All combinations: ``{"training": {"ratio": (1, 2)}, "popularity": {"weight": (2, 4)}}`` gives four candidates."""
    keys = [(phase, key) for phase, values in choices.items() for key in values]
    found = []
    for values in itertools.product(*(choices[phase][key] for phase, key in keys)):
        candidate: dict[str, dict[str, float]] = {}
        for (phase, key), value in zip(keys, values, strict=True):
            candidate.setdefault(phase, {})[key] = value
        found.append(candidate)
    return found


def quadratic_loss(solved: SolvedPlan, *, contractions: Mapping[str, float]) -> float:
    """A stand-in for training: noise left in the parameters of a contracting optimiser, over the signal.

    For each phase ``(1 - rho^2) sum_t snr_t^-2 rho^(2 (T - t))``, rho its contraction: the squared ratio of noise to
    signal that the last parameters carry; summed over phases. A contraction of 0 counts the last round only, as for a
    release that stands alone.

    Args:
      solved: from `solve`.
      contractions: by name of phase, each in [0, 1); phases that are not named do not count.
    """
    loss = 0.0
    for name, contraction in contractions.items():
        if not 0 <= contraction < 1:
            raise ValueError(f"The contraction of phase {name!r} must be at least 0 and below 1; got {contraction!r}.")
        solved.plan.phase(name)
        loss += noise_energy(1 / solved.phases[name].snr, contraction) * (1 - contraction**2)
    return loss

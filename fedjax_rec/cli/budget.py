"""`fedjax-rec budget`: the noise of every phase of a plan, so that all of them together stay within one epsilon."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.table import Table

from fedjax_rec.privacy.accounting import delta_warning
from fedjax_rec.privacy.ledger import spent_to_dict

if TYPE_CHECKING:  # plans import JAX, and the help of other verbs does not wait for it
    from fedjax_rec.privacy.budget import SolvedPlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """Privacy budget of a whole project: the noise of every phase, for one epsilon over all of them.

    Write a plan to start from, and solve it:

        fedjax-rec budget --example > plan.toml

        fedjax-rec budget plan.toml --plot budget.svg
    """

    plan: Annotated[Path | None, tyro.conf.Positional] = None
    """TOML file with the plan."""
    example: bool = False
    """Print a commented plan and nothing else."""
    json: bool = False
    """Print one JSON object and nothing else."""
    plot: Path | None = None
    """Write a figure (SVG): noise of each release, and epsilon over the releases."""


def run(config: BudgetConfig) -> int:
    """Prints the answer to standard output, or a sentence to standard error.

    Returns:
      The exit code: 0, or 2 if the plan cannot be met as asked.
    """
    from fedjax_rec.privacy.budget import solve
    from fedjax_rec.privacy.plan_files import EXAMPLE, from_toml

    if config.example:
        print(EXAMPLE, end="")
        return 0
    try:
        if config.plan is None:
            raise ValueError("Give a plan, a TOML file; `fedjax-rec budget --example > plan.toml` writes one.")
        if not config.plan.exists():
            raise ValueError(f"There is no file {config.plan}; `fedjax-rec budget --example > plan.toml` writes one.")
        solved = solve(from_toml(config.plan))
    except ValueError as error:
        print(f"fedjax-rec budget: {error}", file=sys.stderr)
        return 2
    if config.json:
        print(json.dumps(to_dict(solved), allow_nan=False))
    else:
        _print_tables(solved)
    warning = delta_warning(solved.plan.delta, solved.plan.num_users, unit=solved.plan.unit)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    if config.plot is not None:
        from fedjax_rec.reporting.budget_plot import budget_figure
        from fedjax_rec.reporting.style import to_svg

        config.plot.write_text(to_svg(budget_figure(solved)), encoding="utf-8")
        if not config.json:
            print(f"Wrote {config.plot}.")
    return 0


def to_dict(solved: "SolvedPlan") -> dict:
    """The solved plan as JSON values; infinity as ``"inf"``."""
    plan = solved.plan
    phases = []
    for phase in plan.phases:
        found = solved.phases[phase.name]
        numbers = {
            "first_noise_multiplier": float(found.noise_multipliers[0]),
            "last_noise_multiplier": found.last_noise_multiplier,
            "first_stddev": float(solved.stddevs(phase.name)[0]),
            "last_stddev": float(solved.stddevs(phase.name)[-1]),
            "epsilon_alone": found.epsilon_alone,
            "epsilon_after": found.epsilon_after,
            "first_snr": float(found.snr[0]),
            "last_snr": float(found.snr[-1]),
        }
        asked = {field.name: getattr(phase, field.name) for field in dataclasses.fields(phase) if field.name != "_"}
        phases.append(asked | {name: _finite(value) for name, value in numbers.items()})
    spent = spent_to_dict(solved.spent)
    return {
        **spent,
        "target_epsilon": plan.epsilon,
        "num_users": plan.num_users,
        "scale": solved.scale,
        "phases": phases,
    }


def _finite(value: float) -> float | str:
    return float(value) if math.isfinite(value) else "inf"


def _span(values, digits: int = 4) -> str:
    first, last = float(values[0]), float(values[-1])
    return f"{last:.{digits}g}" if first == last else f"{first:.{digits}g} to {last:.{digits}g}"


def _print_tables(solved: "SolvedPlan") -> None:
    plan, console = solved.plan, Console(highlight=False, markup=False)
    heads = ("phase", "releases", "noise multiplier", "noise std", "epsilon alone", "epsilon so far", "signal / noise")
    table = Table(*heads)
    for phase in plan.phases:
        found = solved.phases[phase.name]
        who = "" if phase.sampler == "all" else f" ({phase.sampler}, {phase.cohort_size:g})"
        table.add_row(
            phase.name,
            f"{phase.rounds} x {phase.mechanism}{who}",
            _span(found.noise_multipliers, 5) + ("" if phase.free else " (given)"),
            _span(solved.stddevs(phase.name)),
            _up(found.epsilon_alone),
            _up(found.epsilon_after),
            _span(found.snr, 3),
        )
    console.print(table)
    added = sum(found.epsilon_alone for found in solved.phases.values())
    console.print(
        f"Together epsilon {_up(solved.spent.epsilon)} of {plan.epsilon:g} at delta {plan.delta:g} "
        f"({plan.unit}-level, {plan.relation}, {solved.spent.accountant}); the phases alone add up to {_up(added)}."
    )
    console.print(solved.spent.sentence)
    console.print(
        "Assumes that every release is made as planned: contributions clipped to the sensitivity, noise drawn once per "
        "release, cohorts drawn in secret as stated, nothing else about the data released, and a plan that was not "
        "chosen by looking at the data. Signal / noise: norm of the expected sum over the norm of the noise in it."
    )


def _up(epsilon: float) -> str:
    """Four digits after the point at most, rounded up."""
    return "inf" if math.isinf(epsilon) else f"{math.ceil(epsilon * 1e4) / 1e4:g}"

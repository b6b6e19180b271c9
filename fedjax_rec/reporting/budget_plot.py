"""The figure of a budget plan: how much noise each release gets, and the epsilon that is spent along the way."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from fedjax_rec.privacy.budget import SolvedPlan
from fedjax_rec.reporting.formatting import format_epsilon
from fedjax_rec.reporting.style import BLUE, GREEN, INK, MUTED, PINK, STYLE, VERMILION, name_axes, new_figure

COLOURS = (BLUE, VERMILION, GREEN, PINK, INK, MUTED)


def budget_figure(solved: SolvedPlan) -> Figure:
    """Noise multiplier of each release, on a logarithmic axis, and epsilon over the releases, phase by phase.

    Args:
      solved: from `budget.solve`.
    """
    points, epsilons = solved.epsilon_curve()
    with matplotlib.rc_context(STYLE):
        figure, (left, right) = new_figure(num_panels=2)
        first, total = 0, sum(phase.rounds for phase in solved.plan.phases)
        before = (0, 0.0)
        for place, phase in enumerate(solved.plan.phases):
            colour, noise = COLOURS[place % len(COLOURS)], solved.phases[phase.name].noise_multipliers
            numbers = np.arange(first + 1, first + phase.rounds + 1)
            look = "o" if phase.rounds == 1 else "-"
            left.plot(numbers, noise, look, color=colour, markersize=4, drawstyle="steps-post")
            middle = first + 0.5 * (1 + phase.rounds)
            side = "left" if middle < 0.15 * total else "right" if middle > 0.85 * total else "center"
            at = {"left": first + 1, "center": middle, "right": first + phase.rounds}[side]
            left.annotate(
                phase.name, (at, noise.max()), xytext=(0, 5), textcoords="offset points", color=colour, ha=side
            )
            mine = (points > first) & (points <= first + phase.rounds)
            right.plot([before[0], *points[mine]], [before[1], *epsilons[mine]], "-", color=colour)
            first += phase.rounds
            before = (points[mine][-1], epsilons[mine][-1])
        left.set_yscale("log")
        left.margins(y=0.18)
        left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        left.yaxis.set_minor_formatter(NullFormatter())
        name_axes(left, x="release", y="noise multiplier")
        right.axhline(solved.plan.epsilon, color=MUTED, linestyle="--", linewidth=1.3)
        right.annotate(
            f"budget {format_epsilon(solved.plan.epsilon)}, planned {format_epsilon(solved.spent.epsilon)}",
            (0, solved.plan.epsilon),
            xytext=(4, 4),
            textcoords="offset points",
            color=MUTED,
        )
        right.set_ylim(0, 1.15 * solved.plan.epsilon)
        name_axes(right, x="release", y="ε spent, jointly")
        for axes in (left, right):
            axes.set_xlim(0, first + 1)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))
    return figure

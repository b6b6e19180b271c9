"""Pictures of a release's risk: each measure before and after, and attacks against what the data is still good for."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fedjax_rec.reporting.style import BLUE, INK, MUTED, STYLE, VERMILION, name_axes, new_figure


class Point(NamedTuple):
    """A release in the picture of risk against utility.

    Attributes:
      name: of the policy.
      utility: ratio of the metric to that of the data as it is.
      risk: share of users who are found, between 0 and 1.
      colour: of a family of policies.
    """

    name: str
    utility: float
    risk: float
    colour: str = BLUE


def found_by(setting: str) -> str:
    """What a setting of the re-identification is called."""
    return "found by partly wrong knowledge" if setting == "partly wrong" else f"found by {setting}"


def risk_bars(report: Mapping[str, Any]) -> Figure:
    """Uniqueness and top-1 re-identification before and after, a pair of bars each, with two standard errors.

    Args:
      report: from `anonymization.risk.risk_report`.
    """
    names, values, errors = [], [[], []], [[], []]
    for m in report["before"]["uniqueness"]:
        names.append(f"unique by {m} items")
        _add(report, values, errors, lambda side, m=m: (side["uniqueness"][m]["share"], side["uniqueness"][m]["error"]))
    for setting in report["before"]["reidentification"]:
        names.append(found_by(setting))

        def top1(side, setting=setting):
            found = side["reidentification"][setting]
            return found["top1"], found["top1_error"]

        _add(report, values, errors, top1)
    places = np.arange(len(names))[::-1]
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure()
        figure.set_size_inches(6.4, 0.9 + 0.36 * len(names))
        figure.subplots_adjust(left=0.4, bottom=0.16, top=0.9)
        for side, (label, colour, shift) in enumerate((("before", MUTED, 0.19), ("after", VERMILION, -0.19))):
            axes.barh(places + shift, values[side], 0.34, color=colour, label=label)
            axes.errorbar(values[side], places + shift, xerr=errors[side], fmt="none", ecolor=INK, elinewidth=0.8)
        axes.set_yticks(places, names)
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, 1.02)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, borderaxespad=0, fontsize=8)
        name_axes(axes, x="share of users", y="")
    return figure


def risk_against_utility(points: Sequence[Point], *, risk: str, utility: str) -> Figure:
    """Each release as a point: to the right is more useful, below is less risky.

    Args:
      points: of the releases; names stand beside them, moved apart where they would meet.
      risk: name of the vertical axis.
      utility: name of the horizontal axis.
    """
    most = max([1.0, *(point.utility for point in points)])
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure(label_share=0.02)
        figure.set_size_inches(7.4, 4.4)
        figure.subplots_adjust(left=0.08, bottom=0.12, top=0.92)
        axes.set_xlim(0, 1.3 * most)
        axes.set_ylim(-0.02, 1.05)
        axes.set_xticks(np.arange(0, most + 0.01, 0.2))
        order = sorted(points, key=lambda point: point.utility)
        for point, height in zip(order, _heights(order), strict=True):
            axes.plot([point.utility], [point.risk], "o", color=point.colour, markersize=5)
            axes.annotate(
                point.name,
                (point.utility, point.risk),
                xytext=(point.utility + 0.02 * most, height),
                textcoords="data",
                color=point.colour,
                fontsize=8,
                va="center",
                arrowprops=None
                if abs(height - point.risk) < 0.03
                else {"arrowstyle": "-", "color": point.colour, "linewidth": 0.5, "shrinkB": 3},
            )
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        name_axes(axes, x=utility, y=risk)
    return figure


def _heights(points: Sequence[Point]) -> list[float]:
    """Heights of names, from left to right, each as near to its point as the names placed before it allow."""
    placed: list[tuple[float, float]] = []
    for point in points:
        near = [height for at, height in placed if abs(at - point.utility) < 0.34]
        steps = sorted(np.arange(-24, 25) * 0.0125, key=abs)
        free = (point.risk + step for step in steps if point.risk + step >= 0)
        height = next((y for y in free if all(abs(y - other) >= 0.05 for other in near)), point.risk)
        placed.append((point.utility, float(height)))
    return [height for _, height in placed]


def _add(report: Mapping[str, Any], values: list[list], errors: list[list], read) -> None:
    for side, name in enumerate(("before", "after")):
        value, error = read(report[name])
        values[side].append(np.nan if value is None else value)
        errors[side].append(0.0 if error is None else 2 * error)

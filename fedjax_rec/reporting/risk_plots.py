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
      name: of what differs within its series, short.
      utility: ratio of the metric to that of the data as it is.
      risk: share of users who are found, between 0 and 1.
      series: policies of a kind are joined by a line, in the order given.
      colour: of the series.
    """

    name: str
    utility: float
    risk: float
    series: str = ""
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
      points: of the releases; points of a series that fall together share a name.
      risk: name of the vertical axis.
      utility: name of the horizontal axis.
    """
    points = _merged(points)
    most = max([1.0, *(point.utility for point in points)])
    series = dict.fromkeys((point.series, point.colour) for point in points)
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure(label_share=0.02)
        figure.set_size_inches(7.4, 4.4)
        figure.subplots_adjust(left=0.08, bottom=0.12, top=0.92)
        axes.set_xlim(0, 1.08 * most)
        axes.set_ylim(-0.03, 1.08)
        axes.set_xticks(np.arange(0, most + 0.01, 0.2))
        for name, colour in series:
            mine = [point for point in points if (point.series, point.colour) == (name, colour)]
            xs, ys = [point.utility for point in mine], [point.risk for point in mine]
            axes.plot(xs, ys, "o-", color=colour, markersize=5, linewidth=1, label=name or None)
        for point, (x, y, side) in zip(points, _label_places(points, most), strict=True):
            axes.text(x, y, point.name, color=point.colour, fontsize=8, va="center", ha=side)
        if any(name for name, _ in series):
            axes.legend(loc="upper left", frameon=False, fontsize=8)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        name_axes(axes, x=utility, y=risk)
    return figure


def _merged(points: Sequence[Point]) -> list[Point]:
    """Points of a series at the same place become one."""
    merged: list[Point] = []
    for point in points:
        same = [
            place
            for place, other in enumerate(merged)
            if other.series == point.series
            and max(abs(other.utility - point.utility), abs(other.risk - point.risk)) < 0.01
        ]
        if same:
            merged[same[0]] = merged[same[0]]._replace(name=f"{merged[same[0]].name}, {point.name}")
        else:
            merged.append(point)
    return merged


def _label_places(points: Sequence[Point], most: float) -> list[tuple[float, float, str]]:
    """Where each name goes, beside its point where no other point or name is: x, y and how it is aligned."""
    taken = [(point.utility - 0.008 * most, point.utility + 0.008 * most, point.risk) for point in points]
    places = []
    for point in points:
        width, gap = 0.0115 * most * len(point.name), 0.016 * most
        options = []
        for dy in (0.0, 0.04, -0.04, 0.075, -0.075):
            right, left = point.utility + gap, point.utility - gap
            options.append((right, point.risk + dy, "left", right, right + width))
            options.append((left, point.risk + dy, "right", left - width, left))
        fits = [option for option in options if option[3] > 0 and option[4] < 1.08 * most and option[1] > -0.02]

        def crowd(option):
            return sum(low < option[4] and high > option[3] and abs(y - option[1]) < 0.038 for low, high, y in taken)

        x, y, side, low, high = min(fits or options, key=crowd)
        taken.append((low, high, y))
        places.append((x, y, side))
    return places


def _add(report: Mapping[str, Any], values: list[list], errors: list[list], read) -> None:
    for side, name in enumerate(("before", "after")):
        value, error = read(report[name])
        values[side].append(np.nan if value is None else value)
        errors[side].append(0.0 if error is None else 2 * error)

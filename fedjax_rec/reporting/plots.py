"""The figures of a run and of a data set, each from plain arrays to a matplotlib `Figure` for `style.to_svg`."""

import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from fedjax_rec.reporting.formatting import format_epsilon, format_number
from fedjax_rec.reporting.style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    PINK,
    STYLE,
    VERMILION,
    name_axes,
    new_figure,
    spread,
    thin_out,
)

LABEL_SHARE = 0.165  # of a figure's width, for the names beside its curves
REFERENCE_LOOKS = {"non-private": (GREEN, "--"), "popularity": (VERMILION, "-."), "DP popularity": (PINK, ":")}


def quality_curve(
    rounds: Sequence[int],
    values: Sequence[float],
    *,
    metric: str,
    references: Mapping[str, float],
    best_round: int | None = None,
) -> Figure:
    """A validation metric against rounds, with references as horizontal lines.

    Args:
      rounds: [n] rounds at which the run was validated.
      values: [n] the metric.
      metric: its name, for the axis.
      references: {label: value}, e.g. {"popularity": .064, "non-private": .092}.
      best_round: marked with a dot if it is among `rounds`.
    """
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure(label_share=LABEL_SHARE)
        _line(axes, rounds, values, colour=BLUE)
        if best_round is not None and best_round in list(rounds):
            axes.plot([best_round], [values[list(rounds).index(best_round)]], "o", color=BLUE, markersize=5)
        name_axes(axes, x="round", y=f"{metric} on validation")
        _round_axis(axes)
        _references(axes, values, references)
    return figure


def quality_against_epsilon(
    epsilons: Sequence[float], values: Sequence[float], *, metric: str, references: Mapping[str, float]
) -> Figure:
    """The same validation metric against the epsilon spent when it was reached: what more privacy loss buys.

    Args:
      epsilons: [n] epsilon after each validated round.
      values: [n] the metric.
      metric: its name.
      references: {label: value} for horizontal lines.
    """
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure(label_share=LABEL_SHARE)
        _line(axes, epsilons, values, colour=BLUE)
        name_axes(axes, x="ε spent", y=f"{metric} on validation")
        axes.set_xlim(left=0)
        _references(axes, values, references)
    return figure


def epsilon_curve(rounds: Sequence[int], epsilons: Sequence[float], *, budget: float | None = None) -> Figure:
    """The epsilon spent against rounds, with the budget as a line.

    Args:
      rounds: [n].
      epsilons: [n] epsilon of everything released up to that round.
      budget: the epsilon that the run may not exceed, if it has one.
    """
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure(label_share=LABEL_SHARE)
        _line(axes, rounds, epsilons, colour=BLUE)
        labels = [(f"ε = {format_epsilon(float(epsilons[-1]))}", float(epsilons[-1]), BLUE)]
        if budget is not None:
            axes.axhline(budget, color=VERMILION, linestyle="--", linewidth=1.3)
            labels.append((f"budget {format_epsilon(budget)}", float(budget), VERMILION))
        name_axes(axes, x="round", y="ε spent")
        _round_axis(axes)
        from_zero(axes, [value for _, value, _ in labels])
        label_ends(axes, labels)
    return figure


def loss_curve(rounds: Sequence[int], losses: Sequence[float]) -> Figure:
    """The training loss, averaged over each round's cohort, against rounds.

    Args:
      rounds: [n].
      losses: [n].
    """
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure(label_share=LABEL_SHARE)
        _line(axes, rounds, losses, colour=BLUE, width=1.2)
        name_axes(axes, x="round", y="training loss, mean over the cohort")
        _round_axis(axes)
        axes.margins(y=0.1)
        short_ticks(axes.yaxis)
        label_ends(axes, [(format_number(float(losses[-1])), float(losses[-1]), BLUE)])
    return figure


def user_histogram(
    edges: Sequence[float], counts: Sequence[int], *, metric: str, percentiles: Mapping[str, float]
) -> Figure:
    """How a metric is spread over users.

    Args:
      edges: [bins + 1] edges of the bins.
      counts: [bins] users in each.
      metric: its name.
      percentiles: {label: value} marked by vertical lines, e.g. {"p10": 0.0, "p50": .21, "p90": 1.0, "mean": .24}.
    """
    edges, shares = np.asarray(edges, float), np.asarray(counts, float) / max(1.0, float(np.sum(counts)))
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure()
        axes.bar(edges[:-1], shares, width=np.diff(edges), align="edge", color=BLUE, edgecolor="none")
        top = 1.35 * max(float(shares.max()), 1e-9)
        marks = _merge_marks(percentiles, tolerance=0.02 * float(edges[-1] - edges[0]))
        for rank, (value, label) in enumerate(marks):
            height = top * (0.97 - 0.075 * rank)
            axes.plot([value, value], [0, height], color=INK, linewidth=1, linestyle=(0, (2, 2)))
            late = value > edges[0] + 0.6 * (edges[-1] - edges[0])
            axes.annotate(
                label,
                (value, height),
                xytext=(-4 if late else 4, 0),
                textcoords="offset points",
                ha="right" if late else "left",
                va="top",
            )
        axes.set_ylim(0, top)
        name_axes(axes, x=f"{metric} of a user", y="share of users")
        axes.grid(visible=False, axis="x")
        short_ticks(axes.xaxis)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.yaxis.set_major_locator(MaxNLocator(5))
    return figure


def exposure_curve(
    cumulative_share: Sequence[float], *, interactions_share: Sequence[float] | None = None, k: int = 10
) -> Figure:
    """Who gets recommended: the Lorenz curve of exposure over items, from the most to the least popular.

    The diagonal is equal exposure of every item; the further above it, the more the popular items take.

    Args:
      cumulative_share: [n], rising from 0 to 1: the share of all recommended slots that goes to the i/(n-1) most
        popular items.
      interactions_share: [m], the same curve of the training interactions, for comparison.
      k: how many items each user is recommended.
    """
    shares = np.asarray(cumulative_share, float)
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure()
        said = [(f"this run: {_top_tenth(shares)} of all top-{k} slots", BLUE)]
        axes.plot(np.linspace(0, 1, len(shares)), shares, color=BLUE)
        if interactions_share is not None:
            observed = np.asarray(interactions_share, float)
            axes.plot(np.linspace(0, 1, len(observed)), observed, color=VERMILION, linestyle="--", linewidth=1.3)
            said.append((f"training data: {_top_tenth(observed)} of interactions", VERMILION))
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        said.append(("equal exposure: 10 %", MUTED))
        axes.axvline(0.1, color=MUTED, linewidth=1)
        said.insert(0, ("the most popular 10 % of items take", INK))
        for rank, (text, colour) in enumerate(reversed(said)):  # below the diagonal, where no curve comes
            axes.text(0.985, 0.05 + 0.078 * rank, text, color=colour, ha="right")
        name_axes(axes, x="items, most popular first", y=f"cumulative share of top-{k} slots")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure


def activity_popularity(counts_per_user: np.ndarray, item_counts: np.ndarray) -> Figure:
    """Activity of users and popularity of items, as counts against rank on logarithmic axes.

    Args:
      counts_per_user: int [num_users], interactions of each user.
      item_counts: int [num_items], interactions of each item.

    Raises:
      ValueError: if either has no positive count.
    """
    with matplotlib.rc_context(STYLE):
        figure, (left, right) = new_figure(num_panels=2)
        _rank_plot(left, counts_per_user, who="user", colour=BLUE)
        _rank_plot(right, item_counts, who="item", colour=VERMILION)
    return figure


def _rank_plot(axes: Axes, counts: np.ndarray, *, who: str, colour: str) -> None:
    """Counts against rank, log-log, with the median and the share of the top tenth said beside them."""
    counts = np.asarray(counts)
    ranked = np.sort(counts[counts > 0])[::-1]
    if ranked.size == 0:
        raise ValueError(f"There is nothing to plot: none of the {counts.size} {who}s has an interaction.")
    places = np.unique(np.geomspace(1, ranked.size, 300).astype(int)) - 1
    axes.loglog(places + 1, ranked[places], color=colour)
    top_share = float(ranked[: max(1, counts.size // 10)].sum() / ranked.sum())
    said = [
        f"median {np.median(counts):,.0f}, most {ranked[0]:,} interactions",
        f"top 10 % of {who}s: {100 * top_share:.0f} % of interactions",
    ]
    said += [f"{counts.size - ranked.size:,} {who}s without any"] if ranked.size < counts.size else []
    axes.text(0.04, 0.05, "\n".join(said), transform=axes.transAxes, va="bottom", linespacing=1.4)
    name_axes(axes, x=f"rank of the {who}", y=f"interactions of the {who}")
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(_whole_number)
    axes.yaxis.set_major_formatter(_whole_number)
    axes.set_ylim(bottom=min(0.7, 0.7 * float(ranked[-1])))


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], *, colour: str, width: float = 1.8) -> None:
    """A curve without its non-finite points; a dot if only one is left."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    kept = np.isfinite(x) & np.isfinite(y)
    x, y = thin_out(x[kept], y[kept])
    axes.plot(x, y, "o" if len(x) == 1 else "-", color=colour, linewidth=width, markersize=5)


def _references(axes: Axes, values: Sequence[float], references: Mapping[str, float]) -> None:
    """Horizontal lines to compare a run's quality with, and the names of all lines."""
    for name, value in references.items():
        colour, dashes = _look(name)
        axes.axhline(value, color=colour, linestyle=dashes, linewidth=1.3)
    from_zero(axes, [*values, *references.values()])
    short_ticks(axes.yaxis)
    others = [(name, float(value), _look(name)[0]) for name, value in references.items()]
    label_ends(axes, [("this run", float(values[-1]), BLUE), *others])


def _look(reference: str) -> tuple[str, object]:
    """Colour and dashes of a reference line."""
    return REFERENCE_LOOKS.get(reference, (MUTED, (0, (1, 2))))


def from_zero(axes: Axes, values: Sequence[float]) -> None:
    """Start the y axis at zero, so that heights compare as ratios, and leave room above the highest value."""
    axes.set_ylim(0, 1.08 * max((value for value in values if np.isfinite(value)), default=1.0) or 1.0)


def _top_tenth(cumulative_share: np.ndarray) -> str:
    """What the first tenth of the items holds, as a percentage."""
    share = np.interp(0.1, np.linspace(0, 1, len(cumulative_share)), cumulative_share)
    return f"{100 * share:.0f} %"


def label_ends(axes: Axes, labels: Sequence[tuple[str, float, str]]) -> None:
    """Name curves at the right edge, in their colours and clear of each other: no legend to match by eye."""
    low, high = axes.get_ylim()
    labels = [label for label in labels if not np.isnan(label[1])]
    heights = spread([min(max(height, low), high) for _, height, _ in labels], gap=0.075 * (high - low))
    for (name, _, colour), height in zip(labels, heights, strict=True):
        axes.annotate(
            name,
            (1.0, height),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            annotation_clip=False,
        )


def _merge_marks(marks: Mapping[str, float], *, tolerance: float) -> list[tuple[float, str]]:
    """Vertical marks from left to right; those closer than `tolerance` share one line and one label."""
    merged: list[tuple[float, list[str]]] = []
    for name, value in sorted(marks.items(), key=lambda item: item[1]):
        if merged and value - merged[-1][0] <= tolerance:
            merged[-1][1].append(f"{name} {_short(value, decimals=3)}")
        else:
            merged.append((value, [f"{name} {_short(value, decimals=3)}"]))
    return [(value, ", ".join(names)) for value, names in merged]


def _round_axis(axes: Axes) -> None:
    """Rounds are whole numbers."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))
    axes.margins(x=0.01)


def short_ticks(axis: Axis) -> None:
    """Tick labels with equally many decimals and no leading zero: .05, .10; for an axis whose limits are final."""
    ticks = axis.get_ticklocs()
    if len(ticks) < 2 or max(map(abs, ticks)) >= 1e4:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        return
    step = float(ticks[1] - ticks[0])
    decimals = next((count for count in range(6) if abs(step * 10**count - round(step * 10**count)) < 1e-6), 6)
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value, decimals=decimals) if value else "0"))


def _short(value: float, *, decimals: int) -> str:
    """A number without a leading zero."""
    text = f"{value:.{decimals}f}"
    return "0" if float(text) == 0 else re.sub(r"^(-?)0\.", r"\1.", text)


@FuncFormatter
def _whole_number(value: float, _position: int | None) -> str:
    """Tick labels of counts: 1,000 rather than a power of ten."""
    return f"{value:,.0f}" if value >= 1 else ""

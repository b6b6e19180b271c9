"""Figures of studies: one curve a method, with the range over its seeds as a band."""

import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from fedjax_rec.reporting.plots import LABEL_SHARE, from_zero, label_ends, short_ticks
from fedjax_rec.reporting.style import BLUE, GREEN, MUTED, PINK, STYLE, VERMILION, name_axes, new_figure

COLOURS = (BLUE, GREEN, VERMILION, "#b07c00", PINK, "#00718f", MUTED)


def bands(
    curves: Mapping[str, Sequence[tuple[float, Sequence[float]]]],
    *,
    x: str,
    y: str,
    reference: tuple[str, float] | None = None,
) -> Figure:
    """A metric against a few values of something, one curve a method: means, and from least to largest as a band.

    Args:
      curves: {method: [(x, values over seeds), ...]}. The distinct x stand at equal distances, in order, infinity last.
      x: name of what is varied.
      y: name of the metric.
      reference: a horizontal line, by name and height.

    Raises:
      ValueError: for more methods than there are colours to tell apart.
    """
    if len(curves) > len(COLOURS):
        raise ValueError(f"{len(curves)} curves are more than the {len(COLOURS)} that can be told apart; draw fewer.")
    places = sorted({point for curve in curves.values() for point, _ in curve})
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure(label_share=LABEL_SHARE + 0.06)
        ends, highest = [], []
        for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
            curve = sorted(curve)
            at = [places.index(point) for point, _ in curve]
            means = [float(np.mean(values)) for _, values in curve]
            low, high = ([float(pick(values)) for _, values in curve] for pick in (min, max))
            axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(at, means, "o-", color=colour, markersize=3.5)
            ends.append((name, means[-1], colour))
            highest += high
        if reference is not None:
            name, height = reference
            axes.axhline(height, color=MUTED, linestyle=(0, (1, 2)), linewidth=1.3)
            ends.append((name, height, MUTED))
            highest.append(height)
        axes.set_xticks(range(len(places)), [_tick(point) for point in places])
        name_axes(axes, x=x, y=y)
        from_zero(axes, highest)
        short_ticks(axes.yaxis)
        label_ends(axes, ends)
    return figure


def _tick(value: float) -> str:
    """A tick's label: ∞ where there is no noise, thousands apart elsewhere."""
    return "∞" if math.isinf(value) else f"{value:,g}"

"""An explanation as a picture: a bar for each item of the history that matters."""

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedjax_rec.interpretation.explain import Explanation
from fedjax_rec.interpretation.sentences import Naming, signed
from fedjax_rec.reporting.style import BLUE, INK, MUTED, STYLE, VERMILION

MOST_BARS, MOST_LETTERS = 8, 34


def attribution_bars(explanation: Explanation, name: Naming) -> Figure:
    """What each item of the history adds, the largest effects first; the rest of the history is one bar.

    Args:
      explanation: of one item.
      name: the title of an item, by id.
    """
    order = np.argsort(-np.abs(explanation.values), kind="stable")
    shown, rest = order[:MOST_BARS], order[MOST_BARS:]
    labels = [_short(name(int(explanation.history[place]))) for place in shown]
    values = [float(explanation.values[place]) for place in shown]
    if len(rest):
        labels.append(f"{len(rest)} other item{'s' if len(rest) > 1 else ''}")
        values.append(float(explanation.values[rest].sum()))
    heights = np.arange(len(values))[::-1]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.0, 0.5 + 0.25 * len(values)))
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        figure.subplots_adjust(left=0.46, right=0.88, bottom=0.3 / figure.get_figheight(), top=0.97)
        colours = [BLUE if value >= 0 else VERMILION for value in values]
        bars = axes.barh(heights, values, height=0.62, color=colours)
        for bar, place in zip(bars, heights, strict=True):
            bar.set_alpha(0.45 if len(rest) and place == 0 else 1.0)
        for value, place in zip(values, heights, strict=True):
            side, gap = ("left", 3) if value >= 0 else ("right", -3)
            spot = {"xytext": (gap, 0), "textcoords": "offset points"}
            axes.annotate(signed(value), (value, place), ha=side, va="center", color=MUTED, fontsize=8, **spot)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.set_yticks(heights, labels)
        axes.tick_params(axis="y", labelcolor=INK, length=0)
        axes.tick_params(axis="x", labelbottom=False, length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.grid(False)
        axes.margins(x=0.35 if min(values) < 0 else 0.2)
    return figure


def _short(title: str) -> str:
    return title if len(title) <= MOST_LETTERS else title[: MOST_LETTERS - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"

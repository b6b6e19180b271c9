"""The one look of every figure: palette, type and axes; and a figure as SVG or PNG without pyplot's global state."""

import io
import itertools
import re

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito 2008, "Color Universal Design": told apart with every common colour blindness.
BLUE, VERMILION, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#b8538f"
INK, MUTED, GRID = "#1f2430", "#646b79", "#e3e6eb"

STYLE = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a data set's title with a dollar sign is a title, not a formula
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",  # text stays text: small files, the reader's font, and it can be searched and copied
    "svg.hashsalt": "fedjax-rec",  # the same figure gives the same file
}

MAX_POINTS = 400


def new_figure(*, num_panels: int = 1, label_share: float = 0.0) -> tuple[Figure, list[Axes]]:
    """An empty figure of 5 x 3 inches a panel, in the shared style.

    Call it, and draw, within `matplotlib.rc_context(STYLE)`. The margins are fixed, not fitted, so that the axes of
    figures that stand side by side line up.

    Args:
      num_panels: panels side by side.
      label_share: share of the width kept free on the right for the names of curves.
    """
    figure = Figure(figsize=(5.0 * num_panels, 3.0))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, num_panels, squeeze=False)[0]
    left, right = 0.105 / num_panels, 1 - 0.045 / num_panels - label_share
    figure.subplots_adjust(left=left, right=right, bottom=0.165, top=0.89, wspace=0.2)
    return figure, list(axes)


def name_axes(axes: Axes, *, x: str, y: str) -> None:
    """Name both axes; the y name stands level above its axis, where it reads without tilting the head."""
    axes.set_xlabel(x, loc="right")
    axes.set_title(y, loc="left", fontsize=9, color=MUTED, pad=8)


def to_svg(figure: Figure) -> str:
    """The figure as a standalone SVG document; the same figure always gives the same text."""
    out = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return re.sub(r"<metadata>.*?</metadata>\s*", "", out.getvalue(), flags=re.DOTALL)


def to_png(figure: Figure, *, dots_per_inch: int = 160) -> bytes:
    """The figure as a PNG on white."""
    out = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(out, format="png", dpi=dots_per_inch, facecolor="white")
    return out.getvalue()


def thin_out(x: np.ndarray, y: np.ndarray, *, max_points: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `max_points` points of a long series that keep its ends and the peaks of every stretch.

    Args:
      x: [n], in drawing order.
      y: [n] floats without NaN.
      max_points: the most points to keep, at least 4.

    Returns:
      The kept x and y: the first and last point, and the lowest and highest of each of equal stretches.
    """
    if len(x) <= max_points:
        return x, y
    edges = np.linspace(0, len(x), (max_points - 2) // 2 + 1).astype(int)
    stretches = [(start, y[start:stop]) for start, stop in itertools.pairwise(edges)]
    kept = {0, len(x) - 1}
    kept.update(start + int(part.argmin()) for start, part in stretches)
    kept.update(start + int(part.argmax()) for start, part in stretches)
    places = sorted(kept)
    return x[places], y[places]


def spread(heights: list[float], *, gap: float) -> list[float]:
    """Move labels apart until neighbours are `gap` away, each as little as possible and in the same order.

    Args:
      heights: where the labels want to be.
      gap: the least distance between two of them.

    Returns:
      Where they go, in the order of the input.
    """
    order = sorted(range(len(heights)), key=heights.__getitem__)
    groups: list[tuple[list[int], float]] = []  # labels that touch, and the centre of the stack they form
    for place in order:
        members, centre = [place], heights[place]
        while groups and groups[-1][1] + gap * len(groups[-1][0]) / 2 > centre - gap * len(members) / 2:
            members = groups.pop()[0] + members
            centre = sum(heights[member] for member in members) / len(members)
        groups.append((members, centre))
    placed = {
        member: centre + gap * (rank - (len(members) - 1) / 2)
        for members, centre in groups
        for rank, member in enumerate(members)
    }
    return [placed[place] for place in range(len(heights))]

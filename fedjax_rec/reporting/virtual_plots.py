"""Real against virtual users, in three pictures: who is popular, how long histories are, what occurs together."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.models.ease import item_gram
from fedjax_rec.reporting.style import BLUE, INK, MUTED, STYLE, VERMILION, name_axes, new_figure

MOST_PAIRS = 3000


def popularity_against(real: Interactions, virtual: Interactions) -> Figure:
    """Share of users who touched each item, items in the order of their real popularity, on logarithmic axes.

    Args:
      real: of real users.
      virtual: on the same catalogue.
    """
    shares = [data.item_counts / max(np.count_nonzero(data.counts_per_user), 1) for data in (real, virtual)]
    order = np.argsort(-shares[0], kind="stable")
    places = np.arange(1, len(order) + 1)
    floor = min(0.5 / max(np.count_nonzero(data.counts_per_user), 1) for data in (real, virtual))
    correlation = _rank_correlation(*shares)
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure()
        axes.loglog(places, np.maximum(shares[1][order], floor), ".", color=VERMILION, markersize=2.2, alpha=0.6)
        axes.loglog(places, np.maximum(shares[0][order], floor), color=BLUE, linewidth=1.6)
        said = [
            (f"rank correlation {correlation:.2f}", INK),
            (f"virtual: {np.count_nonzero(virtual.item_counts):,} of {len(order):,} items occur", VERMILION),
            (f"real: {np.count_nonzero(real.item_counts):,} items occur", BLUE),
        ]
        _say(axes, said)
        name_axes(axes, x="items, most popular among real users first", y="share of users who touched the item")
        _plain_logarithms(axes)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    return figure


def lengths_against(real: Interactions, virtual: Interactions) -> Figure:
    """Share of users whose history is at least so long.

    Args:
      real: of real users.
      virtual: of virtual ones.
    """
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure()
        said = []
        for name, data, colour, look in (("real", real, BLUE, "-"), ("virtual", virtual, VERMILION, "--")):
            lengths = np.sort(data.counts_per_user[data.counts_per_user > 0])
            points, first = np.unique(lengths, return_index=True)
            axes.plot(points, 1 - first / len(lengths), look, color=colour, drawstyle="steps-pre", linewidth=1.5)
            said.append((f"{name}: mean {lengths.mean():.0f}, median {np.median(lengths):.0f} items", colour))
        axes.set_xscale("log")
        _say(axes, said)
        name_axes(axes, x="items in the history", y="share of users with at least as many")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure


def co_occurrence_against(real: Interactions, virtual: Interactions, *, num_items: int = 200) -> Figure:
    """The cosine of each pair of the most popular items, real against virtual: on the diagonal where they agree.

    Args:
      real: of real users.
      virtual: on the same catalogue.
      num_items: the pairs of so many most popular real items are drawn, at most `MOST_PAIRS` of them.
    """
    top = np.argsort(-real.item_counts, kind="stable")[:num_items]
    cosines = [_cosines(data, top) for data in (real, virtual)]
    correlation = float(np.corrcoef(*cosines)[0, 1]) if min(c.std() for c in cosines) > 0 else float("nan")
    drawn = np.random.default_rng(0).permutation(len(cosines[0]))[:MOST_PAIRS]
    limit = 1.05 * max(float(c.max(initial=0.01)) for c in cosines)
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure()
        axes.plot([0, limit], [0, limit], color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        axes.plot(cosines[0][drawn], cosines[1][drawn], ".", color=VERMILION, markersize=2, alpha=0.35, rasterized=True)
        _say(axes, [(f"correlation over pairs of the top {len(top)} items: {correlation:.2f}", INK)], low=False)
        axes.set_xlim(0, limit)
        axes.set_ylim(0, limit)
        name_axes(axes, x="cosine of two items among real users", y="cosine among virtual users")
    return figure


def _cosines(data: Interactions, items: np.ndarray) -> np.ndarray:
    gram = item_gram(data)[np.ix_(items, items)]
    norms = np.sqrt(np.maximum(np.diag(gram), 1e-12))
    return (gram / np.outer(norms, norms))[np.triu_indices(len(items), 1)]


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic) if a.std() > 0 and b.std() > 0 else float("nan")


def _say(axes, lines, *, low: bool = True) -> None:
    for rank, (text, colour) in enumerate(lines):
        height = 0.06 + 0.078 * rank if low else 0.93 - 0.078 * rank
        axes.text(0.03, height, text, color=colour, transform=axes.transAxes)


def _plain_logarithms(axes) -> None:
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))

"""The side-by-side result for people: a table with what ran where, and a plot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks import workload
from benchmarks.contestants import Contestant


@dataclass(frozen=True)
class Result:
    """What was measured of one contestant at one number of items.

    Attributes:
      name: the contestant's.
      items: rows of the item table.
      seconds: every counted time of a round, sorted.
      median_s: their median, seconds; None if there is none.
      times_ours: `median_s` as a multiple of our own private round's; None if either is missing.
      max_abs_difference: from the NumPy reference, after one round without noise; None if it was not compared.
      clients: in the round.
      device: that it ran on.
      versions: of its packages.
      error: why a turn failed, or None.
    """

    name: str
    items: int
    seconds: tuple[float, ...]
    median_s: float | None
    times_ours: float | None
    max_abs_difference: float | None
    clients: int | None
    device: str | None
    versions: Mapping[str, str]
    error: str | None


def markdown(contestants: Sequence[Contestant], results: Sequence[Result], *, stamp: Mapping[str, Any]) -> str:
    """The table, how it was measured, and what each program is.

    Args:
      contestants: the rows, in this order.
      results: one for each contestant and number of items.
      stamp: date, commit, processor, cpus, load, system, turns, rounds and warmup.
    """
    columns = sorted({result.items for result in results})
    cells = {(result.name, result.items): result for result in results}
    clients = next((result.clients for result in results if result.clients), "All")
    head = ["program", "privacy", *(f"{items:,} items: s | ratio" for items in columns), "off the reference"]
    lines = [
        "# One round, side by side",
        "",
        "Written by `python -m benchmarks.peers`; do not edit.",
        "",
        f"{clients} clients, one local epoch each, {workload.DIM} dimensions, batches of {workload.BATCH_SIZE}.",
        "Seconds are the median of a round; the ratio is to fedjax_rec with clipping and noise. Off the reference: the "
        "largest difference of any parameter from a NumPy reference (float64) after one round without noise.",
        "",
        f"| {' | '.join(head)} |",
        f"|---|---|{'---:|---:|' * len(columns)}---:|",
    ]
    for contestant in contestants:
        mine = [cells[contestant.name, items] for items in columns]
        differences = [result.max_abs_difference for result in mine if result.max_abs_difference is not None]
        row = [contestant.label, contestant.privacy]
        row += [cell for result in mine for cell in (_seconds(result.median_s), _ratio(result.times_ours))]
        lines.append(f"| {' | '.join(row)} | {f'{max(differences):.0e}' if differences else '-'} |")
    lines += [
        "",
        f"Programs took turns: {stamp['turns']} for each, of {stamp['rounds']} rounds, the first {stamp['warmup']} not "
        f"counted. {stamp['processor']}, {stamp['cpus']} CPUs with a load of {stamp['load']:.1f} before the start, "
        f"{stamp['system']}; commit {stamp['commit']}; {stamp['date']}.",
        "",
    ]
    for contestant in contestants:
        mine = [cells[contestant.name, items] for items in columns]
        versions = ", ".join(f"{package} {number}" for package, number in mine[0].versions.items())
        parts = [f"on {mine[0].device}" if mine[0].device else "", versions, contestant.note]
        parts += [f"**failed at {result.items:,} items**: {result.error}" for result in mine if result.error]
        lines.append(f"- {contestant.label} ({contestant.privacy}): " + "; ".join(part for part in parts if part) + ".")
    return "\n".join(lines) + "\n"


def plot(contestants: Sequence[Contestant], results: Sequence[Result], path: Path) -> None:
    """Writes an SVG: a panel for each number of items, a bar for each contestant, one logarithmic scale of seconds.

    Args:
      contestants: the bars, from the top.
      results: one for each contestant and number of items, at least one with a median.
      path: the file to write.
    """
    columns = sorted({result.items for result in results})
    cells = {(result.name, result.items): result for result in results}
    medians = [result.median_s for result in results if result.median_s]
    labels = [f"{c.label}\n(no privacy)" if c.privacy == "none" else f"{c.label}\n(clip + noise)" for c in contestants]
    # Text stays text, so that the file is small and can be searched; the fixed salt makes equal plots equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "peers", "font.size": 9}):
        figure = Figure(figsize=(1.6 + 3.9 * len(columns), 0.9 + 0.5 * len(contestants)), layout="constrained")
        panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
        for panel, items in zip(panels, columns, strict=True):
            for place, contestant in enumerate(contestants):
                result = cells[contestant.name, items]
                if not result.median_s:
                    continue
                ours = contestant.family == "fedjax_rec"
                ratio = "" if ours or not result.times_ours else f"  ({_ratio(result.times_ours)} ours)"
                panel.barh(place, result.median_s, height=0.6, color="#2a6f97" if ours else "#adb5bd")
                panel.text(result.median_s * 1.15, place, f"{_seconds(result.median_s)} s{ratio}", va="center")
            panel.set_title(f"{items:,} items", loc="left", fontsize=10)
            panel.set_xlabel("seconds a round, logarithmic")
            panel.set_xscale("log")
            panel.set_xlim(min(medians) / 3, max(medians) * 60)  # room for the words beside the longest bar
            panel.set_yticks(range(len(contestants)), labels)
            panel.set_ylim(len(contestants) - 0.5, -0.5)
            panel.tick_params(axis="y", length=0)
            panel.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _seconds(value: float | None) -> str:
    """Three or four digits, or a dash."""
    return "-" if value is None else f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 1 else f"{value:.2f}"


def _ratio(value: float | None) -> str:
    """Two digits and more, or a dash."""
    return "-" if value is None else f"{value:.1f}x" if value < 10 else f"{value:.0f}x"

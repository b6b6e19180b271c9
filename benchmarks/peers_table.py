"""The side-by-side result for people: a table with what ran where, and a plot."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks import workload
from benchmarks.contestants import Contestant


def markdown(contestants: Sequence[Contestant], summary: Sequence[Row], *, stamp: Row, config: Config) -> str:
    """The table, what ran, and where."""
    columns = sorted({row["items"] for row in summary})
    cells = {(row["name"], row["items"]): row for row in summary}
    clients = next((row["clients"] for row in summary if "clients" in row), "all")
    lines = [
        "# One round, side by side",
        "",
        "Written by `python -m benchmarks.peers`; do not edit.",
        f"{clients} clients, one local epoch, 32 dimensions, batches of {workload.BATCH_SIZE}; median seconds a round, and how "
        "many times the round of fedjax_rec with clipping and noise that is.",
        "",
        "| program | privacy | "
        + " | ".join(f"{items:,} items | ratio" for items in columns)
        + " | off the reference by |",
        "|---|---|" + "---:|---:|" * len(columns) + "---:|",
    ]
    for contestant in contestants:
        mine = [cells[contestant.name, items] for items in columns]
        differences = [row["max_abs_difference"] for row in mine if row["max_abs_difference"] is not None]
        timed = [f"{_seconds(row['median_s'])} | {_ratio(row['times_ours'])}" for row in mine]
        checked = f"{max(differences):.1e}" if differences else "-"
        lines.append(f"| {contestant.label} | {contestant.privacy} | " + " | ".join([*timed, checked]) + " |")
    lines += [
        "",
        '"Off the reference by" is the largest absolute difference of any parameter from a NumPy reference in float64, after '
        "one round without noise.",
        "",
        f"Each program: {config.turns} turns of {config.rounds} rounds, in alternation; the first {config.warmup} of a turn "
        "not counted.",
        f"Machine: {stamp['processor']}, {stamp['cpus']} CPUs, {stamp['system']}. Commit {stamp['commit']}, {stamp['date']}.",
        "",
    ]
    for contestant in contestants:
        row = cells[contestant.name, columns[0]]
        versions = ", ".join(f"{package} {number}" for package, number in row.get("versions", {}).items())
        parts = [f"device {row['device']}" if "device" in row else "", versions, contestant.note]
        failures = {items: cells[contestant.name, items].get("error") for items in columns}
        parts += [f"**failed at {items:,} items**: {error}" for items, error in failures.items() if error]
        lines.append(f"- {contestant.label}: " + "; ".join(part for part in parts if part))
    return "\n".join(lines) + "\n"


def plot(contestants: Sequence[Contestant], summary: Sequence[Row], path: Path) -> None:
    """Writes an SVG with one panel for each number of items: a bar for each program on one logarithmic scale of seconds."""
    columns = sorted({row["items"] for row in summary})
    cells = {(row["name"], row["items"]): row for row in summary}
    slowest = max(row["median_s"] for row in summary if row["median_s"])
    fastest = min(row["median_s"] for row in summary if row["median_s"])
    look = {"svg.fonttype": "none", "svg.hashsalt": "peers", "font.size": 10, "font.family": "sans-serif"}
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(4.4 * len(columns) + 1.4, 0.42 * len(contestants) + 1.3), layout="constrained")
        for panel, items in zip(figure.subplots(1, len(columns), sharey=True, squeeze=False)[0], columns, strict=True):
            for place, contestant in enumerate(contestants):
                row = cells[contestant.name, items]
                if row["median_s"] is None:
                    continue
                ours = contestant.family == "fedjax_rec"
                panel.barh(place, row["median_s"], height=0.62, color="#1f6f8b" if ours else "#b8bec6")
                words = f" {_seconds(row['median_s'])} s" + (f"  ({_ratio(row['times_ours'])})" if not ours else "")
                panel.text(row["median_s"], place, words, va="center", fontsize=9)
            panel.set_xscale("log")
            panel.set_xlim(fastest / 2, slowest * 20)  # room for the words right of the longest bar
            panel.set_yticks(range(len(contestants)), [f"{c.label}\n" * 0 + c.label for c in contestants])
            panel.set_ylim(len(contestants) - 0.4, -0.6)
            panel.set_title(f"{items:,} items", loc="left", fontsize=10)
            panel.set_xlabel("seconds a round (log scale)")
            panel.spines[["top", "right", "left"]].set_visible(False)
            panel.tick_params(axis="y", length=0)
        figure.savefig(path, format="svg", metadata={"Date": None})


def write(out: Path, contestants: Sequence[Contestant], summary: Sequence[Row], *, stamp: Row, config: Config) -> None:
    """Writes peers.jsonl, peers.md and peers.svg into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "peers.jsonl").write_text("".join(json.dumps(row | stamp) + "\n" for row in summary))
    (out / "peers.md").write_text(markdown(contestants, summary, stamp=stamp, config=config))
    if any(row["median_s"] for row in summary):
        plot(contestants, summary, out / "peers.svg")



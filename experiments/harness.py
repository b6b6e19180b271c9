"""What every table of published results shares: run rows over seeds, keep each run as a line, write the page.

A table is a list of `Row`: what to run, what was published and by whom it was seen, how far off still counts as
reproduced. Each run is appended to results/NAME.jsonl; results/NAME.md and NAME.tex are made of those lines and of
nothing else, so a table can be filled row by row, on several machines.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedjax_rec.reporting.formatting import MISSING
from fedjax_rec.reporting.tables import Table, to_latex, to_markdown
from fedjax_rec.runs.stamp import stamp

RESULTS = Path(__file__).parent / "results"
SOURCES = {
    "primary": "",  # seen in the authors' code, log or page
    "digest": " (as others quote it)",
    "unverified": " (unverified)",
}


@dataclass(frozen=True)
class Published:
    """A number that somebody printed.

    Attributes:
      value: in the metric's own unit.
      tolerance: how far off a mean may be and still count as reproduced; None if nothing is claimed.
      source: a key of `SOURCES`.
    """

    value: float
    tolerance: float | None = None
    source: str = "primary"


@dataclass(frozen=True)
class Options:
    """What the command line says to every row."""

    data_dir: Path | None
    smoke: bool


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
      name: names the row on the command line and in the results.
      run: `(seed, options) -> {"values": {metric: number}, "protocols": {metric: fingerprint}, ...}`; a metric's
        fingerprint covers data, split and rules (`Protocol.fingerprint`). Runs of other "settings" (a string) do not
        count together. What else it returns is kept in the line.
      published: by metric.
      note: why a row is not expected to agree, where that is known; such a row is shown and never fails the run.
    """

    name: str
    run: Callable[[int, Options], dict[str, Any]]
    published: dict[str, Published] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Study:
    """A table: its title, rows, metrics to show and how to show them.

    Attributes:
      name: of the command and of the result files.
      title: of the page.
      about: sentences above the table.
      rows: in order.
      metrics: columns, by metric name; a pair of metrics of different protocols is never in one column.
      percent: show values times 100.
    """

    name: str
    title: str
    about: str
    rows: Sequence[Row]
    metrics: Sequence[str]
    percent: bool = True


def main(study: Study, argv: Sequence[str] | None) -> int:
    """Runs the rows that the flags name, writes the files, prints the page.

    Returns:
      1 if a row that claims to be reproduced left its tolerance, else 0.
    """
    parser = argparse.ArgumentParser(prog=f"python -m experiments {study.name}", description=study.about)
    parser.add_argument("--row", action="append", help="run only this row; may be repeated", metavar="ROW")
    parser.add_argument("--seeds", type=int, default=1, help="runs a row, with seeds 0, 1, ...")
    parser.add_argument("--data-dir", type=Path, help="folder with ml-100k/ (default: FEDJAX_REC_DATA)")
    parser.add_argument("--smoke", action="store_true", help="seconds, on made-up data; writes nothing")
    parser.add_argument("--only-page", action="store_true", help="run nothing, write the page from the kept lines")
    args = parser.parse_args(argv)
    names = [row.name for row in study.rows]
    unknown = sorted(set(args.row or ()) - set(names))
    if unknown:
        parser.error(f"there is no row {unknown[0]!r}; the rows are {'; '.join(names)}.")
    options = Options(args.data_dir, args.smoke)
    lines = [] if args.smoke else read_lines(study.name)
    for row in study.rows:
        if args.only_page or (args.row and row.name not in args.row):
            continue
        for seed in range(1 if args.smoke else args.seeds):
            start = time.perf_counter()
            measured = row.run(seed, options)
            line = {"row": row.name, "seed": seed, **measured, "seconds": time.perf_counter() - start}
            line |= {"stamp": stamp(seed=seed, data_fingerprint=None)}
            lines.append(line)
            shown = {name: round(value, 4) for name, value in measured["values"].items()}
            print(f"{row.name}, seed {seed}, {line['seconds']:.0f} s: {shown}", flush=True)
            if not args.smoke:
                keep_line(study.name, line)
    check_comparable(study, lines)
    table, statuses = make_table(study, lines)
    page = write_page(study, table, statuses, lines)
    print(page)
    if not args.smoke:
        (RESULTS / f"{study.name}.md").write_text(page, encoding="utf-8")
        (RESULTS / f"{study.name}.tex").write_text(to_latex(table), encoding="utf-8")
    failed = [
        name for name, status in statuses.items() if status.startswith("not reproduced") and not _note(study, name)
    ]
    if failed and not args.smoke:
        print(f"Left their tolerance without an explanation: {', '.join(failed)}.", file=sys.stderr)
        return 1
    return 0


def read_lines(name: str) -> list[dict[str, Any]]:
    """The kept runs of a table, oldest first."""
    file = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def keep_line(name: str, line: dict[str, Any]) -> None:
    """Appends one run to the kept ones."""
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def study_parser(name: str, about: str, *, seeds: int) -> argparse.ArgumentParser:
    """The flags that studies of keyed runs share: ``--seeds``, ``--smoke``, ``--only-page``."""
    parser = argparse.ArgumentParser(prog=f"python -m experiments {name}", description=about.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=seeds, help="seeds of each row")
    parser.add_argument("--smoke", action="store_true", help="seconds, on made-up data; writes nothing")
    parser.add_argument("--only-page", action="store_true", help="run nothing, write the page from the kept lines")
    return parser


def add_missing(
    name: str,
    keys: Iterable[dict[str, Any]],
    measure: Callable[[dict[str, Any]], dict[str, Any]],
    *,
    shown: Sequence[str],
    smoke: bool = False,
) -> list[dict[str, Any]]:
    """Measures every key that has no line yet, and keeps each run as ``{"key", "values", "stamp"}``.

    Args:
      name: of the study.
      keys: of runs, JSON values, with a "seed"; none to measure nothing.
      measure: ``key -> values``, JSON values.
      shown: values to print.
      smoke: measure all of them, and keep none.

    Returns:
      All lines, kept ones first.
    """
    lines = [] if smoke else read_lines(name)
    for key in keys:
        if any(line["key"] == key for line in lines):
            continue
        line = {"key": dict(key), "values": measure(key), "stamp": stamp(seed=key["seed"], data_fingerprint=None)}
        lines.append(line)
        print(json.dumps(key | {value: line["values"][value] for value in shown}), flush=True)
        if not smoke:
            keep_line(name, line)
    return lines


def finish(name: str, page: str, *, smoke: bool, svg: str | None = None) -> int:
    """Prints a study's page and, but for a smoke, writes it and its picture; the exit status."""
    print(page)
    if not smoke:
        (RESULTS / f"{name}.md").write_text(page, encoding="utf-8")
        if svg is not None:
            (RESULTS / f"{name}.svg").write_text(svg, encoding="utf-8")
    return 0


def newest(lines: Sequence[dict[str, Any]], row: str) -> list[dict[str, Any]]:
    """The runs of a row that count: of its newest protocols and settings, the last one of each seed."""
    mine = [line for line in lines if line["row"] == row]
    same = [line for line in mine if all(line.get(key) == mine[-1].get(key) for key in ("protocols", "settings"))]
    return list({line["seed"]: line for line in same}.values())


def check_comparable(study: Study, lines: Sequence[dict[str, Any]]) -> None:
    """Refuses a column whose rows were measured by different rules.

    Raises:
      ValueError: naming the column and two rows.
    """
    for metric in study.metrics:
        first = {}
        for row in study.rows:
            for run in newest(lines, row.name):
                if metric in run["protocols"]:
                    first.setdefault(run["protocols"][metric], row.name)
        if len(first) > 1:
            one, other = list(first.values())[:2]
            raise ValueError(
                f"{metric} of {one!r} and of {other!r} were measured by different protocols or data; run both again."
            )


def make_table(study: Study, lines: Sequence[dict[str, Any]]) -> tuple[Table, dict[str, str]]:
    """The table, and the status of each row that was run."""
    scale = 100 if study.percent else 1
    compared = [metric for metric in study.metrics if any(metric in row.published for row in study.rows)]
    rows, statuses, notes = [], {}, []
    for row in study.rows:
        runs = newest(lines, row.name)
        if not runs:
            continue
        means, cells = {}, []
        for metric in study.metrics:
            values = [run["values"][metric] * scale for run in runs if metric in run["values"]]
            means[metric] = statistics.fmean(values) if values else math.nan
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{means[metric]:.2f}{spread}" if values else MISSING)
            if metric in compared:
                published = row.published.get(metric)
                cells.append(MISSING if published is None else f"{published.value:.2f}{SOURCES[published.source]}")
        statuses[row.name] = status_of(row, means)
        seconds = statistics.fmean([run["seconds"] for run in runs])
        rows.append((row.name, *cells, len(runs), f"{seconds:.0f}", statuses[row.name]))
        if row.note:
            notes.append(f"{row.name}: {row.note}")
    heads = [text for m in study.metrics for text in ((m, f"{m}, published") if m in compared else (m,))]
    return Table(("row", *heads, "seeds", "seconds", "status"), rows, notes=tuple(notes)), statuses


def status_of(row: Row, means: dict[str, float]) -> str:
    """One of: "reproduced", "not reproduced: ...", "nothing claimed"."""
    claimed = {metric: p for metric, p in row.published.items() if p.tolerance is not None}
    off = {metric: means[metric] - p.value for metric, p in claimed.items()}
    bad = [f"{metric} is {off[metric]:+.2f}" for metric, p in claimed.items() if not abs(off[metric]) <= p.tolerance]
    if not claimed:
        return "nothing claimed"
    return f"not reproduced: {', '.join(bad)}" if bad else "reproduced"


def write_page(study: Study, table: Table, statuses: dict[str, str], lines: Sequence[dict[str, Any]]) -> str:
    """The page: what it is, the table, and what made it."""
    runs = [run for row in study.rows for run in newest(lines, row.name)]
    commits = sorted({(run["stamp"]["commit"] or "none")[:12] for run in runs})
    devices = sorted({str(run["stamp"]["device_kind"]) for run in runs})
    count = sum(status == "reproduced" for status in statuses.values())
    claimed = sum(status != "nothing claimed" for status in statuses.values())
    status = f"{count} of {claimed} rows with a tolerance are reproduced." if claimed else "nothing is claimed."
    return (
        f"# {study.title}\n\nStatus: {status}\n\n{study.about}\n\n"
        f"{to_markdown(table)}\n\nWritten by `python -m experiments {study.name}`; commits {', '.join(commits)}, "
        f"device {', '.join(devices)}. Mean ± standard deviation over seeds of training.\n"
    )


def _note(study: Study, name: str) -> str:
    return next(row.note for row in study.rows if row.name == name)

"""The same round here, in fedjax, in pfl and in a plain JAX loop, timed side by side on this machine.

    python -m benchmarks.peers --data-dir data/ml-100k    # minutes; writes benchmarks/results/peers.{jsonl,md,svg}
    python -m benchmarks.peers --smoke                    # seconds; made-up data, no network, keeps nothing

Every program does the work of `benchmarks/workload.py` in its own process, and the peers in their own virtual
environments, which are made on the first run. Programs take turns (A B A B ...), so that a drift of the machine meets
them all; first rounds are warm-up and not counted; each peer first proves by one round without noise that it computes
what `benchmarks/numpy_reference.py` does.
"""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks import workload
from benchmarks.contestants import CONTESTANTS, OURS, Contestant, ProgramFailedError, command, environment, last_line
from benchmarks.peers_table import markdown, plot

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """Times one federated round side by side with fedjax, pfl and a plain JAX loop, on this machine.

    Attributes:
      data_dir: folder that holds MovieLens 100K's u.data (or ml-100k/u.data).
      items: rows of the item table, one column of the result for each.
      rounds: rounds a program runs each time it has its turn, warm-up included.
      warmup: first rounds of each turn that are not counted.
      turns: how often each program has its turn.
      venv_dir: where the peers' virtual environments are, or will be made.
      only: which programs to run; fedjax_rec stands for both of its rows.
      out: folder to write to; benchmarks/results unless said otherwise, and nowhere with smoke.
      json: print the result as JSON lines, not as a table.
      smoke: a tiny made-up workload, our round and the plain loop only.
    """

    data_dir: Path | None = None
    items: tuple[int, ...] = (1682, 100_000)
    rounds: int = 6
    warmup: int = 1
    turns: int = 2
    venv_dir: Path = Path(".venv-peers")
    only: tuple[Literal["fedjax_rec", "fedjax", "pfl", "naive"], ...] = ("fedjax_rec", "fedjax", "pfl", "naive")
    out: Path | None = None
    json: bool = False
    smoke: bool = False


def run(arguments: Sequence[str], *, say: Callable[[str], None]) -> list[Row]:
    """Runs a program and returns the JSON lines that it printed; other lines are dropped.

    Raises:
      ProgramFailedError: it ended with an error; the message is the last line it wrote to stderr.
    """
    rows = []
    with tempfile.TemporaryFile("w+") as stderr:
        with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
            for line in process.stdout:
                if not line.startswith("{"):
                    continue
                rows.append(json.loads(line))
                seconds = rows[-1].get("seconds", rows[-1].get("median_s"))
                say(
                    f"    {'check' if seconds is None else f'{seconds:.4f} s'}{' (warm-up)' * rows[-1].get('warmup', 0)}"
                )
        if process.returncode:
            stderr.seek(0)
            raise ProgramFailedError(
                f"{' '.join(arguments)} ended with {process.returncode}: {_last_line(stderr.read())}"
            )
    return rows


def measure(
    contestants: Sequence[Contestant],
    u_data: Path,
    config: Config,
    *,
    pythons: dict[str, Path],
    say: Callable[[str], None],
    run: Callable[..., list[Row]] = run,
) -> list[Row]:
    """Gives every contestant its turns, one after the other, at every number of items.

    Returns:
      What the programs printed, each row with the contestant's `name`, `items` and `turn`; a turn that failed is one
      row with an `error`.
    """
    rows = []
    for turn in range(config.turns):
        for items in config.items:
            for contestant in contestants:
                python = pythons[contestant.name]
                say(f"turn {turn + 1} of {config.turns}, {items:,} items: {contestant.label}")
                line = command(contestant, python, u_data, items=items, config=config, check=turn == 0)
                try:
                    printed = run(line, say=say)
                except ProgramFailedError as error:
                    say(f"    failed: {error}")
                    printed = [{"error": str(error)}]
                rows += [row | {"name": contestant.name, "items": items, "turn": turn} for row in printed]
    return rows


def summarise(contestants: Sequence[Contestant], rows: Sequence[Row]) -> list[Row]:
    """One row for each contestant and number of items: the median seconds of all counted rounds and its ratio to ours.

    A peer prints one row a round; our own program prints the median of a turn, so there the median is over turns.
    """
    summary = []
    for items in sorted({row["items"] for row in rows}):
        for contestant in contestants:
            mine = [row for row in rows if row["name"] == contestant.name and row["items"] == items]
            times = [
                row["median_s"] if "median_s" in row else row.get("seconds") for row in mine if not row.get("warmup")
            ]
            times = sorted(time for time in times if time is not None)
            facts = {key: row[key] for row in mine for key in ("device", "versions", "clients", "error") if key in row}
            differences = [row["max_abs_difference"] for row in mine if "max_abs_difference" in row]
            summary.append(
                {"name": contestant.name, "items": items, "num_timings": len(times), "seconds": times}
                | {"median_s": statistics.median(times) if times else None}
                | {"max_abs_difference": max(differences) if differences else None}
                | facts
            )
    ours = {row["items"]: row["median_s"] for row in summary if row["name"] == OURS and row["median_s"]}
    for row in summary:
        known = row["items"] in ours and row["median_s"] is not None
        row["times_ours"] = row["median_s"] / ours[row["items"]] if known else None
    return summary


def machine() -> Row:
    """When and where: UTC date, commit, processor, number of CPUs that this process may use, system."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    models = [line for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": git.stdout.strip() or "none",
        "processor": models[0].split(":", 1)[1].strip() if models else platform.processor() or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(terse=True),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the environments, measures, prints and writes; ends with 1 and a sentence if a program failed."""
    config = tyro.cli(Config, args=arguments)

    def say(words: str) -> None:
        print(words, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        if config.smoke:
            config = replace(config, items=(300,), rounds=3, turns=1, only=("fedjax_rec", "naive"))
            workload.write_u_data(Path(folder) / "u.data", num_clients=24, num_items=300)
        elif config.data_dir is None:
            raise SystemExit(
                "Pass --data-dir, the folder with MovieLens 100K's u.data, or --smoke to try it without data."
            )
        out = config.out or (Path(folder) if config.smoke else ROOT / "benchmarks" / "results")
        contestants = [contestant for contestant in CONTESTANTS if contestant.family in config.only]
        try:
            u_data = workload.find_u_data(folder if config.smoke else config.data_dir).resolve()
            pythons = {c.name: environment(c, config.venv_dir, say=say) for c in contestants}
        except (FileNotFoundError, ProgramFailedError) as error:
            raise SystemExit(str(error)) from error
        summary = summarise(contestants, measure(contestants, u_data, config, pythons=pythons, say=say))
        stamp = machine()
        write(out, contestants, summary, stamp=stamp, config=config)
        lines = [json.dumps(row | stamp) for row in summary]
        print("\n".join(lines) if config.json else markdown(contestants, summary, stamp=stamp, config=config))
    failed = sorted({row["name"] for row in summary if "error" in row})
    if failed:
        raise SystemExit(f"These programs failed, and their numbers are incomplete: {', '.join(failed)}.")


def _seconds(value: float | None) -> str:
    """Three digits, or a dash."""
    return "-" if value is None else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    """Two digits or whole, or a dash."""
    return "-" if value is None else f"{value:.1f}x" if value < 10 else f"{value:.0f}x"


def _last_line(text: str) -> str:
    """The last line that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")


def _read(path: str) -> str:
    """A file's text, or nothing where there is no such file."""
    return Path(path).read_text() if Path(path).is_file() else ""


if __name__ == "__main__":
    main()

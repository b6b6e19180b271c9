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
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks import workload
from benchmarks.contestants import CONTESTANTS, OURS, Contestant, ProgramFailedError, command, environment, last_line
from benchmarks.peers_table import Result, markdown, plot

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


def run(arguments: Sequence[str], *, environ: dict[str, str], say: Callable[[str], None]) -> list[Row]:
    """Runs a program from the root of the repository and returns the JSON lines it printed; other lines are dropped.

    Args:
      arguments: the command line.
      environ: environment variables besides those of this process.
      say: gets a line of progress for each round, as it comes.

    Raises:
      ProgramFailedError: it ended with an error; the message is the last line it wrote to stderr.
    """
    rows = []
    with tempfile.TemporaryFile("w+") as stderr:
        options = {"cwd": ROOT, "env": os.environ | environ, "text": True}
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=stderr, **options) as process:
            for line in process.stdout:
                if line.startswith("{"):
                    rows.append(json.loads(line))
                    say(f"    {_progress(rows[-1])}")
        if process.returncode:
            stderr.seek(0)
            reason = last_line(stderr.read())
            raise ProgramFailedError(f"`{' '.join(arguments)}` ended with {process.returncode}: {reason}")
    return rows


def measure(
    contestants: Sequence[Contestant],
    u_data: Path,
    *,
    config: Config,
    pythons: dict[str, Path],
    say: Callable[[str], None],
    run: Callable[..., list[Row]] = run,
) -> list[Row]:
    """Gives every contestant its turns, one after the other, at every number of items.

    Args:
      contestants: who takes turns, in this order.
      u_data: a GroupLens u.data file.
      config: which items, how many turns and rounds.
      pythons: the interpreter of each contestant, by its name.
      say: gets lines of progress.
      run: runs one command line and returns the rows that it printed.

    Returns:
      What the programs printed, each row with the contestant's `name`, `items` and `turn`; a turn that failed is one
      row with an `error`.
    """
    rows = []
    for turn in range(config.turns):
        for items in config.items:
            for contestant in contestants:
                say(f"turn {turn + 1} of {config.turns}, {items:,} items: {contestant.label} ({contestant.privacy})")
                arguments = command(
                    contestant,
                    u_data,
                    python=pythons[contestant.name],
                    items=items,
                    rounds=config.rounds,
                    warmup=config.warmup,
                    check=turn == 0,
                )
                try:
                    printed = run(arguments, environ=dict(contestant.environ), say=say)
                except ProgramFailedError as error:
                    say(f"    failed: {error}")
                    printed = [{"error": str(error)}]
                rows += [row | {"name": contestant.name, "items": items, "turn": turn} for row in printed]
    return rows


def summarise(contestants: Sequence[Contestant], rows: Sequence[Row]) -> list[Result]:
    """One `Result` for each contestant and number of items, from the rows that `measure` returns.

    A peer prints `seconds` of each round; our own program prints `median_s` of a turn, so its median is over turns.
    """
    results = []
    for items in sorted({row["items"] for row in rows}):
        for contestant in contestants:
            mine = [row for row in rows if row["name"] == contestant.name and row["items"] == items]
            results.append(_result(contestant.name, items, mine))
    ours = {result.items: result.median_s for result in results if result.name == OURS and result.median_s}
    return [
        replace(result, times_ours=result.median_s / ours[result.items])
        if result.median_s and result.items in ours
        else result
        for result in results
    ]


def machine() -> Row:
    """When and where: UTC date, commit, processor, CPUs that this process may use, their load now (1 min), system."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": git.stdout.strip() or "none",
        "processor": models[0] if models else platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan,
        "system": platform.platform(terse=True),
    }


def write(out: Path, contestants: Sequence[Contestant], results: Sequence[Result], *, stamp: Row) -> None:
    """Writes peers.jsonl (a line for each result, with the stamp), peers.md and peers.svg into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "peers.jsonl").write_text("".join(json.dumps(asdict(result) | stamp) + "\n" for result in results))
    (out / "peers.md").write_text(markdown(contestants, results, stamp=stamp))
    if any(result.median_s for result in results):
        plot(contestants, results, out / "peers.svg")


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the environments, measures, prints and writes; ends with a sentence and 1 if something failed."""
    config = tyro.cli(Config, args=arguments)
    if config.smoke:
        config = replace(config, items=(300,), rounds=3, turns=1, only=("fedjax_rec", "naive"))
    if config.rounds <= config.warmup:
        raise SystemExit(f"rounds={config.rounds} leaves nothing after warmup={config.warmup}; pass more rounds.")
    if config.data_dir is None and not config.smoke:
        raise SystemExit("Pass --data-dir, the folder with MovieLens 100K's u.data, or --smoke to try without data.")
    contestants = [contestant for contestant in CONTESTANTS if contestant.family in config.only]

    def say(words: str) -> None:
        print(words, file=sys.stderr, flush=True)

    stamp = machine() | {"turns": config.turns, "rounds": config.rounds, "warmup": config.warmup}
    if stamp["load"] > stamp["cpus"] / 4:
        # Two PyTorch threads that wait for each other on a busy machine were seen to take ten times as long.
        say(f"The machine is busy (load {stamp['load']:.1f}): times will be long, and pfl's by far too long.")
    with tempfile.TemporaryDirectory() as folder:
        if config.smoke:
            workload.write_u_data(Path(folder) / "u.data", num_clients=24, num_items=300)
        try:
            u_data = workload.find_u_data(folder if config.smoke else config.data_dir).resolve()
            pythons = {c.name: environment(c, config.venv_dir, say=say) for c in contestants}
        except (FileNotFoundError, ProgramFailedError) as error:
            raise SystemExit(str(error)) from error
        rows = measure(contestants, u_data, config=config, pythons=pythons, say=say)
    results = summarise(contestants, rows)
    lines = [json.dumps(asdict(result) | stamp) for result in results]
    print("\n".join(lines) if config.json else markdown(contestants, results, stamp=stamp))
    if config.out or not config.smoke:
        write(config.out or ROOT / "benchmarks" / "results", contestants, results, stamp=stamp)
    failed = [f"{result.name} at {result.items:,} items" for result in results if result.error]
    if failed:
        raise SystemExit(f"The table is incomplete, because a program failed: {', '.join(failed)}.")


def _result(name: str, items: int, rows: Sequence[Row]) -> Result:
    """A `Result` without its ratio, from the rows of one contestant at one number of items."""
    times = [row.get("seconds", row.get("median_s")) for row in rows if not row.get("warmup")]
    seconds = tuple(sorted(time for time in times if time is not None))
    differences = [row["max_abs_difference"] for row in rows if "max_abs_difference" in row]
    said = {key: value for row in rows for key, value in row.items()}
    return Result(
        name=name,
        items=items,
        seconds=seconds,
        median_s=statistics.median(seconds) if seconds else None,
        times_ours=None,
        max_abs_difference=max(differences, default=None),
        clients=said.get("clients"),
        device=said.get("device"),
        versions=said.get("versions", {}),
        error=said.get("error"),
    )


def _progress(row: Row) -> str:
    """What a printed row says, in a few words."""
    if "seconds" in row:
        return f"round {row['round']}: {row['seconds']:.3f} s" + " (warm-up)" * row["warmup"]
    if "median_s" in row:
        return f"median of the turn: {row['median_s']:.4f} s"
    return f"off the NumPy reference by {row['max_abs_difference']:.1e}" if "max_abs_difference" in row else "..."


if __name__ == "__main__":
    main()

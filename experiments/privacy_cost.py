"""What privacy costs a round: time and memory of each mechanism against none, from 3,706 to 10 million items.

    python -m experiments privacy_cost                      # an hour; writes results/privacy_cost.{jsonl,md,svg}
    python -m experiments privacy_cost --items 3706         # one size anew; --mechanism Skellam for one mechanism
    python -m experiments privacy_cost --smoke              # two mechanisms, 500 items; keeps nothing

FedSGD of matrix factorisation: 1,000 clients with 64 items each and four negatives for each, 100 expected clients a
round. All noise is calibrated to one epsilon. Each mechanism and size has a process of its own. There the mechanism
runs first, and its peak memory is read; then it and rounds without any link take turns, on cohorts of the same sampler,
so that other work on the machine slows both alike. DPALS and DP-EASE are no links of this chain, and are not here.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure

from benchmarks.methods import population
from benchmarks.round import peak_memory
from experiments._mechanisms import (
    CLIENTS,
    COHORT,
    DELTA,
    DIM,
    EPSILON,
    MECHANISMS,
    NEGATIVES,
    ROUNDS,
    ROWS_PER_USER,
    SHARE_OF_ROWS,
    World,
    noise_of,
    spent,
)
from fedjax_rec.algorithms.fedavg import fedsgd
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated.round import RoundKeys, Rounds, make_rounds
from fedjax_rec.federated.sparse_server import sparse_sgd
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.reporting import Table, to_markdown
from fedjax_rec.reporting.formatting import format_bytes
from fedjax_rec.reporting.style import BLUE, GREEN, INK, MUTED, STYLE, VERMILION, name_axes, new_figure, to_svg
from fedjax_rec.runs.stamp import stamp

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
AT_TEN_MILLION = ("none", "Gaussian", "8 bands", "select_rows", "AdaFEST")
SIZES: dict[int, tuple[int, Sequence[str]]] = {  # items: (dim, mechanisms)
    3706: (DIM, tuple(MECHANISMS)),
    100_000: (DIM, tuple(MECHANISMS)),
    1_000_000: (DIM, tuple(MECHANISMS)),
    10_000_000: (16, AT_TEN_MILLION),
}


def _bytes_of(tree: Any) -> int:
    return int(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))


def _check_memory(table_bytes: int, state_bytes: int, max_gib: float) -> None:
    """Refuses what would not fit: two runs' parameters, sums, noise and new parameters, and the chain's state."""
    needed = 8 * table_bytes + 3 * state_bytes
    if needed > max_gib * 2**30:
        raise ValueError(
            f"Tables of {table_bytes:,} bytes and a chain's state of {state_bytes:,} need about {needed:,} in a round "
            f"and the one beside it, more than {max_gib:g} GiB."
        )


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Times rounds of one mechanism, and rounds without any link in turn with it, in this process.

    Returns:
      A flat JSON object but for the stamp. ``refused`` is the sentence of what does not fit; then times are missing.
    """
    mechanism, world = MECHANISMS[name], World(args.items, args.dim)
    line = {"mechanism": name, **_setting(args), "clients": CLIENTS, "rows_per_user": ROWS_PER_USER}
    line |= {"cohort_size": COHORT, "sampler": mechanism.sampler.name, "noise": args.noise, "max_gib": args.max_gib}
    line |= {"delta": DELTA, "relation": mechanism.relation, "trust": "local" if mechanism.local else "central"}
    line |= {"refused": None, "stamp": stamp(seed=0, data_fingerprint=None)}
    model = matrix_factorization(world.items, dim=world.dim)
    method = fedsgd(model, server_optimizer=optax.sgd(1.0), negatives=Negatives(NEGATIVES))
    method = sparse_sgd(method, learning_rate=1.0)
    shared = jax.eval_shape(model.init_shared, jax.random.key(0))
    line["table_bytes"] = _bytes_of(shared)
    clients = population(num_users=CLIENTS, num_items=world.items, rows_per_user=ROWS_PER_USER)
    try:
        links = mechanism.links(world, args.noise)
        line["state_bytes"] = _bytes_of(jax.eval_shape(links.init, shared))
        _check_memory(line["table_bytes"], line["state_bytes"], args.max_gib)
        rounds = make_rounds(method, links, mechanism.sampler, clients, span_size=1)
    except ValueError as error:
        return line | {"refused": str(error), "load": os.getloadavg()[0]}
    line["before_bytes"] = peak_memory()
    run = _one_round(rounds)
    first, _ = run()
    run()
    line["peak_memory_bytes"] = peak_memory()
    seconds, beside = _take_turns(
        run, _one_round(make_rounds(method, chain(), mechanism.sampler, clients, span_size=1)), args
    )
    quartiles, cpu_quartiles = np.percentile(seconds / beside, [25, 50, 75], axis=1).T.tolist()
    (median_s, cpu_s), (none_s, _) = (np.median(times, axis=1).tolist() for times in (seconds, beside))
    return line | {
        "median_s": median_s,
        "none_s": none_s,
        "cpu_s": cpu_s,
        "ratio": quartiles[1],
        "ratio_quartiles": quartiles,
        "cpu_ratio": cpu_quartiles[1],
        "cpu_ratio_quartiles": cpu_quartiles,
        "turns": seconds.shape[1],
        "compile_s": float(first) - median_s,
        "upload_bits": rounds.upload_bits,
        "epsilon": spent(mechanism, links),
        "load": os.getloadavg()[0],
    }


def _one_round(rounds: Rounds) -> Callable[[], np.ndarray]:
    """One round a call; returns its seconds, and the processor's seconds of all threads of this process."""
    holder = [rounds.init(jax.random.key(0))]
    keys = RoundKeys(*jax.random.split(jax.random.key(1), 3))

    def run() -> np.ndarray:
        start = np.array([time.perf_counter(), time.process_time()])
        holder[0] = jax.block_until_ready(rounds.run(*holder[0], keys, 1))[:2]
        return np.array([time.perf_counter(), time.process_time()]) - start

    return run


def _take_turns(run: Callable, beside: Callable, args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of both, ``[2, turns]`` each, after one round of the second to compile."""
    beside()
    seconds, others, start = [], [], time.perf_counter()
    while len(others) < args.least_turns or (len(seconds) < args.turns and time.perf_counter() - start < args.seconds):
        # Either goes first in every other turn: whoever follows the other may find its tables out of the cache.
        for times, one in ((seconds, run), (others, beside))[:: -1 if len(seconds) % 2 else 1]:
            times.append(one())
    return np.transpose(seconds), np.transpose(others)


def _setting(args: argparse.Namespace) -> dict[str, int]:
    return {"items": args.items, "dim": args.dim}


def in_its_own_process(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Runs `measure` in a child; a child that dies, or takes too long, is a line that says so."""
    flags = ("items", "dim", "noise", "turns", "least_turns", "seconds", "max_gib")
    command = [sys.executable, "-m", "experiments", "privacy_cost", "--child", name]
    command += [f"--{flag.replace('_', '-')}={getattr(args, flag)}" for flag in flags]
    # Compile seconds are of compiling. Set from outside: JAX asks once, at its first compilation.
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    failed = {"mechanism": name, **_setting(args), "load": os.getloadavg()[0]}
    failed["stamp"] = stamp(seed=0, data_fingerprint=None)
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=args.timeout)
    except subprocess.TimeoutExpired:
        return failed | {"failed": f"stopped after {args.timeout:g} s, compilation included"}
    printed = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not printed:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return failed | {"failed": f"ended with {done.returncode}: {last[:300]}"}
    return json.loads(printed[-1])


def newest(lines: Sequence[dict]) -> dict[int, dict[str, dict]]:
    """The last line of each size and mechanism, in the order of the lists above."""
    last = {(line["items"], line["mechanism"]): line for line in lines}
    sizes = sorted({items for items, _ in last})
    return {s: {name: last[s, name] for name in MECHANISMS if (s, name) in last} for s in sizes}


def make_table(lines: Sequence[dict]) -> Table:
    """One row a mechanism: what it took, or why it did not run."""
    rows = []
    for line in lines:
        outcome = next((f"{key}: {line[key]}" for key in ("refused", "failed") if line.get(key)), None)
        cells = (None,) * 8
        if outcome is None:
            cells = tuple(f"{line[key]:.3g}" for key in ("median_s", "none_s", "ratio", "cpu_ratio"))
            q1, _, q3 = line["cpu_ratio_quartiles"]
            cells += (f"{q1:.2f} to {q3:.2f}", str(line["turns"]))
            cells += (f"{line['compile_s']:.1f}", f"{line['peak_memory_bytes'] / 2**30:.2f}")
        state = format_bytes(line.get("state_bytes"))
        rows.append((line["mechanism"], *cells, state, f"{line['load']:.1f}", outcome))
    heads = (
        "seconds a round",
        "none beside it",
        "ratio",
        "CPU ratio",
        "its quartiles",
        "turns",
        "compile, s",
        "peak memory, GiB",
    )
    return Table(("mechanism", *heads, "chain's state", "load", "outcome"), rows)


def findings(sizes: dict[int, dict[str, dict]]) -> list[str]:
    """What the numbers say, a few sentences for each size."""
    said = []
    for items, lines in sizes.items():
        ran = {name: line for name, line in lines.items() if "ratio" in line}
        times = {name: line["cpu_ratio"] for name, line in ran.items() if line["epsilon"] is not None}
        if not times:
            continue
        dear, cheap = (pick(times, key=times.__getitem__) for pick in (max, min))
        sentence = (
            f"{items:,} items, in processor time: of {len(times)} private mechanisms that ran, the most expensive is "
            f"{dear}, {times[dear]:.3g} times the round without privacy, and the cheapest is {cheap}, "
            f"{times[cheap]:.3g} times."
        )
        if "Gaussian" in times:
            sentence += f" Gaussian noise takes {times['Gaussian']:.3g} times"
            sparse = [name for name in ("select_rows", "AdaFEST") if name in times]
            sentence += "".join(f", {name} {times[name]:.3g}" for name in sparse) + "."
        if "none" in ran:
            q1, _, q3 = ran["none"]["cpu_ratio_quartiles"]
            peaks = {name: line["peak_memory_bytes"] / 2**30 for name, line in ran.items()}
            large = max(peaks, key=peaks.__getitem__)
            sentence += f" None against itself has quartiles of {q1:.2f} and {q3:.2f}."
            more = peaks[large] - peaks["none"]
            sentence += f" Most memory: {large}, {more:.2f} GiB above none." if more >= 0.005 else ""
        refused = [name for name, line in lines.items() if line.get("refused")]
        sentence += f" Refused: {', '.join(refused)}." if refused else ""
        said.append(sentence)
    return said


def picture(sizes: dict[int, dict[str, dict]]) -> Figure:
    """Ratios to none, a row a mechanism and a colour a size; a mechanism without a dot did not run."""
    names = [name for name in MECHANISMS if name != "none" and any("ratio" in s.get(name, {}) for s in sizes.values())]
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure()
        figure.set_size_inches(6.4, 0.9 + 0.24 * len(names))
        figure.subplots_adjust(left=0.25, right=0.97, bottom=0.5 / (0.9 + 0.24 * len(names)), top=0.9)
        axes.axvline(1.0, color=MUTED, linewidth=1.0, linestyle=(0, (1, 2)))
        for place, ((items, lines), colour) in enumerate(
            zip(sizes.items(), (BLUE, GREEN, VERMILION, INK), strict=False)
        ):
            shown = [name for name in names if "ratio" in lines.get(name, {})]
            shift = 0.16 * (place - (len(sizes) - 1) / 2)
            heights = [names.index(name) + shift for name in shown]
            q1, ratios, q3 = np.transpose([lines[name]["cpu_ratio_quartiles"] for name in shown])
            axes.hlines(heights, q1, q3, color=colour, linewidth=1.2)
            axes.plot(ratios, heights, "o", color=colour, markersize=3.5, label=f"{items:,} items")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.legend(frameon=False, loc="upper right", labelcolor=INK)
        name_axes(axes, x="processor time of a round over none", y="Median and quartiles over turns")
    return figure


def write_page(lines: Sequence[dict]) -> str:
    """The page: what is measured, what came out, a table a size, and what made it."""
    sizes = newest(lines)
    kept = [line for by_name in sizes.values() for line in by_name.values()]
    epsilons = [line["epsilon"] for line in kept if line.get("epsilon") is not None]
    spread = f"{min(epsilons):.3f} to {max(epsilons):.3f}" if epsilons else "not measured"
    parts = ["# What privacy costs a round", "Status: study; there is no paper to reproduce."]
    before = [line["before_bytes"] / 2**30 for line in kept if "before_bytes" in line] or [0.0]
    parts.append(f"{ABOUT} Epsilons of the chains that ran: {spread}, at delta {DELTA:g}.")
    parts[-1] += f" Of peak memory, {min(before):.2f} to {max(before):.2f} GiB are there before the first round."
    parts.append("\n".join(f"- {sentence}" for sentence in findings(sizes)))
    parts.append("![processor time of a round over none](privacy_cost.svg)")
    for items, by_name in sizes.items():
        dim = next(iter(by_name.values()))["dim"]
        parts += [f"## {items:,} items of dim {dim}", to_markdown(make_table(list(by_name.values()))).rstrip()]
    stamps = sorted((line["stamp"] for line in kept), key=lambda s: s["utc_time"])
    loads = [line["load"] for line in kept]
    devices = sorted({f"{s['device_kind']} ({s['platform']}, {s['cpu_count']} cores)" for s in stamps})
    commits = list(dict.fromkeys((s["commit"] or "none")[:12] for s in stamps))
    dirty = " (with uncommitted changes)" if any(s["dirty"] for s in stamps) else ""
    parts.append(
        f"Written by `python -m experiments privacy_cost`; commits {', '.join(commits)}{dirty}; device "
        f"{', '.join(devices)}. The machine was shared: load averages "
        f"{min(loads):.1f} to {max(loads):.1f} at the end of a row. Above the "
        "number of cores, other work made seconds longer, those of none beside it as well: read the ratios. No GPU was "
        "measured."
    )
    return "\n\n".join(parts) + "\n"


ABOUT = f"""One round of FedSGD with matrix factorisation, clients, sum, noise and the server's step included:
{CLIENTS:,} clients with {ROWS_PER_USER} items each, uniform over the catalogue, {NEGATIVES} negatives for each item,
{COHORT} expected clients a round. "None beside it" is the same round without any link, on cohorts of the same sampler,
in the same process and in turn with the mechanism; the ratio is the median over turns, and the CPU ratio that of the
processor's time, which waiting for other work does not lengthen. Peak memory is the largest
resident set of the process, Python and compilation included, after two rounds of the mechanism and before the other
exists; compile seconds are those of its first round above the median. The chain's state is what the server keeps from
round to round for the mechanism.

The server's step is the sparse one, so select_rows and AdaFEST, which let at most {SHARE_OF_ROWS:.0%} of the rows
through, step those rows only; select_rows sums those alone, too, and can take less than a round without it. With few
clients an item, AdaFEST's choice is mostly noise here: its time does not depend on that, what it learns does.
Local mechanisms noise a whole table a client, which the links refuse above 64 MiB; the
table says so. DPALS and DP-EASE are no links of a chain and have benchmarks of their own.

All noise is calibrated for epsilon {EPSILON:g}, user-level, over {ROUNDS} rounds: add-or-remove-one for the server's
noise, replace-one for one client's reports in all of these rounds (local). Cohorts are Poisson, but for integer noise
(ten groups in turn, none left to chance) and correlated noise (eight groups in turn; four fifths take part)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what the flags name, writes the files, prints the page; 1 if a child died."""
    parser = argparse.ArgumentParser(prog="python -m experiments privacy_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, help="only this catalogue size")
    parser.add_argument("--dim", type=int, help="length of item vectors")
    parser.add_argument("--mechanism", action="append", choices=MECHANISMS, help="only this one; may be repeated")
    parser.add_argument("--turns", type=int, default=400, help="most timed rounds of each")
    parser.add_argument("--least-turns", type=int, default=3, help="fewest timed rounds of each")
    parser.add_argument("--seconds", type=float, default=20.0, help="after which no turn begins")
    parser.add_argument("--timeout", type=float, default=120.0, help="most seconds of a process")
    parser.add_argument("--max-gib", type=float, default=8.0, help="most memory of a process, estimated beforehand")
    parser.add_argument("--only-page", action="store_true", help="run nothing, write the page from the kept lines")
    parser.add_argument("--smoke", action="store_true", help="two mechanisms, 500 items; keeps nothing")
    parser.add_argument("--child", choices=MECHANISMS, help=argparse.SUPPRESS)
    parser.add_argument("--noise", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(measure(args.child, args)))
        return 0
    file, new = RESULTS / "privacy_cost.jsonl", []
    sizes = {args.items: SIZES.get(args.items, (DIM, tuple(MECHANISMS)))} if args.items else SIZES
    if args.smoke:
        sizes, args.turns, args.least_turns = {500: (4, ("none", "Gaussian"))}, 2, 2
    for items, (dim, names) in {} if args.only_page else sizes.items():
        for name in [name for name in args.mechanism or names if name in names or args.items]:
            own = argparse.Namespace(**vars(args) | {"items": items, "dim": args.dim or dim})
            own.noise = noise_of(MECHANISMS[name])
            new.append(measure(name, own) if args.smoke else in_its_own_process(name, own))
            print(json.dumps(new[-1] | {"stamp": None}), file=sys.stderr, flush=True)
            if not args.smoke:
                RESULTS.mkdir(exist_ok=True)
                with open(file, "a", encoding="utf-8") as kept:
                    kept.write(json.dumps(new[-1]) + "\n")
    lines = new if args.smoke else [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    page = write_page(lines)
    print(page)
    if not args.smoke:
        (RESULTS / "privacy_cost.md").write_text(page, encoding="utf-8")
        (RESULTS / "privacy_cost.svg").write_text(to_svg(picture(newest(lines))), encoding="utf-8")
    return 1 if any("failed" in line for line in new) else 0


if __name__ == "__main__":
    sys.exit(main())

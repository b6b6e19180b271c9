"""Seconds a round of each method, beside a plain loop over clients that does the same work, and beside published times.

    python -m experiments speed                         # minutes; writes experiments/results/speed.{jsonl,md,tex}
    python -m experiments speed --row "PFedRec, ML-1M"  # one row anew
    python -m experiments speed --smoke                 # made-up data, keeps nothing

The loop is one jitted program a client, called for one client after the other from Python: it draws the same negatives
from the same keys, trains, and adds its update to a running sum; the server's step follows. It is compiled once for
each bucket shape, with the round's own compiler options, its data lie on the device, and its sum and private state are
updated in place, so that what differs is who runs the loop. Before it is timed, two rounds of it are compared with two
rounds of the engine: all shared and private parameters must agree to 1e-5 of the largest. Each row has a process of its
own, for its peak memory. Full participation, one device.

Published times are of other machines, and mostly include evaluation; the times here are of the round alone. Times on a
GPU were not measured.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.round import peak_memory
from experiments.gpfedrec import build_gpfedrec
from experiments.pfedrec import NEGATIVES, build_fedmf, build_fedncf, build_fedrecon, build_pfedrec
from experiments.ranked import Build, ml_100k
from fedjax_rec.algorithms.fcf import fcf
from fedjax_rec.algorithms.fedrap import additive_scorer, fedrap
from fedjax_rec.data import Interactions, load
from fedjax_rec.data.clients import ClientData, client_data
from fedjax_rec.evaluation.protocol import STRICT_99
from fedjax_rec.federated.algorithm import Algorithm, client_key
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.rows import add_to_total, zero_total
from fedjax_rec.federated.transforms import chain
from fedjax_rec.reporting import Table, to_latex, to_markdown
from fedjax_rec.runs.stamp import stamp

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
TOLERANCE = 1e-5
NUM_BUCKETS = 5
REPEATS = 5


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
      name: method and data set.
      build: the method.
      data: ``"100k"`` or ``"1m"``.
      published: seconds a round that others report, whose, and on what; empty if there are none.
      restart: start the loop from the engine's state in each compared round. For ReLU networks: where an activation is
        near zero, the last bit decides whether it counts, so that two runs of one program part in their second round
        (the engine's own, with chunks of 1 and of 4 clients, by 1e-2 for FedNCF).
    """

    name: str
    build: Build
    data: str
    published: str = ""
    restart: bool = False


def build_fedrap(interactions: Interactions):
    """FedRAP with the settings of its authors' code."""
    model = additive_scorer(interactions.num_items)
    return fedrap(model, num_clients=interactions.num_users, negatives=NEGATIVES), model


def build_fcf(interactions: Interactions):
    """FCF; clients solve for their vectors, so there is no model with a loss."""
    return fcf(interactions.num_items, cohort_size=interactions.num_users), None


CASES = (
    Case("FedMF, ML-100K", build_fedmf, "100k"),
    Case("FedNCF, ML-100K", build_fedncf, "100k", restart=True),
    Case(
        "PFedRec, ML-100K",
        build_pfedrec,
        "100k",
        "14 to 19 s: the authors' code on two CPU cores, evaluation included (run for this project)",
    ),
    Case("FedRAP, ML-100K", build_fedrap, "100k", "50 s: the authors' log; device not named"),
    Case("FedRecon, ML-100K", build_fedrecon, "100k"),
    Case("FCF, ML-100K", build_fcf, "100k"),
    Case("GPFedRec, ML-100K", partial(build_gpfedrec, similarity="cosine"), "100k"),
    Case("FedMF, ML-1M", build_fedmf, "1m"),
    Case("PFedRec, ML-1M", build_pfedrec, "1m", "151 s: on an RTX 4090, as others quote it"),
    Case("FedRAP, ML-1M", build_fedrap, "1m", "667 s: the authors' log; device not named"),
)


def population(case: Case, data_dir: Path | None, *, smoke: bool) -> tuple[Interactions, ClientData]:
    """A case's data set and its training clients under strict negatives."""
    if smoke or case.data == "100k":
        interactions = ml_100k(data_dir, smoke=smoke)
    else:
        interactions = load("movielens/1m", data_dir=data_dir)
    split = STRICT_99.split(interactions)
    return interactions, client_data(split, exclusion=STRICT_99.exclusion, num_buckets=1 if smoke else NUM_BUCKETS)


def client_loop(algorithm: Algorithm, clients: ClientData) -> tuple[Callable, Callable]:
    """The round as a Python loop over clients.

    Returns:
      ``one_round(state, private, keys) -> (state, private)``, where ``private`` is a list with one client's private
      parameters at its id (see `one_by_one`; both arguments are donated), and the jitted client step.
    """
    options = {"xla_backend_optimization_level": 2} if jax.default_backend() == "cpu" else {}
    data = [
        jax.tree.map(lambda x, row=row: jnp.asarray(x[row]), bucket)
        for bucket in clients.buckets
        for row in range(len(bucket.client_id))
        if bucket.client_id[row] < clients.num_clients
    ]
    ids = [int(client.client_id) for client in data]

    def update_of(shared, private, client, key):
        train_key, _ = jax.random.split(client_key(key, client.client_id))
        return algorithm.client_update(shared, private, client, algorithm.num_steps(client), train_key)

    def step(total, private, shared, client, key):
        output = update_of(shared, private, client, key)
        return add_to_total(total, jax.tree.map(lambda x: x[None], output.update)), output.private

    def finish(state, total):
        state = algorithm.server_update(state, jax.tree.map(lambda x: x / clients.num_clients, total))
        return state._replace(round=state.round + 1)

    step = jax.jit(step, donate_argnums=(0, 1), compiler_options=options)
    finish = jax.jit(finish, donate_argnums=0, compiler_options=options)

    state_shape, private_shape = (
        jax.eval_shape(init, jax.random.key(0)) for init in (algorithm.init, algorithm.init_private)
    )
    update = jax.eval_shape(update_of, state_shape.shared, private_shape, data[0], jax.random.key(0)).update

    def one_round(state, private, keys):
        key = jax.random.fold_in(keys.client, state.round)
        total = zero_total(update)
        for client_id, client in zip(ids, data, strict=True):
            total, private[client_id] = step(total, private[client_id], state.shared, client, key)
        return finish(state, total), private

    return one_round, step


def one_by_one(private: Any, num_clients: int) -> list[Any]:
    """Stacked private parameters as a list of each client's own."""
    return [jax.tree.map(lambda x, row=row: jnp.copy(x[row]), private) for row in range(num_clients)]


def largest_difference(state, private, loop_state, loop_private: Sequence[Any]) -> float:
    """How far the loop is from the engine: the largest difference in a leaf over the largest number there or 1."""

    def off(found, expected):
        found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
        return np.max(np.abs(found - expected) / max(1.0, np.abs(expected).max(initial=0.0)), initial=0.0)

    worst = [off(a, b) for a, b in zip(jax.tree.leaves(loop_state.shared), jax.tree.leaves(state.shared), strict=True)]
    host = jax.device_get(private)
    for row, own in enumerate(loop_private):
        same = jax.tree.map(lambda x, row=row: x[row], host)
        worst += [off(a, b) for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(same), strict=True)]
    return float(np.max(worst)) if np.all(np.isfinite(worst)) else float("inf")


def prove_equal(
    rounds, loop, num_clients: int, keys: RoundKeys, *, num_rounds: int = 2, restart: bool = False
) -> float:
    """Runs both from one start and returns `largest_difference`; of all rounds, if each starts anew.

    Raises:
      RuntimeError: if it is above `TOLERANCE`; then the times would not be of equal work.
    """
    state, private = rounds.init(jax.random.key(0))
    difference = 0.0
    for number in range(num_rounds):
        if restart or number == 0:
            loop_state, loop_private = jax.tree.map(jnp.copy, state), one_by_one(private, num_clients)
        state, private, _ = rounds.run(state, private, keys, 1)
        loop_state, loop_private = loop(loop_state, loop_private, keys)
        if restart or number == num_rounds - 1:
            difference = max(difference, largest_difference(state, private, loop_state, loop_private))
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"After {num_rounds} rounds the loop is {difference:.2g} off the round, more than {TOLERANCE:g}: not equal "
            "work."
        )
    return difference


def take_turns(programs: Sequence[tuple[Callable, Any]], *, repeats: int) -> list[list[float]]:
    """Seconds of each round of each program, the first round of each not counted.

    The programs take turns, so that a drift of the machine meets all of them.

    Args:
      programs: ``one_round(state, private) -> (state, private)`` and what it starts from.
      repeats: counted rounds of each.
    """
    seconds, states = [[] for _ in programs], [start for _, start in programs]
    for _ in range(repeats + 1):
        for place, (one_round, _) in enumerate(programs):
            start = time.perf_counter()
            states[place] = jax.block_until_ready(one_round(*states[place]))
            seconds[place].append(time.perf_counter() - start)
    return [times[1:] for times in seconds]


def measure(case: Case, *, data_dir: Path | None, smoke: bool, repeats: int) -> dict[str, Any]:
    """Proves the loop equal and times both, in this process.

    Returns:
      A flat JSON object. Peak memory is that of the rounds, read before the loop has run.
    """
    interactions, clients = population(case, data_dir, smoke=smoke)
    algorithm, _ = case.build(interactions)
    num_clients = clients.num_clients
    rounds = make_rounds(algorithm, chain(), full_participation(num_clients), clients, span_size=1)
    keys = RoundKeys(*jax.random.split(jax.random.key(1), 3))

    def engine(state, private):
        return rounds.run(state, private, keys, 1)[:2]

    take_turns([(engine, rounds.init(jax.random.key(0)))], repeats=1)
    peak = peak_memory()
    loop, _ = client_loop(algorithm, clients)
    difference = prove_equal(rounds, loop, num_clients, keys, restart=case.restart)
    state, private = rounds.init(jax.random.key(0))
    starts = [rounds.init(jax.random.key(0)), (state, one_by_one(private, num_clients))]
    ours, plain = take_turns(list(zip((engine, lambda s, p: loop(s, p, keys)), starts, strict=True)), repeats=repeats)
    return {
        "row": case.name,
        "clients": num_clients,
        "items": clients.num_items,
        "interactions": clients.num_interactions,
        "round_s": float(np.median(ours)),
        "loop_s": float(np.median(plain)),
        "clients_per_s": num_clients / float(np.median(ours)),
        "peak_memory_bytes": peak,
        "max_difference": difference,
        "repeats": repeats,
        "threads": os.environ.get("NPROC", "as many as cores"),
        "load": os.getloadavg()[0],
        "stamp": stamp(seed=0, data_fingerprint=interactions.fingerprint),
    }


def in_its_own_process(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Runs `measure` in a child.

    Raises:
      RuntimeError: with its last line, if the child fails.
    """
    command = [sys.executable, "-m", "experiments", "speed", "--child", case.name, f"--repeats={args.repeats}"]
    command += ["--smoke"] * args.smoke + ([f"--data-dir={args.data_dir}"] if args.data_dir else [])
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    printed = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not printed:
        raise RuntimeError(f"{case.name} ended with {done.returncode}: {(done.stderr.strip() or 'silence')[-400:]}")
    return json.loads(printed[-1])


def make_table(lines: Sequence[dict[str, Any]]) -> Table:
    """The rows that were run, the newest line of each."""
    newest, rows = {line["row"]: line for line in lines}, []
    for case in CASES:
        if case.name not in newest:
            continue
        line = newest[case.name]
        rows.append(
            (
                case.name,
                f"{line['round_s']:.3g}",
                f"{line['clients_per_s']:,.0f}",
                f"{line['peak_memory_bytes'] / 2**30:.2f}",
                f"{line['loop_s']:.3g}",
                f"{line['loop_s'] / line['round_s']:.1f}x",
                f"{line['max_difference']:.0e}",
                f"{line['load']:.1f}",
                case.published or None,
            )
        )
    heads = ("seconds a round", "clients/s", "peak memory, GiB", "plain loop, seconds", "loop / round", "loop off by")
    return Table(("row", *heads, "load", "published seconds a round"), rows)


def write_page(lines: Sequence[dict[str, Any]]) -> str:
    """The page: how it was measured, the table, the machine."""
    newest = list({line["row"]: line for line in lines}.values())
    stamps = [line["stamp"] for line in newest]
    devices = sorted({f"{s['device_kind']} ({s['platform']}, {s['cpu_count']} cores)" for s in stamps})
    commits = sorted({(s["commit"] or "none")[:12] for s in stamps})
    threads, repeats = (sorted({str(line[key]) for line in newest}) for key in ("threads", "repeats"))
    restarted = [case.name.partition(",")[0] for case in CASES if case.restart]
    return (
        "# Seconds a round\n\nStatus: study; published times are of other machines, and nothing is claimed of them.\n\n"
        "All clients take part; negatives are drawn anew in every round. The plain loop is one jitted program a client "
        'called from Python that was first shown to compute the same parameters: "off by" is the largest difference '
        f"after two rounds, over the largest number of its leaf or 1 (for {', '.join(restarted)}, after each of two "
        "rounds that start alike: where a ReLU is near zero, the last bit decides whether it counts, and two runs part "
        f"in their second round). Medians of {', '.join(repeats)} rounds after one to warm up, the two taking turns; "
        "peak memory is the largest resident set of the row's process, data and compilation included, "
        "before the loop. Load is the machine's 1-minute average at the end of a row: above its number of cores, other "
        "work slowed the row down, the loop as well as the round.\n\n"
        f"{to_markdown(make_table(lines))}\nWritten by `python -m experiments speed`; commits {', '.join(commits)}, "
        f"device {', '.join(devices)}, XLA threads (NPROC) {', '.join(threads)}. No GPU was measured.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the rows that the flags name, writes the files, prints the page."""
    parser = argparse.ArgumentParser(prog="python -m experiments speed", description=__doc__.splitlines()[0])
    names = [case.name for case in CASES]
    parser.add_argument("--row", action="append", choices=names, help="only this row; may be repeated")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="timed rounds")
    parser.add_argument("--data-dir", type=Path, help="folder with ml-100k/ and ml-1m/ (default: FEDJAX_REC_DATA)")
    parser.add_argument("--smoke", action="store_true", help="two rows on made-up data; keeps nothing")
    parser.add_argument("--only-page", action="store_true", help="run nothing, write the page from the kept lines")
    parser.add_argument("--child", choices=names, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    chosen = args.row or (["PFedRec, ML-100K"] if args.smoke else names)
    if args.smoke:
        args.repeats = 2
    if args.child:
        case = next(case for case in CASES if case.name == args.child)
        print(json.dumps(measure(case, data_dir=args.data_dir, smoke=args.smoke, repeats=args.repeats)))
        return 0
    file = RESULTS / "speed.jsonl"
    kept = file.exists() and not args.smoke
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if kept else []
    for case in CASES:
        if args.only_page or case.name not in chosen:
            continue
        lines.append(in_its_own_process(case, args))
        found = lines[-1]
        print(f"{case.name}: {found['round_s']:.3g} s a round, the loop {found['loop_s']:.3g} s", flush=True)
        if not args.smoke:
            with open(file, "a", encoding="utf-8") as out:
                out.write(json.dumps(found) + "\n")
    page = write_page(lines)
    print(page)
    if not args.smoke:
        (RESULTS / "speed.md").write_text(page, encoding="utf-8")
        (RESULTS / "speed.tex").write_text(to_latex(make_table(lines)), encoding="utf-8")
    return 0

"""One round of every method with 100,000 clients and 50,000 items: its time and peak memory, or its refusal.

    python -m benchmarks.methods                      # minutes; writes benchmarks/results/methods.{jsonl,md}
    python -m benchmarks.methods --method fedavg      # one row anew
    python -m benchmarks.methods --smoke              # under a minute; a small population, keeps nothing

Every client has 64 distinct items, drawn uniformly, and four uniform negatives for each in every round. All clients'
private state exists, and a Poisson cohort of 1,000 trains: memory is set by the population, time by the cohort. Each
method has a process of its own, so that the peak resident memory is its own. A method whose private state would not fit
refuses before anything is allocated, and the sentence it refuses with is in the table.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import fedjax_rec as fr
from benchmarks.round import peak_memory
from fedjax_rec.algorithms.fedavg import fedavg
from fedjax_rec.algorithms.fedncf import fedncf
from fedjax_rec.algorithms.fednova import fednova
from fedjax_rec.algorithms.fedprox import fedprox
from fedjax_rec.algorithms.fedrap import additive_scorer, fedrap
from fedjax_rec.algorithms.local_only import local_only
from fedjax_rec.algorithms.pfedrec import personal_scorer, pfedrec
from fedjax_rec.algorithms.scaffold import control_rows, scaffold
from fedjax_rec.data.clients import ClientData, client_data
from fedjax_rec.data.interactions import Interactions
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.data.split import Split
from fedjax_rec.federated.algorithm import Algorithm, all_private
from fedjax_rec.federated.cohort import full_participation, poisson
from fedjax_rec.federated.local import mean_steps
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.models.neural_cf import mlp
from fedjax_rec.reporting import Table, to_markdown
from fedjax_rec.reporting.formatting import format_bytes
from fedjax_rec.runs.stamp import stamp

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DIM = 32
BATCH_SIZE = 51  # with four negatives each, 51 make the usual 256 examples
NEGATIVES = Negatives(4)
LR = 0.1


@dataclass(frozen=True)
class World:
    """What a method is built for.

    Attributes:
      clients: the population.
      sampling_prob: of a client in a round.
      max_bytes: most bytes that the private state of all clients may take.
    """

    clients: ClientData
    sampling_prob: float
    max_bytes: int

    @property
    def num_items(self) -> int:
        """Catalogue size."""
        return self.clients.num_items

    @property
    def sizes(self) -> dict[str, int]:
        """The arguments of a method with a private table for each client."""
        return {
            "num_clients": self.clients.num_clients,
            "num_items": self.num_items,
            "max_private_bytes": self.max_bytes,
        }

    @property
    def personal(self) -> dict[str, int]:
        """The same where the model knows the catalogue's size."""
        return {name: value for name, value in self.sizes.items() if name != "num_items"}

    @property
    def cohort_size(self) -> float:
        """Expected clients of a round."""
        return self.clients.num_clients * self.sampling_prob


def _mf(world: World):
    return matrix_factorization(world.num_items, dim=DIM)


def _steps(**options) -> dict[str, Any]:
    return {"batch_size": BATCH_SIZE, "negatives": NEGATIVES, **options}


def _scaffold(world: World) -> Algorithm:
    return scaffold(
        _mf(world),
        lr=LR,
        num_control_rows=control_rows(world.clients, batch_size=BATCH_SIZE, negatives=NEGATIVES),
        mean_local_steps=mean_steps(world.clients, batch_size=BATCH_SIZE),
        sampling_prob=world.sampling_prob,
        **_steps(),
    )


def _fedrap(world: World) -> Algorithm:
    return fedrap(additive_scorer(world.num_items, dim=DIM), local_epochs=1, **world.personal, **_steps())


# A new method is one line: how it is built for a world.
METHODS: dict[str, Callable[[World], Algorithm]] = {
    "fedavg": lambda w: fedavg(_mf(w), client_optimizer=optax.sgd(LR), **_steps()),
    "fedprox": lambda w: fedprox(_mf(w), mu=0.01, client_optimizer=optax.sgd(LR), **_steps()),
    "fednova": lambda w: fednova(_mf(w), lr=LR, **_steps()),
    "scaffold": _scaffold,
    "fedncf": lambda w: fedncf(mlp(w.num_items, dim=DIM), num_items=w.num_items, local_epochs=1, **_steps()),
    "pfedrec": lambda w: pfedrec(personal_scorer(w.num_items, dim=DIM), num_items=w.num_items, **_steps()),
    "fedrap": _fedrap,
    "local_only": lambda w: local_only(personal_scorer(w.num_items, dim=DIM), **w.sizes, **_steps()),
    "fcf": lambda w: fr.fcf(w.num_items, cohort_size=w.cohort_size, dim=DIM),
    "fedrecon": lambda w: fr.fedrecon(
        _mf(w), reconstruction_optimizer=optax.sgd(LR), client_optimizer=optax.sgd(LR), **_steps()
    ),
    "fedmf": lambda w: fr.fedmf(_mf(w), **_steps()),
    "fedmf, visits": lambda w: fr.fedmf(_mf(w), aggregation="visits", cohort_size=w.cohort_size, **_steps()),
    "fedrec": lambda w: fr.fedrec(w.num_items, dim=DIM, rho=1),
    "gpfedrec": lambda w: fr.gpfedrec(fr.private_tower(w.num_items, dim=DIM), **w.sizes, **_steps()),
    "cofedrec": lambda w: fr.cofedrec(personal_scorer(w.num_items, dim=DIM), **w.sizes, **_steps()),
    "ditto": lambda w: fr.ditto(_mf(w), pull=0.5, **w.personal, **_steps()),
    "apfl": lambda w: fr.apfl(_mf(w), **w.personal, **_steps()),
}


def population(*, num_users: int, num_items: int, rows_per_user: int, seed: int = 0) -> ClientData:
    """Clients with as many distinct items each, uniform over the catalogue; all in train."""
    rng = np.random.default_rng(seed)
    # Sorted draws from fewer items, moved apart by their place, are distinct.
    items = np.sort(rng.integers(0, num_items - rows_per_user + 1, (num_users, rows_per_user), np.int32), axis=1)
    items += np.arange(rows_per_user, dtype=np.int32)

    def part(item_ids: np.ndarray, offsets: np.ndarray) -> Interactions:
        return Interactions(
            name="uniform",
            offsets=offsets,
            item_ids=item_ids,
            file_rows=np.arange(len(item_ids)),
            num_items=num_items,
            timestamps=None,
            ratings=None,
            user_labels=np.arange(num_users),
            item_labels=np.arange(num_items),
        )

    train = part(items.reshape(-1), np.arange(num_users + 1) * rows_per_user)
    empty = part(np.zeros(0, np.int32), np.zeros(num_users + 1, np.int64))
    return client_data(Split(train, empty, empty, empty, rule="everything to train"), num_buckets=1)


def measure(name: str, args: argparse.Namespace) -> dict:
    """Times rounds of one method in this process.

    Returns:
      A flat JSON object; ``private_bytes`` is the state of all clients, ``server_bytes`` the server's,
      ``refused`` the sentence of a method that does
      not fit, or None; times and peak memory are missing in the latter case.
    """
    clients = population(num_users=args.users, num_items=args.items, rows_per_user=args.rows)
    cohort_size = min(args.cohort_size, args.users) or args.users
    max_bytes = int(args.max_gib * 2**30)
    world = World(clients, cohort_size / args.users, max_bytes)
    row = {"benchmark": "methods", "method": name, **_setting(args), "refused": None}
    row |= {k: v for k, v in stamp(seed=0, data_fingerprint=None).items() if k in ("commit", "dirty", "versions")}
    row |= {"device": str(jax.devices()[0].device_kind), "utc_time": datetime.now(UTC).isoformat(timespec="seconds")}
    try:
        algorithm = METHODS[name](world)
        row["private_bytes"] = _bytes_of(lambda key: all_private(algorithm, key, args.users))
        row["server_bytes"] = _bytes_of(algorithm.init)
        for whose, what in (("clients' private", "private_bytes"), ("server's", "server_bytes")):
            if row[what] > max_bytes:
                raise ValueError(
                    f"The {whose} state for {args.users} clients takes {row[what]} bytes, more than {max_bytes}. Use a "
                    "smaller dim or fewer clients or items."
                )
    except ValueError as error:
        return row | {"refused": str(error)}
    sampler = full_participation(args.users)
    if cohort_size < args.users:
        sampler = poisson(args.users, cohort_size=cohort_size)
    rounds = make_rounds(algorithm, chain(), sampler, clients, span_size=1)
    keys = RoundKeys(*jax.random.split(jax.random.key(1), 3))
    state, private = rounds.init(jax.random.key(0))
    seconds, cohorts = [], []
    for _ in range(args.repeats + 1):
        start = time.perf_counter()
        state, private, metrics = jax.block_until_ready(rounds.run(state, private, keys, 1))
        seconds.append(time.perf_counter() - start)
        cohorts.append(float(metrics["cohort_size"][0]))
    median = float(np.median(seconds[1:]))
    return row | {
        "median_s": median,
        "compile_s": seconds[0] - median,
        "clients_per_s": float(np.mean(cohorts[1:]) / median),
        "peak_memory_bytes": peak_memory(),
        "load": os.getloadavg()[0],
    }


def _bytes_of(init: Callable) -> int:
    """Bytes of what ``init(key)`` returns, without making it."""
    shapes = jax.eval_shape(init, jax.random.key(0))
    return int(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)))


def _setting(args: argparse.Namespace) -> dict[str, Any]:
    """What makes two lines comparable."""
    return {
        "users": args.users,
        "items": args.items,
        "rows_per_user": args.rows,
        "cohort_size": args.cohort_size,
        "max_gib": args.max_gib,
        "repeats": args.repeats,
    }


def in_its_own_process(name: str, args: argparse.Namespace) -> dict:
    """Runs `measure` in a child; a child that dies is a row that says so."""
    flags = [f"--{key.replace('_', '-')}={getattr(args, key)}" for key in ("users", "items", "rows", "cohort_size")]
    flags += [f"--max-gib={args.max_gib}", f"--repeats={args.repeats}", f"--child={name}"]
    command = [sys.executable, "-m", "benchmarks.methods", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    printed = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not printed:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"benchmark": "methods", "method": name, **_setting(args), "failed": f"{done.returncode}: {last}"}
    return json.loads(printed[-1])


def make_table(rows: Sequence[dict]) -> Table:
    """One line a method: what it took, or why it did not run."""
    lines = []
    for row in rows:
        outcome = row.get("refused") or row.get("failed")
        if outcome is None:
            cells = (f"{row['median_s']:.3g}", f"{row['clients_per_s']:,.0f}")
            gib = row["peak_memory_bytes"] / 2**30
            fits = "fits" if gib <= row["max_gib"] else f"over {row['max_gib']:g} GiB"
            cells += (f"{gib:.2f}", fits)
        else:
            cells = (None, None, None, f"{'refused' if row.get('refused') else 'failed'}: {outcome}")
        sizes = (format_bytes(row.get(name)) for name in ("private_bytes", "server_bytes"))
        lines.append((row["method"], *sizes, *cells))
    return Table(
        ("method", "private state", "server state", "seconds a round", "clients/s", "peak memory, GiB", "outcome"),
        lines,
    )


def page(rows: Sequence[dict]) -> str:
    """The table, with what was run and on what."""
    one = rows[0]
    loads = [row["load"] for row in rows if "load" in row]
    busy = f"load averages {min(loads):.1f} to {max(loads):.1f}" if loads else "load not measured"
    devices = sorted({row["device"] for row in rows if "device" in row})
    commits = sorted({(row["commit"] or "none")[:12] for row in rows if "commit" in row})
    return (
        "# Every method at scale\n\nWritten by `python -m benchmarks.methods`; do not edit.\n\n"
        f"{one['users']:,} clients with {one['rows_per_user']} items each of {one['items']:,}; item vectors of length "
        f"{DIM}; one local epoch in batches of {BATCH_SIZE} positives with four negatives each; a Poisson cohort of "
        f"{one['cohort_size']:,} expected clients (0: all). Private state is that of all clients. The limit, for each "
        f"of the two states and for the process, is {one['max_gib']:g} GiB. Seconds are the median of "
        f"{one['repeats']} rounds after one to warm up. Peak memory is the largest resident set of the method's "
        "process, data and compilation included.\n\n"
        f"{to_markdown(make_table(rows))}\n"
        f"Device {', '.join(devices)}, {busy} while they ran: above the number of cores, {os.cpu_count()}, other work "
        f"made times longer. Commits {', '.join(commits)}. No GPU was measured.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the methods that the flags name; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=100_000, help="clients in the population")
    parser.add_argument("--items", type=int, default=50_000, help="catalogue size")
    parser.add_argument("--rows", type=int, default=64, help="items of each client")
    parser.add_argument("--cohort-size", type=int, default=1000, help="expected clients a round; 0 = all")
    parser.add_argument("--max-gib", type=float, default=8.0, help="the limit, for private state and peak memory")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--method", action="append", choices=METHODS, help="only this one; may be repeated")
    parser.add_argument("--smoke", action="store_true", help="a small population; keeps nothing")
    parser.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.smoke:
        # A limit that private tables exceed, so that one method runs and one refuses.
        args.users, args.items, args.rows, args.cohort_size, args.repeats, args.max_gib = 400, 500, 8, 40, 2, 0.02
        args.method = args.method or ["fedavg", "local_only"]
    if args.child:
        print(json.dumps(measure(args.child, args)))
        return 0
    rows = []
    for name in args.method or METHODS:
        rows.append(in_its_own_process(name, args))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        if not args.smoke:
            RESULTS.mkdir(exist_ok=True)
            with open(RESULTS / "methods.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    if not args.smoke:
        kept = [json.loads(line) for line in (RESULTS / "methods.jsonl").read_text("utf-8").splitlines()]
        same = {line["method"]: line for line in kept if all(line.get(k) == v for k, v in _setting(args).items())}
        rows = [same[name] for name in METHODS if name in same]
        (RESULTS / "methods.md").write_text(page(rows), encoding="utf-8")
    print(page(rows))
    return 1 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

"""How long one federated round takes.

    python -m benchmarks.round --data-dir ~/data/ml-100k
    python -m benchmarks.round --items 100000 --dp --json
    python -m benchmarks.round --items 1682 --dp --profile profiles/round

The work is that of `benchmarks/workload.py`: every client's positives and four negatives each, one local epoch of SGD,
uniform averaging. Before any timing, one round without noise is compared with a NumPy round in float64.
"""

import argparse
import json
import os
import resource
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import numpy_reference, workload
from fedjax_rec.algorithms.fedavg import fedavg
from fedjax_rec.data.clients import client_data_from_examples
from fedjax_rec.federated.algorithm import ServerState
from fedjax_rec.federated.cohort import full_participation, poisson
from fedjax_rec.federated.round import RoundKeys, default_chunk_size, make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.base import Shared
from fedjax_rec.models.matrix_factorization import linear_scorer
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise
from fedjax_rec.runs.stamp import stamp

RESULTS = Path(__file__).parent / "results" / "round.jsonl"
L2_CLIP_NORM, NOISE_MULTIPLIER = 1.0, 1.0
NUM_BUCKETS = 8
TOLERANCE = 1e-5


def main(argv: list[str] | None = None) -> int:
    """Runs the grid that the flags span; returns the exit code."""
    args = _arguments(argv)
    if args.threads:
        os.environ["NPROC"] = str(args.threads)  # read when JAX first looks for devices
    if args.devices > 1:
        jax.config.update("jax_num_cpu_devices", args.devices)
    rows = []
    bandwidth = copy_bandwidth()
    for num_items in args.items:
        work = _workload(args, num_items)
        for dp in (True, False) if args.dp is None else (args.dp,):
            for cohort_size in args.cohort_sizes:
                for chunk_size in args.chunk_sizes:
                    row = measure(work, args, dp=dp, cohort_size=cohort_size, chunk_size=chunk_size)
                    row["bandwidth_fraction"] = row["bytes_moved"] / row["median_s"] / bandwidth
                    rows.append(row | {"copy_bytes_per_s": bandwidth})
                    print(json.dumps(rows[-1]) if args.json else _line(rows[-1]), flush=True)
    if not args.smoke and not args.json:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with open(args.out, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        print(f"Appended {len(rows)} lines to {args.out}")
    return 0


def _arguments(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.round", description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[1682, 100_000, 1_000_000], help="catalogue sizes")
    parser.add_argument(
        "--dp", action=argparse.BooleanOptionalAction, default=None, help="clip and noise; both if unset"
    )
    parser.add_argument("--data-dir", help="folder with u.data of MovieLens 100K; a made-up population without it")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls")
    parser.add_argument("--span", type=int, default=5, help="rounds in a call; training runs up to 100")
    parser.add_argument("--cohort-sizes", type=int, nargs="+", default=[0], help="expected clients a round; 0 = all")
    parser.add_argument("--chunk-sizes", type=int, nargs="+", default=[0], help="clients side by side; 0 = the default")
    parser.add_argument("--devices", type=int, default=1, help="devices for the client axis; 0 = one a CPU core")
    parser.add_argument(
        "--threads", type=int, help="XLA's worker threads on a CPU; default one a device, 0 = as many as cores"
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines and nothing else; append nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where JSON lines are appended")
    parser.add_argument("--profile", type=Path, help="write a trace of a few rounds into this folder")
    parser.add_argument("--smoke", action="store_true", help="a tiny population, seconds long")
    args = parser.parse_args(argv)
    if args.smoke:
        args.items, args.repeats, args.span = [50], 2, 2
    # The kernels of a round are small: handing them from thread to thread costs more than the second thread gains.
    args.devices = args.devices or len(os.sched_getaffinity(0))
    args.threads = args.devices if args.threads is None else args.threads
    return args


def _workload(args, num_items: int) -> workload.Workload:
    if args.data_dir is not None:
        return workload.clients(workload.find_u_data(args.data_dir), num_items=num_items)
    return workload.synthetic_clients(num_clients=40 if args.smoke else 943, num_items=num_items)


def measure(work: workload.Workload, args, *, dp: bool, cohort_size: int, chunk_size: int) -> dict:
    """Times rounds of one setting.

    Returns:
      A flat JSON object; seconds a round as ``median_s``, ``q1_s``, ``q3_s`` (over calls, each the mean of its
      rounds); ``compile_s`` is the first call less a median call; ``bytes_moved`` is what the algorithm must
      read and write at least; ``peak_memory_bytes`` is the device's where it tells, else the process's.
    """
    clients = client_data_from_examples(
        list(work),
        num_items=work.num_items,
        batch_size=workload.BATCH_SIZE,
        num_buckets=NUM_BUCKETS,
        num_shards=args.devices,
    )
    mesh = jax.make_mesh((args.devices,), ("clients",)) if args.devices > 1 else None
    links = (clip_by_global_norm(L2_CLIP_NORM), gaussian_noise(NOISE_MULTIPLIER * L2_CLIP_NORM)) if dp else ()
    algorithm = fedavg(
        linear_scorer(work.num_items, dim=workload.DIM),
        client_optimizer=optax.sgd(workload.LEARNING_RATE),
        batch_size=workload.BATCH_SIZE,
    )
    sampler = full_participation(work.num_clients)
    if cohort_size:
        sampler = poisson(work.num_clients, cohort_size=cohort_size)
    options = {"chunk_size": chunk_size or None, "mesh": mesh, "span_size": args.span}
    rounds = make_rounds(algorithm, chain(*links), sampler, clients, **options)
    difference = None
    if not cohort_size:
        noiseless = make_rounds(algorithm, chain(*links[:1]), sampler, clients, **options)
        difference = equal_work(work, noiseless, l2_clip_norm=L2_CLIP_NORM if dp else None)
    keys = RoundKeys(*jax.random.split(jax.random.key(1), 3))
    state, private = rounds.init(jax.random.key(0))
    start = time.perf_counter()
    state, private, _ = jax.block_until_ready(rounds.run(state, private, keys, args.span))
    first = time.perf_counter() - start
    seconds, cohorts = [], []
    for _ in range(args.repeats):
        start = time.perf_counter()
        state, private, metrics = jax.block_until_ready(rounds.run(state, private, keys, args.span))
        seconds.append((time.perf_counter() - start) / args.span)
        cohorts.append(float(metrics["cohort_size"].mean()))
    if args.profile is not None:
        with jax.profiler.trace(str(args.profile)):
            state, private, _ = jax.block_until_ready(rounds.run(state, private, keys, min(3, args.span)))
    q1, median, q3 = np.percentile(seconds, [25, 50, 75])
    share = np.mean(cohorts) / work.num_clients
    return {
        "benchmark": "round",
        "items": work.num_items,
        "dp": dp,
        "clients": work.num_clients,
        "cohort_size": float(np.mean(cohorts)),
        "examples": work.num_examples,
        "workload": work.fingerprint,
        "chunk_size": chunk_size or default_chunk_size(),
        "devices": args.devices,
        "threads": args.threads,
        "span": args.span,
        "median_s": float(median),
        "q1_s": float(q1),
        "q3_s": float(q3),
        "compile_s": first - args.span * float(median),
        "repeats": args.repeats,
        "clients_per_s": float(np.mean(cohorts) / median),
        "examples_per_s": float(share * work.num_examples / median),
        "padding_waste": clients.padding_waste,
        "bytes_moved": bytes_moved(work, share=share, dp=dp),
        "peak_memory_bytes": peak_memory(),
        "max_abs_difference": difference,
        "utc_time": datetime.now(UTC).isoformat(timespec="seconds"),
        **{k: v for k, v in stamp(seed=0, data_fingerprint=None).items() if k in ("commit", "dirty", "versions")},
        "device": str(jax.devices()[0].device_kind),
        "load": os.getloadavg()[0],
    }


def equal_work(work: workload.Workload, rounds, *, l2_clip_norm: float | None) -> float:
    """One round without noise against the NumPy reference; returns the largest absolute difference.

    Raises:
      RuntimeError: if it is above 1e-5; then nothing that follows would be a comparison.
    """
    params = workload.initial_params(work.num_items)
    expected = numpy_reference.fedavg_round(params, work, l2_clip_norm=l2_clip_norm)
    state, private = rounds.init(jax.random.key(0))
    shared = Shared({"item": jnp.asarray(params["items"])}, {k: jnp.asarray(params[k]) for k in ("out", "bias")})
    shared = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), shared, state.shared)
    state = ServerState(state.round, shared, state.opt_state, state.transforms)
    keys = RoundKeys(*jax.random.split(jax.random.key(1), 3))
    state, _, _ = rounds.run(state, private, keys, 1)
    found = {"items": np.asarray(state.shared.tables["item"]), **jax.tree.map(np.asarray, state.shared.dense)}
    difference = numpy_reference.max_abs_difference(found, expected)
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"One round is {difference:.2g} off the NumPy reference, more than {TOLERANCE:g}: not equal work."
        )
    return difference


def bytes_moved(work: workload.Workload, *, share: float, dp: bool) -> float:
    """Bytes that a round must move at least: rows read and written for each example, and the server's tables.

    An example reads its row and adds to it (3 row passes); each distinct row of a client is received, subtracted and
    summed (5); the server's table is zeroed, summed, read and written (4, and 1 more for noise).
    """
    row = 4 * workload.DIM
    distinct = sum(len(np.unique(ids)) for ids, _ in work)
    server = (5 if dp else 4) * work.num_items
    return float(row * (share * (3 * work.num_examples + 5 * distinct) + server))


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a 256 MB device copy: what the fraction is of."""
    x = jnp.ones(1 << 25, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    copy(x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        copy(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * x.nbytes / min(seconds)


def peak_memory() -> int:
    """Peak bytes in use on the device, or the peak resident set of this process on a CPU."""
    stats = jax.devices()[0].memory_stats() or {}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(stats.get("peak_bytes_in_use", resident * (1 if sys.platform == "darwin" else 1024)))


def _line(row: dict) -> str:
    privacy = "clip + noise" if row["dp"] else "no privacy  "
    off = "" if row["max_abs_difference"] is None else f", {row['max_abs_difference']:.1e} off the reference"
    return (
        f"{row['items']:>9,} items, {privacy}, cohort {row['cohort_size']:.0f}, "
        f"chunk {row['chunk_size']}, {row['devices']} device(s): {row['median_s'] * 1e3:.1f} ms "
        f"[{row['q1_s'] * 1e3:.1f}, {row['q3_s'] * 1e3:.1f}], compile {row['compile_s']:.1f} s, "
        f"{row['clients_per_s']:,.0f} clients/s, {row['examples_per_s'] / 1e6:.1f} M examples/s, "
        f"{row['bandwidth_fraction']:.0%} of copy bandwidth, peak {row['peak_memory_bytes'] / 1e6:,.0f} MB{off}"
    )


if __name__ == "__main__":
    sys.exit(main())

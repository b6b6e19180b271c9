"""Seconds of one sweep of private alternating least squares.

    python -m benchmarks.dpals --data-dir ~/data      # a minute or two; appends to benchmarks/results/dpals.jsonl
    python -m benchmarks.dpals --smoke                # seconds, a made-up population; keeps nothing

All clients of MovieLens 1M in every round, dim 32, clip and noise on. "light" sends dim numbers an item; the others
send the dim (dim + 1) / 2 of x x^T as well, of at most so many items a client. Processor seconds stand beside those on
the wall: on a machine that has other work, they say what a sweep takes on one that has not.
"""

import argparse
import json
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import jax

from fedjax_rec.algorithms.dpals import Shares, dpals
from fedjax_rec.data import Split, leave_one_out, load
from fedjax_rec.data.clients import client_data
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.privacy.mechanisms import user_level_dp
from fedjax_rec.runs.stamp import stamp

RESULTS = Path(__file__).parent / "results" / "dpals.jsonl"
FORMS = {
    "light": {"shares": Shares(gram=0.0)},
    "50 items": {"max_rows": 50},
    "100 items": {"max_rows": 100},
    "all items": {},
}


def measure(split: Split, name: str, *, dim: int, repeats: int) -> dict:
    """One record: median seconds of a sweep on the wall and on the processor, and of compiling it."""
    clients = client_data(split)
    algorithm = dpals(split.num_items, cohort_size=split.num_users, dim=dim, **FORMS[name])
    links = user_level_dp(l2_clip_norm=1.0, noise_multiplier=1.0)
    rounds = make_rounds(algorithm, links, full_participation(split.num_users), clients, span_size=1)
    state, private = rounds.init(jax.random.key(0))
    keys = RoundKeys(*(jax.random.key(seed) for seed in (1, 2, 3)))
    wall, processor = [], []
    for _ in range(repeats + 1):
        start = time.perf_counter(), time.process_time()
        state, private, _ = jax.block_until_ready(rounds.run(state, private, keys))
        wall.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
    return {
        "benchmark": "dpals",
        "form": name,
        "num_users": split.num_users,
        "num_items": split.num_items,
        "num_interactions": split.train.num_interactions,
        "dim": dim,
        "median_s": round(statistics.median(wall[1:]), 3),
        "median_processor_s": round(statistics.median(processor[1:]), 3),
        "first_s": round(wall[0], 1),
        "upload_mb_per_client": round(rounds.upload_bits / 8e6, 3),
        "repeats": repeats,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "stamp": stamp(seed=0, data_fingerprint=None),
    }


def main(argv: list[str] | None = None) -> int:
    """Measures every form, prints a line each and keeps it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder with ml-1m/ (default: FEDJAX_REC_DATA)")
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--form", action="append", choices=FORMS, help="only this form; may be repeated")
    parser.add_argument("--smoke", action="store_true", help="a tiny population, keeps nothing")
    args = parser.parse_args(argv)
    data = (
        load("synthetic", num_users=40, num_items=100) if args.smoke else load("movielens/1m", data_dir=args.data_dir)
    )
    dim, repeats = (4, 1) if args.smoke else (args.dim, args.repeats)
    for name in args.form or FORMS:
        row = measure(leave_one_out(data), name, dim=dim, repeats=repeats)
        print(
            f"{name:>10}: {row['median_s']:.2f} s a sweep, {row['median_processor_s']:.2f} s of processor time",
            flush=True,
        )
        if not args.smoke:
            RESULTS.parent.mkdir(exist_ok=True)
            with open(RESULTS, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

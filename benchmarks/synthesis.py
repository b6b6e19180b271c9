"""Seconds and memory of making virtual users: fitting the Gram generator, drawing, and an epoch of Mult-VAE.

    python -m benchmarks.synthesis --data-dir ~/data   # two minutes; appends to benchmarks/results/synthesis.jsonl
    python -m benchmarks.synthesis --smoke             # seconds, a made-up population; keeps nothing

MovieLens 1M, implicit rows of all users. "gram" is fitted at epsilon 8 with everything charged, compilation included;
"draw" draws 6,040 virtual users from it, cold and warm; "epoch" is one epoch of Mult-VAE 600-200 after the first,
which compiles. Each part runs in a process of its own, so that its peak memory is its own. Processor seconds stand
beside those on the wall: on a machine that has other work, they say what a part takes on one that has not.
"""

import argparse
import json
import math
import multiprocessing
import resource
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import jax

from fedjax_rec.data import Interactions, load
from fedjax_rec.models.mult_vae import mult_vae
from fedjax_rec.models.vae_training import vae_training
from fedjax_rec.runs.stamp import stamp
from fedjax_rec.synthesis.gram import gram_method
from fedjax_rec.synthesis.plan import fit_generator
from fedjax_rec.synthesis.virtual import virtual_users

RESULTS = Path(__file__).parent / "results" / "synthesis.jsonl"
PARTS = ("gram", "gram, no privacy", "epoch")


def measure(part: str, data_dir: Path | None, smoke: bool) -> dict:
    """One record of one part."""
    data = load("synthetic", num_users=60, num_items=80) if smoke else load("movielens/1m", data_dir=data_dir)
    found = _epoch(data) if part == "epoch" else _gram(data, math.inf if "no privacy" in part else 8.0)
    return {
        "benchmark": "synthesis",
        "part": part,
        "num_users": data.num_users,
        "num_items": data.num_items,
        **found,
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "stamp": stamp(seed=0, data_fingerprint=None),
    }


def _gram(data: Interactions, epsilon: float) -> dict:
    """Fitting, and drawing as many users as there are real ones, twice."""
    with _Clock() as fit:
        fitted = fit_generator(gram_method(), data, epsilon=epsilon, key=jax.random.key(0))
    found = {"fit_s": fit.wall, "fit_processor_s": fit.processor}
    for name in ("draw_cold", "draw"):
        key = jax.random.key(1)
        with _Clock() as draw:
            num = data.num_users
            virtual_users(fitted.generator, fitted.lengths, num_users=num, key=key, catalogue=data)
        found |= {f"{name}_s": draw.wall, f"{name}_processor_s": draw.processor}
    return found


def _epoch(data: Interactions) -> dict:
    """The fastest of three epochs after the first."""
    training = vae_training(mult_vae(data.num_items, width=600, latent=200), data, num_epochs=4)
    init_key, run_key = jax.random.split(jax.random.key(0))
    state = training.init(init_key)
    wall, processor = [], []
    for _ in range(4):
        with _Clock() as epoch:
            state, _ = jax.block_until_ready(training.run_epoch(state, run_key))
        wall.append(epoch.wall)
        processor.append(epoch.processor)
    return {"epoch_s": min(wall[1:]), "epoch_processor_s": min(processor[1:]), "first_epoch_s": wall[0]}


class _Clock:
    """Seconds on the wall and on the processor."""

    def __enter__(self):
        self.wall, self.processor = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_):
        self.wall = round(time.perf_counter() - self.wall, 2)
        self.processor = round(time.process_time() - self.processor, 2)


def main(argv: list[str] | None = None) -> int:
    """Measures every part, prints a line each and keeps it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder with ml-1m/ (default: FEDJAX_REC_DATA)")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; may be repeated")
    parser.add_argument("--smoke", action="store_true", help="a tiny population, keeps nothing")
    args = parser.parse_args(argv)
    # A fresh process for each part: memory that one gives back to nobody is not the next one's.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for part in args.part or PARTS:
            row = pool.apply(measure, (part, args.data_dir, args.smoke))
            print(", ".join(f"{key} {row[key]}" for key in row if key.endswith("_s") or key in ("part", "peak_gib")))
            if not args.smoke:
                RESULTS.parent.mkdir(exist_ok=True)
                with open(RESULTS, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

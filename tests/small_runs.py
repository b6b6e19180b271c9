"""A data set of sixty users and the commands that train on it: small enough that a test can run the whole job."""

import json
import os
from pathlib import Path

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

NUM_USERS, NUM_ITEMS, LENGTH = 60, 40, 8
TIMES = ("seconds", "rounds_per_s")
TINY = ("--rounds", "6", "--eval-every", "2", "--model.dim", "4")


def csv_lines(*, num_users: int = NUM_USERS, num_items: int = NUM_ITEMS, length: int = LENGTH, seed: int = 0):
    """Two camps of users with overlapping tastes; equal lengths, so that there is one bucket to compile."""
    rng = np.random.default_rng(seed)
    half = num_items // 2 + 5
    yield "user,item,rating,timestamp"
    for user in range(num_users):
        first = 0 if user % 2 else num_items - half
        for place, item in enumerate(rng.choice(half, min(length, half), replace=False) + first):
            yield f"u{user},i{item},{rng.integers(1, 6)},{1000 + place}"


def write_csv(path: Path, lines=None) -> Path:
    """Writes the lines, by default those of `csv_lines`."""
    path.write_text("\n".join(csv_lines() if lines is None else lines) + "\n", encoding="utf-8")
    return path


def share_compilations(folder: Path) -> None:
    """Compiles equal programs once for all runs of this process and of its children."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["XDG_CACHE_HOME"] = str(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()


def read(folder: Path, name: str = "result.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what a clock wrote."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


def result(folder: Path) -> dict:
    """result.json without what a clock or the machine wrote."""
    values = {name: value for name, value in read(folder).items() if name not in ("seconds", "stamp")}
    timed = ("clients_per_s", "rounds_per_s", "compile_s")
    return values | {"cost": {name: value for name, value in values["cost"].items() if name not in timed}}


def flags(dataset: Path, out: Path, *more: str) -> list[str]:
    return ["train", "--dataset", str(dataset), "--out", str(out), *TINY, *more]

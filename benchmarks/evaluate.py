"""Seconds of a full-ranking evaluation with every metric, at the shape of MovieLens 1M.

    python -m benchmarks.evaluate [--json] [--users 6040 --items 3706 --dim 64 --seen 165] [--repeats 9] [--smoke]

Random vectors and random masked items; time does not depend on what the vectors have learned.
"""

import argparse
import json
import time

import jax
import numpy as np

from fedjax_rec.evaluation import Cases, evaluate, factor_scorer


def random_cases(*, num_users: int, num_items: int, num_seen: int, seed: int) -> Cases:
    """One positive and about `num_seen` masked items a user."""
    rng = np.random.default_rng(seed)
    items = np.sort(rng.integers(0, num_items, (num_users, num_seen + 1)), axis=1)
    first = np.diff(items, axis=1, prepend=-1) > 0
    positives = items[:, -1].copy()
    seen = first & (items < positives[:, None])
    return Cases(
        user_ids=np.arange(num_users, dtype=np.int32),
        positives=positives[:, None].astype(np.int32),
        seen_offsets=np.concatenate([[0], np.cumsum(seen.sum(axis=1))]).astype(np.int64),
        seen_item_ids=items[seen].astype(np.int32),
        candidates=None,
        item_counts=np.bincount(items[seen], minlength=num_items),
        num_train_users=num_users,
        num_items=num_items,
        num_users_without_positives=0,
        part="test",
        fingerprint="synthetic",
    )


def measure(*, num_users: int, num_items: int, dim: int, num_seen: int, repeats: int, seed: int = 0) -> dict:
    """One record: compile seconds, median and quartiles of a call, users a second, device and versions."""
    rng = np.random.default_rng(seed)
    cases = random_cases(num_users=num_users, num_items=num_items, num_seen=num_seen, seed=seed)
    vectors = [rng.normal(size=(rows, dim)).astype(np.float32) for rows in (num_users, num_items)]
    scorer = factor_scorer(jax.device_put(vectors[0]), jax.device_put(vectors[1]))
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        evaluation = evaluate(scorer, cases)
        seconds.append(time.perf_counter() - start)
    quartiles = np.percentile(seconds[1:], [25, 50, 75])
    return {
        "benchmark": "evaluate",
        "num_users": num_users,
        "num_items": num_items,
        "dim": dim,
        "seen_per_user": round(len(cases.seen_item_ids) / num_users, 1),
        "num_metrics": len(evaluation.values),
        "median_s": round(float(quartiles[1]), 5),
        "quartiles_s": [round(float(quartiles[0]), 5), round(float(quartiles[2]), 5)],
        "compile_s": round(seconds[0] - float(quartiles[1]), 3),
        "users_per_s": round(num_users / float(quartiles[1])),
        "repeats": repeats,
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "jax": jax.__version__,
        "numpy": np.__version__,
    }


def main() -> None:
    """Prints a small table, or one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=6040)
    parser.add_argument("--items", type=int, default=3706)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--seen", type=int, default=165, help="masked items a user, about")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print only JSON lines")
    parser.add_argument("--smoke", action="store_true", help="a tiny catalogue, seconds long")
    flags = parser.parse_args()
    if flags.smoke:
        flags.users, flags.items, flags.dim, flags.seen, flags.repeats = 60, 200, 8, 20, 2
    record = measure(
        num_users=flags.users, num_items=flags.items, dim=flags.dim, num_seen=flags.seen, repeats=flags.repeats
    )
    if flags.json:
        print(json.dumps(record))
        return
    for key, value in record.items():
        print(f"{key:>16}  {value}")


if __name__ == "__main__":
    main()

"""What breaks ties in time decides the table: one data set, one protocol, five tie rules, three models.

    python -m experiments.tie_rules [--data-dir DIR]

About a minute on two CPU cores. Writes experiments/results/tie_rules.md.

MovieLens 100K, latest item out (415 of 943 users have a tied latest timestamp), full ranking, train and validation
items masked. Expect hit@10 of popularity and of EASE to differ by a factor of two between the smallest and the largest
item id as "latest". The rule of a split is therefore a named field, and its default is a seeded hash.

The reference values were measured before this package existed, with another program. That program sorted scores, and
popularity has many equal ones: ranked in expectation it differs by up to .0011 from the reference, and by less than
.001 in every cell if equal items stand by ascending id, which is what the reference is compared with. EASE has no ties.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedjax_rec.data import Interactions, leave_one_out
from fedjax_rec.data.sources import load
from fedjax_rec.evaluation import Cases, Scorer, cases, constant_scorer, evaluate
from fedjax_rec.models.ease import ease_scorer
from fedjax_rec.models.ials import ials_scorer, train_ials
from fedjax_rec.models.popularity import popularity_scorer
from fedjax_rec.reporting.tables import Table, to_markdown
from fedjax_rec.runs.stamp import stamp

METRICS = ("hit@10", "ndcg@10")
EASE_L2 = 300.0
HASH_SEEDS = (0, 1, 2)
TOLERANCE = 0.001

# (hit@10, ndcg@10) by tie rule: popularity, EASE.
REFERENCE = {
    "item_largest": ((0.0498, 0.0251), (0.0817, 0.0371)),
    "item_smallest": ((0.1135, 0.0574), (0.1813, 0.0977)),
    "file_last": ((0.0859, 0.0442), (0.141, 0.0726)),
    "file_first": ((0.0859, 0.0426), (0.1506, 0.0769)),
}


def measure(scorer: Scorer, cases: Cases, *, ties: str = "expected") -> tuple[float, ...]:
    """hit@10 and ndcg@10."""
    values = evaluate(scorer, cases, ks=(10,), ties=ties).values
    return tuple(values[name] for name in METRICS)


def measure_rule(interactions: Interactions, *, tie_rule: str, seed: int = 0, with_ials: bool = True) -> dict:
    """Both metrics of each model under one rule; for popularity also with ties against and for the positive."""
    split = leave_one_out(interactions, tie_rule=tie_rule, seed=seed)
    asked = cases(split)
    popularity = popularity_scorer(split.train)
    found = {
        "popularity": measure(popularity, asked),
        "popularity, pessimistic": measure(popularity, asked, ties="pessimistic"),
        "popularity, optimistic": measure(popularity, asked, ties="optimistic"),
        "popularity, by item id": measure(popularity_by_id(split.train), asked),
        "EASE": measure(ease_scorer(split.train, l2=EASE_L2), asked),
    }
    if with_ials:
        found["iALS"] = measure(ials_scorer(train_ials(split.train, dim=32)), asked)
    return found


def popularity_by_id(train: Interactions) -> Scorer:
    """Popularity whose equal items stand by ascending id: no two scores are equal, and each is a whole float32."""
    counts = train.item_counts * train.num_items + np.arange(train.num_items)[::-1]
    if counts.max() >= 2**24:
        raise ValueError("The data set is too large for one whole float32 a pair of count and id.")
    return constant_scorer(counts.astype(np.float32))


def agrees(found: dict, tie_rule: str) -> bool:
    """Whether a deterministic rule gives the reference values, within the tolerance."""
    ours = np.array([found["popularity, by item id"], found["EASE"]])
    return bool(np.all(np.abs(ours - np.array(REFERENCE[tie_rule])) <= TOLERANCE))


def write(found: dict[str, dict], *, interactions: Interactions) -> str:
    """The page: status, table, and what made it."""
    rows = []
    for rule, models in found.items():
        low, high = models["popularity, pessimistic"][0], models["popularity, optimistic"][0]
        cells = [value for name in ("popularity", "EASE", "iALS") for value in models[name]]
        by_id = " / ".join(f"{value:.4f}" for value in models["popularity, by item id"])
        rows.append((rule, *cells, f"{low:.4f} to {high:.4f}", by_id))
    table = Table(
        columns=(
            "tie rule",
            *(f"{name} {metric}" for name in ("popularity", "EASE", "iALS") for metric in METRICS),
            "popularity hit@10 by order of equal scores",
            "popularity, equal items by id",
        ),
        rows=rows,
        caption="MovieLens 100K, latest item out, full ranking, train and validation items masked.",
        notes=(
            f"EASE with l2 {EASE_L2:g}; iALS with 32 dimensions and default settings, not tuned.",
            "Equal scores in expectation; the last but one column spans all orders of equal popularity, the last has "
            "hit@10 / ndcg@10 of one of them.",
        ),
    )
    right = [rule for rule in REFERENCE if agrees(found[rule], rule)]
    wrong = [rule for rule in REFERENCE if rule not in right]
    status = f"reproduced for {', '.join(right) or 'no rule'}" + (f"; not for {', '.join(wrong)}" if wrong else "")
    ratio = found["item_smallest"]["EASE"][1] / found["item_largest"]["EASE"][1]
    made = stamp(seed=HASH_SEEDS[0], data_fingerprint=interactions.fingerprint)
    return (
        "# The tie rule decides the table\n\n"
        f"Status: {status} (popularity and EASE, within {TOLERANCE:g} of a reference measured with another program; "
        "popularity with equal items by ascending id).\n\n"
        f"Between the smallest and the largest item id as the latest, ndcg@10 of EASE changes {ratio:.1f} times.\n\n"
        f"{to_markdown(table)}\n"
        f"Written by `python -m experiments.tie_rules`; data sha256 {interactions.fingerprint[:16]}, "
        f"commit {(made['commit'] or 'none')[:12]}, jax {made['versions']['jax']}, {made['device_kind']}.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measures every rule and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=None, help="folder with ml-100k/ (default: FEDJAX_REC_DATA)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tie_rules.md")
    parser.add_argument("--smoke", action="store_true", help="one rule on a small synthetic data set; writes nothing")
    flags = parser.parse_args(argv)
    if flags.smoke:
        print(measure_rule(load("synthetic", num_users=80, num_items=120), tie_rule="hash"))
        return 0
    interactions = load("movielens/100k", data_dir=flags.data_dir)
    found = {rule: measure_rule(interactions, tie_rule=rule) for rule in REFERENCE}
    found |= {f"hash, seed {seed}": measure_rule(interactions, tie_rule="hash", seed=seed) for seed in HASH_SEEDS}
    page = write(found, interactions=interactions)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(page)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())

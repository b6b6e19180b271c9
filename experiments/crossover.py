"""From how many users on a private recommender beats a private popularity list, in worlds that differ in size only.

    python -m experiments crossover

Synthetic worlds of up to a million users (the table has the sizes that were run) with 30 interactions each of 1,000
items (`fedjax_rec.data.synthetic`), latest item out, full ranking. DPALS (federated training: clients solve for
themselves, two sweeps or three), DP-EASE (one Gram matrix) and popularity released once, at epsilon 1 and 8, delta
1 / users^1.1, user-level, all users in every release.
Settings are those of MovieLens 1M at the same epsilon (`experiments/_private_settings.py`) for every size, without
recency, which these worlds hardly have: nothing was tuned here. Noise is the same for any number of users, and signal
grows with them; so what is found is a size, and not a method's best.

About 20 minutes on two CPU cores, most of it for the million users.
"""

import argparse
import math
import statistics
import sys
import time

from experiments import _contenders as contenders
from experiments.harness import RESULTS, keep_line, read_lines
from fedjax_rec.data.sources import load
from fedjax_rec.data.split import leave_one_out
from fedjax_rec.evaluation import cases, evaluate
from fedjax_rec.models.popularity import popularity_scorer
from fedjax_rec.reporting import Table, to_markdown
from fedjax_rec.reporting.study_plots import bands
from fedjax_rec.reporting.style import to_svg
from fedjax_rec.runs.privacy_plan import default_delta
from fedjax_rec.runs.stamp import stamp

NAME = "crossover"
SIZES = (1_000, 10_000, 100_000, 1_000_000)
SEEDS = {1_000: 3, 10_000: 3, 100_000: 3, 1_000_000: 1}
EPSILONS = (1.0, 8.0)
METHODS = ("DPALS", "DP-EASE", contenders.POPULARITY)
ROWS_PER_USER, NUM_ITEMS = 30, 1_000


def main(argv: list[str] | None = None) -> int:
    """Runs sizes that have no lines yet, keeps each run as a line, writes the page and its pictures."""
    parser = argparse.ArgumentParser(prog="python -m experiments crossover", description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, action="append", choices=SIZES, help="only this size; may be repeated")
    parser.add_argument("--smoke", action="store_true", help="seconds, on two small worlds; writes nothing")
    parser.add_argument("--only-page", action="store_true", help="run nothing, write the page from the kept lines")
    args = parser.parse_args(argv)
    lines = [] if args.smoke else read_lines(NAME)
    for size in () if args.only_page else (60, 120) if args.smoke else args.users or SIZES:
        for line in run_size(size, lines, smoke=args.smoke):
            lines.append(line)
            print(
                f"{line['users']:,} users, epsilon {line['epsilon']:g}, {line['method']}: {line['ndcg@10']:.4f}",
                flush=True,
            )
            if not args.smoke:
                keep_line(NAME, line)
    page = write_page(lines, draw=not args.smoke)
    print(page)
    if not args.smoke:
        (RESULTS / f"{NAME}.md").write_text(page, encoding="utf-8")
    return 0


def run_size(size: int, lines: list[dict], *, smoke: bool):
    """The runs of one world that are not among the lines: each a line."""
    done = {(x["users"], x["method"], x["epsilon"], x["seed"]) for x in lines}
    wanted = [(m, e, seed) for e in EPSILONS for m in METHODS for seed in range(SEEDS.get(size, 1))]
    wanted = [run for run in wanted if (size, *run) not in done][: 3 if smoke else None]
    if not wanted:
        return
    num_items, rows = (60, 12) if smoke else (NUM_ITEMS, ROWS_PER_USER)
    world = load("synthetic", num_users=size, num_items=num_items, num_interactions=rows * size, min_per_user=5)
    split = leave_one_out(world)
    floor = evaluate(popularity_scorer(split.train), cases(split), ks=(10,)).values["ndcg@10"]
    delta = default_delta(size)
    for method, epsilon, seed in wanted:
        start = time.perf_counter()
        settings = contenders.settings(method, "ml-1m", epsilon, smoke=smoke)
        found = contenders.METHODS[method](split, settings, epsilon=epsilon, delta=delta, seed=seed)
        line = {"users": size, "method": method, "epsilon": epsilon, "seed": seed, "ndcg@10": found.values["ndcg@10"]}
        line |= {
            "delta": delta,
            "popularity": floor,
            "split": split.fingerprint,
            "seconds": time.perf_counter() - start,
        }
        yield line | {"stamp": stamp(seed=seed, data_fingerprint=world.fingerprint)}


def make_table(lines: list[dict]) -> Table:
    """Means over seeds as multiples of popularity without noise, and what beats the private list."""
    rows = []
    for epsilon in EPSILONS:
        for size in sorted({x["users"] for x in lines}):
            runs = [x for x in lines if (x["users"], x["epsilon"]) == (size, epsilon)]
            if runs:
                means = means_of(runs)
                best = max(means, key=means.get)
                values = [means.get(method, math.nan) for method in METHODS]
                rows.append((epsilon, f"{size:,}", f"{runs[0]['delta']:.1g}", *values, runs[0]["popularity"], best))
    return Table(
        columns=("epsilon", "users", "δ", *METHODS, "popularity, no noise", "best private"),
        rows=tuple(rows),
        caption="ndcg@10; user-level ε, δ = 1 / users^1.1, add/remove one user, all clients in every release",
        notes=("Means over three seeds of noise, one for the million users, on one world a size.",),
    )


def means_of(runs: list[dict]) -> dict[str, float]:
    """ndcg@10 by method, the mean over seeds."""
    methods = {x["method"] for x in runs}
    return {m: statistics.fmean(x["ndcg@10"] for x in runs if x["method"] == m) for m in METHODS if m in methods}


def crossings(lines: list[dict]) -> str:
    """One sentence a method and epsilon: the smallest world from which on it beats the private popularity list."""
    sentences = []
    for epsilon in EPSILONS:
        sizes = sorted({x["users"] for x in lines if x["epsilon"] == epsilon})
        means = {n: means_of([x for x in lines if (x["users"], x["epsilon"]) == (n, epsilon)]) for n in sizes}
        for method in METHODS[:-1]:
            ahead = [means[n].get(method, 0.0) > means[n][contenders.POPULARITY] for n in sizes]
            first = next((n for i, n in enumerate(sizes) if all(ahead[i:])), None)
            if not sizes:
                continue
            if first is None:
                sentences.append(
                    f"At ε = {epsilon:g} {method} beats the private popularity list at none of these sizes."
                )
            elif first == sizes[0]:
                sentences.append(f"At ε = {epsilon:g} {method} beats it at every size, from {first:,} users on.")
            else:
                before = sizes[sizes.index(first) - 1]
                sentences.append(
                    f"At ε = {epsilon:g} {method} beats it from {first:,} users on, and not yet at {before:,}."
                )
    return " ".join(sentences)


def write_page(lines: list[dict], *, draw: bool) -> str:
    """The page of all sizes that have lines."""
    parts = [
        "# How many users privacy needs",
        "Status: study, no paper to reproduce.",
        "\n\n".join(__doc__.split("\n\n")[2:3]),
    ]
    parts += [crossings(lines), to_markdown(make_table(lines))]
    for epsilon in EPSILONS if draw else ():
        curves = {}
        for method in METHODS:
            for size in sorted({x["users"] for x in lines}):
                key = (size, epsilon, method)
                values = [
                    x["ndcg@10"] / x["popularity"] for x in lines if (x["users"], x["epsilon"], x["method"]) == key
                ]
                if values:
                    curves.setdefault(method, []).append((size, values))
        picture = bands(curves, x="users", y="ndcg@10 over that of popularity", reference=("popularity", 1.0))
        (RESULTS / f"{NAME}-{epsilon:g}.svg").write_text(to_svg(picture), encoding="utf-8")
        parts.append(f"![epsilon {epsilon:g}: ndcg@10 over that of popularity against users]({NAME}-{epsilon:g}.svg)")
    commits = sorted({(x["stamp"]["commit"] or "none")[:12] for x in lines})
    parts.append(f"Written by `python -m experiments crossover`; commits {', '.join(commits)}.")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())

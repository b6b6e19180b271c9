"""Privacy against utility: which private recommender is best at which epsilon, on MovieLens 100K and 1M.

    python -m experiments frontier --data-dir ~/data --dataset ml-1m

Epsilon in {1, 2, 4, 8, 16, infinity}, user-level, add or remove one user, for DP-FedAvg of matrix factorisation, the
same with banded noise (DP-FTRL), DPALS, DP-EASE and a popularity list that is released once. Latest item out, ties by
seeded hash, full ranking, negatives that avoid training items only. A row is up to five runs with seeds of their own on
one split; the last column counts them, and one seed shows no spread. A second epsilon is that of a release that also
chose among ten settings by a privately released score (`fedjax_rec.privacy.selection`): what a user who must tune on
the same data would pay. Rows are alternatives: each is a release of its own.

Rows named "recent" come from the very same release as those without the word: a client weighs its newest items more
when it scores, which is its own business and costs no epsilon. That helps without privacy as well, so compare these
rows with each other; the popularity list, which knows nothing of a client, has no such row.

One to twenty minutes a method and data set on two CPU cores. Runs are kept as lines in results/frontier.jsonl, and the
page and the pictures are made of those lines.
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

from dp_accounting.dp_event import RepeatAndSelectDpEvent

from experiments import _contenders as contenders
from experiments.harness import RESULTS, keep_line, read_lines
from fedjax_rec.data.sources import load
from fedjax_rec.data.split import leave_one_out
from fedjax_rec.evaluation import cases, evaluate
from fedjax_rec.models.popularity import popularity_scorer
from fedjax_rec.privacy import privacy_spent
from fedjax_rec.reporting import Table, to_markdown
from fedjax_rec.reporting.study_plots import bands
from fedjax_rec.reporting.style import to_svg
from fedjax_rec.runs.stamp import stamp

NAME = "frontier"
EPSILONS = (1.0, 2.0, 4.0, 8.0, 16.0, math.inf)
DATASETS = {"ml-100k": ("movielens/100k", 1e-4), "ml-1m": ("movielens/1m", 1e-5)}
NUM_SEEDS = 5
NUM_CANDIDATES = 10  # settings that the selection-inclusive epsilon pays for
METRICS = ("ndcg@10", "hit@10")
BEGIN, END = "<!-- frontier -->", "<!-- end -->"


def main(argv: list[str] | None = None) -> int:
    """Runs what the flags name, keeps each run as a line, writes the page."""
    parser = argparse.ArgumentParser(prog="python -m experiments frontier", description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=DATASETS, help="only this one")
    parser.add_argument("--method", choices=contenders.METHODS, action="append", help="only this one; may be repeated")
    parser.add_argument("--epsilon", type=float, action="append", help="only this one; may be repeated")
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS, help="runs a row, with seeds 0, 1, ...")
    parser.add_argument("--data-dir", type=Path, help="folder with ml-100k/ and ml-1m/ (default: FEDJAX_REC_DATA)")
    parser.add_argument("--smoke", action="store_true", help="seconds, on made-up data; writes nothing")
    parser.add_argument("--only-page", action="store_true", help="run nothing, write the page from the kept lines")
    args = parser.parse_args(argv)
    lines = [] if args.smoke else read_lines(NAME)
    for dataset in [] if args.only_page else [args.dataset] if args.dataset else list(DATASETS):
        run_dataset(dataset, args, lines)
        if args.smoke:
            break
    page = write_page(lines, draw=not args.smoke)
    print(page)
    if not args.smoke:
        (RESULTS / f"{NAME}.md").write_text(page, encoding="utf-8")
        write_readme(lines)
    return 0


def run_dataset(dataset: str, args: argparse.Namespace, lines: list[dict]) -> None:
    """Runs the rows of one data set that have no line yet, or that the flags name."""
    name, delta = DATASETS[dataset]
    smoke = {"num_users": 80, "num_items": 60}
    interactions = load("synthetic", **smoke) if args.smoke else load(name, data_dir=data_dir(args.data_dir, dataset))
    split = leave_one_out(interactions)
    floor = evaluate(popularity_scorer(split.train), cases(split), ks=(10,)).values
    done = {(x["dataset"], x["method"], x["epsilon"], x["seed"], x["settings"]) for x in lines}
    for method in args.method or contenders.METHODS:
        for epsilon in args.epsilon or (EPSILONS[-3:-2] if args.smoke else EPSILONS):
            for seed in range(1 if args.smoke else args.seeds):
                settings = contenders.settings(method, dataset, epsilon, smoke=args.smoke)
                key = (dataset, method, "inf" if math.isinf(epsilon) else epsilon, seed, json.dumps(settings))
                if key in done:
                    continue
                start = time.perf_counter()
                found = contenders.METHODS[method](split, settings, epsilon=epsilon, delta=delta, seed=seed)
                line = dict(zip(("dataset", "method", "epsilon", "seed", "settings"), key, strict=True))
                line |= {name: found.values[name] for name in METRICS}
                line |= {"spent": spent(found, delta), "popularity": floor[METRICS[0]], "split": split.fingerprint}
                line |= {"seconds": time.perf_counter() - start}
                line |= {"stamp": stamp(seed=seed, data_fingerprint=interactions.fingerprint)}
                lines.append(line)
                print(f"{dataset} {method} epsilon {epsilon:g} seed {seed}: {found.values[METRICS[0]]:.4f}", flush=True)
                if not args.smoke:
                    keep_line(NAME, line)


def data_dir(folder: Path | None, dataset: str) -> Path | None:
    """The folder of one data set below the one that was given, or what the environment says."""
    return None if folder is None else folder / dataset if (folder / dataset).is_dir() else folder


def spent(found: contenders.Found, delta: float) -> dict | None:
    """The whole privacy statement of a run, and its epsilon if it also chose among settings; None without privacy."""
    if found.event is None:
        return None
    one = privacy_spent(found.event, delta=delta, relation=found.relation)
    chosen = RepeatAndSelectDpEvent(found.event, float(NUM_CANDIDATES), 1.0)
    return {
        "epsilon": one.epsilon,
        "delta": delta,
        "unit": one.unit,
        "relation": one.relation,
        "sampler": found.sampler,
        "epsilon_with_selection": privacy_spent(chosen, delta=delta, relation=found.relation).epsilon,
    }


def rows_of(lines: list[dict], dataset: str) -> list[tuple]:
    """(method, epsilon, runs) of one data set, newest settings only, in the order of the study."""
    rows = []
    for method in contenders.METHODS:
        for epsilon in EPSILONS:
            label = "inf" if math.isinf(epsilon) else epsilon
            mine = [x for x in lines if (x["dataset"], x["method"], x["epsilon"]) == (dataset, method, label)]
            newest = [x for x in mine if x["settings"] == mine[-1]["settings"]]
            if newest:
                rows.append((method, epsilon, list({x["seed"]: x for x in newest}.values())))
    return rows


def make_table(lines: list[dict], dataset: str, smoke: bool = False) -> Table:
    """Means over seeds, beside plain popularity and beside popularity released at the same epsilon."""
    rows = rows_of(lines, dataset)
    mean = {(m, e): statistics.fmean(x["ndcg@10"] for x in runs) for m, e, runs in rows}
    cells = []
    for method, epsilon, runs in rows:
        sd = statistics.stdev([x["ndcg@10"] for x in runs]) if len(runs) > 1 else None
        said = runs[0]["spent"]
        rival = mean.get((contenders.POPULARITY, epsilon))
        cells.append(
            (
                method,
                said and said["epsilon"],
                said and said["epsilon_with_selection"],
                mean[method, epsilon],
                sd,
                statistics.fmean(x["hit@10"] for x in runs),
                None if rival is None else mean[method, epsilon] / rival,
                len(runs),
            )
        )
    delta = DATASETS[dataset][1]
    samplers = sorted({x["spent"]["sampler"] for x in lines if x["dataset"] == dataset and x["spent"]})
    return Table(
        columns=(
            "method",
            "epsilon",
            f"epsilon, best of {NUM_CANDIDATES}",
            "ndcg@10",
            "sd",
            "hit@10",
            "vs private popularity",
            "seeds",
        ),
        rows=tuple(cells),
        caption=(
            f"{dataset}: user-level (ε, δ = {delta:g}), add/remove one user, sampling {', '.join(samplers)}, "
            f"full ranking, leave_one_out, hash ties, split {lines[-1]['split'][:12]}"
        ),
        notes=(
            f"Popularity without noise: {next(x['popularity'] for x in lines if x['dataset'] == dataset):.4f}.",
            "Trust model: central. ε covers neither the choice of hyper-parameters nor the metrics shown; the second ε "
            f"is that of the best of {NUM_CANDIDATES} settings on average, chosen by a score that the run's ε covers.",
        ),
        highest=("ndcg@10", "hit@10"),
    )


def write_page(lines: list[dict], *, draw: bool) -> str:
    """The page of all data sets that have lines, and its pictures beside it."""
    parts = ["# Privacy against utility", "Status: study, no paper to reproduce.", *__doc__.split("\n\n")[2:4]]
    if draw:
        parts += ["## What to use", to_markdown(recommended(lines))]
    for dataset in DATASETS:
        if not any(x["dataset"] == dataset for x in lines):
            continue
        parts.append(f"## {dataset}")
        parts.append(to_markdown(make_table(lines, dataset)))
        parts.append(winners(lines, dataset))
        if draw:
            curves = {}
            for method, epsilon, runs in rows_of(lines, dataset):
                values = [x["ndcg@10"] for x in runs]
                curves.setdefault(method, []).append((epsilon, values))
            popularity = next(x["popularity"] for x in lines if x["dataset"] == dataset)
            picture = bands(curves, x="ε", y="ndcg@10", reference=("popularity", popularity))
            (RESULTS / f"{NAME}-{dataset}.svg").write_text(to_svg(picture), encoding="utf-8")
            parts.append(f"![{dataset}: ndcg@10 against epsilon, mean and range over seeds]({NAME}-{dataset}.svg)")
    commits = sorted({(x["stamp"]["commit"] or "none")[:12] for x in lines})
    parts.append(f"Written by `python -m experiments frontier`; commits {', '.join(commits)}.")
    return "\n\n".join(parts) + "\n"


def recommended(lines: list[dict]) -> Table:
    """The best private method of each data set and epsilon, with its settings, beside the private popularity list."""
    cells, splits, samplers = [], [], set()
    for dataset, (_, delta) in DATASETS.items():
        rows = [(m, e, runs) for m, e, runs in rows_of(lines, dataset) if math.isfinite(e)]
        for epsilon in sorted({e for _, e, _ in rows}):
            means = {m: statistics.fmean(x["ndcg@10"] for x in runs) for m, e, runs in rows if e == epsilon}
            best = max(means, key=means.get)
            (runs,) = (runs for m, e, runs in rows if (m, e) == (best, epsilon))
            chosen = json.loads(runs[0]["settings"])
            shown = ", ".join(f"{name} {value}" for name, value in chosen.items()) or "none"
            ratio = means[best] / means[contenders.POPULARITY]
            cells.append((dataset, runs[0]["spent"]["epsilon"], best, shown, means[best], ratio))
            samplers.add(runs[0]["spent"]["sampler"].replace("all", "all clients"))
            splits.append(f"{dataset} δ = {delta:g}, split {runs[0]['split'][:12]}")
    return Table(
        columns=("data", "epsilon", "best private method", "settings", "ndcg@10", "vs private popularity"),
        rows=tuple(cells),
        caption=(
            f"user-level ε, add/remove one user, sampling {', '.join(sorted(samplers))}; "
            f"{'; '.join(dict.fromkeys(splits))}; full ranking, leave_one_out, hash ties"
        ),
        notes=(
            "Means over seeds of the noise. Trust model: central. ε does not cover how settings were chosen; "
            "experiments/results/frontier.md has every method, and the ε of a choice among ten settings.",
        ),
    )


def write_readme(lines: list[dict]) -> None:
    """The README's copy of what is recommended."""
    readme = Path(__file__).parent.parent / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    if rest:
        text = f"{before}{BEGIN}\n{to_markdown(recommended(lines))}\n{END}{rest.partition(END)[2]}"
        readme.write_text(text, encoding="utf-8")


def winners(lines: list[dict], dataset: str) -> str:
    """One sentence an epsilon: what is best, and whether it beats the private popularity list by more than noise."""
    rows = rows_of(lines, dataset)
    sentences = []
    for epsilon in EPSILONS:
        found = {m: [x["ndcg@10"] for x in runs] for m, e, runs in rows if e == epsilon}
        if contenders.POPULARITY not in found or len(found) < 2:
            continue
        means = {m: statistics.fmean(values) for m, values in found.items()}
        best = max(means, key=means.get)
        rival = means[contenders.POPULARITY]
        label = "Without noise" if math.isinf(epsilon) else f"At ε = {epsilon:g}"
        if best == contenders.POPULARITY:
            sentences.append(f"{label} the popularity list wins: noise takes more than the models add.")
        else:
            sentences.append(f"{label} {best} is best, {means[best] / rival:.2f} times the popularity list.")
    return " ".join(sentences)


if __name__ == "__main__":
    sys.exit(main())

"""Which generator of virtual users at which epsilon: what a recommender learns from them, and what they give away.

    python -m experiments virtual_users --data-dir ~/data

Each run is kept as a line of results/virtual_users.jsonl, and a second call runs only what is missing;
results/virtual_users.md and .svg are made of the lines. `--row "ml-100k vae 8"` runs one row.

Whole users are held out (10 % to choose settings of recommenders, 20 % to test). A generator is fitted on the others,
and everything that it releases, history lengths included, is charged to one user-level epsilon at delta 1 / N^1.1. As
many virtual users are drawn. EASE is trained on them and asked about the real test users; its penalty is chosen on the
real validation users, as it is for EASE trained on real users, to which the ratio is. Attacks tell the generator's
own users from held-out ones; the corrected area subtracts what the same attack finds in virtual users that never met
either group. Seeds are of fitting, noise and draws; the split stays.
"""

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import jax
import numpy as np

from experiments.harness import RESULTS, keep_line, read_lines
from fedjax_rec.attacks.generator_membership import generator_membership
from fedjax_rec.attacks.membership import ceiling_for
from fedjax_rec.cli.synthesize import method_by_name
from fedjax_rec.data import load, strong_generalization
from fedjax_rec.evaluation import cases, evaluate
from fedjax_rec.models.popularity import popularity_scorer
from fedjax_rec.reporting import Table, to_markdown
from fedjax_rec.reporting.formatting import MISSING
from fedjax_rec.reporting.study_plots import bands
from fedjax_rec.reporting.style import to_svg
from fedjax_rec.runs.stamp import stamp
from fedjax_rec.synthesis.downstream import CUT_OFF, METRIC, choose, ease, tested
from fedjax_rec.synthesis.plan import fit_generator, usual_delta
from fedjax_rec.synthesis.populations import popularity_sampler, populations
from fedjax_rec.synthesis.virtual import virtual_users

NAME = "virtual_users"
DATA = {"ml-100k": "movielens/100k", "ml-1m": "movielens/1m"}
EPSILONS = (math.inf, 8.0, 4.0, 2.0)
GENERATORS = ("gram", "vae", "gan", "gan, no adversary", "next-item", "popularity")
NUM_SEEDS = 5
L2 = (100.0, 300.0, 1000.0, 3000.0, 10000.0)
SMOKE = (("synthetic", "gram", 8.0), ("synthetic", "popularity", math.inf))


@cache
def world(dataset: str, data_dir: Path | None):
    """Data, split and who is who."""
    if dataset == "synthetic":
        data = load("synthetic", num_users=120, num_items=80)
    else:
        data = load(DATA[dataset], data_dir=data_dir)
    num = data.num_users
    split = strong_generalization(data, num_validation_users=num // 10, num_test_users=num // 5, seed=0)
    return data, split, populations(split, seed=0)


def quality(split, users) -> tuple[float, dict]:
    """ndcg@20 on real test users of EASE trained on some users, and the penalty that validation users chose."""
    chosen = choose(ease(l2=L2), users, split.history, cases(split, "validation"), seed=0)
    return tested(chosen, split.history, cases(split, "test")).values[METRIC], chosen.setting


@cache
def references(dataset: str, data_dir: Path | None) -> tuple[float, float]:
    """ndcg@20 of EASE trained on the real train users, and of the list of popular items."""
    _, split, people = world(dataset, data_dir)
    popular = evaluate(popularity_scorer(split.train), cases(split, "test"), ks=(CUT_OFF,)).values[METRIC]
    return quality(split, people.members)[0], popular


def run(dataset: str, generator: str, epsilon: float, seed: int, data_dir: Path | None) -> dict:
    """One generator, fitted, drawn from, and judged."""
    data, split, people = world(dataset, data_dir)
    fit_key, draw_key = jax.random.split(jax.random.key(seed))
    start = time.perf_counter()
    fitted = fit_generator(method_by_name(generator), split.train, epsilon=epsilon, key=fit_key)
    fit_s, num_users = time.perf_counter() - start, people.members.num_users
    start = time.perf_counter()
    virtual = virtual_users(fitted.generator, fitted.lengths, num_users=num_users, key=draw_key, catalogue=data)
    draw_s = time.perf_counter() - start
    ndcg, setting = quality(split, virtual)
    real, popular = references(dataset, data_dir)
    guarantee = None
    if fitted.spent is not None:
        guarantee = {key: getattr(fitted.spent, key) for key in ("epsilon", "delta", "unit", "relation")}
        # Gaussians on everybody, as many as there are: what is left to an attack is then known exactly.
        guarantee["gaussian"] = all(entry.sampler == "all" for entry in fitted.ledger.entries)
    control = popularity_sampler(people.reference, num_users=num_users, seed=seed)
    attacked = generator_membership(
        people.members,
        people.others,
        virtual,
        reference=people.reference,
        control=control,
        ceiling=ceiling_for(guarantee, "user"),
        seed=seed,
    )
    strongest = attacked.row(attacked.strongest)
    counts = np.sort(virtual.item_counts)[::-1]
    return {
        "ratio": ndcg / real,
        "above_popularity": (ndcg - popular) / (real - popular),
        "ndcg@20": ndcg,
        "ndcg@20, real": real,
        "ndcg@20, popularity": popular,
        "l2": setting["l2"],
        "attack": attacked.strongest,
        "auc": strongest.auc,
        "corrected_auc": strongest.corrected_auc,
        "corrected_error": strongest.corrected_error,
        "ceiling": attacked.ceiling_auc,
        "bug": attacked.bug,
        "coverage": float(np.mean(counts > 0)),
        "top tenth": float(counts[: max(len(counts) // 10, 1)].sum() / counts.sum()),
        "epsilon": None if fitted.spent is None else fitted.spent.epsilon,
        "fit_s": round(fit_s, 1),
        "draw_s": round(draw_s, 1),
        "split": split.fingerprint,
        "num_users": num_users,
    }


def rows_of(lines: Sequence[dict], dataset: str, generator: str, epsilon: float) -> list[dict]:
    """Values of one row, one seed each."""
    key = [dataset, generator, _spelt(epsilon)]
    return [line["values"] for line in lines if [line["key"][k] for k in ("data", "generator", "epsilon")] == key]


def _spelt(epsilon: float) -> float | str:
    return "inf" if math.isinf(epsilon) else epsilon


def make_table(lines: Sequence[dict], datasets: Sequence[str]) -> Table:
    """One row a data set, generator and epsilon; means over seeds."""
    rows = []
    for dataset in datasets:
        for generator in GENERATORS:
            for epsilon in EPSILONS:
                mine = rows_of(lines, dataset, generator, epsilon)
                if not mine:
                    continue

                def mean(name, mine=mine):
                    return float(np.mean([values[name] for values in mine]))

                ratios = [values["ratio"] for values in mine]
                spread = f" ± {np.std(ratios, ddof=1):.3f}" if len(mine) > 1 else ""
                ceiling = MISSING if mine[0]["ceiling"] is None else f"{mean('ceiling'):.3f}"
                rows.append(
                    (
                        dataset,
                        generator,
                        "none" if math.isinf(epsilon) else f"{epsilon:g}",
                        f"{mean('ratio'):.3f}{spread}",
                        f"{mean('above_popularity'):.2f}",
                        f"{mean('coverage'):.2f}",
                        f"{mean('corrected_auc'):.3f} ± {2 * mean('corrected_error'):.3f}",
                        ceiling,
                        f"{mean('fit_s'):.0f}",
                        len(mine),
                    )
                )
    heads = (
        "data",
        "generator",
        "epsilon",
        "ndcg@20, ratio to real",
        "above popularity",
        "coverage",
        "strongest attack, AUC",
        "ceiling",
        "fit, s",
        "seeds",
    )
    return Table(heads, rows, caption=caption(lines))


def caption(lines: Sequence[dict]) -> str:
    """What stands beside every epsilon of the page."""
    deltas = {}
    for line in lines:
        deltas[line["key"]["data"]] = (usual_delta(line["values"]["num_users"]), line["values"]["split"][:12])
    said = "; ".join(f"{name} δ = {delta:.2g}, split {split}" for name, (delta, split) in deltas.items())
    return f"user-level ε, add/remove one user, sampling all clients or Poisson (vae, gan); {said}"


def status(lines: Sequence[dict], datasets: Sequence[str]) -> str:
    """What the rows say about the bar of .65 at epsilon 8 and .52 at 4, and about attacks."""
    said = []
    for dataset in datasets:
        for epsilon, bar in ((8.0, 0.65), (4.0, 0.52), (2.0, None)):
            best = max(
                (
                    (float(np.mean([v["ratio"] for v in mine])), name)
                    for name in GENERATORS
                    if (mine := rows_of(lines, dataset, name, epsilon))
                ),
                default=None,
            )
            if best is None:
                continue
            verdict = "" if bar is None else f", {'above' if best[0] >= bar else 'BELOW'} the bar of {bar}"
            said.append(f"{dataset} at epsilon {epsilon:g}: {best[1]} {best[0]:.3f}{verdict}")
    bugs = [line["key"] for line in lines if line["values"]["bug"]]
    attacks = (
        f"{len(bugs)} runs pass their ceiling by two standard errors: {bugs}"
        if bugs
        else ("no attack passes its ceiling by two standard errors")
    )
    missing = [
        f"{dataset} {generator}{'' if len(gone) == len(EPSILONS) else f' at {gone}'}"
        for dataset in datasets
        for generator in GENERATORS
        if (gone := [_spelt(e) for e in EPSILONS if not rows_of(lines, dataset, generator, e)])
    ]
    left = f" Not run: {'; '.join(missing)}." if missing else ""
    return f"study; {'; '.join(said)}; {attacks}.{left}"


def write_page(lines: Sequence[dict], datasets: Sequence[str]) -> str:
    """The page."""
    stamps = [line["stamp"] for line in lines]
    pictures = "".join(f"![Ratio against epsilon, {d}]({NAME}-{d}.svg)\n\n" for d in datasets if d in DATA)
    return (
        "# Virtual users: which generator at which epsilon\n\n"
        f"Status: {status(lines, datasets)}\n\n{pictures}{to_markdown(make_table(lines, datasets))}\n\n"
        "Ratio: ndcg@20 on real test users of EASE trained on virtual users, over that of EASE trained on the real "
        "train users; ± is the standard deviation over seeds. Above popularity: 0 is the list of popular items, 1 is "
        "real data. Coverage: share of the catalogue that occurs. The attack is the strongest of a dozen (nearest "
        "neighbours, likelihoods and density ratios), corrected by the same attack on virtual users that never met the "
        "candidates, ± two standard errors; the ceiling is what the guarantee leaves to any attack. Defaults of the "
        "generators were chosen on these data sets, which epsilon does not cover. “gan, no adversary” is the same "
        "generator fitted without its critic: what a GAN adds is the difference to it.\n\n"
        f"Written by `python -m experiments {NAME}`; commits "
        f"{', '.join(sorted({(s['commit'] or 'none')[:12] for s in stamps}))}, device "
        f"{', '.join(sorted({str(s['device_kind']) for s in stamps}))}.\n"
    )


def draw(lines: Sequence[dict], dataset: str) -> str:
    """Ratio against epsilon, a curve a generator, as SVG."""
    curves = {}
    for generator in GENERATORS:
        points = [(e, [v["ratio"] for v in mine]) for e in EPSILONS if (mine := rows_of(lines, dataset, generator, e))]
        if points:
            curves[generator] = points
    popular = [
        v["ndcg@20, popularity"] / v["ndcg@20, real"]
        for v in (x["values"] for x in lines if x["key"]["data"] == dataset)
    ]
    reference = ("popularity list", float(np.mean(popular)))
    return to_svg(bands(curves, x="ε, user-level", y=f"ndcg@20, ratio to real ({dataset})", reference=reference))


def main(argv: list[str] | None = None) -> int:
    """Measures what is missing, and writes the page."""
    parser = argparse.ArgumentParser(prog=f"python -m experiments {NAME}", description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder with ml-100k/ and ml-1m/ (default: FEDJAX_REC_DATA)")
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS, help="seeds of each row")
    parser.add_argument("--data", choices=tuple(DATA), action="append", help="only this data set; may be repeated")
    parser.add_argument("--generator", choices=GENERATORS, action="append", help="only this one; may be repeated")
    parser.add_argument("--epsilon", type=float, choices=EPSILONS, action="append", help="only this; may be repeated")
    parser.add_argument("--smoke", action="store_true", help="seconds, on made-up data; writes nothing")
    parser.add_argument("--only-page", action="store_true", help="run nothing, write the page from the kept lines")
    args = parser.parse_args(argv)
    datasets = args.data or tuple(DATA)
    rows = itertools.product(datasets, args.generator or GENERATORS, args.epsilon or EPSILONS)
    wanted = SMOKE if args.smoke else tuple(rows)
    lines = [] if args.smoke else read_lines(NAME)
    done = [line["key"] for line in lines]
    for seed in range(1 if args.smoke else args.seeds):
        for dataset, generator, epsilon in wanted:
            key = {"data": dataset, "generator": generator, "epsilon": _spelt(epsilon), "seed": seed}
            if key in done or args.only_page:
                continue
            values = run(dataset, generator, epsilon, seed, args.data_dir)
            lines.append({"key": key, "values": values, "stamp": stamp(seed=seed, data_fingerprint=None)})
            print(
                json.dumps({**key, **{k: values[k] for k in ("ratio", "corrected_auc", "ceiling", "fit_s")}}),
                flush=True,
            )
            if not args.smoke:
                keep_line(NAME, lines[-1])
    found = ("synthetic",) if args.smoke else tuple(d for d in DATA if any(x["key"]["data"] == d for x in lines))
    page = write_page(lines, found)
    print(page)
    if not args.smoke:
        (RESULTS / f"{NAME}.md").write_text(page, encoding="utf-8")
        for dataset in found:
            (RESULTS / f"{NAME}-{dataset}.svg").write_text(draw(lines, dataset), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

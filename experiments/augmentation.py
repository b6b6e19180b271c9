"""Do virtual users help where real ones are few, and where a client has shown little? MovieLens 100K.

    python -m experiments augmentation --data-dir ~/data/ml-100k

About ten minutes of two CPU cores. Each run is kept as a line of results/augmentation.jsonl, and a second call runs
only what is missing; results/augmentation.md and .svg are made of the lines.

A data owner with all train users releases virtual users, as many as there are train users. A researcher holds a share
of the real train users, and trains EASE or matrix factorisation on those alone or on those and the virtual users
together, all weighted alike. Real test users, whom neither training nor the generator saw, show 5 or 10 of their items
and are asked for all others. The researcher has real validation users to choose a penalty with, for every training set
alike. Differences are paired over test users.

The comparison is not between equals: virtual users carry what the owner's users know. So "popularity" stands beside
them, virtual users who know nothing but how popular items are, and the row of no real users at all.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import jax
import numpy as np

from experiments.harness import RESULTS, keep_line, read_lines
from fedjax_rec.data import load, strong_generalization
from fedjax_rec.data.interactions import Interactions
from fedjax_rec.data.split import Split
from fedjax_rec.data.synthetic import synthetic
from fedjax_rec.evaluation import cases
from fedjax_rec.evaluation.exact import evaluate
from fedjax_rec.reporting import Table, to_markdown
from fedjax_rec.reporting.formatting import MISSING
from fedjax_rec.reporting.study_plots import bands
from fedjax_rec.reporting.style import to_svg
from fedjax_rec.runs.stamp import stamp
from fedjax_rec.synthesis.downstream import CUT_OFF, METRIC, Downstream, ease, mf
from fedjax_rec.synthesis.gram import gram_method
from fedjax_rec.synthesis.plan import fit_generator, usual_delta
from fedjax_rec.synthesis.populations import popularity_sampler, populations, stack_users, take_users
from fedjax_rec.synthesis.virtual import virtual_users

NAME, NUM_SEEDS = "augmentation", 3
SHARES, SHOWN = (0.0, 0.05, 0.1, 0.25, 1.0), (5, 10)
ADDED = ("nothing", "popularity", "gram, no privacy", "gram, epsilon 8")
EPSILON = {"gram, no privacy": math.inf, "gram, epsilon 8": 8.0}
GRAM = {"rank": 50, "temperature": 0.4, "counts_weight": 1.5}  # what the kept lines were measured with
# Who shows five items needs far larger penalties than who shows fifty: wide enough that no end of a grid is chosen.
DOWNSTREAM = {"ease": ease(l2=(300.0, 1000.0, 3000.0, 10_000.0, 30_000.0)), "mf": mf(l2=(0.003, 0.01, 0.03))}
CONFIDENCE = 1.96


def cold_split(split: Split, shown: int, seed: int) -> Split:
    """Held-out clients show that many of their items, drawn by a seed, and are asked for all the others."""
    rng = np.random.default_rng([seed, shown])
    parts = [split.history, split.validation, split.test]
    lottery = [rng.random(part.num_interactions) for part in parts]
    users = np.concatenate([part.user_ids for part in parts])
    order = np.lexsort((np.concatenate(lottery), users))
    starts = np.concatenate([[0], np.cumsum(np.bincount(users, minlength=split.num_users))])
    place = np.empty(len(users), np.int64)
    place[order] = np.arange(len(users)) - starts[users[order]]
    is_shown = np.split(place < shown, np.cumsum([part.num_interactions for part in parts])[:-1])
    asked = np.where(split.validation.counts_per_user > 0, 1, np.where(split.test.counts_per_user > 0, 2, 0))

    def rows(keep) -> Interactions:
        kept = [part.take(keep(part, own)) for part, own in zip(parts, is_shown, strict=True)]
        return _merged(kept)

    return dataclasses.replace(
        split,
        history=rows(lambda part, own: own),
        validation=rows(lambda part, own: ~own & (asked[part.user_ids] == 1)),
        test=rows(lambda part, own: ~own & (asked[part.user_ids] == 2)),
        rule=f"{split.rule}, {shown} items shown",
    )


def _merged(parts: Sequence[Interactions]) -> Interactions:
    users = np.concatenate([part.user_ids for part in parts])
    order = np.argsort(users, kind="stable")
    counts = sum(part.counts_per_user for part in parts)
    return dataclasses.replace(
        parts[0],
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        item_ids=np.concatenate([part.item_ids for part in parts])[order],
        file_rows=np.arange(len(users)),
        timestamps=None,
        ratings=None,
    )


@cache
def world(seed: int, data_dir: Path | None, smoke: bool):
    """Split, its cold versions with their cases, and the virtual users of each kind."""
    data = synthetic(num_users=120, num_items=60, seed=seed) if smoke else load("movielens/100k", data_dir=data_dir)
    held_out = data.num_users // 10
    split = strong_generalization(data, num_validation_users=held_out, num_test_users=2 * held_out, seed=seed)
    cold = {shown: cold_split(split, shown, seed) for shown in SHOWN}
    asked = {shown: (cases(part, "validation"), cases(part, "test")) for shown, part in cold.items()}
    real = populations(split).members
    added = {"nothing": None, "popularity": popularity_sampler(real, num_users=real.num_users, seed=seed)}
    for name, epsilon in EPSILON.items():
        fit_key, draw_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), int(epsilon == math.inf)))
        fitted = fit_generator(gram_method(**GRAM), real, epsilon=epsilon, key=fit_key)
        added[name] = virtual_users(
            fitted.generator, fitted.lengths, num_users=real.num_users, key=draw_key, catalogue=split.train
        )
    return split, cold, asked, real, added


def users_of(seed: int, share: float, name: str, data_dir: Path | None, smoke: bool) -> Interactions | None:
    """Whom a row is trained on; None for nobody."""
    _, _, _, real, added = world(seed, data_dir, smoke)
    order = np.random.default_rng([seed, 99]).permutation(real.num_users)  # smaller shares are in larger ones
    few = take_users(real, np.sort(order[: round(share * real.num_users)]))
    if added[name] is None:
        return few if few.num_users else None
    return stack_users(few, added[name], name="real and virtual") if few.num_users else added[name]


def trained(recommender: Downstream, users: Interactions, seed: int, data_dir, smoke) -> dict[int, np.ndarray]:
    """The metric of each test user, by items shown; for each the setting that validation users prefer."""
    _, cold, asked, _, _ = world(seed, data_dir, smoke)
    best = dict.fromkeys(SHOWN, (-math.inf, None))
    for _, scorer_of in recommender.train(users, seed):
        for shown in SHOWN:
            scorer = scorer_of(cold[shown].history)
            value = evaluate(scorer, asked[shown][0], ks=(CUT_OFF,)).values[METRIC]
            if value > best[shown][0]:
                best[shown] = (value, evaluate(scorer, asked[shown][1], ks=(CUT_OFF,)).per_user[METRIC])
    return {shown: values for shown, (_, values) in best.items()}


@cache
def alone(recommender: str, seed: int, share: float, data_dir: Path | None, smoke: bool):
    """The real users alone."""
    users = users_of(seed, share, "nothing", data_dir, smoke)
    return None if users is None else trained(DOWNSTREAM[recommender], users, seed, data_dir, smoke)


def run(key: dict, *, data_dir: Path | None, smoke: bool) -> dict:
    """One training set and recommender: the metric by items shown, and its paired difference from real users alone."""
    seed, share, name = key["seed"], key["share"], key["added"]
    base = alone(key["downstream"], seed, share, data_dir, smoke)
    found = base
    if name != "nothing":
        users = users_of(seed, share, name, data_dir, smoke)
        found = trained(DOWNSTREAM[key["downstream"]], users, seed, data_dir, smoke)
    values = {}
    for shown in SHOWN:
        values[f"{METRIC}, {shown} shown"] = float(found[shown].mean(dtype=np.float64))
        if base is not None:
            difference = found[shown].astype(np.float64) - base[shown]
            values[f"gain, {shown} shown"] = float(difference.mean())
            values[f"gain error, {shown} shown"] = float(difference.std(ddof=1) / math.sqrt(len(difference)))
    return values | {"split": world(seed, data_dir, smoke)[0].fingerprint}


def picked(lines: Sequence[dict], **wanted) -> list[dict]:
    """Values of the lines with these keys."""
    return [x["values"] for x in lines if all(x["key"][name] == value for name, value in wanted.items())]


def gain(values: Sequence[dict], shown: int) -> tuple[float, float] | None:
    """Mean gain over seeds and half its 95 % interval: from test users, or from seeds where those differ more."""
    gains = [v[f"gain, {shown} shown"] for v in values if f"gain, {shown} shown" in v]
    if not gains:
        return None
    error = math.sqrt(sum(v[f"gain error, {shown} shown"] ** 2 for v in values)) / len(gains)
    if len(gains) > 1:
        error = max(error, statistics.stdev(gains) / math.sqrt(len(gains)))
    return statistics.fmean(gains), CONFIDENCE * error


def make_table(lines: Sequence[dict]) -> Table:
    """A row for each recommender, share of real users and kind of users added."""
    rows = []
    for recommender in DOWNSTREAM:
        for share in SHARES:
            for name in ADDED:
                values = picked(lines, downstream=recommender, share=share, added=name)
                if not values:
                    continue
                cells = []
                for shown in SHOWN:
                    cells.append(f"{statistics.fmean(v[f'{METRIC}, {shown} shown'] for v in values):.4f}")
                    found = gain(values, shown) if name != "nothing" else None
                    cells.append(MISSING if found is None else f"{found[0]:+.4f} ± {found[1]:.4f}")
                rows.append((recommender, f"{share:.0%}", name, *cells, len(values)))
    heads = [text for shown in SHOWN for text in (f"{METRIC}, {shown} shown", f"gain, {shown} shown")]
    return Table(("recommender", "real users", "virtual users added", *heads, "seeds"), rows)


def verdict(lines: Sequence[dict]) -> str:
    """Where adding virtual users helps, harms, or neither for both 5 and 10 items shown, in words."""
    said = []
    for name in ADDED[2:]:
        for recommender in DOWNSTREAM:
            outcome = {"helps": [], "harms": [], "neither for 5 and 10 items alike": []}
            for share in SHARES[1:]:
                values = picked(lines, downstream=recommender, share=share, added=name)
                found = [gain(values, shown) for shown in SHOWN] if values else []
                if found and all(mean > half for mean, half in found):
                    outcome["helps"].append(f"{share:.0%}")
                elif found and all(-mean > half for mean, half in found):
                    outcome["harms"].append(f"{share:.0%}")
                elif found:
                    outcome["neither for 5 and 10 items alike"].append(f"{share:.0%}")
            parts = [f"{what} at {', '.join(shares)} of the real users" for what, shares in outcome.items() if shares]
            said += [f"{recommender}, {name}: {'; '.join(parts)}."] if parts else []
    return f"Adding virtual users, by 95 % intervals. {' '.join(said)}" if said else "Not enough."


def figure(lines: Sequence[dict], recommender: str = "ease", shown: int = SHOWN[0]):
    """ndcg against the share of real users, a curve for each kind of users added."""
    curves = {}
    for name in ADDED:
        points = [
            (100 * share, [v[f"{METRIC}, {shown} shown"] for v in values])
            for share in SHARES
            if (values := picked(lines, downstream=recommender, share=share, added=name))
        ]
        if points:
            curves["real users alone" if name == "nothing" else f"+ {name}"] = points
    return bands(curves, x="real users, %", y=f"{METRIC}, {shown} items shown")


def write_page(lines: Sequence[dict]) -> str:
    """The page."""
    stamps = [line["stamp"] for line in lines]
    size = 661
    return (
        "# Virtual users where real ones are few\n\n"
        f"Status: study, no paper to reproduce. {verdict(lines)}\n\n"
        f"{to_markdown(make_table(lines))}\n\n"
        "![ndcg against the share of real users](augmentation.svg)\n\n"
        f"MovieLens 100K; 100 % are {size} train users, and as many virtual users are added. Those of the Gram "
        "generator (temperature 0.4) come from all train users; epsilon 8 is user-level, add or remove one user, delta "
        f"{usual_delta(size):.2g}, every release charged. The real users of the researcher are used as they are and "
        'covered by no epsilon. "popularity" is the popularity sampler, not private. Test users show 5 or 10 random '
        "items and are asked for all others; penalties are chosen on real validation users for each row. The grid of "
        "EASE was widened to 30,000, for all rows alike, after results of one that ended at 1,000 had been seen, in "
        "which virtual users looked worse. Most rows of MF are older than a change in how lengths are drawn: their "
        "virtual users have histories 5 to 10 % longer than real ones on average. Means over "
        "seeds of split, few users, generator and training. A virtual user weighs as much as a real one, so where real "
        "ones are few they are outnumbered; other weights were not tried. Gains are paired over test users, with 95 % "
        "intervals from test users or seeds, whichever are wider.\n\n"
        f"Written by `python -m experiments {NAME}`; commits "
        f"{', '.join(sorted({(s['commit'] or 'none')[:12] for s in stamps}))}, device "
        f"{', '.join(sorted({str(s['device_kind']) for s in stamps}))}.\n"
    )


def keys(num_seeds: int, *, smoke: bool) -> list[dict]:
    """What is run, in order."""
    shares, recommenders = ((0.25, 1.0), ("ease",)) if smoke else (SHARES, tuple(DOWNSTREAM))
    return [
        {"seed": seed, "share": share, "added": name, "downstream": recommender}
        for seed in range(num_seeds)
        for recommender in recommenders
        for share in shares
        for name in ADDED
        if share or name != "nothing"
    ]


def main(argv: list[str] | None = None) -> int:
    """Measures what is missing, and writes the page and its picture."""
    parser = argparse.ArgumentParser(prog=f"python -m experiments {NAME}", description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder with ml-100k/ (default: FEDJAX_REC_DATA)")
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS, help="seeds of each row")
    parser.add_argument("--smoke", action="store_true", help="seconds, on made-up data; writes nothing")
    parser.add_argument("--only-page", action="store_true", help="run nothing, write the page from the kept lines")
    args = parser.parse_args(argv)
    lines = [] if args.smoke else read_lines(NAME)
    done = [line["key"] for line in lines]
    for key in keys(1 if args.smoke else args.seeds, smoke=args.smoke):
        if key in done or args.only_page:
            continue
        start = time.perf_counter()
        values = run(key, data_dir=args.data_dir, smoke=args.smoke)
        line = {"key": key, "values": values, "seconds": round(time.perf_counter() - start, 1)}
        lines.append(line | {"stamp": stamp(seed=key["seed"], data_fingerprint=None)})
        print(json.dumps(line), flush=True)
        if not args.smoke:
            keep_line(NAME, lines[-1])
    page = write_page(lines)
    print(page)
    if not args.smoke:
        (RESULTS / f"{NAME}.md").write_text(page, encoding="utf-8")
        (RESULTS / f"{NAME}.svg").write_text(to_svg(figure(lines)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

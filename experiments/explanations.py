"""Do explanations find the items that a recommendation rests on? Deletion curves on MovieLens 100K.

    python -m experiments explanations --data-dir ~/data/ml-100k

Minutes on one CPU core. Each run is kept as a line of results/explanations.jsonl, and a second call runs only what is
missing; results/explanations.md and .svg are made of the lines.

For 150 users, EASE and SASRec read the last 50 items before the test row and recommend an item. Every method gives each
of the 50 an attribution. Items are then deleted in the order of the attributions, the history closes up, and the margin
of the recommended item over the catalogue's mean falls: the faster, the better the explanation. Random orders, the
newest item first and the most popular item first need no look at the model.

`--example` explains one recommendation to a generated user, as text and picture. No real user's history is ever shown.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from experiments.harness import RESULTS, keep_line, read_lines
from fedjax_rec.data import leave_one_out, load
from fedjax_rec.data.interactions import Interactions
from fedjax_rec.data.split import shown_at_test
from fedjax_rec.data.synthetic import synthetic
from fedjax_rec.evaluation.statistics import difference_test
from fedjax_rec.interpretation.deletion import deletion_area, deletion_curve, random_area
from fedjax_rec.interpretation.explain import METHODS, attribute, explain, recommend
from fedjax_rec.interpretation.gradients import integrated_gradients
from fedjax_rec.interpretation.sentences import sentences
from fedjax_rec.interpretation.value import (
    HistoryModel,
    by_deletion,
    by_presence,
    linear_history_model,
    sequence_history_model,
)
from fedjax_rec.models.ease import ease_weights
from fedjax_rec.models.items import id_table
from fedjax_rec.models.sasrec import sasrec
from fedjax_rec.models.sequence import padded_histories
from fedjax_rec.models.sequence_training import train_sequence
from fedjax_rec.reporting import Table, to_markdown
from fedjax_rec.reporting.explain_plots import attribution_bars
from fedjax_rec.reporting.formatting import format_seconds
from fedjax_rec.reporting.study_plots import bands
from fedjax_rec.reporting.style import to_svg
from fedjax_rec.runs.stamp import stamp

NAME, MODELS = "explanations", ("ease", "sasrec")
NUM_USERS, WINDOW, NUM_PAIRS, NUM_ORDERS, NUM_TIMED = 150, 50, 8, 8, 10
EASE_L2, DIM, NUM_BLOCKS, NUM_EPOCHS = 300.0, 64, 2, 60  # fixed beforehand; the study is not about the models
BASELINES = {"newest": "newest first", "popular": "most popular first"}
ORDERS = (*METHODS, *BASELINES)
RANDOM = "random"
WORDS = {**METHODS, **BASELINES, RANDOM: "random orders"}


def world(data_dir: Path | None, smoke: bool):
    """Train rows, what users show at test time, and the users to explain."""
    data = synthetic(num_users=60, num_items=40, seed=0) if smoke else load("movielens/100k", data_dir=data_dir)
    split = leave_one_out(data)
    shown = shown_at_test(split)
    users = np.flatnonzero(shown.counts_per_user >= 3)
    return split, shown, np.sort(np.random.default_rng(0).permutation(users)[: 12 if smoke else NUM_USERS])


def trained(name: str, train: Interactions, seed: int, smoke: bool) -> HistoryModel:
    """The recommender of a row."""
    if name == "ease":
        return linear_history_model(ease_weights(train, l2=EASE_L2))
    size = {"max_length": 8, "num_blocks": 1} if smoke else {"max_length": WINDOW, "num_blocks": NUM_BLOCKS}
    model = sasrec(id_table(train.num_items, dim=8 if smoke else DIM), **size)
    return sequence_history_model(model, train_sequence(model, train, seed=seed, num_epochs=2 if smoke else NUM_EPOCHS))


def attributed(model, popularity, num_pairs, user):
    """Attributions of every method, their deletion areas, the gap and the mean curve of one user."""
    history, item, key = user
    real = history < model.num_items
    orders_key, shapley_key = jax.random.split(key)
    value = by_deletion(model, history, item)
    gradients = integrated_gradients(by_presence(model, history, item), real)
    options = {"num_pairs": num_pairs, "key": shapley_key}
    found = {
        "integrated_gradients": gradients.values,
        "shapley": attribute(model, history, item, method="shapley", **options)[0],
        "removal": attribute(model, history, item, method="removal")[0],
        "newest": jnp.arange(len(history), dtype=jnp.float32),
        "popular": popularity.at[history].get(mode="fill", fill_value=0.0),
    }
    areas = {name: deletion_area(value, real, found[name]) for name in ORDERS}
    areas[RANDOM] = random_area(value, real, orders_key, num_orders=NUM_ORDERS)
    curves = {name: deletion_curve(value, real, found[name]) for name in ORDERS}
    return found, areas, curves, gradients.gap, gradients.total, gradients.num_points


def run(key: dict, *, data_dir: Path | None, smoke: bool) -> dict:
    """One recommender: gaps, areas, agreement and seconds."""
    split, shown, users = world(data_dir, smoke)
    model = trained(key["model"], split.train, key["seed"], smoke)
    window, num_pairs = (8, 2) if smoke else (WINDOW, NUM_PAIRS)
    histories = jnp.asarray(padded_histories(shown, users, window))
    lengths = np.minimum(shown.counts_per_user[users], window)
    items = jnp.asarray(jax.lax.map(partial(_first, model), (histories, _seen(shown, users, model.num_items))))
    keys = jax.random.split(jax.random.key(key["seed"]), len(users))
    popularity = jnp.asarray(split.train.item_counts, jnp.float32)
    explained = jax.jit(lambda model, rows: jax.lax.map(partial(attributed, model, popularity, num_pairs), rows))
    found, areas, curves, gaps, totals, points = jax.tree.map(np.asarray, explained(model, (histories, items, keys)))
    relative = np.abs(gaps) / np.abs(totals)
    values = {
        "num_users": len(users),
        "gap": {q: float(np.quantile(relative, float(q))) for q in ("0.5", "0.9", "1.0")},
        "complete_share": float(np.mean(relative <= 0.01)),
        "num_points": float(np.median(points)),
        "area": {name: float(area.mean()) for name, area in areas.items()},
        "start": float(curves["removal"][:, 0].mean()),
        "against_random": {name: _against(areas[RANDOM] - areas[name]) for name in ORDERS},
        "agreement": _agreement(found, lengths),
        "curve": {name: _mean_curve(curves[name], lengths) for name in ORDERS},
        "seconds": {name: _seconds(model, histories, items, name, num_pairs) for name in (() if smoke else METHODS)},
    }
    return values | {"split": split.fingerprint}


def _seen(shown: Interactions, users: np.ndarray, num_items: int) -> jax.Array:
    """Whole histories, which a list leaves out, bool ``[users, items]``."""
    seen = np.zeros((len(users), num_items), bool)
    for row, user in enumerate(users):
        seen[row, shown.items_of(user)] = True
    return jnp.asarray(seen)


def _first(model, row):
    history, seen = row
    return jnp.argmax(jnp.where(seen, -jnp.inf, model.scores(history)))


def _against(gain: np.ndarray) -> dict[str, float]:
    """How much smaller an area is than that of random orders, paired over users."""
    test = difference_test(gain)
    return {"gain": test.difference.mean, "low": test.difference.low, "high": test.difference.high} | {
        "p": max(test.permutation_p, test.wilcoxon_p),
        "better_share": float(np.mean(gain > 0)),
    }


def _agreement(found: dict[str, np.ndarray], lengths: np.ndarray) -> dict[str, float]:
    """Mean over users of the rank correlation between two methods' attributions."""
    names, out = list(ORDERS), {}
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            ranks = [
                scipy.stats.spearmanr(found[one][row, :n], found[other][row, :n]).statistic
                for row, n in enumerate(lengths)
            ]
            out[f"{one}, {other}"] = float(np.nanmean(ranks))
    return out


def _mean_curve(curves: np.ndarray, lengths: np.ndarray) -> list[float]:
    """Mean height at 11 equally spaced shares of the history removed."""
    shares = np.linspace(0, 1, 11)
    rows = [np.interp(shares * n, np.arange(n + 1), curve[: n + 1]) for curve, n in zip(curves, lengths, strict=True)]
    return np.mean(rows, axis=0).tolist()


def _seconds(model, histories, items, method, num_pairs) -> float:
    """Median of single explanations, compiled."""
    taken = []
    for row in range(NUM_TIMED + 1):
        start = time.perf_counter()
        options = {"key": jax.random.key(row), "num_pairs": num_pairs} if method == "shapley" else {}
        jax.block_until_ready(attribute(model, histories[row], items[row], method=method, **options))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def make_tables(lines: Sequence[dict]) -> list[Table]:
    """Deletion areas; agreement; completeness."""
    areas, agreement, gaps = [], [], []
    for line in lines:
        name, values = line["key"]["model"], line["values"]
        areas.append((name, WORDS[RANDOM], f"{values['area'][RANDOM]:.3f}", "", "", "", ""))
        for order in ORDERS:
            test, seconds = values["against_random"][order], values["seconds"].get(order)
            gain = f"{test['gain']:+.3f} ({test['low']:+.3f} to {test['high']:+.3f})"
            share, taken = f"{test['better_share']:.0%}", "" if seconds is None else format_seconds(seconds)
            areas.append((name, WORDS[order], f"{values['area'][order]:.3f}", gain, f"{test['p']:.2g}", share, taken))
        agreement += [
            (name, *(WORDS[part] for part in pair.split(", ")), f"{value:+.2f}")
            for pair, value in values["agreement"].items()
        ]
        quantiles = [f"{100 * values['gap'][q]:.3f} %" for q in ("0.5", "0.9", "1.0")]
        share = f"{values['complete_share']:.1%}"
        gaps.append((name, values["num_users"], *quantiles, share, f"{values['num_points']:.0f}"))
    return [
        Table(("model", "order", "area", "below random", "p", "users", "seconds"), areas),
        Table(("model", "users", "gap, median", "gap, 90 %", "gap, largest", "within 1 %", "points"), gaps),
        Table(("model", "method", "other", "rank correlation"), agreement),
    ]


def verdict(lines: Sequence[dict]) -> str:
    """Whether attributions beat random orders and are complete, in words."""
    said = []
    for line in lines:
        values, name = line["values"], line["key"]["model"]
        beaten = [
            m for m in METHODS if values["against_random"][m]["gain"] > 0 and values["against_random"][m]["p"] < 0.01
        ]
        failed = [m for m in METHODS if m not in beaten]
        said.append(f"{name}: {', '.join(WORDS[m] for m in beaten) or 'no method'} beat random orders at p < .01")
        said[-1] += f", {', '.join(WORDS[m] for m in failed)} did not" if failed else ""
        said[-1] += f"; integrated gradients are complete within 1 % for {values['complete_share']:.1%} of the users."
        best = min(BASELINES, key=values["area"].get)
        behind = [WORDS[m] for m in METHODS if values["area"][m] > values["area"][best]]
        said[-1] += (
            f" {', '.join(behind).capitalize()}: behind {WORDS[best]}, which looks at no model." if behind else ""
        )
    return " ".join(said) or "Not enough."


def write_page(lines: Sequence[dict]) -> str:
    """The page: what was found, the tables, and what made them."""
    areas, gaps, agreement = make_tables(lines)
    stamps = [line["stamp"] for line in lines]
    return (
        "# Do explanations find what a recommendation rests on?\n\n"
        f"Status: study, no paper to reproduce. {verdict(lines)}\n\n{to_markdown(areas)}\n\n"
        "![margin of the recommended item while the history is deleted](explanations.svg)\n\n"
        f"{to_markdown(gaps)}\n\n{to_markdown(agreement)}\n\n"
        f"MovieLens 100K, leave one out; the last {WINDOW} items before the test row, and the item that the model puts "
        "first among those that the user has not met. Area: mean height of the deletion curve of the item's margin "
        "over the catalogue's mean score, in units of the score; smaller is better. Below random: the mean over users "
        f"of the area of {NUM_ORDERS} random orders less that of the method, with its 95 % bootstrap interval; p is "
        "the larger of a sign-flip permutation test (at least 1 / 2001) and Wilcoxon's signed-rank test; users: for "
        "how many the area is smaller. Deletion closes the history up, so it asks what removal and Shapley values ask; "
        "integrated gradients scale what a place puts in, and leave the place. For EASE, which is linear, all three "
        f"are the weights. Shapley values from {NUM_PAIRS} pairs of orders. Seconds: one explanation, compiled, on "
        f"one CPU core of a busy machine. EASE l2 {EASE_L2:g}; SASRec dim {DIM}, {NUM_BLOCKS} blocks, {NUM_EPOCHS} "
        "epochs; settings fixed beforehand. One training and one draw of users.\n\n"
        f"An explanation as a client sees it, of a generated user:\n\n{example_text()}\n"
        "![what each item adds](explanations_example.svg)\n\n"
        f"Written by `python -m experiments {NAME}`; commits "
        f"{', '.join(sorted({(s['commit'] or 'none')[:12] for s in stamps}))}, device "
        f"{', '.join(sorted({str(s['device_kind']) for s in stamps}))}.\n"
    )


def example_text() -> str:
    """What `--example` wrote."""
    path = RESULTS / "explanations_example.txt"
    return path.read_text(encoding="utf-8") if path.is_file() else "(run with --example)\n"


def example(smoke: bool) -> tuple[str, str]:
    """One recommendation to a generated user, explained in words and as a picture."""
    data = synthetic(num_users=60, num_items=40, seed=0) if smoke else synthetic(seed=0)
    train = leave_one_out(data).train
    model, history = linear_history_model(ease_weights(train, l2=EASE_L2)), train.items_of(0)
    (item,) = recommend(model, history, top=1)
    found = explain(model, history, int(item))
    text = "".join(f"> {sentence}\n" for sentence in sentences(found, "item {}".format))
    return text, to_svg(attribution_bars(found, "item {}".format))


def figure(line: dict):
    """The mean deletion curves of one recommender."""
    curves = {
        WORDS[name]: [(10.0 * place, [height]) for place, height in enumerate(curve)]
        for name, curve in line["values"]["curve"].items()
    }
    return bands(curves, x="% of the history deleted", y=f"margin of the recommended item, {line['key']['model']}")


def main(argv: list[str] | None = None) -> int:
    """Measures what is missing, and writes the page and its pictures."""
    parser = argparse.ArgumentParser(prog=f"python -m experiments {NAME}", description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder with ml-100k/ (default: FEDJAX_REC_DATA)")
    parser.add_argument("--smoke", action="store_true", help="seconds, on made-up data; writes nothing")
    parser.add_argument("--only-page", action="store_true", help="run nothing, write the page from the kept lines")
    parser.add_argument("--example", action="store_true", help="also explain a generated user's recommendation")
    args = parser.parse_args(argv)
    lines = [] if args.smoke else read_lines(NAME)
    if args.smoke:
        jax.config.update("jax_disable_most_optimizations", True)  # nearly all of its time is compilation
    for model in () if args.only_page else MODELS:
        key = {"model": model, "seed": 0}
        if key in [line["key"] for line in lines]:
            continue
        start = time.perf_counter()
        values = run(key, data_dir=args.data_dir, smoke=args.smoke)
        line = {"key": key, "values": values, "seconds": round(time.perf_counter() - start, 1)}
        lines.append(line | {"stamp": stamp(seed=0, data_fingerprint=None)})
        print(json.dumps(line), flush=True)
        if not args.smoke:
            keep_line(NAME, lines[-1])
    text, svg = example(args.smoke) if args.example or args.smoke else ("", "")
    if args.example and not args.smoke:
        (RESULTS / f"{NAME}_example.txt").write_text(text, encoding="utf-8")
        (RESULTS / f"{NAME}_example.svg").write_text(svg, encoding="utf-8")
    page, picture = write_page(lines), to_svg(figure(lines[-1]))
    print(page)
    if not args.smoke:
        (RESULTS / f"{NAME}.md").write_text(page, encoding="utf-8")
        (RESULTS / f"{NAME}.svg").write_text(picture, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

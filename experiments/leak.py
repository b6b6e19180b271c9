"""What published negatives give away: a scorer that learns nothing, beside trained methods, with and without the leak.

    python -m experiments leak --data-dir ~/data/ml-100k

A few minutes on two CPU cores. Appends to experiments/results/leak.jsonl, and writes leak.md and leak.svg from it.

MovieLens 100K, latest item out, every round with all clients. "paper": training negatives avoid all that a user ever
touched, held-out items too. "strict": they avoid training items only. Expect hit@10 against 99 negatives after 100
rounds of a scorer that only counts its negatives (see `fedjax_rec.evaluation.leak`) to be 1.000 under paper and .10,
which is chance, under strict; and that of PFedRec to be about .71 and .56.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import matplotlib
from matplotlib.figure import Figure

from experiments.harness import RESULTS, newest, read_lines
from fedjax_rec.algorithms.pfedrec import personal_scorer, pfedrec
from fedjax_rec.data import Split, load
from fedjax_rec.data.clients import client_data
from fedjax_rec.evaluation import cases, expect_sampled
from fedjax_rec.evaluation.leak import ROUNDS, audit_protocol
from fedjax_rec.evaluation.on_client import evaluate_on_clients, question, ranked_on_clients
from fedjax_rec.evaluation.protocol import PFEDREC_PAPER
from fedjax_rec.federated.algorithm import Algorithm
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.base import Model
from fedjax_rec.reporting import Table, to_markdown
from fedjax_rec.reporting.style import BLUE, GREEN, MUTED, PINK, STYLE, VERMILION, name_axes, new_figure, spread, to_svg
from fedjax_rec.runs.stamp import stamp

METRICS = ("hit@10/99neg", "ndcg@10/99neg", "hit@10", "ndcg@10")
NEGATIVES = {"paper": "-", "strict": (0, (4, 2))}  # exclusion rules and their line styles
# The counting scorer by another program, before this package existed: hit and ndcg at 10 against one draw of 99
# negatives. Over draws of those, hit has a standard deviation of .011 (round 20), so that .03 is not quite three.
REFERENCE = {
    "paper": {1: (0.154, 0.069), 5: (0.413, 0.225), 10: (0.589, 0.401), 20: (0.749, 0.587), 50: (0.989, 0.865)}
    | {100: (1.000, 0.978)},
    "strict": {1: (0.112, 0.055), 5: (0.111, 0.055), 10: (0.113, 0.050), 20: (0.109, 0.051), 50: (0.101, 0.044)}
    | {100: (0.107, 0.048)},
}
TOLERANCE = 0.03

Curve = dict[int, dict[str, float]]  # metrics by round


def main(argv: list[str] | None = None) -> int:
    """Runs the curves that the flags name, writes the files, prints the page."""
    parser = argparse.ArgumentParser(prog="python -m experiments leak", description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder with ml-100k/ (default: FEDJAX_REC_DATA)")
    parser.add_argument("--method", action="append", choices=METHODS, help="run only this one; may be repeated")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of training, and of the counting scorer's draws")
    parser.add_argument("--smoke", action="store_true", help="seconds, on made-up data; writes nothing")
    parser.add_argument("--only-page", action="store_true", help="run nothing, write the page from the kept lines")
    args = parser.parse_args(argv)
    if args.smoke:
        interactions, num_rounds = load("synthetic", num_users=40, num_items=240), 2
    else:
        interactions, num_rounds = load("movielens/100k", data_dir=args.data_dir), args.rounds
    split = PFEDREC_PAPER.split(interactions)
    lines = [] if args.smoke else read_lines("leak")
    for method in () if args.only_page else args.method or METHODS:
        for exclusion in NEGATIVES:
            start = time.perf_counter()
            curve = METHODS[method][0](split, exclusion, num_rounds, args.seed)
            line = {
                "row": f"{method}, {exclusion}",
                "seed": args.seed,
                "fingerprint": f"{split.fingerprint} after {num_rounds} rounds",
                "curve": {t: {name: round(curve[t][name], 5) for name in METRICS} for t in curve},
                "seconds": time.perf_counter() - start,
                "stamp": stamp(seed=args.seed, data_fingerprint=None, split_fingerprint=split.fingerprint),
            }
            print(f"{line['row']}, {line['seconds']:.0f} s: {line['curve'][num_rounds]}", flush=True)
            lines.append(json.loads(json.dumps(line)))  # as it will be read back
            if not args.smoke:
                RESULTS.mkdir(exist_ok=True)
                with open(RESULTS / "leak.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
    curves = kept_curves(lines)
    page, picture = write_page(curves, lines), to_svg(draw(curves))
    print(page)
    if not args.smoke:
        (RESULTS / "leak.md").write_text(page, encoding="utf-8")
        (RESULTS / "leak.svg").write_text(picture, encoding="utf-8")
    return 0


def counting_curve(split: Split, exclusion: str, num_rounds: int, seed: int) -> Curve:
    """The scorer that only counts its negatives, from round 0, which is chance."""
    return audit_protocol(split, exclusion=exclusion, rounds=range(1, num_rounds + 1), seed=seed)


def trained_curve(make: Callable[[int], tuple[Model, Algorithm]]) -> Callable[[Split, str, int, int], Curve]:
    """The curve of a method whose clients rank with what they have just trained.

    Args:
      make: from the number of items to a model and the algorithm that trains it.
    """

    def run(split, exclusion, num_rounds, seed):
        clients, asked = client_data(split, exclusion=exclusion), cases(split)
        model, algorithm = make(split.num_items)
        ranked = ranked_on_clients(algorithm, model.score, {"test": question(asked, num_clients=clients.num_clients)})
        rounds = make_rounds(ranked, chain(), full_participation(clients.num_clients), clients, span_size=1)
        init_key, *keys = jax.random.split(jax.random.key(seed), 4)
        state, private = rounds.init(init_key)
        curve = {}
        for number in range(1, num_rounds + 1):
            state, private, _ = rounds.run(state, private, RoundKeys(*keys))
            full = evaluate_on_clients(private["ranks"]["test"], asked)
            curve[number] = full.values | expect_sampled(full, num_negatives=99, ks=(10,)).values
        return curve

    return run


def pfedrec_with_defaults(num_items: int) -> tuple[Model, Algorithm]:
    """PFedRec as its authors ran it."""
    model = personal_scorer(num_items)
    return model, pfedrec(model, num_items=num_items)


# A method joins the study by one line here: its curve, and its colour.
METHODS = {
    "counting": (counting_curve, VERMILION),
    "PFedRec": (trained_curve(pfedrec_with_defaults), BLUE),
}


def kept_curves(lines: list[dict]) -> dict[tuple[str, str], Curve]:
    """The newest curve of each method and exclusion rule, for those that were run."""
    curves = {}
    for method in METHODS:
        for exclusion in NEGATIVES:
            runs = newest(lines, row) if any(line["row"] == (row := f"{method}, {exclusion}") for line in lines) else []
            if runs:
                curves[method, exclusion] = {int(t): values for t, values in runs[-1]["curve"].items()}
    return curves


def draw(curves: dict[tuple[str, str], Curve]) -> Figure:
    """Hit@10 against 99 negatives by round: a colour for each method, a line style for each exclusion rule."""
    metric, labels = METRICS[0], []
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure(label_share=0.17)
        for (method, exclusion), curve in curves.items():
            rounds = [t for t in curve if t]
            colour = METHODS[method][1]
            axes.plot(rounds, [curve[t][metric] for t in rounds], color=colour, linestyle=NEGATIVES[exclusion])
            labels.append((f"{method}, {exclusion}", curve[rounds[-1]][metric], colour))
        axes.axhline(0.1, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        axes.set_ylim(0, 1.05)
        axes.margins(x=0.01)
        name_axes(axes, x="round", y="hit@10 against 99 negatives (chance .1); solid: negatives avoid the test item")
        heights = spread([height for _, height, _ in labels], gap=0.075)
        for (name, _, colour), height in zip(labels, heights, strict=True):
            axes.annotate(
                name,
                (1.0, height),
                xycoords=("axes fraction", "data"),
                xytext=(5, 0),
                textcoords="offset points",
                color=colour,
                va="center",
                annotation_clip=False,
            )
    return figure


def agreement(curves: dict[tuple[str, str], Curve]) -> str:
    """The status line: how far the counting scorer is from the reference."""
    off = [
        abs(curves["counting", exclusion][t][name] - value)
        for exclusion, by_round in REFERENCE.items()
        for t, values in by_round.items()
        for name, value in zip(METRICS[:2], values, strict=True)
        if t in curves.get(("counting", exclusion), ())
    ]
    if not off:
        return "not compared, the counting scorer was not run"
    verdict = "reproduced" if max(off) <= TOLERANCE else "not reproduced"
    return (
        f"{verdict}; the counting scorer is at most {max(off):.3f} from {len(off)} values that another program measured "
        f"with one draw of negatives (tolerance {TOLERANCE:g})"
    )


def write_page(curves: dict[tuple[str, str], Curve], lines: list[dict]) -> str:
    """The page: status, the counting scorer by round, every method at its last round, and what made it."""
    parts = [f"# What the negatives give away\n\nStatus: {agreement(curves)}.\n\n{ABOUT}\n"]
    counting = {exclusion: curves[key] for exclusion in NEGATIVES if (key := ("counting", exclusion)) in curves}
    if len(counting) == len(NEGATIVES):
        last = max(counting["paper"])
        shown = [t for t in (0, *ROUNDS, last) if t in counting["paper"]]
        rows = [
            (str(t) if t else "chance", *(counting[exclusion][t][name] for exclusion in NEGATIVES for name in METRICS))
            for t in dict.fromkeys(shown)
        ]
        columns = ("round", *(f"{exclusion} {name}" for exclusion in NEGATIVES for name in METRICS))
        parts.append(to_markdown(Table(columns, rows, caption="The scorer that only counts its negatives, by round.")))
    rows = [
        (method, exclusion, max(curve), *(curve[max(curve)][name] for name in METRICS))
        for (method, exclusion), curve in curves.items()
    ]
    caption = "Every method at its last round, each client scored with what it has just trained."
    parts.append(to_markdown(Table(("method", "negatives", "round", *METRICS), rows, caption=caption)))
    parts.append("![hit@10 by round](leak.svg)\n")
    runs = [run for key in curves for run in newest(lines, ", ".join(key))]
    commits, devices = ({str(run["stamp"][key])[:12] for run in runs} for key in ("commit", "device_kind"))
    split = runs[0]["stamp"]["split_fingerprint"][:16] if runs else "none"
    parts.append(
        f"Written by `python -m experiments leak`; split sha256 {split}, {PFEDREC_PAPER.tie_rule} ties in time, equal "
        f"scores in expectation, one seed; commit {', '.join(sorted(commits))}, {', '.join(sorted(devices))}.\n"
    )
    return "\n".join(parts)


ABOUT = """MovieLens 100K, latest item out, all clients in every round, four negatives for each training positive. Under
*paper* they avoid everything that the user ever touched, as in the published code of several methods: the held-out item
is then the one unseen item that is never a negative, and a scorer that ranks items by how seldom they were drawn finds
it. Under *strict* they avoid training items only, and the same scorer stays at chance. What a method reaches under
paper is therefore an upper bound on what it learned; compare methods under strict."""


if __name__ == "__main__":
    sys.exit(main())

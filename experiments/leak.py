"""What published negatives give away: a scorer that learns nothing, beside trained methods, with and without the leak.

    python -m experiments leak --data-dir ~/data/ml-100k

A quarter of an hour on two busy CPU cores. Appends to experiments/results/leak.jsonl; makes leak.md and leak.svg of it.

MovieLens 100K, latest item out, every round with all clients. "paper": training negatives avoid all that a user ever
touched, held-out items too. "strict": they avoid training items only. Expect hit@10 against 99 negatives after 100
rounds of a scorer that only counts its negatives (see `fedjax_rec.evaluation.leak`) to be 1.000 under paper and .10,
which is chance, under strict; and that of PFedRec to be about .72 and .58.
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

from experiments.harness import keep_line
from experiments.ranked import ml_100k
from fedjax_rec.algorithms.fedrap import additive_scorer, fedrap
from fedjax_rec.algorithms.local_only import local_only, local_score
from fedjax_rec.algorithms.pfedrec import personal_scorer, pfedrec
from fedjax_rec.data import Split, load
from fedjax_rec.data.clients import client_data
from fedjax_rec.evaluation import cases, expect_sampled
from fedjax_rec.evaluation.leak import AS_PUBLISHED, ROUNDS, audit_protocol
from fedjax_rec.evaluation.on_client import evaluate_on_clients, question, ranked_on_clients
from fedjax_rec.evaluation.protocol import PFEDREC_PAPER
from fedjax_rec.federated.algorithm import Algorithm
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.reporting import Table, to_markdown
from fedjax_rec.reporting.style import BLUE, GREEN, MUTED, PINK, STYLE, VERMILION, name_axes, new_figure, spread, to_svg
from fedjax_rec.runs.stamp import stamp

RESULTS = Path(__file__).parent / "results"
METRICS = ("hit@10/99neg", "ndcg@10/99neg", "hit@10", "ndcg@10")
NEGATIVES = {"paper": "-", "strict": (0, (4, 2))}  # exclusion rules and their line styles
BROAD = {"paper": "-", "strict": (0, (1.4, 0.7))}  # of a broad line, whose dashes grow with it
# The counting scorer by another program, before this package existed: hit and ndcg at 10 against one draw of 99
# negatives. Over draws of those, hit has a standard deviation of .011 (round 20).
REFERENCE = {
    "paper": {1: (0.154, 0.069), 5: (0.413, 0.225), 10: (0.589, 0.401), 20: (0.749, 0.587), 50: (0.989, 0.865)}
    | {100: (1.000, 0.978)},
    "strict": {1: (0.112, 0.055), 5: (0.111, 0.055), 10: (0.113, 0.050), 20: (0.109, 0.051), 50: (0.101, 0.044)}
    | {100: (0.107, 0.048)},
}
TOLERANCE = 0.02

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
    if args.smoke:  # equal lengths make one bucket, and that is compiled quickly
        interactions, num_rounds = load("synthetic", num_users=30, num_items=200, num_interactions=600), 2
    else:
        interactions, num_rounds = ml_100k(args.data_dir, smoke=False), args.rounds
    split = PFEDREC_PAPER.split(interactions)
    lines = [] if args.smoke else read_lines()
    methods = args.method or (list(METHODS)[:2] if args.smoke else METHODS)
    for method in () if args.only_page else methods:
        for exclusion in NEGATIVES:
            start = time.perf_counter()
            curve = METHODS[method][0](split, exclusion, num_rounds, args.seed)
            line = {
                "row": f"{method}, {exclusion}",
                "seed": args.seed,
                "curve": {t: {name: round(curve[t][name], 5) for name in METRICS} for t in curve},
                "seconds": time.perf_counter() - start,
                "stamp": stamp(seed=args.seed, data_fingerprint=None, split_fingerprint=split.fingerprint),
            }
            print(f"{line['row']}, {line['seconds']:.0f} s: {line['curve'][num_rounds]}", flush=True)
            lines.append(json.loads(json.dumps(line)))  # as it will be read back
            if not args.smoke:
                keep_line("leak", line)
    curves = kept_curves(lines)
    page, picture = write_page(curves, lines), to_svg(draw(curves))
    if not args.smoke:
        (RESULTS / "leak.md").write_text(page, encoding="utf-8")
        (RESULTS / "leak.svg").write_text(picture, encoding="utf-8")
    print(page)
    return 0


def counting_curve(split: Split, exclusion: str, num_rounds: int, seed: int) -> Curve:
    """The scorer that only counts its negatives, from round 0, which is chance."""
    return audit_protocol(split, exclusion=exclusion, rounds=range(1, num_rounds + 1), seed=seed)


def trained_curve(make: Callable[[Split], tuple[Algorithm, Callable]]) -> Callable[[Split, str, int, int], Curve]:
    """The curve of a method whose clients rank with what they have just trained.

    Args:
      make: from a split to the algorithm, and `(Shared, private) -> [items]` that scores for one client.
    """

    def run(split, exclusion, num_rounds, seed):
        clients, asked = client_data(split, exclusion=exclusion), cases(split)
        algorithm, score = make(split)
        ranked = ranked_on_clients(algorithm, score, {"test": question(asked, num_clients=clients.num_clients)})
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


def make_pfedrec(split: Split):
    """PFedRec as its authors ran it."""
    model = personal_scorer(split.num_items)
    return pfedrec(model, num_items=split.num_items, negatives=AS_PUBLISHED), model.score


def make_local_only(split: Split):
    """PFedRec's model and steps without a server: it cannot know an item that its client never touched."""
    model = personal_scorer(split.num_items)
    algorithm = local_only(model, num_clients=split.num_users, num_items=split.num_items, negatives=AS_PUBLISHED)
    return algorithm, local_score(model)


def make_fedrap(split: Split):
    """FedRAP with its authors' settings, but one local epoch: with ten, hit@10 falls again after five rounds."""
    model = additive_scorer(split.num_items)
    return fedrap(model, num_clients=split.num_users, local_epochs=1), model.score


# A method joins the study by one line here: its curve, and its colour.
METHODS = {
    "counting": (counting_curve, VERMILION),
    "PFedRec": (trained_curve(make_pfedrec), BLUE),
    "local only": (trained_curve(make_local_only), GREEN),
    "FedRAP": (trained_curve(make_fedrap), PINK),
}


def read_lines() -> list[dict]:
    """The kept curves, oldest first."""
    file = RESULTS / "leak.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def kept_curves(lines: list[dict]) -> dict[tuple[str, str], Curve]:
    """The newest curve of each method and exclusion rule, for those that were run."""
    by_row = {line["row"]: line for line in lines}  # the last one stays
    keys = [(method, exclusion) for method in METHODS for exclusion in NEGATIVES]
    return {key: _rounds(by_row[row]["curve"]) for key in keys if (row := ", ".join(key)) in by_row}


def _rounds(curve: dict[str, dict[str, float]]) -> Curve:
    """Rounds as numbers again: in JSON they are strings."""
    return {int(t): values for t, values in curve.items()}


def draw(curves: dict[tuple[str, str], Curve]) -> Figure:
    """Hit@10 against 99 negatives by round: a colour for each method, a line style for each exclusion rule."""
    metric, labels = METRICS[0], []
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure(label_share=0.2)
        for (method, exclusion), curve in curves.items():
            rounds = [t for t in curve if t]
            colour = METHODS[method][1]
            # Broad and pale: a method that only remembers lies on top of it.
            look = {"linestyle": NEGATIVES[exclusion]}
            if method == "counting":
                look = {"linestyle": BROAD[exclusion], "linewidth": 5, "alpha": 0.35}
            heights = [curve[t][metric] for t in rounds]
            axes.plot(rounds, heights, color=colour, **look)
            labels.append((f"{method}, {exclusion}", curve[rounds[-1]][metric], colour))
        axes.axhline(0.1, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        axes.set_ylim(0, 1.05)
        axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1], ["0", ".2", ".4", ".6", ".8", "1"])
        axes.margins(x=0.01)
        name_axes(axes, x="round", y="hit@10 against 99 negatives; chance is .1")
        for height, text in (
            (0.29, "solid, paper: negatives avoid held-out items"),
            (0.22, "dashed, strict: they do not"),
        ):
            axes.text(0.985, height, text, transform=axes.transAxes, color=MUTED, ha="right")
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
    compared, far = 0, []
    for exclusion, by_round in REFERENCE.items():
        curve = curves.get(("counting", exclusion), {})
        for t in [t for t in by_round if t in curve]:
            for name, value in zip(METRICS[:2], by_round[t], strict=True):
                compared += 1
                if abs(curve[t][name] - value) > TOLERANCE:
                    far.append(f"{name} under {exclusion} at round {t}, {curve[t][name]:.3f} and not {value:.3f}")
    if not compared:
        return "not compared, the counting scorer was not run"
    within = f"{compared - len(far)} of {compared} values of another program within {TOLERANCE:g}"
    return f"not reproduced: {within}" if len(far) > 2 else f"reproduced: {'; but '.join([within, *far])}"


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
    caption = "Every method after its last round, each client scored with what it has just trained."
    parts.append(to_markdown(Table(("method", "negatives", "round", *METRICS), rows, caption=caption)))
    parts.append("![hit@10 by round](leak.svg)\n")
    runs = list({line["row"]: line for line in lines}.values())
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
it. Under *strict* they avoid training items only, and the same scorer stays at chance. So a number under
paper does not say what a method learned; compare methods under strict.

*Local only* is PFedRec's model and steps on each client alone, and nothing is shared: it cannot know an item that its
client never touched, so what it has above chance is the leak and nothing else. *PFedRec* receives the item table anew
in each round and forgets most negatives; *FedRAP* keeps a private table, as local only does. It runs with one local
epoch, and its negatives are distinct within a round; those of all others are drawn anew for each positive."""


if __name__ == "__main__":
    sys.exit(main())

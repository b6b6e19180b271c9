"""Customer service: which intent a query has, learned from clients in one private release, with names as prior.

    export FEDJAX_REC_TEXT_ENCODER=~/all-MiniLM-L6-v2
    python -m experiments intents --data-dir ~/data

About ten minutes of one CPU core, of which three embed the sentences, once. Each run is kept as a line of
results/intents.jsonl, and a second call runs only what is missing; results/intents.md and .svg are made of the lines.

CLINC150 (Larson et al., 2019, "An Evaluation Dataset for Intent Classification and Out-of-Scope Prediction"): 150
intents. Clients are simulated: the train queries are shuffled by the seed and dealt, ten to each of 600. What they send
is user-level private. The validation queries are nobody's, and public: their texts train the student of the teachers
and the second row, and set the score below which a query is rejected; their intents chose settings of the linear head
and of the teachers, and, of the class sums, the coordinates and how counts weigh; the prior's weight is a formula.
"""

import itertools
import math
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from scipy.stats import rankdata

from experiments._intents import METHODS, VARIANTS, World, clients_of, clinc150, made_up, names_alone
from experiments.harness import add_missing, finish, study_parser
from fedjax_rec.data.cache import default_cache_dir
from fedjax_rec.models.class_sums import cosine_scores
from fedjax_rec.reporting import Table, to_markdown
from fedjax_rec.reporting.study_plots import bands
from fedjax_rec.reporting.style import to_svg

NAME, NUM_SEEDS = "intents", 5
EPSILONS = (1.0, 2.0, 4.0, 8.0, math.inf)
DELTA = 1e-5
NAMES, MAIN = "names alone", "class sums and names"
SHORT = dict(zip(METHODS, ("sums, names", "+ public", "head, names", "votes", "sums"), strict=True))  # in the figure
REJECTED = 0.1  # share of public queries that a threshold may reject
BARS = ((math.inf, 0.90), (4.0, 0.75), (2.0, 0.62))  # of the main row's accuracy
ROWS = ((NAMES, None), *itertools.product(METHODS, EPSILONS), *itertools.product(VARIANTS, (2.0, 4.0)))
SMOKE = ((NAMES, None), (MAIN, 4.0), ("linear head from names", 4.0), ("teachers' votes", 4.0))


ABOUT = """\
600 simulated clients hold ten train queries of CLINC150 each, as vectors of a frozen all-MiniLM-L6-v2; 150 intents, \
4,500 test queries, 1,000 out of scope; ± is the standard deviation over deals and noise.

- "Class sums and names" is one release of a sum and a count a class, and a posterior mean around the names, whose \
weight is a formula of noise, counts and one assumption (sentences of one intent have cosine 1/2), which no query of \
a run enters and nothing tunes (`models/class_sums.py`).
- "The same and public queries" then moves the means by 3,000 public queries that they label themselves.
- "Linear head from names" starts at the names and takes five rounds of everybody.
- "Teachers' votes" is PATE with confident GNMax: every client is a teacher, with the names and its ten queries, and \
all vote on 1,000 public queries. Teachers of more clients know more, but are too few against the noise that 1,000 \
answers take; so this is hardly more than what the names say of public queries, at any epsilon.
- "Class sums alone" has no names: what they are worth is the difference.
- The last rows show how much hangs on the weight: what a wrong assumption about the sentences would have cost.

A query is rejected if its largest cosine is below what a tenth of the public queries in scope stay below. "Rejected" \
is the share of out-of-scope queries that are; "accepted and right" the share of test queries in scope that are not, \
and get their intent.

Settings of the head and of the teachers, and the coordinates and the weight of counts in the class sums, were chosen \
on the intents of the public queries, which no client has sent: epsilon is about clients and covers none of that."""


def measure(world: World, method: str, epsilon: float, seed: int) -> dict:
    """One method on one deal of the queries."""
    start = time.perf_counter()
    fit = names_alone if method == NAMES else (METHODS | VARIANTS)[method]
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(f"{method} {epsilon}".encode()))
    fitted = fit(world, clients_of(world, seed), epsilon, DELTA, key)
    scores = cosine_scores(world.test.vectors, fitted.classes)
    strange = cosine_scores(world.out_of_scope, fitted.classes).max(1)
    threshold = float(np.quantile(cosine_scores(world.public.vectors, fitted.classes).max(1), REJECTED))
    correct, best = scores.argmax(1) == world.test.labels, scores.max(1)
    return {
        "accuracy": float(correct.mean()),
        "auroc": auroc(best, strange),
        "rejected": float((strange < threshold).mean()),
        "accepted and right": float((correct & (best >= threshold)).mean()),
        "epsilon": fitted.ledger.spent(DELTA).epsilon if math.isfinite(epsilon) and fitted.ledger.entries else None,
        "seconds": round(time.perf_counter() - start, 1),
        **fitted.said,
    }


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    """Chance that a score in scope is above one out of scope, ties half."""
    ranks = rankdata(np.concatenate([inside, outside]))[: len(inside)]
    return float((ranks.mean() - (len(inside) + 1) / 2) / len(outside))


def rows_of(lines: Sequence[dict], method: str, epsilon: float | None) -> list[dict]:
    """Values of one row, one seed each."""
    return [line["values"] for line in lines if line["key"]["method"] == method and line["key"]["epsilon"] == epsilon]


def _spelt(epsilon: float | None) -> float | str | None:
    return "inf" if epsilon is not None and math.isinf(epsilon) else epsilon


def make_table(lines: Sequence[dict]) -> Table:
    """One row a method and epsilon; means over seeds."""
    columns = ("accuracy", "auroc", "accepted and right", "rejected")
    rows = []
    for method, epsilon in ROWS:
        if mine := rows_of(lines, method, _spelt(epsilon)):
            cells = []
            for column in columns:
                values = [100 * one[column] for one in mine]
                spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 and column == "accuracy" else ""
                cells.append(f"{np.mean(values):.1f}{spread}")
            spelt = "0" if epsilon is None else "none" if math.isinf(epsilon) else f"{epsilon:g}"
            rows.append((method, spelt, *cells, len(mine)))
    heads = (
        "method",
        "epsilon",
        "accuracy, %",
        "out-of-scope AUROC, %",
        "accepted and right, %",
        "rejected, %",
        "seeds",
    )
    return Table(
        heads,
        rows,
        caption=f"user-level ε at δ = {DELTA:g}, add/remove one client with all its queries, everybody in each release",
    )


def status(lines: Sequence[dict]) -> str:
    """What the main row says about its bars."""
    said = []
    for epsilon, bar in BARS:
        if mine := rows_of(lines, MAIN, _spelt(epsilon)):
            found = float(np.mean([one["accuracy"] for one in mine]))
            where = "without noise" if math.isinf(epsilon) else f"at epsilon {epsilon:g}"
            said.append(
                f"{100 * found:.1f} % {where}, {'above' if found >= bar else 'BELOW'} the bar of {100 * bar:.0f}"
            )
    return f"study; {MAIN}: {'; '.join(said)}."


def write_page(lines: Sequence[dict]) -> str:
    """The page."""
    stamps = [line["stamp"] for line in lines]
    return (
        "# Customer service: intents from one private release\n\n"
        f"Status: {status(lines)}\n\n![Accuracy against epsilon]({NAME}.svg)\n\n{to_markdown(make_table(lines))}\n\n"
        f"{ABOUT}\n\n"
        f"Written by `python -m experiments {NAME}`; commits "
        f"{', '.join(sorted({(s['commit'] or 'none')[:12] for s in stamps}))}, device "
        f"{', '.join(sorted({str(s['device_kind']) for s in stamps}))}.\n"
    )


def draw(lines: Sequence[dict]) -> str:
    """Accuracy against epsilon, a curve a method, as SVG."""
    curves = {}
    for method in METHODS:
        points = [(e, [v["accuracy"] for v in mine]) for e in EPSILONS if (mine := rows_of(lines, method, _spelt(e)))]
        if points:
            curves[SHORT[method]] = points
    known = rows_of(lines, NAMES, None)
    reference = (NAMES, float(np.mean([v["accuracy"] for v in known]))) if known else None
    return to_svg(bands(curves, x=f"ε, user-level, δ = {DELTA:g}", y="accuracy in scope", reference=reference))


def main(argv: list[str] | None = None) -> int:
    """Measures what is missing, and writes the page."""
    parser = study_parser(NAME, __doc__, seeds=NUM_SEEDS)
    parser.add_argument("--data-dir", type=Path, help="folder with clinc150/clinc.json (default: FEDJAX_REC_DATA)")
    args = parser.parse_args(argv)

    def measured(key):
        world = made_up() if args.smoke else clinc150(args.data_dir, default_cache_dir() / "text")
        epsilon = math.inf if key["epsilon"] in (None, "inf") else key["epsilon"]
        return measure(world, key["method"], epsilon, key["seed"])

    keys = [
        {"method": method, "epsilon": _spelt(epsilon), "seed": seed}
        for seed, (method, epsilon) in itertools.product(
            range(1 if args.smoke else args.seeds), SMOKE if args.smoke else ROWS
        )
        if not (method == NAMES and seed)  # nothing is drawn
    ]
    shown = ("accuracy", "auroc", "seconds")
    lines = add_missing(NAME, [] if args.only_page else keys, measured, shown=shown, smoke=args.smoke)
    return finish(NAME, write_page(lines), smoke=args.smoke, svg=None if args.smoke else draw(lines))


if __name__ == "__main__":
    sys.exit(main())

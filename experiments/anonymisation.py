"""Anonymised releases: who is still found in them, and what they are good for.

    python -m experiments anonymisation --data-dir ~/data/ml-100k
    python -m experiments anonymisation --dataset movielens/1m --data-dir ~/data/ml-1m

About a quarter of a minute a policy on MovieLens 100K and two minutes on 1M, on two CPU cores. Appends to
experiments/results/anonymisation.jsonl; makes anonymisation.md and a picture a data set of it.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from fedjax_rec.anonymization.apply import anonymize
from fedjax_rec.anonymization.policy import parse_policy
from fedjax_rec.anonymization.risk import SETTINGS, risk_report
from fedjax_rec.anonymization.utility import (
    L2S,
    Quality,
    downstream_cost,
    ease_quality,
    held_out,
    training_users,
)
from fedjax_rec.data import Interactions, Split, load
from fedjax_rec.reporting import Table, to_markdown
from fedjax_rec.reporting.risk_plots import Point, risk_against_utility
from fedjax_rec.reporting.style import BLUE, GREEN, MUTED, PINK, VERMILION, to_svg
from fedjax_rec.runs.stamp import stamp
from fedjax_rec.synthesis.gram import gram_method
from fedjax_rec.synthesis.plan import fit_generator
from fedjax_rec.synthesis.virtual import virtual_users

RESULTS = Path(__file__).parent / "results"
KNOWN, TARGETS, UNIQUE_BY = 8, 500, 12
EPSILON = 8.0  # user-level, of the Gram generator whose virtual users replace items
NEAR = 0.04
UNIQUE = {"movielens/100k": 0.635, "movielens/1m": 0.389}  # of random known items; what a check expects
WORST = "items, ratings, dates"
NO_TIMES = "[times]\nto = 'none'\n"


class Row(NamedTuple):
    """A policy: its name, its text, its series in the picture, whose items replace, and the k of its groups."""

    name: str
    text: str
    series: str
    short: str
    virtual: str = ""
    group: int = 0


COLOURS = {
    "pseudonyms": MUTED,
    "5^2-anonymous items": "#b07c00",
    "groups": BLUE,
    "replaced, popularity": VERMILION,
    f"replaced, Gram ε = {EPSILON:g}": PINK,
    "coins": GREEN,
}


def rows() -> list[Row]:
    """The policies, weakest first. All have pseudonyms; all below "times by month" have no times."""
    replaced = [
        Row(
            f"{share} % replaced, {source}",
            f"{NO_TIMES}[replacement]\nshare = {share / 100}\n{key}",
            f"replaced, {source}",
            f"{share} %",
            virtual=source,
        )
        for source, key in (("popularity", ""), (f"Gram ε = {EPSILON:g}", "virtual = 'given'\n"))
        for share in (20, 50, 80)
    ]
    coins = [
        Row(
            f"coins, ε = {epsilon} an item",
            f"[randomized_response]\nepsilon_per_item = {epsilon}\nexpected_items = {{length}}\n",
            "coins",
            f"ε = {epsilon} an item",
        )
        for epsilon in (4, 2)
    ]
    return [
        Row("pseudonyms only", "", "pseudonyms", "pseudonyms"),
        Row("times by month", "[times]\nto = 'month'\n", "pseudonyms", "by month"),
        Row("no times", NO_TIMES, "pseudonyms", "no times"),
        Row("no times, no ratings", f"{NO_TIMES}[ratings]\nto = 'none'\n", "pseudonyms", "nor ratings"),
        Row("5^2-anonymous items", f"{NO_TIMES}[items]\nk = 5\nm = 2\n", "5^2-anonymous items", ""),
        *(Row(f"groups of {k}", f"[microaggregation]\nk = {k}\n", "groups", str(k), group=k) for k in (2, 5, 10, 20)),
        *replaced,
        *coins,
    ]


def main(argv: list[str] | None = None) -> int:
    """Runs the policies, writes the files, prints the page; 1 if something that must hold does not."""
    parser = argparse.ArgumentParser(prog="python -m experiments anonymisation", description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=tuple(UNIQUE), default="movielens/100k")
    parser.add_argument("--data-dir", type=Path, help="folder with ml-100k/ or ml-1m/ (default: FEDJAX_REC_DATA)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--row", action="append", help="run only rows that start with this; may be repeated")
    parser.add_argument("--smoke", action="store_true", help="seconds, on made-up data; writes nothing")
    parser.add_argument("--only-page", action="store_true", help="run nothing, write the page from the kept lines")
    args = parser.parse_args(argv)
    file, lines = RESULTS / "anonymisation.jsonl", []
    if file.exists() and not args.smoke:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for line in () if args.only_page else run(args):
        lines.append(json.loads(json.dumps(line)))  # as it will be read back
        print(f"{line['dataset']}, {line['row']}, {line['seconds']:.0f} s", flush=True)
        if not args.smoke:
            RESULTS.mkdir(exist_ok=True)
            with open(file, "a", encoding="utf-8") as kept:
                kept.write(json.dumps(line) + "\n")
    order = [row.name for row in rows()]
    newest = {(line["dataset"], line["row"]): line for line in lines if line["row"] in order}
    lines = sorted(newest.values(), key=lambda line: (line["dataset"], order.index(line["row"])))
    page = write_page(lines)
    for name in datasets(lines) if not args.smoke else ():
        (RESULTS / picture(name)).write_text(to_svg(draw(lines, name)), encoding="utf-8")
    if not args.smoke:
        (RESULTS / "anonymisation.md").write_text(page, encoding="utf-8")
    print(page)
    return 0 if args.smoke else int(bool(complaints(lines)))


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line a policy, as they are done."""
    if args.smoke:
        data = load("synthetic", num_users=100, num_items=60, num_interactions=2000, min_per_user=12, ratings=True)
        wanted, l2s = ("pseudonyms", "groups of 5", "20 % replaced, popularity", "coins, ε = 4"), (100.0,)
    else:
        data, wanted, l2s = load(args.dataset, data_dir=args.data_dir), tuple(args.row or ("",)), L2S
    split = held_out(data, seed=args.seed)
    train = training_users(split)
    before, measured = ease_quality(train, split, l2s=l2s), None
    for row in rows():
        if row.name.startswith(wanted):
            start = time.perf_counter()
            found = measure(row, data, train, split, before, l2s, args.seed, measured)
            measured = found["report"]["before"]  # is the same for all policies
            made = stamp(seed=args.seed, data_fingerprint=data.fingerprint)
            yield (
                {"dataset": data.name, "row": row.name}
                | found
                | {
                    "seconds": time.perf_counter() - start,
                    "stamp": made,
                }
            )


def measure(
    row: Row,
    data: Interactions,
    train: Interactions,
    split: Split,
    before: Quality,
    l2s: tuple[float, ...],
    seed: int,
    measured: dict[str, Any] | None,
) -> dict[str, Any]:
    """What one policy gives: attacks on the release of everybody, quality on the release of the training users."""
    length = max(1, min(round(data.num_interactions / data.num_users), data.num_items // 2))
    policy = parse_policy(row.text.format(length=length) + "[pseudonyms]\n")
    made = anonymize(data, policy, virtual=virtual_for(row, data, seed), seed=seed)
    report = risk_report(
        data,
        made,
        policy,
        known_items=(UNIQUE_BY,),
        num_known=KNOWN,
        num_targets=TARGETS,
        l2s=None,
        before=measured,
        seed=seed,
    )
    again = anonymize(train, policy, virtual=virtual_for(row, train, seed), seed=seed + 1).interactions
    report["downstream"] = downstream_cost(ease_quality(again, split, l2s=l2s), before, seed=seed)
    return {"steps": list(made.steps), "report": report}


def virtual_for(row: Row, data: Interactions, seed: int) -> Interactions | None:
    """Virtual users of the Gram generator, fitted on the very users whose items they replace; None = not needed."""
    if not row.virtual.startswith("Gram"):
        return None
    fit, draw_key = jax.random.split(jax.random.key(seed))
    delta = 1 / data.num_users**1.1
    fitted = fit_generator(gram_method(), data, epsilon=EPSILON, delta=delta, key=fit)
    return virtual_users(fitted.generator, fitted.lengths, num_users=data.num_users, key=draw_key, catalogue=data)


def datasets(lines: list[dict]) -> list[str]:
    """The data sets that there are lines of."""
    return sorted({line["dataset"] for line in lines})


def picture(dataset: str) -> str:
    """The file of a data set's picture."""
    return f"anonymisation-ml-{dataset.rpartition('/')[2]}.svg"


def complaints(lines: list[dict]) -> list[str]:
    """What must hold and does not: uniqueness of the data as it is, and at most one in k of groups of k."""
    groups, broken = {row.name: row.group for row in rows()}, []
    for line in lines:
        expected = UNIQUE.get(line["dataset"])
        share = line["report"]["before"]["uniqueness"][str(UNIQUE_BY)]["share"]
        if expected is not None and not abs(share - expected) <= NEAR:
            broken.append(f"{100 * share:.1f} % of {line['dataset']} are unique by {UNIQUE_BY} items")
        k = groups[line["row"]]
        for setting, found in line["report"]["after"]["reidentification"].items() if k else ():
            if found["top1"] > 1 / k + 2 * found["top1_error"]:
                broken.append(f"{setting} finds {100 * found['top1']:.1f} % of users in {line['row']}")
    return sorted(set(broken))


def status(lines: list[dict]) -> str:
    """Whether the attacks have power on the data as it is, and groups bound them."""
    broken = complaints(lines)
    if broken:
        return f"NOT as it should be: {'; '.join(broken)}."
    shares = {line["dataset"]: line["report"]["before"]["uniqueness"][str(UNIQUE_BY)] for line in lines}
    words = [f"{100 * share['share']:.1f} ± {100 * share['error']:.1f} % ({name})" for name, share in shares.items()]
    return (
        f"as it should be. {UNIQUE_BY} random items of their own single out {' and '.join(words)} of the users of the "
        "data as it is; of groups of k no attack finds more than one in k, within two standard errors."
    )


def risk_table(lines: list[dict], dataset: str) -> Table:
    """Attacks and cost by policy."""
    columns = (
        "policy",
        f"unique by {UNIQUE_BY}",
        *SETTINGS,
        "published score",
        "Jaccard distance",
        "ndcg@20, ratio",
        "95 %",
    )
    return Table(
        columns=columns,
        rows=[_cells(line) for line in lines if line["dataset"] == dataset],
        caption=f"{dataset}: users who are found, in percent, and what the release is good for.",
        notes=(
            f"Columns of knowledge: share of {TARGETS} random users whose record has the best score, from {KNOWN} "
            "items of theirs, ± one standard error. Partly wrong: two of the items are others, each rating is off by "
            "one, each date by two weeks.",
            "The strongest of three scores, and of those without ratings or dates, is shown. "
            f"Published score: that of the paper, with {WORST}.",
        ),
    )


def _cells(line: dict) -> tuple[str, ...]:
    after, cost = line["report"]["after"], line["report"]["downstream"]
    unique, found = after["uniqueness"][str(UNIQUE_BY)], after["reidentification"]

    def percent(share: float, error: float) -> str:
        return f"{100 * share:.1f} ± {100 * error:.1f}"

    published = found[WORST]["published_score"]
    return (
        line["row"],
        percent(unique["share"], unique["error"]),
        *(percent(found[setting]["top1"], found[setting]["top1_error"]) for setting in SETTINGS),
        percent(published["top1"], published["top1_error"]),
        f"{line['report']['information_loss']['jaccard_distance']:.2f}",
        f"{cost['ratio']:.3f}",
        f"{cost['ratio_low']:.3f} to {cost['ratio_high']:.3f}",
    )


def draw(lines: list[dict], dataset: str):
    """Attack against utility, a point a policy."""
    named = {row.name: row for row in rows()}
    points = [
        Point(
            named[line["row"]].short,
            line["report"]["downstream"]["ratio"],
            line["report"]["after"]["reidentification"][WORST]["top1"],
            named[line["row"]].series,
            COLOURS[named[line["row"]].series],
        )
        for line in lines
        if line["dataset"] == dataset
    ]
    return risk_against_utility(
        points,
        risk=f"users found by {KNOWN} {WORST}, where the release has them",
        utility="ndcg@20 of EASE trained on the release, ratio to the data as it is",
    )


def write_page(lines: list[dict]) -> str:
    """The page: status, what was done, a table and a picture a data set, and what made them."""
    if not lines:
        return "# Anonymised releases\n\nStatus: nothing was run yet.\n"
    made = {line["dataset"]: line["stamp"] for line in lines}
    commits = sorted({(line["stamp"]["commit"] or "none")[:12] for line in lines})
    sources = ", ".join(f"{name} data sha256 {one['data_fingerprint'][:16]}" for name, one in made.items())
    parts = [
        f"{to_markdown(risk_table(lines, name))}\n![Risk against utility, {name}]({picture(name)})\n"
        for name in datasets(lines)
    ]
    last = lines[-1]["stamp"]
    return (
        f"# Anonymised releases\n\nStatus: {status(lines)}\n\n{ABOUT}\n\n" + "\n".join(parts) + "\n"
        f"Written by `python -m experiments anonymisation`; {sources}, seed {last['seed']}, commits "
        f"{', '.join(commits)}, {last['device_kind']}.\n"
    )


ABOUT = f"""Each policy makes a release of all users, with pseudonyms. An attacker who knows {KNOWN} random items of a
user, and perhaps ratings and dates, looks for the user's record by the score of Narayanan and Shmatikov (2008), "Robust
De-anonymization of Large Sparse Datasets", and by that score over a power of the record's length, which favours long
records less. It knows the policy, and makes its ratings and dates as coarse as the release has them. Records that score
alike share a hit, so that of k equal records each is found with 1/k.

What a release is good for: EASE is trained on it and asked for held-out items of real users whose rows it never saw (a
fifth of the users; l2 chosen on another tenth). For that the training users are anonymised as a data set of their own.

Groups are micro-aggregation of k similar users with one history, without times. Replaced: a share of each user's items
is exchanged for those of virtual users, drawn by popularity or from the Gram generator (user-level ε = {EPSILON:g},
add or remove one, all users, δ = 1 / users^1.1: it covers the virtual users and nothing that is kept). Coins:
randomised response on every item of the catalogue, with records as long as the mean one, taken as public, on average;
its ε is for one interaction added or removed, and a user's whole history costs as much for every item of the catalogue.

None of this but the coins is differential privacy: the numbers say how far these attacks get, and no more."""

if __name__ == "__main__":
    sys.exit(main())

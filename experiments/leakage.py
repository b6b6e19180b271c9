"""What one client's upload tells the server: plain, clipped, padded, locally noised and securely summed uploads.

    python -m experiments leakage --data-dir ~/data/ml-100k

Minutes on two CPU cores. Appends to experiments/results/leakage.jsonl; makes leakage.md and .svg of it.

MovieLens 100K, matrix factorisation after a few plain rounds. The server attacks the next round's uploads: of FedSGD on
ratings for items, ratings and attributes, and of FedAvg with negatives for interactions.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments._leakage import (
    CLIP_NORM,
    COHORTS,
    DELTA,
    DIM,
    L2,
    LOCAL_EPOCHS,
    MOST_POSITIVES,
    NUM_FAKE,
    NUM_NEGATIVES,
    make_world,
    measure,
    protections,
    released,
)
from fedjax_rec.data import Interactions, load
from fedjax_rec.federated.transforms import chain
from fedjax_rec.reporting import Table, to_markdown
from fedjax_rec.reporting.style import BLUE, GREEN, STYLE, VERMILION, name_axes, new_figure, to_svg
from fedjax_rec.runs.stamp import stamp

RESULTS = Path(__file__).parent / "results"
ROUNDS, FEW = 10, 80
KNOWN_ITEMS = (5, 20)
LEAST = 0.99  # of plain uploads: F1 of item sets, and share of ratings
HIDDEN = 10  # members from which on a sum must hide its members from each other


def main(argv: list[str] | None = None) -> int:
    """Runs the rows, writes the files, prints the page; 1 if an attack lacks power or a sum singles a member out."""
    parser = argparse.ArgumentParser(prog="python -m experiments leakage", description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder with ml-100k/ (default: FEDJAX_REC_DATA)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--row", action="append", help="run only rows that start with this; may be repeated")
    parser.add_argument("--smoke", action="store_true", help="seconds, on made-up data; writes nothing")
    parser.add_argument("--only-page", action="store_true", help="run nothing, write the page from the kept lines")
    args = parser.parse_args(argv)
    train = made_up() if args.smoke else load("movielens/100k", data_dir=args.data_dir)
    file, settings = RESULTS / "leakage.jsonl", f"{train.fingerprint[:16]}, seed {args.seed}, {ROUNDS} rounds"
    lines = []
    if file.exists() and not args.smoke:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if not args.only_page:
        for line in run(train, args):
            line |= {"settings": settings, "stamp": stamp(seed=args.seed, data_fingerprint=train.fingerprint)}
            lines.append(json.loads(json.dumps(line)))  # as it will be read back
            print(f"{line['row']}, {line['seconds']:.0f} s", flush=True)
            if not args.smoke:
                RESULTS.mkdir(exist_ok=True)
                with open(file, "a", encoding="utf-8") as kept:
                    kept.write(json.dumps(line) + "\n")
    newest = {(line["row"], line["epsilon"]): line for line in lines if line["settings"] == settings}
    lines = list(newest.values())
    page, picture = write_page(lines, train), to_svg(draw(lines))
    if not args.smoke:
        (RESULTS / "leakage.md").write_text(page, encoding="utf-8")
        (RESULTS / "leakage.svg").write_text(picture, encoding="utf-8")
    print(page)
    return 0 if args.smoke else int(bool(complaints(lines)))


def made_up() -> Interactions:
    """Synthetic ratings of people whose favourite genre stands for gender and age."""
    train = load("synthetic", num_users=60, num_items=50, min_per_user=8, ratings=True)
    genre = train.user_attributes["favourite_genre"]
    people = {"gender": np.where(genre % 2 == 0, "F", "M"), "age": np.where(genre % 4 < 2, 20, 40)}
    return dataclasses.replace(train, user_attributes=people)


def run(train: Interactions, args: argparse.Namespace):
    """One line a row, as they are done."""
    world = make_world(train, num_rounds=2 if args.smoke else ROUNDS, num_few=8 if args.smoke else FEW, seed=args.seed)
    plain = world.ratings.uploads(chain()), world.implicit.uploads(chain())
    for protection in protections(world):
        start = time.perf_counter()
        epsilon = None if protection.epsilon is None else round(protection.epsilon, 3)
        if _skipped(protection.name, args):
            continue
        line = {"row": protection.name, "epsilon": epsilon, "members": protection.members}
        yield line | measure(world, protection, plain) | {"seconds": time.perf_counter() - start}
    for num_items in () if _skipped("released", args) else KNOWN_ITEMS:
        start = time.perf_counter()
        for name, found in released(world, num_items).items():
            line = {"row": f"{num_items} known items, {name}", "epsilon": None, "members": 0}
            yield line | found | {"seconds": time.perf_counter() - start}


def _skipped(name: str, args: argparse.Namespace) -> bool:
    if args.smoke:
        return name not in ("plain", f"{NUM_FAKE} uniform fakes", "sum of 10", "released")
    return bool(args.row) and not any(name.startswith(wanted) for wanted in args.row)


def uploads_of(lines: list[dict]) -> list[dict]:
    """The rows about uploads, and not those about the released table."""
    return [line for line in lines if line["members"]]


def complaints(lines: list[dict]) -> list[str]:
    """What should hold and does not: power on plain uploads, and sums that single nobody out."""
    found = {line["row"]: line for line in lines}
    broken = []
    for name in ("items", "ratings"):
        if "plain" in found and found["plain"][name] < LEAST:
            broken.append(
                f"{name} of plain uploads come back at {found['plain'][name]:.3f} only, so the attack is weak"
            )
    for line in uploads_of(lines):
        if line["members"] >= HIDDEN and line["items_gap"] > 2 * line["items_gap_error"]:
            broken.append(f"the {line['row']} singles out a member, by {line['items_gap']:.3f} of F1")
    return broken


def status(lines: list[dict]) -> str:
    """Whether the attacks have power and sums hide their members from each other."""
    broken, found = complaints(lines), {line["row"]: line for line in lines}
    if broken:
        return f"NOT as it should be: {'; '.join(broken)}."
    summed = [line for line in uploads_of(lines) if line["members"] >= HIDDEN]
    words = [f"{line['row']}: F1 {line['items']:.3f}, another member {line['items_other']:.3f}" for line in summed]
    return (
        f"as it should be. Plain uploads give F1 {found['plain']['items']:.3f} of item sets and "
        f"{100 * found['plain']['ratings']:.1f} % of ratings in one round; a sum tells no more of the target than of "
        f"another member, within two standard errors ({'; '.join(words)})."
    )


def item_table(lines: list[dict]) -> Table:
    """Item sets and ratings."""
    return Table(
        columns=("upload", "epsilon", "F1 of items", "standard error", "F1 by popularity", "ratings right",
                 "standard error of ratings", "right by the item's mean"),
        rows=[
            (line["row"], line["epsilon"], line["items"], line["items_error"], line["items_popular"], line["ratings"],
             line["ratings_error"], line["ratings_guess"])
            for line in uploads_of(lines)
        ],
        caption="Items and ratings, from one upload (or the sum that it is in).",
        notes=(
            EPSILON,
            "F1 of items: the better of reading row ids and of the learned attack, chosen on known clients. The "
            "learned attack and the guess by popularity are told how many items a client has.",
            "Ratings right: share of a client's ratings, of items that the attacker is told. Where noise leaves the "
            "inversion below the item's mean, the attacker does better to guess.",
        ),
    )  # fmt: skip


def sum_table(lines: list[dict]) -> Table:
    """What a sum tells of its members, of its cohort and of nobody."""
    return Table(
        columns=("clients in the sum", "F1, target", "F1, another member", "difference", "standard error",
                 "F1, sum without the target", "F1 by popularity"),
        rows=[
            (line["members"], line["items"], line["items_other"], line["items_gap"], line["items_gap_error"],
             line["items_without"], line["items_popular"])
            for line in uploads_of(lines) if line["members"] > 1
        ],
        caption=f"Item sets from secure sums, {COHORTS} cohorts of targets each.",
    )  # fmt: skip


def interaction_table(lines: list[dict]) -> Table:
    """Positives among the rows that a client trained."""
    return Table(
        columns=("upload", "epsilon", "F1 of interactions", "standard error", "F1 at the known ratio",
                 "F1 by popularity"),
        rows=[
            (line["row"], line["epsilon"], line["interactions"], line["interactions_error"],
             line["interactions_guess"], line["interactions_popular"])
            for line in uploads_of(lines)
        ],
        caption=f"Interactions among the rows trained, {NUM_NEGATIVES} negatives for each positive.",
        notes=(
            EPSILON,
            f"Targets have at most {MOST_POSITIVES} interactions. With noise and in sums the attacker is told which "
            "rows the target trained, and in padded uploads it sees fakes among them. Negatives are uniform, so "
            "popularity alone tells many apart; the attack does not use it.",
        ),
    )  # fmt: skip


def attribute_table(lines: list[dict]) -> Table:
    """Gender and age."""
    return Table(
        columns=("what the attacker sees", "epsilon", "AUC gender", "standard error, gender", "control, gender",
                 "accuracy, gender", "AUC age", "standard error, age", "control, age", "accuracy, age"),
        rows=[
            (line["row"], line["epsilon"],
             *(line.get(f"{name}{part}") for name in ("gender", "age") for part in
               ("", "_error", "_control", "_accuracy")))
            for line in lines
        ],
        caption="Attributes: a woman; below 30 years. Five folds of clients.",
        notes=(EPSILON, _majorities(lines), "Control: the same attack on attributes shuffled over the clients."),
    )  # fmt: skip


def _majorities(lines: list[dict]) -> str:
    line = next((line for line in lines if "gender_majority" in line), {})
    shares = (f"{line[f'{name}_majority']:.3f} ({name})" for name in ("gender", "age") if f"{name}_majority" in line)
    return f"Calling everybody the commoner class is right for {', '.join(shares)}."


EPSILON = (
    f"Epsilon: user-level, replace one, of one client's own report in one round, all clients, δ = {DELTA:g}. "
    "A gap: no differential privacy. It bounds no sum and no second round."
)


def draw(lines: list[dict]) -> Figure:
    """Each attack beside its guess, a row a protection."""
    lines = uploads_of(lines)
    places = np.arange(len(lines))[::-1]
    panels = (
        (("items", "items_popular", "items (F1)", BLUE), ("ratings", "ratings_guess", "ratings (share right)", GREEN),
         ("interactions", "interactions_guess", "interactions (F1)", VERMILION)),
        (("gender", "gender_control", "gender (AUC)", BLUE), ("age", "age_control", "age (AUC)", VERMILION)),
    )  # fmt: skip
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(num_panels=2, label_share=0.02)
        figure.set_size_inches(10, 1.2 + 0.32 * len(lines))
        figure.subplots_adjust(left=0.17, bottom=0.14, top=0.86)
        for panel, series in zip(axes, panels, strict=True):
            for place, (name, guess, label, colour) in enumerate(series):
                shift = places + 0.22 * (place - (len(series) - 1) / 2)
                values = [line.get(name, np.nan) for line in lines]
                errors = [2 * line.get(f"{name}_error", 0) for line in lines]
                panel.errorbar(values, shift, xerr=errors, fmt="o", color=colour, markersize=4, label=label)
                guesses = [line.get(guess, np.nan) for line in lines]
                panel.plot(guesses, shift, "|", color=colour, markersize=7, alpha=0.6)
            panel.set_ylim(-0.7, len(lines) - 0.3)
            where = (
                {"loc": "upper center", "bbox_to_anchor": (0.69, 1.03)} if panel is axes[0] else {"loc": "lower right"}
            )
            panel.legend(**where, frameon=False, fontsize=8)
        axes[0].set_yticks(places, [_name(line) for line in lines])
        axes[1].set_yticks(places, [""] * len(lines))
        axes[0].set_xlim(0, 1.04)
        axes[1].set_xlim(0.4, 1.0)
        name_axes(axes[0], x="dots: attack ± two standard errors; bars: guess", y="items, ratings, interactions")
        name_axes(axes[1], x="dots: attack ± two standard errors; bars: shuffled control", y="attributes")
    return figure


def _name(line: dict) -> str:
    return line["row"] if line["epsilon"] is None else f"{line['row']}, ε = {line['epsilon']:g}"


def write_page(lines: list[dict], train: Interactions) -> str:
    """The page: status, what was done, tables, figure, and what made it."""
    made = lines[-1]["stamp"]
    commits = sorted({(line["stamp"]["commit"] or "none")[:12] for line in lines})
    tables = [to_markdown(make(lines)) for make in (item_table, sum_table, interaction_table, attribute_table)]
    return (
        f"# What uploads tell the server\n\nStatus: {status(lines)}\n\n{ABOUT}\n\n{tables[0]}\n{SUMS}\n\n"
        f"{side_information(lines)}\n\n{tables[1]}\n"
        f"{tables[2]}\n{tables[3]}\n![Attacks and guesses by protection](leakage.svg)\n\n"
        f"Written by `python -m experiments leakage`; {train.name}, data sha256 {made['data_fingerprint'][:16]}, "
        f"seed {made['seed']}, commits {', '.join(commits)}, {made['device_kind']}.\n"
    )


def side_information(lines: list[dict]) -> str:
    """What sums tell somebody who knows a member's rows already, in a sentence."""
    summed = [line for line in uploads_of(lines) if line["members"] > 1]
    ratings = ", ".join(f"{100 * line['ratings']:.0f} % among {line['members']} clients" for line in summed)
    return (
        "Who knows from elsewhere which items a member has still reads many of its ratings off the sum, namely "
        f"{ratings}. Small cohorts and sparse histories hide little from such an attacker."
    )


ABOUT = f"""An honest-but-curious server looks at single uploads of one round. Matrix factorisation, dim {DIM},
after {ROUNDS} plain rounds. Items, ratings and attributes: FedSGD on ratings, squared loss, l2 {L2:g}, no negatives.
Interactions: FedAvg on implicit feedback, {LOCAL_EPOCHS} full-batch local epochs. A random half of the clients is known
to the attacker, the other half is attacked; for attributes, four fifths and one fifth in turn.

A clip (norm {CLIP_NORM:g}) alone protects nothing: rows and their ratios stay, and the penalty's share or the lattice
of ratings gives the scale back. Padding ({NUM_FAKE} fake rows with copied values) hides which rows are real, less so
where fakes are not as popular as real items, and hides no rating. Local noise comes after the clip, on the whole table;
the row with a huge epsilon is there to show what the attack finds through less noise."""

SUMS = f"""A secure sum shows the server the sum of a cohort's uploads and no term of it; here the plain sum stands for
it, as an exact protocol gives the same numbers. The guess that an attack must not beat is its own for another random
member of the same cohort: nothing in a sum belongs to one member rather than to another. From {HIDDEN} members on, a
difference beyond two standard errors would be a bug. That is all a secure sum gives, and less than differential
privacy: the sum still tells about the cohort as a whole. The two columns on the right say how much: what the attacker
finds of the target in the sum of the other members alone, and by popularity. An item that one member alone has is
visible as somebody's, and two sums that differ in one member give that member's upload by subtraction."""

if __name__ == "__main__":
    sys.exit(main())

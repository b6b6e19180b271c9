"""Poisoning attacks against defences: how many honest users are shown the attacker's item, and what it costs them.

    python -m experiments poisoning --data-dir ~/data

Half an hour on two CPU cores; cells that are done are kept, so it may be stopped. Appends to
experiments/results/poisoning.jsonl; makes poisoning.md and poisoning.svg of it.
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

from experiments._poisoning_cells import ATTACKS, DEFENCES, NO_ATTACK, NO_DEFENCE, ROW_CLIPS, World, run_cell
from experiments.harness import RESULTS, keep_line, read_lines
from fedjax_rec.attacks.poisoning_targets import damage
from fedjax_rec.data import leave_one_out, load
from fedjax_rec.reporting import Table, to_markdown
from fedjax_rec.reporting.style import INK, MUTED, STYLE, new_figure, to_svg
from fedjax_rec.runs.stamp import stamp

NAME = "poisoning"
STRONG = ("FedRecAttack", "A-hum", "adaptive")
# Rules that keep every upload cost most, and are asked for what is known to go wrong with them, and no more.
ASKED = {
    NO_DEFENCE: tuple(ATTACKS),
    "norm clip": (NO_ATTACK, *STRONG),
    **{name: tuple(ATTACKS) for name in ROW_CLIPS},
    "FLTrust": (NO_ATTACK, *STRONG),
    "trimmed mean, each row": (NO_ATTACK, "A-hum"),
    "median, each row": (NO_ATTACK, "A-hum"),
    "median, min. support": (NO_ATTACK, "A-hum", "adaptive"),
    "median, dense": (NO_ATTACK, "A-hum"),
    "Krum": (NO_ATTACK, "A-hum"),
}
ML_100K, ML_100K_TENTH, ML_1M = "movielens/100k", "movielens/100k, 10 % malicious", "movielens/1m"
WORLDS = {
    ML_100K: World(),
    ML_100K_TENTH: World(malicious_share=0.1),
    ML_1M: World(malicious_share=0.001, l2_row_norm=0.1),
}
SMOKE = World(num_fillers=8, num_rounds=2, num_rows=6, num_buckets=1, dim=4, num_root=5, num_popular=3)
METRICS = ("er@10", "er@20", "target_ndcg@10", "hit@10", "ndcg@10")


def cells() -> list[tuple[str, str, str]]:
    """(world, attack, defence) of every cell, in order."""
    matrix = [(ML_100K, attack, defence) for defence, attacks in ASKED.items() for attack in attacks]
    small = [(ML_1M, attack, NO_DEFENCE) for attack in (NO_ATTACK, "A-hum")]
    return [*matrix, (ML_100K_TENTH, "A-hum", "median, each row"), *small]


def main(argv: list[str] | None = None) -> int:
    """Runs the cells that have no line yet, writes the files, prints the page."""
    parser = argparse.ArgumentParser(prog="python -m experiments poisoning", description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder with ml-100k/ and ml-1m/ (default: FEDJAX_REC_DATA)")
    parser.add_argument("--dataset", choices=WORLDS, help="only this one")
    parser.add_argument("--defence", action="append", choices=DEFENCES, help="only this one; may be repeated")
    parser.add_argument("--attack", action="append", choices=ATTACKS, help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="of targets, fake profiles and training")
    parser.add_argument("--smoke", action="store_true", help="seconds, on made-up data; writes nothing")
    parser.add_argument("--only-page", action="store_true", help="run nothing, write the page from the kept lines")
    args = parser.parse_args(argv)
    lines, splits = [] if args.smoke else read_lines(NAME), {}
    asked = [(ML_100K, "A-hum", NO_DEFENCE), (ML_100K, NO_ATTACK, NO_DEFENCE)] if args.smoke else cells()
    for dataset, attack, defence in () if args.only_page else asked:
        if any(
            wanted is not None and name not in wanted
            for wanted, name in (
                (args.dataset and [args.dataset], dataset),
                (args.defence, defence),
                (args.attack, attack),
            )
        ):
            continue
        world = SMOKE if args.smoke else WORLDS[dataset]
        settings = json.loads(json.dumps(dataclasses.asdict(world)))
        where = {"row": f"{attack} against {defence}, {dataset}", "seed": args.seed, "settings": settings}
        if any(all(line[key] == value for key, value in where.items()) for line in lines):
            continue
        if dataset not in splits:
            smoke = {"num_users": 60, "num_items": 60}
            data = load("synthetic", **smoke) if args.smoke else load(dataset.split(",")[0], data_dir=args.data_dir)
            splits[dataset] = leave_one_out(data)
        split, start = splits[dataset], time.perf_counter()
        values = run_cell(split, attack, defence, world, seed=args.seed)
        line = where | {"dataset": dataset, "attack": attack, "defence": defence, "values": values}
        line |= {"num_users": split.num_users, "num_fake": world.num_fake(split.num_users)}
        line |= {"seconds": time.perf_counter() - start, "stamp": stamp(
            seed=args.seed, data_fingerprint=split.train.fingerprint, split_fingerprint=split.fingerprint
        )}  # fmt: skip
        lines.append(line)
        shown = {name: round(values[name], 4) for name in METRICS}
        print(f"{where['row']}, {line['seconds']:.0f} s: {shown}", flush=True)
        if not args.smoke:
            keep_line(NAME, line)
    found = newest(lines)
    page = write_page(found)
    print(page)
    if not args.smoke:
        (RESULTS / f"{NAME}.md").write_text(page, encoding="utf-8")
        (RESULTS / f"{NAME}.svg").write_text(to_svg(draw(found)), encoding="utf-8")
    return 0


Found = dict[tuple[str, str, str], list[dict]]


def newest(lines: list[dict]) -> Found:
    """The runs of each cell that count, one a seed: those with the settings of its newest line."""
    found = {}
    for cell in cells():
        mine = [line for line in lines if (line["dataset"], line["attack"], line["defence"]) == cell]
        same = [line for line in mine if line["settings"] == mine[-1]["settings"]]
        if same:
            found[cell] = list({line["seed"]: line for line in same}.values())
    return found


def value(found: Found, attack: str, defence: str, metric: str, dataset: str = ML_100K) -> float:
    """Mean over seeds, NaN for a cell that was not run."""
    runs = found.get((dataset, attack, defence), ())
    return float(np.mean([run["values"][metric] for run in runs])) if runs else float("nan")


def claims(found: Found) -> list[tuple[str, bool | None]]:
    """What the matrix should show, with what it shows; None where cells are missing, or nothing was promised."""

    def at(attack, defence, metric="er@10", dataset=ML_100K):
        return value(found, attack, defence, metric, dataset)

    def lost(attack, defence):
        return damage(at(NO_ATTACK, NO_DEFENCE, "hit@10"), at(attack, defence, "hit@10"))

    def judged(text, holds, *numbers):
        return text, None if np.isnan(numbers).any() else bool(holds)

    def clip_claim(name, whom, attacked):
        worst = max(attacked, key=lambda attack: np.nan_to_num(at(attack, name)))
        highest, cost = at(worst, name), lost(NO_ATTACK, name)
        most = np.max([lost(attack, name) for attack in attacked])
        return judged(
            f"The {name} keeps {whom} to er@10 of at most .05 and costs at most 15 % of hit@10: {highest:.3f} by "
            f"{worst}, {cost:.0%} without an attack, up to {most:.0%} under one",
            highest <= 0.05 and cost <= 0.15,
            *(at(attack, name) for attack in attacked),
            cost,
        )

    open_ = [at(attack, NO_DEFENCE) for attack in STRONG]
    attacked = [attack for attack in ATTACKS if attack != NO_ATTACK]
    blind = [attack for attack in attacked if attack not in ("FedRecAttack", "adaptive")]
    clean, dense = (at(NO_ATTACK, defence, "hit@10") for defence in (NO_DEFENCE, "median, dense"))
    each = at("A-hum", "median, each row", dataset=ML_100K_TENTH)
    small = at("A-hum", NO_DEFENCE, "er@20", ML_1M)
    shown = ", ".join(f"{name} {er:.3f}" for name, er in zip(STRONG, open_, strict=True))
    return [
        judged(f"Without a defence strong attacks reach er@10 of at least .70: {shown}", min(open_) >= 0.70, *open_),
        *(clip_claim(name, "every attack", attacked) for name in ROW_CLIPS),
        clip_claim(list(ROW_CLIPS)[-1], "attacks that see no user's interactions", blind),
        judged(
            f"A dense median learns next to nothing, a third of the open hit@10 or less: {dense:.3f}, not {clean:.3f}",
            dense <= clean / 3, dense, clean,
        ),
        judged(
            "A median over each row's own senders gives a cold item to attackers who are its majority: with 10 % of "
            f"all clients er@10 is {each:.3f}, with 5 % {at('A-hum', 'median, each row'):.3f}", each >= 0.5, each,
        ),
        judged(
            f"A-hum with .1 % of MovieLens 1M's clients reaches er@20 of at least .9: {small:.3f}", small >= 0.9, small
        ),
    ]  # fmt: skip


def status(found: Found) -> str:
    """A line for each claim."""
    words = {True: "holds", False: "does not hold", None: "not judged"}
    judged = claims(found)
    count = sum(holds is True for _, holds in judged)
    asked = sum(holds is not None for _, holds in judged)
    return f"{count} of {asked} claims hold.\n\n" + "\n".join(f"- {words[holds]}: {text}." for text, holds in judged)


def make_table(found: Found, dataset: str) -> Table:
    """Every cell of one data set."""
    clean = value(found, NO_ATTACK, NO_DEFENCE, "hit@10", dataset)
    rows = []
    for (name, attack, defence), runs in found.items():
        if name == dataset:
            values = [value(found, attack, defence, metric, dataset) for metric in METRICS]
            rows.append((defence, attack, *values, damage(clean, values[3]), len(runs)))
    fake = {run["num_fake"] for (name, *_), runs in found.items() if name == dataset for run in runs}
    return Table(
        ("defence", "attack", *METRICS, "hit@10 lost", "seeds"),
        rows,
        caption=f"{dataset}, {', '.join(map(str, sorted(fake)))} fake clients beside the honest ones.",
    )


def draw(found: Found) -> Figure:
    """Exposure and honest hit@10 of every cell that was run."""
    panels = (("er@10", "Oranges", 1.0), ("hit@10", "Blues", None))
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = new_figure(num_panels=2)
        figure.set_size_inches(11, 4.4)
        figure.subplots_adjust(left=0.18, right=0.99, top=0.93, bottom=0.2, wspace=0.08)
        for panel, (metric, colours, highest) in zip(axes, panels, strict=True):
            shown = [d for d in DEFENCES if any((ML_100K, attack, d) in found for attack in ATTACKS)]
            grid = np.array([[value(found, a, d, metric) for a in ATTACKS] for d in shown])
            highest = highest or float(np.nanmax(grid))
            panel.imshow(np.ma.masked_invalid(grid), cmap=colours, vmin=0, vmax=highest, aspect="auto")
            for (row, column), number in np.ndenumerate(grid):
                if not np.isnan(number):
                    ink = "white" if number > 0.65 * highest else INK
                    text = f"{number:.3f}".replace("0.", ".", 1)
                    panel.text(column, row, text, ha="center", va="center", color=ink, fontsize=8)
            panel.set_xticks(range(len(ATTACKS)), ["no attack", *list(ATTACKS)[1:]], rotation=35, ha="right")
            panel.set_yticks(
                range(len(shown)),
                ["no defence" if d == NO_DEFENCE else d for d in shown] if panel is axes[0] else [""] * len(shown),
            )
            name = {"er@10": "er@10: honest users who are shown the target", "hit@10": "hit@10 of honest users"}[metric]
            panel.set_title(name, loc="left", fontsize=9, color=MUTED)
            panel.spines[:].set_visible(False)
            panel.tick_params(length=0)
    return figure


def write_page(found: Found) -> str:
    """The page: status, what was done, tables, figure, and what made it."""
    runs = [run for group in found.values() for run in group]
    commits, devices = ({str(run["stamp"][key])[:12] for run in runs} for key in ("commit", "device_kind"))
    datasets = dict.fromkeys(dataset for dataset, _, _ in found)
    tables = "\n".join(to_markdown(make_table(found, dataset)) for dataset in datasets)
    return (
        f"# Poisoning\n\nStatus: {status(found)}\n\n{ABOUT}\n\n{tables}\n"
        f"![Exposure of the target and hit@10, attacks against defences](poisoning.svg)\n\n"
        f"Written by `python -m experiments poisoning`; seeds {', '.join(sorted({str(run['seed']) for run in runs}))}, "
        f"commit {', '.join(sorted(commits))}, {', '.join(sorted(devices))}, "
        f"{sum(run['seconds'] for run in runs) / 60:.0f} minutes.\n"
    )


_W = WORLDS[ML_100K]
ABOUT = f"""Matrix factorisation with BPR: a full-batch step on each client, all clients in each of {_W.num_rounds}
rounds, uploads added up; latest item out, full ranking. An attacker adds fake clients, {_W.malicious_share:.0%} of all
on MovieLens 100K, and wants one cold item, with 1 to 5 interactions in training, in the lists of honest users. er@k is
the share of honest users who have not met it and have it among their k best items; hit@10 is that of honest users' own
withheld items. Without an attack the fake users never take part.

*random* and *bandwagon* only invent data. The others upload what they like: an attack's own row norm is
{_W.l2_row_norm:g}, many times what an honest client sends. FedRecAttack and the adaptive attacker see
{_W.public_share:.0%} of all interactions; the others see what the server sends to anybody. The *adaptive* attacker also
knows the defence: rows just as long as the clip allows, up for the target and down for its rivals.

The norm clip is {_W.norm_clip:g}. *Doubled* means that the server takes twice the step after the clip. A row clip cuts
all of FedRecAttack's rows, so that it is the adaptive attack there; against FLTrust the adaptive attacker knows of no
clip. A row's senders are the clients who have the item and those who drew it as a negative, about one in seventeen:
attackers are the majority of a cold row's only if they are more than that. "Min. support" is twice the number of
attackers, plus one. FLTrust's server holds the data of {_W.num_root} honest users. Robust rules keep every upload side
by side, so they were run against fewer attacks; blank cells were not run. One seed, and so one target item: small
differences mean nothing."""


if __name__ == "__main__":
    sys.exit(main())

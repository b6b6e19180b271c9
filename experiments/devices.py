"""Who pays when devices differ? Matrix factorisation on MovieLens 100K on large, medium and small devices.

    python -m experiments devices --data-dir ~/data/ml-100k

About an hour on one busy CPU core. Each run is kept as a line of results/devices.jsonl, and a second call runs only
what is missing; results/devices.md and .svg are made of the lines.

Half of the devices are small: they hold a quarter of the columns of user and item vectors and train on their last 50
items; a quarter are medium, with half of the columns, and a quarter hold all. Each device is evaluated with what it
holds. Part one: what if all devices were large, if all had to be small, with tiers, and if only large ones trained.
Part two, with whole vectors everywhere, is about time: small devices take eight times as long as large ones, and eight
simulated hours are spent on rounds that wait for all, on rounds with a deadline, on rounds of a fixed length whose slow
clients were called early, and on buffers of whoever arrives.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from experiments._devices import (
    BUFFER,
    COHORT_SIZE,
    DEADLINE,
    DELTA,
    HOURS,
    L2_CLIP_NORM,
    METRIC,
    NUM_ROUNDS,
    REST,
    SHARES,
    TIERS,
    TIMES,
    popularity,
    trained,
)
from experiments.harness import finish, keep_line, read_lines, study_parser
from fedjax_rec.evaluation.fairness import group_changes, mdac_interval
from fedjax_rec.reporting import Table, to_markdown
from fedjax_rec.reporting.formatting import MISSING
from fedjax_rec.reporting.study_plots import bands
from fedjax_rec.reporting.style import to_svg
from fedjax_rec.runs.stamp import stamp

NAME, NUM_SEEDS, RATES, EPSILON = "devices", 3, (0.02, 0.05), 8.0
WIDTHS = ("all devices large", "all devices small", "tiers", "large devices alone train")
CLOCKS = ("wait for all", "deadline", "stale", "buffered")
FLOOR = {"method": "popularity", "assigned": "random", "epsilon": None, "lr": 0.0, "seed": 0}
ASSIGNED = {"random": "by lot", "activity": "small devices to the least active"}
KINDS = (
    *((name, "random", None) for name in (*WIDTHS, *CLOCKS)),
    *((name, "random", EPSILON) for name in (*WIDTHS, *CLOCKS)),
    *((name, "activity", None) for name in WIDTHS),
)


def picked(lines: Sequence[dict], kind: tuple) -> list[dict]:
    """Values of a kind of run, with the learning rate that validation users prefer on seed 0."""
    mine = [line for line in lines if (line["key"]["method"], line["key"]["assigned"], line["key"]["epsilon"]) == kind]
    first = [line for line in mine if line["key"]["seed"] == 0]
    if not first:
        return []
    lr = max(first, key=lambda line: line["values"]["validation"])["key"]["lr"]
    return [line["values"] | {"lr": lr} for line in mine if line["key"]["lr"] == lr]


def missing(lines: Sequence[dict], num_seeds: int, kinds: Sequence[tuple]) -> Iterator[dict]:
    """What is to be run: both learning rates on seed 0, and the better one on the others."""
    done = [line["key"] for line in lines]
    if FLOOR not in done:
        yield FLOOR
    for kind in kinds:
        for seed in range(num_seeds):
            rates = RATES if seed == 0 else [run["lr"] for run in picked(lines, kind)[:1]]
            for lr in rates:
                key = dict(zip(("method", "assigned", "epsilon"), kind, strict=True)) | {"lr": lr, "seed": seed}
                if key not in done:
                    yield key


def per_user(runs: Sequence[dict]) -> np.ndarray:
    """The metric of each user, a mean over seeds."""
    out = np.zeros((len(runs), len(runs[0]["tiers"])))
    for row, run in zip(out, runs, strict=True):
        users, values = run["hits"]
        row[users] = values
    return out.mean(axis=0)


def groups(run: dict) -> np.ndarray:
    """The tier of each user, by name."""
    return np.array([TIERS[int(digit)].name for digit in run["tiers"]])


def cells(lines: Sequence[dict], kind: tuple, reference: tuple) -> list | None:
    """Mean, spread, means by tier, MDAC against the reference; None for what has not run."""
    runs, base = picked(lines, kind), picked(lines, reference)
    if not runs or not base:
        return None
    values = [run[METRIC] for run in runs]
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    before, after, tiers = per_user(base), per_user(runs), groups(runs[0])
    found = group_changes(before, after, tiers)
    means = [f"{found.after.means[tier.name]:.4f} ({found.relative[tier.name]:+.0%})" for tier in TIERS]
    unfair = MISSING
    if kind != reference:
        interval = mdac_interval(before, after, tiers)
        unfair = f"{interval.mean:.2f} ({interval.low:.2f}-{interval.high:.2f})"
    return [f"{statistics.fmean(values):.4f}{spread}", *means, unfair, len(runs)]


def make_table(lines: Sequence[dict], names: Sequence[str], *, clock: bool) -> Table:
    """A row a contender; the first one is what the others are compared with."""
    rows = []
    for epsilon in (None, EPSILON):
        for assigned, words in ASSIGNED.items():
            for name in names:
                found = cells(lines, (name, assigned, epsilon), (names[0], assigned, epsilon))
                if found:
                    run = picked(lines, (name, assigned, epsilon))[0]
                    noise = f"{run['noise multiplier']:.2f}" if epsilon else MISSING
                    more = [run["rounds"], f"{run['cohort']:.0f}", f"{run['late']:.1f}"] if clock else [words]
                    rows.append((name, "∞" if epsilon is None else f"{epsilon:g}", *more, noise, *found))
    more = ("rounds", "updates a round", "rounds late") if clock else ("tiers given",)
    columns = ("devices" if not clock else "rounds that", "epsilon", *more, "noise multiplier", METRIC)
    return Table((*columns, *(tier.name for tier in TIERS), "MDAC", "seeds"), rows)


def figure(lines: Sequence[dict]):
    """Quality against simulated time."""
    curves = {}
    for epsilon in (None, EPSILON):
        for name in CLOCKS if epsilon is None else (CLOCKS[0], *CLOCKS[2:]):
            runs = picked(lines, (name, "random", epsilon))
            stops = range(len(runs[0]["curve"])) if runs else ()
            points = [(HOURS * (i + 1) / len(stops), [run["curve"][i][2] for run in runs]) for i in stops]
            if points:
                curves[name if epsilon is None else f"{name}, ε {epsilon:g}"] = points
    return bands(curves, x="simulated hours", y=METRIC)


def findings(lines: Sequence[dict]) -> str:
    """What the numbers say, in words made of them."""
    said = []
    for epsilon, words in ((None, "without DP"), (EPSILON, f"at user-level epsilon {EPSILON:g}")):
        means = {
            name: statistics.fmean(run[METRIC] for run in runs)
            for name in (*WIDTHS, *CLOCKS)
            if (runs := picked(lines, (name, "random", epsilon)))
        }
        for title, names in (("Widths", WIDTHS), ("Eight simulated hours", CLOCKS)):
            order = sorted((name for name in names if name in means), key=means.get, reverse=True)
            if len(order) > 1:
                ranked = ", ".join(f"{name} {means[name]:.4f}" for name in order)
                said.append(f"{title}, {words}, best first: {ranked}.")
    floor = next((line["values"][METRIC] for line in lines if line["key"] == FLOOR), None)
    if floor is not None:
        said.append(f"Exact popularity, which is not private, has {floor:.4f}.")
    return " ".join(said)


def write_page(lines: Sequence[dict]) -> str:
    """The page."""
    stamps = [line["stamp"] for line in lines]
    numbers = next(line["values"]["numbers"] for line in lines if line["key"] != FLOOR)
    held = ", ".join(f"{name} {count:,}" for name, count in numbers.items())
    medians = ", ".join(f"{tier.name} {median:g} s" for tier, median in zip(TIERS, TIMES.medians, strict=True))
    shares = ", ".join(f"{share:.0%} {tier.name}" for tier, share in zip(TIERS, SHARES, strict=True))
    return (
        "# Who pays when devices differ\n\n"
        f"Status: study, no paper to reproduce. {findings(lines)}\n\n"
        f"## Widths\n\n{to_markdown(make_table(lines, WIDTHS, clock=False))}\n\n"
        f"MovieLens 100K, latest item out, full ranking; FedSGD matrix factorisation, FedAdam, {NUM_ROUNDS} rounds of "
        f"{COHORT_SIZE} of 943 devices by Poisson sampling ({shares}). Shared numbers that a device holds: {held}. In "
        "brackets the change from the first row of the same kind; MDAC is the largest difference of these changes "
        "between tiers, with a 95 % interval over users. It is above 0 by chance even where nothing changes, and with "
        "so few users the intervals are wide. Each device is evaluated with what it holds, and fits its "
        "user vector to it in the end, so that devices that took no part have one too. Where large devices alone "
        "train, as many of them come in a round, and the others receive the leading columns of the whole model.\n\n"
        f"## Time\n\n{to_markdown(make_table(lines, CLOCKS, clock=True))}\n\n"
        "![ndcg against simulated time](devices.svg)\n\n"
        f"Whole vectors on all devices, {HOURS:g} simulated hours. Medians: {medians}; lognormal, spread "
        f"{TIMES.spread:g}, whatever the data. Wait for all: {COHORT_SIZE} devices by Poisson sampling, the round ends "
        f"with the slowest. Deadline: after {DEADLINE:g} s, the divisor is the expected number of those in time. "
        f"Stale: {BUFFER} expected by Poisson sampling, coins thrown ahead, rounds of a fixed length that the same "
        "number of busy devices affords; slow clients were called early and train on old parameters. Buffered: "
        f"FedBuff, {COHORT_SIZE} devices train at any time and the server steps at every {BUFFER} updates; a device "
        f"rests {REST} steps. The first three are amplified by sampling, add or remove one user. Who arrives first is "
        "no secret coin, so the last is charged for every participation without amplification, and under replace one "
        "user, for a buffer that closes at the K-th update is another one if somebody is missing: its epsilon is about "
        "a stronger change of the data.\n\n"
        f"User-level epsilon {EPSILON:g}, delta {DELTA:g}, clip norm {L2_CLIP_NORM:g}. The server's learning rate, "
        f"{' or '.join(f'{lr:g}' for lr in RATES)}, is chosen on validation items of one seed, which no epsilon "
        "covers. "
        "Who has which device is drawn once; means over seeds of training.\n\n"
        f"Written by `python -m experiments {NAME}`; commits "
        f"{', '.join(sorted({(s['commit'] or 'none')[:12] for s in stamps}))}, device "
        f"{', '.join(sorted({str(s['device_kind']) for s in stamps}))}.\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Measures what is missing, and writes the page and its picture."""
    parser = study_parser(NAME, __doc__, seeds=NUM_SEEDS)
    parser.add_argument("--data-dir", type=Path, help="folder with ml-100k/ (default: FEDJAX_REC_DATA)")
    args = parser.parse_args(argv)
    lines = [] if args.smoke else read_lines(NAME)
    kinds = (("tiers", "random", None), ("buffered", "random", None)) if args.smoke else KINDS
    while (key := next(missing(lines, 1 if args.smoke else args.seeds, kinds), None)) and not args.only_page:
        start = time.perf_counter()
        named = {"data_dir": args.data_dir, "smoke": args.smoke}
        if key == FLOOR:
            values = popularity(**named)
        else:
            values = trained(key["method"], key["assigned"], key["epsilon"], key["lr"], key["seed"], **named)
        line = {"key": key, "values": values, "seconds": round(time.perf_counter() - start, 1)}
        lines.append(line | {"stamp": stamp(seed=key["seed"], data_fingerprint=None)})
        print(json.dumps(key), round(values[METRIC], 4), line["seconds"], flush=True)
        if not args.smoke:
            keep_line(NAME, lines[-1])
    return finish(NAME, write_page(lines), smoke=args.smoke, svg=None if args.smoke else to_svg(figure(lines)))


if __name__ == "__main__":
    sys.exit(main())

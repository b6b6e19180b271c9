"""What the lines of the study of distillation say: its tables and its status."""

from collections.abc import Sequence

import numpy as np

from fedjax_rec.reporting import Table, to_markdown
from fedjax_rec.reporting.formatting import MISSING

EPSILON, DELTA = 8.0, 1e-4
TEACHER, PLAIN, DISTILLED = "teacher", "plain", "distilled"
METRIC = "ndcg@10"


def rows_of(lines: Sequence[dict], student: str, mode: str, private: bool) -> list[dict]:
    """Values of one row, one seed each."""
    key = {"student": student, "mode": mode, "private": private}
    return [line["values"] for line in lines if all(line["key"][name] == key[name] for name in key)]


def students_of(lines: Sequence[dict]) -> list[str]:
    """Students that were run, largest first."""
    sizes = {line["key"]["student"]: line["values"]["numbers"] for line in lines if line["key"]["student"] != TEACHER}
    return sorted(sizes, key=sizes.get, reverse=True)


def mean(runs: Sequence[dict], name: str) -> float:
    """Over seeds."""
    return float(np.mean([values[name] for values in runs]))


def quality_table(lines: Sequence[dict], private: bool) -> Table:
    """One row a student: plain and distilled, and the share of the gap to the teacher."""
    taught_by = rows_of(lines, TEACHER, TEACHER, private)
    numbers = taught_by[0]["numbers"]
    rows = [(TEACHER, f"{numbers:,}", "1", MISSING, _with_spread(taught_by), MISSING, MISSING, len(taught_by))]
    for student in students_of(lines):
        plain, learned = (rows_of(lines, student, mode, private) for mode in (PLAIN, DISTILLED))
        if not plain:
            continue
        gained = recovered(taught_by, plain, learned) if learned else (MISSING, MISSING)
        fewer = f"{numbers / plain[0]['numbers']:.0f}"
        cells = (_with_spread(plain), _with_spread(learned) if learned else MISSING, *gained)
        rows.append((student, f"{plain[0]['numbers']:,}", fewer, *cells, min(len(plain), len(learned) or len(plain))))
    heads = ("model", "numbers", "times fewer", "plain", "distilled", "share of the gap", "gain", "seeds")
    kind = (
        f"virtual users at user-level ε {EPSILON:g}, δ {DELTA:g}, add/remove one user, sampling all clients"
        if private
        else "not private"
    )
    caption = f"{METRIC}, full ranking, test items; {kind}; split {taught_by[0]['split'][:12]}"
    return Table(heads, rows, caption=caption)


def recovered(taught_by, plain, learned) -> tuple[str, str]:
    """(distilled - plain) / (teacher - plain), and what distillation adds, seed by seed."""
    seeds = min(len(plain), len(learned))
    top, low, got = (mean(runs, METRIC) for runs in (taught_by, plain[:seeds], learned[:seeds]))
    share = f"{(got - low) / (top - low):.2f}" if top > low else "no gap"
    gains = [a[METRIC] - b[METRIC] for a, b in zip(learned[:seeds], plain[:seeds], strict=True)]
    spread = f" ± {np.std(gains, ddof=1):.4f}" if seeds > 1 else ""
    return share, f"{np.mean(gains):+.4f}{spread}"


def _with_spread(runs) -> str:
    spread = f" ± {np.std([values[METRIC] for values in runs], ddof=1):.4f}" if len(runs) > 1 else ""
    return f"{mean(runs, METRIC):.4f}{spread}"


def cost_table(lines: Sequence[dict]) -> Table:
    """What a device pays for each model, as it is and in integers."""
    rows = []
    for name, mode in ((TEACHER, TEACHER), *((student, DISTILLED) for student in students_of(lines))):
        runs = rows_of(lines, name, mode, False)
        if not runs:
            continue
        small = "bytes int8" in runs[0]
        rows.append(
            (
                name,
                f"{runs[0]['numbers']:,}",
                f"{runs[0]['bytes'] / 1e3:,.0f}",
                f"{runs[0]['bytes int8'] / 1e3:,.0f}" if small else MISSING,
                f"{np.median([v['ms'] for v in runs]):.2f}",
                f"{np.median([v['ms int8'] for v in runs]):.2f}" if small else MISSING,
                f"{mean(runs, METRIC):.4f}",
                f"{mean(runs, f'{METRIC} int8'):.4f}" if small else MISSING,
            )
        )
    heads = ("model", "numbers", "kB", "kB, int8", "ms a list", "ms, int8", METRIC, f"{METRIC}, int8")
    return Table(heads, rows, caption="one user's ten best items, compiled, on one CPU core, median of 200 calls")


def status(lines: Sequence[dict]) -> str:
    """Whether students of at most a tenth recover half of the gap, and whether distillation was charged."""
    said = []
    for private in (False, True):
        taught_by = rows_of(lines, TEACHER, TEACHER, private)
        for student in students_of(lines) if taught_by else ():
            plain, learned = (rows_of(lines, student, mode, private) for mode in (PLAIN, DISTILLED))
            if not (plain and learned) or 10 * plain[0]["numbers"] > taught_by[0]["numbers"]:
                continue
            seeds = min(len(plain), len(learned))
            top, low, got = (mean(runs, METRIC) for runs in (taught_by, plain[:seeds], learned[:seeds]))
            verdict = "at least half" if got >= (top + low) / 2 and got > low else "LESS THAN HALF"
            gap = "" if top > low else " (on test items the plain student is no worse than the teacher)"
            kind = f"at epsilon {EPSILON:g}" if private else "without privacy"
            fewer = taught_by[0]["numbers"] / plain[0]["numbers"]
            said.append(
                f"{kind}, {student} ({fewer:.0f} times fewer numbers): {METRIC} {low:.4f} plain, {got:.4f} distilled, "
                f"teacher {top:.4f}, {verdict} of the gap{gap}"
            )
    epsilons = {line["values"]["epsilon"] for line in lines if line["key"]["private"]}
    if epsilons:
        said.append(f"students are charged nothing: epsilon of teacher and of all students is {max(epsilons):.4f}")
        if len(epsilons) > 1:
            said.append(f"BUT epsilons differ: {sorted(epsilons)}")
    return f"study; {'; '.join(said)}."


def candidates(lines: Sequence[dict]) -> str:
    """Which teacher was chosen, by validation items."""
    found = [values for private in (False, True) for values in rows_of(lines, TEACHER, TEACHER, private)[:1]]
    said = "; ".join(f"{name} {value:.4f}" for values in found for name, value in values["candidates"].items())
    return f"{METRIC} of candidates for the teacher on validation items: {said}.\n\n"


def write_page(lines: Sequence[dict]) -> str:
    """The page."""
    stamps = [line["stamp"] for line in lines]
    tables = [
        to_markdown(quality_table(lines, private)) + "\n\n"
        for private in (False, True)
        if rows_of(lines, TEACHER, TEACHER, private)
    ]
    return (
        f"# Distillation to the small\n\nStatus: {status(lines)}\n\n{candidates(lines)}{''.join(tables)}"
        "Share of the gap: (distilled - plain) / (teacher - plain); above 1, a student passes its teacher, as it also "
        "learns what came next. Gain: of distillation, seed by seed. ± is "
        "the standard deviation over seeds of training and, under privacy, of the releases; over users, the standard "
        "error of one value is about .006.\n\n"
        f"{to_markdown(cost_table(lines))}\n\nWritten by `python -m experiments distilled`; commits "
        f"{', '.join(sorted({(s['commit'] or 'none')[:12] for s in stamps}))}, device "
        f"{', '.join(sorted({str(s['device_kind']) for s in stamps}))}.\n"
    )

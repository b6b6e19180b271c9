"""Claimed and true: noise recipes that are in use, the epsilon each claims, the true one, and what an audit shows.

    python -m experiments claimed

One to three minutes on two idle CPU cores; no data is needed. Each recipe is re-implemented as a link of the update
chain, a sampler or round code (`_recipes.py`), so the rounds that train models run it. Its epsilon is computed twice,
as its users compute it and as this package's accountant does (`_claims.py`); and canary clients, some of them hostile,
go through a run of it: whoever guesses from the released sums which of them took part shows how large epsilon is at
least (`fedjax_rec/privacy/audit.py`). `--row` runs some rows, `--smoke` two of them in seconds.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from experiments._claims import ADD, DELTA, RECIPES, REPLACE, ZEROS, Recipe, epsilon
from experiments.harness import RESULTS, keep_line, read_lines
from fedjax_rec.privacy.audit import AuditResult, make_audit
from fedjax_rec.reporting import Table, to_latex, to_markdown
from fedjax_rec.reporting.formatting import format_delta, format_epsilon
from fedjax_rec.runs.stamp import stamp

NAME = "claimed"
SMOKE_CANARIES = 200
SMOKE_ROWS = tuple(recipe.name for recipe in RECIPES[:2])
SAMPLERS = {"all": "all clients", "poisson": "Poisson", "in_turn": "in turn"}
RELATIONS = {ADD: "add/remove", REPLACE: "replace", ZEROS: "zeros instead"}
SEEN, UNSEEN, HOLDS, SHOWN = "refuted", "not visible", "holds", "no claim"
FALSE_ALARM = "false alarm"
MOST_PRINTED = 1e4


def measure(recipe: Recipe, seed: int, *, num_canaries: int | None = None) -> dict[str, Any]:
    """The two epsilons of a recipe and its audit, as JSON values.

    Args:
      recipe: a row.
      seed: of coins, cohorts and noise.
      num_canaries: fewer than the row asks for.
    """
    values = {"claimed": recipe.claimed(), "true": recipe.true()}
    line = {"row": recipe.name, "seed": seed, "values": values, "audit": None}
    if recipe.audit is None:
        return line
    num_canaries = num_canaries or recipe.num_canaries
    audit = recipe.audit(num_canaries)
    claim = {} if audit.claimed == "chain" else {"claimed_event": audit.claimed}
    if audit.claimed is None or isinstance(audit.claimed, float):
        # No claim is none that an audit could refute.
        claim = {"claimed_epsilon": math.inf if audit.claimed is None else audit.claimed}
    result = make_audit(
        audit.transforms,
        audit.sampler,
        num_rounds=audit.num_rounds,
        num_canaries=num_canaries,
        delta=DELTA,
        num_crowd_runs=min(300, num_canaries) if audit.crowd else 0,
        layout=audit.layout,
        make=audit.make,
        **claim,
    )(jax.random.key(seed))
    found = {name: getattr(result, name) for name in ("lower_bound", "lower_bound_fdp", "gaussian_epsilon")}
    found |= {name: getattr(result, name) for name in ("num_canaries", "num_rounds", "confidence", "most_visible")}
    found |= {"sampler": audit.sampler.name, "worst": result.worst.score, "passed": result.passed}
    claimed = None if audit.claimed is None else result.claimed_epsilon
    true = epsilon(audit.true, recipe.relation)
    return line | {"audit": found | {"claimed": claimed, "true": true, "verdict": verdict(result, claimed, true)}}


def verdict(result: AuditResult, claimed: float | None, true: float | str) -> str:
    """What an audit says of a claim, where the truth is known.

    Args:
      result: of the audit.
      claimed: epsilon of the audited rounds, or None if no number is claimed.
      true: their epsilon, or words where none exists.
    """
    if claimed is None:
        return SHOWN
    right = not isinstance(true, str) and true <= claimed * (1 + 1e-6)
    if result.passed:
        return HOLDS if right else UNSEEN
    return FALSE_ALARM if right else SEEN


def shown(value: float | str | None) -> float | str | None:
    """A cell of epsilons; what is beyond any meaning keeps two digits."""
    if isinstance(value, float) and MOST_PRINTED < value < math.inf:
        return f"{value:.1e}"
    return value


def at_least(value: float) -> str:
    """A lower bound, rounded down."""
    return "∞" if value == math.inf else f"{math.floor(100 * value) / 100:.2f}"


def newest(lines: Sequence[dict]) -> dict[str, dict]:
    """The last line of each row, in the order of the rows."""
    last = {line["row"]: line for line in lines}
    return {recipe.name: last[recipe.name] for recipe in RECIPES if recipe.name in last}


def claims_table(lines: Sequence[dict]) -> Table:
    """Claimed and true epsilons of a run of each recipe."""
    kept = newest(lines)
    rows = [
        (r.name, r.run, RELATIONS[r.relation], *(shown(kept[r.name]["values"][name]) for name in ("claimed", "true")))
        for r in RECIPES
        if r.name in kept
    ]
    return Table(
        ("recipe", "run", "neighbours", "claimed ε", "valid ε"),
        rows,
        caption=(
            f"User-level (ε, δ = {format_delta(DELTA)}), as the recipe's users compute it and as it is valid; "
            "neighbours as in their column, sampling as in the run"
        ),
        notes=(
            "Valid: what this package's accountant proves of the mechanism that runs. It is exact, up to rounding, "
            "where nothing is sampled, for Poisson cohorts and for draws with replacement; for cut and for fixed-size "
            "cohorts it is an upper bound, and the truth may be somewhat lower. Rows are alternatives.",
        ),
    )


def audits_table(lines: Sequence[dict]) -> Table:
    """What audits of smaller runs show."""
    rows = []
    for name, line in newest(lines).items():
        found = line["audit"]
        if found is None:
            continue
        rows.append(
            (
                name,
                SAMPLERS.get(found["sampler"], found["sampler"]),
                found["num_rounds"],
                found["num_canaries"],
                "no number" if found["claimed"] is None else shown(found["claimed"]),
                shown(found["true"]),
                at_least(found["lower_bound"]),
                found["worst"] if found["lower_bound"] > 0 else None,
                at_least(found["most_visible"]),
                how(found),
            )
        )
    columns = ("recipe", "sampler", "rounds", "canaries", "claimed ε", "valid ε")
    confidence = {line["audit"]["confidence"] for line in newest(lines).values() if line["audit"]}
    return Table(
        (*columns, "audited: at least", "canary", "visible", "verdict"),
        rows,
        caption=(
            f"Audits of smaller runs: user-level, δ = {format_delta(DELTA)}, of the audited rounds alone; "
            "neighbours as above"
        ),
        notes=(
            "Audited: a lower bound of ε for any mechanism (Steinke et al., 2023), with a confidence of "
            f"{', '.join(f'{100 * c:g} %' for c in sorted(confidence))} for each row by itself. Visible: the bound if "
            "every guess were right, so larger ε cannot be told apart; guesses that tie can show a little more. "
            "Canary: whose score gave the bound.",
            "Refuted by the curve: no Gaussian mechanism of ε below the first number shows what was seen (Mahloujifar "
            "et al., 2024), and one of the second number covers the claim.",
            "Not visible: less is claimed than is valid, and this audit does not show it. An audit proves faults; it "
            "never proves that there are none.",
        ),
    )


def how(found: dict) -> str:
    """The verdict, and the bound that decides where it is not the one in the table."""
    if found["verdict"] in (SEEN, FALSE_ALARM) and found["lower_bound"] <= found["claimed"]:
        return (
            f"{found['verdict']} by the curve: {at_least(found['lower_bound_fdp'])} against "
            f"{format_epsilon(found['gaussian_epsilon'])}"
        )
    if found["verdict"] == SHOWN:
        everything = found["lower_bound"] >= found["most_visible"]
        return "no number to refute" + ("; all guesses right" if everything else "")
    return found["verdict"]


def status(lines: Sequence[dict]) -> str:
    """The findings in numbers."""
    audits = {name: line["audit"] for name, line in newest(lines).items() if line["audit"]}
    of = {v: [name for name, a in audits.items() if a["verdict"] == v] for v in (SEEN, UNSEEN, HOLDS, SHOWN)}
    false = len(of[SEEN]) + len(of[UNSEEN])
    parts = (
        [f"In {len(of[SEEN])} of {false} audited rows that claim less than is valid the audit refutes the claim"]
        if false
        else []
    )
    alarms = [name for name, a in audits.items() if a["verdict"] == FALSE_ALARM]
    named = (("not visible to audits of this size", of[UNSEEN]), ("claims that hold, and pass", of[HOLDS]))
    for words, names in (*named, ("no number is claimed", of[SHOWN]), ("FALSE ALARMS", alarms)):
        parts += [f"{words}: {', '.join(repr(name) for name in names)}"] if names else []
    return "Status: study, no paper to reproduce. " + "; ".join(parts) + "."


def write_page(lines: Sequence[dict]) -> str:
    """The page: the two tables, and each recipe in words."""
    kept = newest(lines)
    words = [f"**{r.name}.** {r.does} {r.truth}" for r in RECIPES if r.name in kept and r.does]
    stamps = [line["stamp"] for line in kept.values()]
    commits = sorted({(made["commit"] or "none")[:12] for made in stamps})
    devices = sorted({f"{made['device_kind']}, dp-accounting {made['versions']['dp-accounting']}" for made in stamps})
    return (
        f"# Claimed and true: noise recipes and their ε\n\n{status(lines)}\n\n"
        "Each recipe is re-implemented here, with one fault each, and run by the same rounds that train models; no "
        "other project's code was run, and what others do was read in their code, or in papers. An audited bound above "
        "a claim refutes it whatever an accountant says. The audited runs are small and mostly claim an ε of 1 to 2, "
        f"where thousands of canaries see most.\n\n{to_markdown(claims_table(lines))}\n## What audits show\n\n"
        f"{to_markdown(audits_table(lines))}\n## The recipes\n\n" + "\n\n".join(words) + "\n\n"
        f"Written by `python -m experiments {NAME}` from results/{NAME}.jsonl; commit {', '.join(commits)}, device "
        f"{'; '.join(devices)}; {sum(line['seconds'] for line in kept.values()):.0f} s in all.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs rows, keeps their lines, writes the page; 1 if an audit refutes a claim that holds."""
    parser = argparse.ArgumentParser(prog=f"python -m experiments {NAME}", description=__doc__.splitlines()[0])
    parser.add_argument("--row", action="append", metavar="ROW", help="run only this row; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="of coins, cohorts and noise")
    parser.add_argument("--smoke", action="store_true", help="two rows in seconds, with few canaries; writes nothing")
    parser.add_argument("--only-page", action="store_true", help="run nothing, write the page from the kept lines")
    args = parser.parse_args(argv)
    names = [recipe.name for recipe in RECIPES]
    unknown = sorted(set(args.row or ()) - set(names))
    if unknown:
        parser.error(f"there is no row {unknown[0]!r}; the rows are {'; '.join(names)}.")
    chosen = args.row or (SMOKE_ROWS if args.smoke else names)
    lines = [] if args.smoke else read_lines(NAME)
    for recipe in RECIPES:
        if args.only_page or recipe.name not in chosen:
            continue
        start = time.perf_counter()
        line = measure(recipe, args.seed, num_canaries=SMOKE_CANARIES if args.smoke else None)
        line |= {"seconds": time.perf_counter() - start, "stamp": stamp(seed=args.seed, data_fingerprint=None)}
        lines.append(line)
        print(f"{recipe.name}, {line['seconds']:.0f} s: {line['values']}, {line['audit']}", flush=True)
        if not args.smoke:
            keep_line(NAME, line)
    page = write_page(lines)
    print(page)
    if not args.smoke:
        (RESULTS / f"{NAME}.md").write_text(page, encoding="utf-8")
        latex = [to_latex(table(lines), label=f"tab:{NAME}-{table.__name__}") for table in (claims_table, audits_table)]
        (RESULTS / f"{NAME}.tex").write_text("\n".join(latex), encoding="utf-8")
    return int(any(line["audit"] and line["audit"]["verdict"] == FALSE_ALARM for line in newest(lines).values()))


if __name__ == "__main__":
    sys.exit(main())

"""The risk report of a release as one HTML file that needs no network and no script, and as tables."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from fedjax_rec.reporting.figures import Panel, inline_svg
from fedjax_rec.reporting.formatting import MISSING, format_number
from fedjax_rec.reporting.html import TEMPLATES, flatten, panel_view, table_view
from fedjax_rec.reporting.risk_plots import Point, found_by, risk_against_utility, risk_bars
from fedjax_rec.reporting.style import VERMILION, to_svg
from fedjax_rec.reporting.tables import Table

OWNERS_ONLY = (
    "The numbers on this page are computed on the users as they are, without noise. Keep the page; hand out the data."
)
HEURISTIC = (
    "k, l, t, k^m and attacks that fail are evidence and no guarantee: whoever knows more, or attacks better, may find "
    "more. Differential privacy bounds every attacker; `fedjax-rec synthesize` makes data that has it."
)
SEEDED = "What was random came from a seed: whoever guesses it can undo it. A rehearsal, not for handing out."
NAMED = "The policy has no [pseudonyms], so the release has the users' own labels: everybody who knows these is found."
WORST = "items, ratings, dates"
PUBLISHED, MATCHED = "\N{BULLET} by the published score", "\N{BULLET} stands out, and rightly"


def write_risk_page(path: Path, document: Mapping[str, Any]) -> Path:
    """Writes the page; whole, or not at all.

    Args:
      path: of the page.
      document: "report" (from `risk_report`), "steps", "policy", "source", "seeded" and "stamp".
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        unfinished.write_text(render(document), encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def render(document: Mapping[str, Any]) -> str:
    """The page as one HTML document."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    report, source = document["report"], document["source"]
    page = {
        "title": f"Anonymised release of {source['name']}",
        "subtitle": f"{source['num_users']:,} users · {source['num_items']:,} items · "
        f"{source['num_interactions']:,} interactions",
        "notices": notices(document),
        "cards": _cards(report),
        "panels": [panel_view(panel) for panel in _panels(report)],
        "tables": [table_view(table) for table in (risk_table(report), cost_table(report))],
        "steps": flatten({f"{place}. {step['step']}": _rest(step) for place, step in enumerate(document["steps"], 1)}),
        "settings": flatten({"policy": document["policy"], "release": document["release"], **document["stamp"]}),
    }
    return environment.get_template("risk.html.j2").render(page)


def notices(document: Mapping[str, Any]) -> list[str]:
    """What somebody must know before handing the data out."""
    found = [OWNERS_ONLY, HEURISTIC]
    found += [SEEDED] if document["seeded"] else []
    return found + ([] if "pseudonyms" in document["policy"] else [NAMED])


def risk_table(report: Mapping[str, Any]) -> Table:
    """Every measure of risk, before and after."""
    before, after = report["before"], report["after"]
    rows = []
    if before["attributes"] is not None:
        columns = ", ".join(before["attributes"]["quasi_identifiers"])
        rows.append((f"k of {columns}", str(before["attributes"]["k"]), str(after["attributes"]["k"])))
        for letter in ("l", "t"):
            if letter in before["attributes"]:
                name = f"{letter} of {before['attributes']['sensitive']}"
                rows.append((name, *(format_number(side["attributes"][letter]) for side in (before, after))))
    m, k = before["items"]["m"], before["items"]["k"]
    rows.append((f"fewest users with some {m} items", *(str(s["items"]["smallest_support"]) for s in (before, after))))
    share = f"sets of up to {m} items of fewer than {k} users"
    rows.append((share, *(_percent(side["items"]["violating_share"]) for side in (before, after))))
    for m in before["uniqueness"]:
        found = [side["uniqueness"][m] for side in (before, after)]
        rows.append((f"unique by {m} items", *(_percent(one["share"], one["error"]) for one in found)))
    for setting in before["reidentification"]:
        found = [side["reidentification"][setting] for side in (before, after)]
        rows.append((found_by(setting), *(_percent(one["top1"], one["top1_error"]) for one in found)))
        published = [one["published_score"] for one in found]
        rows.append((PUBLISHED, *(_percent(one["top1"], one["top1_error"]) for one in published)))
        rows.append((MATCHED, *(_sure(one) for one in published)))
    return Table(
        columns=("risk", "before", "after"),
        rows=rows,
        notes=(
            f"Found: of {_targets(before)} random users, the right record has the best score; ± one standard error. "
            "The attacker tries the score of Narayanan and Shmatikov (2008), that score corrected for the lengths of "
            "records in two ways, and without ratings or dates. Shown is the strongest; below it the published score, "
            "with the share of users for whom a record stands out and the share of these matches that is right.",
        ),
    )


def cost_table(report: Mapping[str, Any]) -> Table:
    """What the release lost."""
    loss, cost = report["information_loss"], report["downstream"]
    rows = [
        ("users left out", f"{loss['users_left_out']:,}"),
        ("interactions lost", _percent(loss["interactions_lost"])),
        ("interactions that are not true", _percent(loss["interactions_added"])),
        ("Jaccard distance of item sets", format_number(loss["jaccard_distance"])),
        ("distance of item popularity", format_number(loss["popularity_distance"])),
        ("ratings", "yes" if loss["ratings"] else "no"),
        ("times", "yes" if loss["times"] else "no"),
    ]
    if cost is not None:
        low, high = format_number(cost["ratio_low"]), format_number(cost["ratio_high"])
        rows += [
            (f"{cost['metric']} of {cost['model']} on the data as it is", format_number(cost["before"])),
            (f"{cost['metric']} of {cost['model']} on anonymised data", format_number(cost["after"])),
            ("ratio, with 95 % interval", f"{format_number(cost['ratio'])} ({low} to {high})"),
        ]
    return Table(columns=("cost", "value"), rows=rows)


def _panels(report: Mapping[str, Any]) -> list[Panel]:
    panels = [
        Panel("Who is found", _inline(risk_bars(report), "found"), "Share of users; lines: two standard errors."),
    ]
    if report["downstream"] is not None:
        points = [
            Point("before", 1.0, report["before"]["reidentification"][WORST]["top1"]),
            Point(
                "after", report["downstream"]["ratio"], report["after"]["reidentification"][WORST]["top1"], VERMILION
            ),
        ]
        figure = risk_against_utility(points, risk=found_by(WORST), utility=f"{_metric(report)}, ratio to before")
        text = "To the right: as good to train on as the data as it is. Below: hard to tell whose record it is."
        panels.append(Panel("What it costs", _inline(figure, "cost"), text))
    return panels


def _inline(figure, name: str) -> str:
    return inline_svg(to_svg(figure), name=name, title=name)


def _cards(report: Mapping[str, Any]) -> list[dict[str, str]]:
    before, after, cost = report["before"], report["after"], report["downstream"]
    m = list(before["uniqueness"])[-1]
    found = [side["reidentification"][WORST]["top1"] for side in (before, after)]
    unique = [side["uniqueness"][m]["share"] for side in (before, after)]
    return [
        {
            "name": "found by items, ratings, dates",
            "value": _percent(found[1]),
            "detail": f"before: {_percent(found[0])}",
        },
        {"name": f"unique by {m} items", "value": _percent(unique[1]), "detail": f"before: {_percent(unique[0])}"},
        {
            "name": "as good to train on",
            "value": MISSING if cost is None else _percent(cost["ratio"]),
            "detail": "not measured" if cost is None else f"{_metric(report)}, of the data as it is",
        },
    ]


def _metric(report: Mapping[str, Any]) -> str:
    return f"{report['downstream']['metric']} of {report['downstream']['model']}"


def _targets(side: Mapping[str, Any]) -> int:
    return next(iter(side["reidentification"].values()))["num_targets"]


def _sure(found: Mapping[str, Any]) -> str:
    return f"{_percent(found['matched'])}, {_percent(found['precision'])}"


def _percent(share: float | None, error: float | None = None) -> str:
    if share is None:
        return MISSING
    return f"{100 * share:.1f}" + ("" if error is None else f" ± {100 * error:.1f}") + " %"


def _rest(step: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in step.items() if key != "step"}

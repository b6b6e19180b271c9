"""The report of a run: one HTML file that needs no network, no script and no server."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fedjax_rec.privacy.ledger import TRUST_MODELS
from fedjax_rec.reporting.figures import Panel, budget_of, item_panel, training_panels, user_panel
from fedjax_rec.reporting.formatting import (
    INTERVAL,
    MISSING,
    format_bytes,
    format_epsilon,
    format_number,
    format_ratio,
    format_seconds,
    is_number,
)
from fedjax_rec.reporting.run_files import RunFiles, entries, find, mapping, read_run, series
from fedjax_rec.reporting.run_tables import (
    group_table,
    ledger_table,
    primary_metric,
    result_table,
    speed_table,
    traffic_table,
)
from fedjax_rec.reporting.statements import audit_line, complete_statement, epsilon_label, statement_parts
from fedjax_rec.reporting.tables import Table, bold_cells, formatted_rows, is_numeric_column

TEMPLATES = Path(__file__).parent / "templates"


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run directory, from its config, metrics, ledger and result files.

    Files that a killed run never wrote are reported as missing, with what follows from that. The file appears whole
    or not at all.

    Returns:
      The path of the report.

    Raises:
      FileNotFoundError: if the directory does not exist or holds none of the files of a run.
    """
    run = read_run(run_dir)
    path = run.folder / "report.html"
    unfinished = path.with_suffix(".html.partial")
    unfinished.write_text(render(run), encoding="utf-8")
    os.replace(unfinished, path)
    return path


def render(run: RunFiles) -> str:
    """The report of a run as one HTML document."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    privacy = privacy_statement(run)
    statement = ", ".join(statement_parts(privacy)) if privacy else None
    groups = [group_table(run.result, group) for group in mapping(run.result.get("groups"))]
    cost = [table for table in (traffic_table(run.result), speed_table(run.result)) if table.rows]
    page = {
        "title": title(run),
        "subtitle": subtitle(run),
        "status": status(run),
        "problems": [*run.problems, *overspent(run, privacy)],
        "warnings": [str(warning) for warning in run.result.get("warnings") or ()],
        "cards": cards(run, privacy),
        "results": table_view(result_table(run.result)) if mapping(run.result.get("test")) else None,
        "training": [panel_view(panel) for panel in training_panels(run, statement=statement)],
        "people": [panel_view(user_panel(run.result)), panel_view(item_panel(run.result))],
        "groups": [bars(table) for table in groups if table.rows],
        "explanations": [(name, name.removeprefix("explain_").removesuffix(".html")) for name in run.explanations],
        "cost": [table_view(table) for table in cost],
        "ledger": table_view(ledger_table(run.ledger)) if entries(run.ledger) else None,
        "privacy": privacy_view(run, privacy),
        "config": flatten(run.config),
        "stamp": flatten(mapping(run.result.get("stamp"))),
    }
    return environment.get_template("report.html.j2").render(page)


def title(run: RunFiles) -> str:
    """The data set and the algorithm."""
    dataset = mapping(run.result.get("dataset")).get("name") or find(run.config, "dataset", "dataset_name")
    algorithm = run.result.get("algorithm") or run.config.get("algorithm")
    if isinstance(algorithm, Mapping):
        algorithm = algorithm.get("name")
    return " · ".join(str(part) for part in (dataset, algorithm) if part) or run.folder.resolve().name


def subtitle(run: RunFiles) -> str:
    """The size of the data set and the split."""
    dataset, split = mapping(run.result.get("dataset")), mapping(run.result.get("split"))
    parts = [
        f"{dataset[key]:,} {word}"
        for key, word in (("num_users", "users"), ("num_items", "items"), ("num_interactions", "interactions"))
        if is_number(dataset.get(key))
    ]
    parts += [str(split["rule"]).replace("_", " ")] if split.get("rule") else []
    parts += [f"ties by {str(split['tie_rule']).replace('_', ' ')}"] if split.get("tie_rule") else []
    return " · ".join(parts)


def status(run: RunFiles) -> str:
    """Empty for a finished run; else how far it came."""
    if run.result:
        return ""
    planned = find(run.config, "rounds", "num_rounds")
    reached = run.metrics[-1]["round"] if run.metrics else 0
    return f"Unfinished: the last logged round is {reached:,}" + (f" of {planned:,}." if is_number(planned) else ".")


def privacy_statement(run: RunFiles) -> Mapping[str, Any] | None:
    """The run's epsilon with all that belongs to it; None if the run is not private or its statement is incomplete.

    An unfinished run has no result yet; its epsilon so far is the last logged one, stated as its ledger states it.
    """
    if run.result:
        return complete_statement(mapping(run.result.get("privacy")))
    _, epsilons = series(run.metrics, "epsilon")
    training = next((entry for entry in reversed(entries(run.ledger)) if entry.get("phase") == "training"), {})
    spent = {"delta": find(run.config, "delta"), **mapping(run.ledger.get("spent"))}
    logged = {"epsilon": epsilons[-1]} if epsilons else {}
    return complete_statement({**training, **run.ledger, **spent, **logged})


def overspent(run: RunFiles, privacy: Mapping[str, Any] | None) -> list[str]:
    """A sentence if the releases of the ledger cost more, together, than the result says."""
    spent = mapping(run.ledger.get("spent"))
    if not (privacy and run.result and is_number(spent.get("epsilon")) and spent.get("delta") == privacy["delta"]):
        return []
    if spent["epsilon"] <= privacy["epsilon"] * (1 + 1e-6):
        return []
    return [
        f"The result states ε = {format_epsilon(privacy['epsilon'])}, but all releases of the ledger together cost "
        f"{format_epsilon(spent['epsilon'])} at the same δ."
    ]


def claims_privacy(run: RunFiles) -> bool:
    """True if the run has an epsilon, stated completely or not."""
    if run.result.get("privacy") or series(run.metrics, "epsilon")[1]:
        return True
    return not run.result and budget_of(run) is not None


def cards(run: RunFiles, privacy: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """The six numbers at the top: quality, ratio to popularity, epsilon, rounds, time, uplink."""
    result = run.result
    metric, test, cost = primary_metric(result), mapping(result.get("test")), mapping(result.get("cost"))
    bounds = mapping(result.get("interval")).get(metric)
    floor = mapping(mapping(result.get("baselines")).get("popularity")).get(metric)
    value = test.get(metric)
    ratio = value / floor if is_number(value) and is_number(floor) and floor > 0 else None
    interval = ""
    if isinstance(bounds, list | tuple) and len(bounds) == 2:
        interval = f"{format_number(bounds[0])} to {format_number(bounds[1])}, bootstrap over users"
    rounds = result.get("rounds", run.metrics[-1]["round"] if run.metrics else None)
    seconds = result.get("seconds", run.metrics[-1].get("seconds") if run.metrics else None)
    best = f"best on validation: round {result['best_round']:,}" if is_number(result.get("best_round")) else ""
    speed = f"{format_number(cost['rounds_per_s'])} rounds a second" if is_number(cost.get("rounds_per_s")) else ""
    missing = "" if is_number(value) else "not measured yet"
    return [
        {"name": metric, "value": format_number(value), "detail": interval or missing},
        {
            "name": "against popularity",
            "value": format_ratio(ratio),
            "detail": f"popularity: {format_number(floor)}" if is_number(floor) else "not measured yet",
        },
        privacy_card(run, privacy),
        {"name": "rounds", "value": f"{rounds:,}" if is_number(rounds) else MISSING, "detail": best},
        {"name": "time", "value": format_seconds(seconds), "detail": speed},
        {
            "name": "uplink",
            "value": format_bytes(cost.get("uplink_bytes_per_client_round")),
            "detail": "of one client in one round",
        },
    ]


def privacy_card(run: RunFiles, privacy: Mapping[str, Any] | None) -> dict[str, str]:
    """Epsilon with its unit, relation, sampler and delta; or that there is none."""
    if privacy:
        so_far = "" if run.result else " so far"
        return {
            "name": f"ε{so_far}",
            "value": format_epsilon(privacy["epsilon"]),
            "detail": ", ".join(statement_parts(privacy)).replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}"),
        }
    if claims_privacy(run):
        return {"name": "ε", "value": MISSING, "detail": "not shown: unit, relation, sampler or delta is not recorded"}
    return {"name": "privacy", "value": "none", "detail": "no differential privacy"}


def privacy_view(run: RunFiles, privacy: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the privacy section says, beyond the ledger."""
    trust_model = str(mapping(privacy).get("trust_model") or run.ledger.get("trust_model") or "central")
    unit = str(mapping(privacy).get("unit", ""))
    details = [f"{privacy['accountant']} accountant"] if mapping(privacy).get("accountant") else []
    details += [
        f"{name}\N{NO-BREAK SPACE}{value:.4g}"
        for name in ("noise_multiplier", "l2_clip_norm", "sampling_prob", "rounds")
        if is_number(value := mapping(privacy).get(name))
    ]
    return {
        "label": epsilon_label(privacy) if privacy else None,
        "claimed": claims_privacy(run),
        "protects": "one interaction" if unit.startswith("example") else "one user's whole history",
        "details": " · ".join(details),
        "audit": audit_line(privacy, audit=run.audit, membership=run.membership, run=str(run.folder)),
        "trust_model": trust_model.replace("_", " "),
        "trust": TRUST_MODELS.get(trust_model, ""),
    }


def table_view(table: Table) -> dict[str, Any]:
    """A table as the template draws it: formatted cells, which are numbers, which are best."""
    numeric = [is_numeric_column(table, name) for name in table.columns]
    texts, marks = formatted_rows(table), bold_cells(table)
    return {
        "columns": list(zip(table.columns, numeric, strict=True)),
        "rows": [
            [_cell_view(texts, marks, numeric, row, place) for place in range(len(numeric))]
            for row in range(len(texts))
        ],
        "caption": table.caption,
        "notes": table.notes,
    }


def _cell_view(
    texts: list[list[str]], marks: list[list[bool]], numeric: list[bool], row: int, place: int
) -> dict[str, Any]:
    """One cell: its number, its interval, and as filler the column's widest interval, so that all numbers line up."""
    if not numeric[place]:
        return {"text": texts[row][place], "best": marks[row][place], "numeric": False, "interval": "", "filler": ""}
    parts = [line[place].partition(INTERVAL) for line in texts]
    point, sign, half_width = parts[row]
    filler = max((sign + half for _, sign, half in parts), key=len)
    return {"text": point, "best": marks[row][place], "numeric": True, "interval": sign + half_width, "filler": filler}


def bars(table: Table) -> dict[str, Any]:
    """A two-column table as bars: each value as a share of the largest."""
    values = [float(row[1]) for row in table.rows]
    largest = max(values) or 1.0
    return {
        "name": table.columns[0],
        "metric": table.columns[1],
        "rows": [
            (part, text, f"{max(0.0, 100 * value / largest):.1f}")
            for (part, text), value in zip(formatted_rows(table), values, strict=True)
        ],
    }


def panel_view(panel: Panel) -> dict[str, Any]:
    """A panel whose SVG is marked as safe: matplotlib has escaped the text inside it."""
    return {"title": panel.title, "svg": Markup(panel.svg) if panel.svg else None, "text": panel.text}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as `outer.inner` names with their values as text."""
    rows: list[tuple[str, str]] = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            rows += flatten(value, prefix=f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", _setting(value)))
    return rows


def _setting(value: object) -> str:
    """A setting as text."""
    if value is None or isinstance(value, bool):
        return {None: MISSING, True: "yes", False: "no"}[value]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return json.dumps(value)
    return str(value)

"""The tables of a run, from the contents of its result.json and ledger.json."""

import json
from collections.abc import Mapping
from typing import Any

from fedjax_rec.privacy.events import describe, from_dict
from fedjax_rec.reporting.formatting import (
    MISSING,
    Cell,
    Estimate,
    format_bytes,
    format_number,
    format_percent,
    format_seconds,
    is_number,
)
from fedjax_rec.reporting.run_files import entries, mapping
from fedjax_rec.reporting.statements import (
    RELATIONS,
    SAMPLERS,
    STATEMENT,
    UNITS,
    complete_statement,
    epsilon_label,
    in_words,
)
from fedjax_rec.reporting.tables import Table

RESULT_METRICS = ("ndcg@10", "hit@10", "recall@20", "coverage@10", "mrr@10")
BASELINES = {
    "non_private": "same configuration, non-private",
    "popularity": "popularity",
    "dp_popularity": "popularity",
}


def primary_metric(result: Mapping[str, Any]) -> str:
    """The metric that a run is judged by: ndcg@10 if it was measured, else the first one that was."""
    test = mapping(result.get("test"))
    return "ndcg@10" if "ndcg@10" in test or not test else next(iter(test))


def result_table(result: Mapping[str, Any]) -> Table:
    """The table at the end of a run: the run beside its baselines, each with its epsilon or a gap.

    Args:
      result: the content of result.json. `test` {metric: value}; `interval` {metric: [low, high]}; `baselines` with
        any of `non_private`, `popularity`, `dp_popularity` and others, each {metric: value}; `privacy` (or None) with
        epsilon, delta, unit, relation, sampler. A baseline that is itself private carries the same five under
        `privacy`, or among its metrics.

    Returns:
      Columns: model, the metrics, epsilon (one column a unit), `vs popularity` (ratio of the primary metric). Every
      privacy statement stands in full in the notes, with the split and its fingerprint.
    """
    primary = primary_metric(result)
    baselines = {name: mapping(metrics) for name, metrics in mapping(result.get("baselines")).items()}
    test = mapping(result.get("test"))
    order = [*(name for name in BASELINES if name in baselines), *(name for name in baselines if name not in BASELINES)]
    own = _statement(result)
    lines = [
        (
            f"this run ({_kind(own, claimed=bool(result.get('privacy')))})",
            _with_intervals(test, mapping(result.get("interval"))),
            own,
        )
    ]
    for name in order:
        privacy = _statement(baselines[name])
        label = BASELINES.get(name, name.replace("_", " "))
        private = name == "dp_popularity" or privacy is not None
        lines.append((f"{label} ({_kind(privacy, claimed=True)})" if private else label, baselines[name], privacy))

    metrics = _metric_columns([values for _, values, _ in lines], test)
    units = sorted({_unit(privacy) for _, _, privacy in lines if privacy}, reverse=True)  # user-level first
    heads = {unit: "epsilon" if len(units) == 1 else f"epsilon ({unit})" for unit in units} or {None: "epsilon"}
    floor = baselines.get("popularity", {}).get(primary)
    rows = [
        (
            label,
            *(values.get(metric) for metric in metrics),
            *(privacy["epsilon"] if privacy and _unit(privacy) == unit else None for unit in heads),
            _ratio(values.get(primary), floor),
        )
        for label, values, privacy in lines
    ]
    return Table(
        columns=("model", *metrics, *heads.values(), "vs popularity"),
        rows=rows,
        caption=_caption(result),
        notes=_notes(result, lines, primary),
        highest=metrics,
    )


def traffic_table(result: Mapping[str, Any]) -> Table:
    """Bytes on the wire.

    Args:
      result: the content of result.json; `cost` holds any of `uplink_bytes_per_client_round`,
        `downlink_bytes_per_client_round`, `plain_bytes_per_client_round`, and the same with `_total` (bytes).
    """
    cost = mapping(result.get("cost"))
    rows = [
        ("uplink, one client in one round", format_bytes(cost.get("uplink_bytes_per_client_round"))),
        ("downlink, one client in one round", format_bytes(cost.get("downlink_bytes_per_client_round"))),
        ("either, as plain float32", format_bytes(cost.get("plain_bytes_per_client_round"))),
        ("uplink, whole run", format_bytes(cost.get("uplink_bytes_total"))),
        ("downlink, whole run", format_bytes(cost.get("downlink_bytes_total"))),
        ("either, whole run, as plain float32", format_bytes(cost.get("plain_bytes_total"))),
    ]
    return Table(columns=("bytes", "amount"), rows=[row for row in rows if row[1] != MISSING])


def speed_table(result: Mapping[str, Any]) -> Table:
    """Time, and what padding wastes of it.

    Args:
      result: the content of result.json; `seconds`, and in `cost` any of `clients_per_s`, `rounds_per_s`, `compile_s`
        (seconds), `padding_waste` (share of padded slots).
    """
    cost = mapping(result.get("cost"))
    rows = [
        ("clients a second", format_number(cost.get("clients_per_s"))),
        ("rounds a second", format_number(cost.get("rounds_per_s"))),
        ("padding waste", format_percent(cost.get("padding_waste"))),
        ("compilation", format_seconds(cost.get("compile_s"))),
        ("whole run", format_seconds(result.get("seconds"))),
    ]
    return Table(columns=("speed", "amount"), rows=[row for row in rows if row[1] != MISSING])


def ledger_table(ledger: Mapping[str, Any]) -> Table:
    """The releases of a run, phase by phase; their joint epsilon is no column, because it is no sum.

    Args:
      ledger: the content of ledger.json (`privacy.ledger.Ledger.to_json`): `unit`, `relation`, and `entries`, each
        with `phase`, `released`, `event`, `count`, `sampler`.
    """
    rows = [
        (
            str(entry.get("phase", MISSING)),
            str(entry.get("released") or MISSING),
            describe_event(entry.get("event")),
            entry.get("count") if is_number(entry.get("count")) else None,
            *(
                in_words(value, words) if (value := entry.get(name, ledger.get(name))) else MISSING
                for name, words in (("unit", UNITS), ("relation", RELATIONS), ("sampler", SAMPLERS))
            ),
        )
        for entry in entries(ledger)
    ]
    return Table(columns=("phase", "released", "mechanism", "times", "unit", "relation", "sampler"), rows=rows)


def group_table(result: Mapping[str, Any], group: str) -> Table:
    """The primary metric of each part of the users, e.g. of each activity quartile.

    Args:
      result: the content of result.json; `groups` holds {group: {part: value}}, or {part: {metric: value}}.
      group: the name of a grouping.
    """
    primary = primary_metric(result)
    parts = mapping(mapping(result.get("groups")).get(group))
    rows = [
        (str(part), mapping(value).get(primary) if isinstance(value, Mapping) else value)
        for part, value in parts.items()
    ]
    return Table(columns=(group, primary), rows=[row for row in rows if is_number(row[1])])


def describe_event(event: object) -> str:
    """An event of the ledger in one line: `Poisson(0.0424, Gaussian(1))`; unknown ones as they are stored."""
    if not isinstance(event, Mapping):
        return MISSING if event is None else str(event)
    try:
        return describe(from_dict(dict(event)))
    except ValueError:
        return json.dumps(event)


def _statement(holder: Mapping[str, Any]) -> dict[str, Any] | None:
    """The complete privacy statement of a result or a baseline, or None."""
    return complete_statement(mapping(holder.get("privacy")) or {name: holder.get(name) for name in STATEMENT})


def _unit(privacy: Mapping[str, Any]) -> str:
    """`user-level` or `example-level`."""
    return in_words(privacy["unit"], UNITS, otherwise="{}-level")


def _kind(privacy: Mapping[str, Any] | None, *, claimed: bool) -> str:
    """The protection of a row in words; never a bare "DP"."""
    return f"{_unit(privacy)} DP" if privacy else "incomplete privacy statement" if claimed else "no DP"


def _with_intervals(metrics: Mapping[str, Any], intervals: Mapping[str, Any]) -> dict[str, Cell]:
    """Metrics, as estimates where there is an interval."""
    return {
        name: Estimate(value, *intervals[name]) if is_number(value) and _is_interval(intervals.get(name)) else value
        for name, value in metrics.items()
    }


def _is_interval(value: object) -> bool:
    """True for two numbers."""
    return isinstance(value, list | tuple) and len(value) == 2 and all(is_number(bound) for bound in value)


def _metric_columns(lines: list[Mapping[str, Any]], test: Mapping[str, Any]) -> tuple[str, ...]:
    """The metrics worth a column: the usual ones if any row has them, else the first of the run's own."""
    usual = tuple(metric for metric in RESULT_METRICS if any(values.get(metric) is not None for values in lines))
    return usual or tuple(test)[: len(RESULT_METRICS)]


def _ratio(value: Cell, floor: object) -> float | None:
    """A metric over popularity's."""
    point = value.value if isinstance(value, Estimate) else value
    return float(point) / float(floor) if is_number(point) and is_number(floor) and floor > 0 else None


def _caption(result: Mapping[str, Any]) -> str:
    """What was measured, on what."""
    dataset = mapping(result.get("dataset"))
    items = dataset.get("num_items")
    ranking = f", ranked among all {items:,} items" if is_number(items) else ""
    return f"Test users of {dataset.get('name', 'an unnamed data set')}{ranking}"


def _notes(
    result: Mapping[str, Any], lines: list[tuple[str, Mapping[str, Any], Mapping[str, Any] | None]], primary: str
) -> list[str]:
    """The privacy statement of each row, how the numbers were made, and the split."""
    notes = [f"{label}: {epsilon_label(privacy)}." for label, _, privacy in lines if privacy]
    notes.append(f"No epsilon ({MISSING}): no differential privacy.")
    if any("incomplete privacy statement" in label for label, _, _ in lines):
        notes.append("An epsilon is shown only with its unit, neighbouring relation, sampler and delta.")
    if any(isinstance(value, Estimate) for value in lines[0][1].values()):
        notes.append("± is half the width of the bootstrap interval over users.")
    notes.append(f"vs popularity: ratio of {primary}.")
    split = mapping(result.get("split"))
    if split:
        ties = f", ties by {split['tie_rule']}" if split.get("tie_rule") else ""
        seed = f", seed {split['seed']}" if split.get("seed") is not None else ""
        print_of = f", fingerprint {str(split['fingerprint'])[:12]}" if split.get("fingerprint") else ""
        notes.append(f"Split: {split.get('rule', 'unknown')}{ties}{seed}{print_of}.")
    return notes

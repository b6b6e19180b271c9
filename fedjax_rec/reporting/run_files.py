"""What a run directory holds, read with tolerance: a run that was killed, or still runs, can be reported too."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedjax_rec.reporting.formatting import is_number

FILES = ("config.json", "metrics.jsonl", "ledger.json", "result.json")


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """The files of a run directory.

    Attributes:
      folder: the run directory.
      config: config.json, or {}.
      metrics: the logged rounds in order, one mapping each; of a round logged twice (before and after a resume) the
        later one.
      ledger: ledger.json, or {}; a bare list of entries becomes {"entries": [...]}.
      result: result.json, or {}.
      problems: one sentence for every file that is missing or unreadable.
      audit: audit.json, or {} if the run was not audited.
      membership: membership.json, or {} if the run was not attacked.
      explanations: names of the pages that explain what single users are recommended.
    """

    folder: Path
    config: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...]
    ledger: Mapping[str, Any]
    result: Mapping[str, Any]
    problems: tuple[str, ...]
    audit: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    membership: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    explanations: tuple[str, ...] = ()


def read_run(run_dir: str | Path) -> RunFiles:
    """Read a run directory.

    Raises:
      FileNotFoundError: if the directory does not exist, or holds none of the files of a run.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no run directory '{folder}': give the folder that `fedjax-rec train` printed."
        )
    if not any((folder / name).exists() for name in FILES):
        raise FileNotFoundError(
            f"'{folder}' is not a run directory, it has none of {', '.join(FILES)}: give the folder that "
            "`fedjax-rec train` printed."
        )
    problems: list[str] = []
    config = _read_json(folder / "config.json", problems, without="the configuration is unknown")
    ledger = _read_json(folder / "ledger.json", problems, without="nothing is known about what was released")
    result = _read_json(folder / "result.json", problems, without="the run has not finished; there are no test metrics")
    later = {
        name: mapping(_read_json(path, problems, without="it is left out"))
        for name in ("audit", "membership")
        if (path := folder / f"{name}.json").exists()
    }
    return RunFiles(
        **later,
        folder=folder,
        config=mapping(config),
        metrics=_read_metrics(folder / "metrics.jsonl", problems),
        ledger={"entries": ledger} if isinstance(ledger, list) else mapping(ledger),
        result=mapping(result),
        problems=tuple(problems),
        explanations=tuple(sorted(path.name for path in folder.glob("explain_*.html"))),
    )


def mapping(value: object) -> Mapping[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def entries(ledger: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The releases listed in a ledger."""
    listed = ledger.get("entries")
    return [entry for entry in listed if isinstance(entry, Mapping)] if isinstance(listed, list) else []


def series(metrics: tuple[Mapping[str, Any], ...], *path: str) -> tuple[list[int], list[float]]:
    """One logged quantity over rounds, without the rounds that lack it.

    Args:
      metrics: logged rounds, as in `RunFiles`.
      *path: the keys that lead to the quantity, e.g. "validation", "ndcg@10".

    Returns:
      The rounds and the values.
    """
    rounds, values = [], []
    for row in metrics:
        value: object = row
        for key in path:
            value = mapping(value).get(key)
        if is_number(value):
            rounds.append(int(row["round"]))
            values.append(float(value))
    return rounds, values


def find(config: Mapping[str, Any], *names: str) -> Any:
    """The first of some settings that a configuration has, at its top level or one level down; None if it has none."""
    levels = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    for name in names:
        for level in levels:
            if level.get(name) is not None and not isinstance(level[name], Mapping):
                return level[name]
    return None


def _read_json(path: Path, problems: list[str], *, without: str) -> Any:
    """The content of a JSON file, or None; says in `problems` what follows from its absence."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"There is no {path.name}: {without}.")
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read ({error}): {without}.")
    return None


def _read_metrics(path: Path, problems: list[str]) -> tuple[Mapping[str, Any], ...]:
    """The logged rounds; lines cut off by a kill are counted and skipped."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        problems.append("There is no metrics.jsonl: nothing is known about the course of training.")
        return ()
    rows: dict[int, Mapping[str, Any]] = {}
    unreadable = 0
    for line in filter(str.strip, lines):
        row = _parse_line(line)
        if is_number(row.get("round")):
            rows[int(row["round"])] = row
        else:
            unreadable += 1
    if unreadable:
        problems.append(f"{unreadable} of {len(lines)} lines of metrics.jsonl cannot be read and are left out.")
    if not rows:
        problems.append("metrics.jsonl has no round yet.")
    return tuple(rows[number] for number in sorted(rows))


def _parse_line(line: str) -> Mapping[str, Any]:
    """One line of metrics.jsonl; empty if it is no JSON object."""
    try:
        return mapping(json.loads(line))
    except ValueError:
        return {}

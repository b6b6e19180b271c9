"""The files of a run directory: who writes what, so that a kill leaves nothing half-written."""

import json
import os
from pathlib import Path
from typing import Any

CONFIG, METRICS, LEDGER, RESULT = "config.json", "metrics.jsonl", "ledger.json", "result.json"
LAST, BEST = "checkpoint/last", "checkpoint/best"


def write_json(path: Path, values: Any) -> None:
    """Writes JSON so that a reader meets the old file or the new one, and never half of it."""
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        unfinished.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def check(folder: Path, *, resume: bool) -> None:
    """Checks that a run can begin in this directory, or go on there; makes nothing yet.

    Raises:
      FileExistsError: if it holds something and ``resume`` is False.
      FileNotFoundError: if there is no run to resume.
    """
    if resume:
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"There is no run to resume in {folder}: it has no {CONFIG}.")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"The run directory {folder} is not empty. Choose another --out, or continue that run with --resume."
        )


def append_record(folder: Path, record: dict[str, Any]) -> None:
    """Adds one line to metrics.jsonl."""
    with open(folder / METRICS, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def keep_records(folder: Path, *, up_to_round: int) -> None:
    """Drops the lines of metrics.jsonl past a round, and a last line that a kill cut off."""
    path = folder / METRICS
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["round"] > up_to_round:
                break
        except (json.JSONDecodeError, KeyError, TypeError):
            break
        kept.append(line)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(unfinished, path)

"""Budget plans as TOML files, with errors that name the line."""

import dataclasses
import os
import re
import tomllib
from pathlib import Path
from typing import Any

from fedjax_rec.privacy.budget import Phase, Plan

EXAMPLE = """\
# A plan of everything that a project releases about its users. `fedjax-rec budget plan.toml` solves for the noise
# that keeps all of it together within one epsilon.
epsilon = 8.0
delta = 1e-4                       # well below 1 / num_users
num_users = 943
relation = "add_or_remove_one"     # or "replace_one"
unit = "user"                      # or "example"

[[phase]]                          # item counts, once: each user's histogram has norm at most 1
name = "popularity"
weight = 5.0                       # noise multipliers are in the ratio of the weights; one scale is solved for
num_numbers = 1682                 # numbers in a release, for the signal-to-noise ratio
signal = 0.1                       # norm of what users on average have in common, over the sensitivity

[[phase]]                          # rounds of federated training
name = "training"
rounds = 200
sampler = "poisson"                # "all", or "fixed_size" with relation = "replace_one"
cohort_size = 94
weight = 1.0
ratio = 1.5                        # noise of the first round over that of the last
sensitivity = 0.02                 # the clip norm
num_numbers = 13456                # 1682 items x 8
signal = 0.3

[[phase]]                          # two metrics in [0, 1], five times
name = "evaluation"
rounds = 5
noise_multiplier = 10.0            # given, not solved for
sensitivity = 1.4142
num_numbers = 2
signal = 0.1
"""

_PLAN_KEYS = tuple(field.name for field in dataclasses.fields(Plan) if field.name != "phases")
_NEEDED = ("epsilon", "delta", "num_users")
_PHASE_KEYS = tuple(field.name for field in dataclasses.fields(Phase) if field.name != "_")


def from_toml(path: str | os.PathLike) -> Plan:
    """Reads a plan.

    Raises:
      ValueError: a sentence with the file, the line, and the key and phase that are wrong.
      OSError: if the file cannot be read.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no TOML: {error}.") from error
    phases = values.pop("phase", [])
    if not isinstance(phases, list) or not all(isinstance(phase, dict) for phase in phases):
        raise ValueError(f"{path}, line {_line(text, 0, 'phase')}: write each phase under a [[phase]] of its own.")
    _check_keys(path, text, values, None, _PLAN_KEYS, _NEEDED, "the plan")
    made = []
    for place, phase in enumerate(phases):
        _check_keys(path, text, phase, place, _PHASE_KEYS, ("name",), f"phase {phase.get('name', place + 1)!r}")
        try:
            made.append(Phase(**phase))
        except ValueError as error:
            raise _located(path, text, place, error) from error
    try:
        return Plan(phases=tuple(made), **values)
    except (ValueError, TypeError) as error:
        named = [place for place, phase in enumerate(made) if f"phase {phase.name!r}" in str(error)]
        raise _located(path, text, named[0] if named else None, error) from error


def _check_keys(
    path: Path, text: str, values: dict[str, Any], place: int | None, known: tuple, needed: tuple, whose: str
) -> None:
    for key in values:
        if key not in known:
            line = _line(text, place, key)
            raise ValueError(f"{path}, line {line}: {whose} has no key {key!r}; the keys are {', '.join(known)}.")
    for key in needed:
        if key not in values:
            line = _line(text, place, key)
            raise ValueError(f"{path}, line {line}: {whose} needs {key!r}; add a line like {_example_of(key)!r}.")


def _example_of(key: str) -> str:
    return re.search(rf"^{key} = [^#\n]*", EXAMPLE, re.MULTILINE).group().strip()


def _located(path: Path, text: str, place: int | None, error: Exception) -> ValueError:
    """The error with the line of the key that its sentence starts with, or of its phase."""
    sentence = str(error)
    openings = {"The unit": "unit", "The neighbouring": "relation"}
    key = next((key for opening, key in openings.items() if sentence.startswith(opening)), sentence.split(" ", 1)[0])
    return ValueError(f"{path}, line {_line(text, place, key)}: {error}")


def _line(text: str, place: int | None, key: str) -> int:
    """Line of a key in the phase at a place (None: before all phases), or else where that part begins."""
    begins, current = 1, None
    for number, line in enumerate(text.splitlines(), start=1):
        if re.match(r"\s*\[\[\s*phase\s*\]\]", line):
            current = 0 if current is None else current + 1
            begins = number if current == place else begins
        elif current == place and re.match(rf"""\s*["']?{re.escape(key)}["']?\s*=""", line):
            return number
    return begins

"""The ledger: every release of a run, in order, under one unit and one neighbouring relation; and the budget.

Guarantee: ``Ledger.spent`` bounds the privacy loss of all entries together, for the ledger's unit and relation,
provided that each entry's event describes what was really released: noise of the stated multiplier relative to the
largest contribution of one unit, on a cohort really drawn as its sampler says. What is not in the ledger is not
covered.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dp_accounting import dp_event
from dp_accounting.dp_event import DpEvent

from fedjax_rec.privacy import accounting
from fedjax_rec.privacy.accounting import PrivacySpent
from fedjax_rec.privacy.calibration import max_rounds
from fedjax_rec.privacy.events import check_event, describe, from_dict, to_dict

SCHEMA_VERSION = 1

TRUST_MODELS = {
    "central": "The server sees the sum of the clipped updates and is trusted to add the noise and to drop the rest.",
    "secure_sum": "The server sees only the noised sum, by secure aggregation; it is trusted to follow the protocol.",
    "shuffled": "Each client adds noise to its own report; a trusted shuffler hides who sent it.",
    "silo": "Each silo adds the noise while it trains on its own records; it is trusted by those, and trusts nobody.",
    "local": "Each client adds noise to its own report; nobody is trusted.",
}
"""Who must be trusted for the epsilon to hold, by name."""


class BudgetExceeded(RuntimeError):
    """Raised before a release that would exceed the budget; nothing has been released."""


@dataclass(frozen=True)
class Entry:
    """One kind of release, ``count`` times in a row.

    Attributes:
      phase: what the run was doing: "training", "popularity", "distillation", ...
      event: dp_accounting event of ONE release, its sampling included.
      count: how many of them.
      sampler: how the cohort was drawn: "poisson", "fixed_size", "all", ...
      released: what became visible, in words.
    """

    phase: str
    event: DpEvent
    count: int
    sampler: str
    released: str

    def __post_init__(self):
        check_event(self.event)
        if not isinstance(self.count, int) or isinstance(self.count, bool) or self.count < 1:
            raise ValueError(f"An entry's count must be a positive integer; got {self.count!r}.")


@dataclass(frozen=True)
class Ledger:
    """What a run has released so far; an immutable value, so a checkpoint can hold it.

    Attributes:
      unit: "user" or "example": whom the guarantee is about; one per ledger.
      relation: "add_or_remove_one" or "replace_one"; one per ledger.
      trust_model: a key of ``TRUST_MODELS``.
      entries: the releases, in order; consecutive equal ones are merged.
    """

    unit: str = "user"
    relation: str = "add_or_remove_one"
    trust_model: str = "central"
    entries: tuple[Entry, ...] = ()

    def __post_init__(self):
        accounting.check_claim(delta=0.5, relation=self.relation, unit=self.unit)
        if self.trust_model not in TRUST_MODELS:
            raise ValueError(f"The trust model must be one of {', '.join(TRUST_MODELS)}; got {self.trust_model!r}.")

    def record(
        self,
        event: DpEvent,
        *,
        phase: str,
        released: str,
        sampler: str = "all",
        count: int = 1,
        unit: str | None = None,
        relation: str | None = None,
    ) -> "Ledger":
        """A ledger with ``count`` more releases; this one is unchanged.

        Args:
          event: of one release, sampling included.
          phase: as in ``Entry``.
          released: as in ``Entry``.
          sampler: as in ``Entry``.
          count: positive.
          unit: if given, must be the ledger's.
          relation: if given, must be the ledger's.

        Raises:
          ValueError: a sentence, if the unit or relation differs, or the event is malformed.
        """
        self._check_same("unit", self.unit, unit)
        self._check_same("neighbouring relation", self.relation, relation)
        entry = Entry(phase, event, count, sampler, released)
        if self.entries and replace(self.entries[-1], count=count) == entry:
            merged = replace(entry, count=self.entries[-1].count + count)
            return replace(self, entries=(*self.entries[:-1], merged))
        return replace(self, entries=(*self.entries, entry))

    def _check_same(self, what: str, own: str, given: str | None) -> None:
        if given is not None and given != own:
            raise ValueError(
                f"This ledger's {what} is {own!r}, and a release with {given!r} cannot be added to it: their epsilons "
                "do not compose. Keep a second ledger and report both."
            )

    @property
    def event(self) -> DpEvent:
        """All entries as one event."""
        return dp_event.ComposedDpEvent([_times(entry.event, entry.count) for entry in self.entries])

    def spent(self, delta: float) -> PrivacySpent:
        """The epsilon of all entries together, composed jointly (not summed)."""
        return accounting.privacy_spent(self.event, delta=delta, relation=self.relation, unit=self.unit)

    def phase(self, name: str) -> "Ledger":
        """Only the entries of one phase; what it would have cost alone."""
        return replace(self, entries=tuple(entry for entry in self.entries if entry.phase == name))

    def rows(self) -> Iterator[dict[str, Any]]:
        """One flat dict an entry, for tables: phase, released, mechanism, count, sampler, unit, relation."""
        for entry in self.entries:
            yield {
                "phase": entry.phase,
                "released": entry.released,
                "mechanism": describe(entry.event),
                "count": entry.count,
                "sampler": entry.sampler,
                "unit": self.unit,
                "relation": self.relation,
            }

    def to_json(self, *, delta: float | None = None) -> str:
        """The ledger as indented JSON; with ``delta``, also what it spent, for readers (loading recomputes it)."""
        body = _body(self)
        document = {"schema_version": SCHEMA_VERSION, **body, "fingerprint": _fingerprint(body)}
        if delta is not None:
            document["spent"] = spent_to_dict(self.spent(delta))
        return json.dumps(document, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Ledger":
        """The inverse of ``to_json``.

        Raises:
          ValueError: a sentence, if the text is no ledger, was changed by hand, or is of another schema version.
        """
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"The ledger is not JSON, at line {error.lineno}: {error.msg}. {_RESTORE}") from error
        if not isinstance(document, dict) or "schema_version" not in document:
            raise ValueError(f'This is no ledger: it has no "schema_version". {_RESTORE}')
        if document["schema_version"] != SCHEMA_VERSION:
            raise ValueError(
                f"The ledger has schema version {document['schema_version']!r}, and this fedjax_rec reads "
                f"{SCHEMA_VERSION}. Use the version that wrote it."
            )
        try:
            entries = tuple(_entry_from_dict(entry) for entry in document["entries"])
            ledger = cls(document["unit"], document["relation"], document["trust_model"], entries)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"the field {error} is missing" if isinstance(error, KeyError) else str(error).rstrip(".")
            raise ValueError(f"The ledger is damaged: {reason}. {_RESTORE}") from error
        if document.get("fingerprint") != _fingerprint(_body(ledger)):
            raise ValueError(f"The ledger was changed after it was written: its fingerprint does not match. {_RESTORE}")
        return ledger

    def save(self, path: str | os.PathLike, *, delta: float | None = None) -> None:
        """Writes ``to_json`` to a file; a reader, or a full disk, never meets half a ledger."""
        path = Path(path)
        unfinished = path.with_name(path.name + ".unfinished")
        try:
            unfinished.write_text(self.to_json(delta=delta), encoding="utf-8")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Ledger":
        """Reads what ``save`` wrote.

        Raises:
          FileNotFoundError: if there is no such file.
          ValueError: a sentence that names the file, as ``from_json``.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


_RESTORE = "Restore it from the run's checkpoint; without its ledger a run's epsilon is unknown."


def _times(event: DpEvent, count: int) -> DpEvent:
    return event if count == 1 else dp_event.SelfComposedDpEvent(event, count)


def _body(ledger: Ledger) -> dict[str, Any]:
    entries = [{**vars(entry), "event": to_dict(entry.event)} for entry in ledger.entries]
    return {
        "unit": ledger.unit,
        "relation": ledger.relation,
        "trust_model": ledger.trust_model,
        "entries": entries,
    }


def _fingerprint(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _entry_from_dict(data: dict[str, Any]) -> Entry:
    words = {name: data[name] for name in ("phase", "sampler", "released")}
    for name, value in words.items():
        if not isinstance(value, str):
            raise ValueError(f"{name} of an entry must be text; got {value!r}")
    return Entry(event=from_dict(data["event"]), count=data["count"], **words)


def spent_to_dict(spent: PrivacySpent) -> dict[str, Any]:
    """The fields of a ``PrivacySpent`` as JSON values; an infinite epsilon is the string "inf"."""
    return {**asdict(spent), "epsilon": "inf" if spent.epsilon == math.inf else spent.epsilon}


@dataclass(frozen=True)
class Budget:
    """The most that a run may spend; checked before a release, never after.

    Attributes:
      epsilon: positive; infinite = no budget.
      delta: in (0, 1).
    """

    epsilon: float
    delta: float

    def __post_init__(self):
        if not self.epsilon > 0:
            raise ValueError(f"The budget's epsilon must be positive; got {self.epsilon!r}.")
        accounting.check_claim(delta=self.delta, relation="add_or_remove_one", unit="user")

    def allows(self, ledger: Ledger, event: DpEvent, *, count: int = 1) -> bool:
        """Whether ``count`` more releases of ``event`` keep the ledger within the budget."""
        return self._after(ledger, event, count).epsilon <= self.epsilon

    def require(self, ledger: Ledger, event: DpEvent, *, count: int = 1) -> None:
        """Returns if ``allows``.

        Raises:
          BudgetExceeded: a sentence with the epsilon that the release would have led to.
        """
        after = self._after(ledger, event, count)
        if after.epsilon > self.epsilon:
            raise BudgetExceeded(
                f"{count} x {describe(event)} would raise epsilon to {after.epsilon:.6g} at delta {self.delta:g} "
                f"({ledger.unit}-level, {ledger.relation}), above the budget of {self.epsilon:g}; nothing released. "
                "Add noise, take fewer rounds, or raise the budget."
            )

    def _after(self, ledger: Ledger, event: DpEvent, count: int) -> PrivacySpent:
        joint = dp_event.ComposedDpEvent([ledger.event, _times(event, count)])
        return accounting.privacy_spent(joint, delta=self.delta, relation=ledger.relation, unit=ledger.unit)


def affordable_rounds(ledger: Ledger, event: DpEvent, budget: Budget, *, limit: int = 10**7) -> int:
    """How many more releases of ``event`` the budget allows; ask once, before the loop.

    Args:
      ledger: what has been released.
      event: what one round releases.
      budget: the most that may be spent.
      limit: never answers more.

    Returns:
      0 if the budget is spent; ``limit`` if it is infinite.
    """
    if budget.epsilon == math.inf:
        return limit
    return max_rounds(
        event,
        target_epsilon=budget.epsilon,
        delta=budget.delta,
        relation=ledger.relation,
        prior=ledger.event,
        limit=limit,
    )

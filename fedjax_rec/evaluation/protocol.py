"""How a number was measured, as one value: the split, who is a negative, what is ranked, which round is reported.

Papers of one field differ in each of these, and each alone moves hit@10 by tens of points. Two results are comparable
exactly if their protocols, and the splits that these make, are equal.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass

from fedjax_rec.data.clients import EXCLUSION_RULES
from fedjax_rec.data.interactions import Interactions
from fedjax_rec.data.split import Split, leave_one_out
from fedjax_rec.data.ties import TIE_RULES
from fedjax_rec.evaluation.metrics import TIES

SELECTIONS = ("best validation round", "best test round", "last round")
SCORED = ("client", "server")
DRAWS = ("expectation", "one draw")


@dataclass(frozen=True)
class Protocol:
    """The rules of one evaluation.

    Attributes:
      name: for people; not part of the fingerprint.
      tie_rule: which of several rows with the latest timestamp is held out, see `data.ties`.
      split_seed: of the hash.
      exclusion: what training negatives avoid: "strict" (the user's training items) or "paper" (also the held-out
        ones, which tells training what the answer is).
      num_negatives: negatives ranked against each held-out item, uniform, in expectation; None ranks the catalogue.
      draw: "expectation" over the draw of those negatives, or "one draw" of them for a run, kept for all its rounds, as
        published code has it: a sample of 99 for a thousand users alone moves hit@10 by about a point.
      ks: cut-offs.
      ties: what equal scores mean, see `evaluation.metrics`.
      selection: which round is reported.
      scored: "client" ranks with what each client has just trained, "server" with the shared parameters of the round
        and the client's private ones.

    Raises:
      ValueError: for an unknown rule; the message lists the known ones.
    """

    name: str
    tie_rule: str = "hash"
    split_seed: int = 0
    exclusion: str = "strict"
    num_negatives: int | None = None
    draw: str = "expectation"
    ks: tuple[int, ...] = (10,)
    ties: str = "expected"
    selection: str = "best validation round"
    scored: str = "client"

    def __post_init__(self) -> None:
        known = {
            "tie_rule": TIE_RULES,
            "exclusion": EXCLUSION_RULES,
            "draw": DRAWS,
            "ties": TIES,
            "selection": SELECTIONS,
            "scored": SCORED,
        }
        for field, values in known.items():
            if getattr(self, field) not in values:
                raise ValueError(f"{field} must be one of {', '.join(values)}; got {getattr(self, field)!r}.")
        if self.draw != "expectation" and self.num_negatives is None:
            raise ValueError(f"draw={self.draw!r} needs num_negatives; without it the catalogue is ranked.")

    def split(self, interactions: Interactions) -> Split:
        """Leave-one-out: the latest row to test, the second latest to validation."""
        return leave_one_out(interactions, tie_rule=self.tie_rule, seed=self.split_seed)

    def fingerprint(self, split: Split) -> str:
        """Sha256 (hex) over the rules and the split that they made: equal exactly when results are comparable."""
        rules = {key: value for key, value in dataclasses.asdict(self).items() if key != "name"}
        if self.draw == "expectation":
            del rules["draw"]  # the field is younger than some results
        return hashlib.sha256((json.dumps(rules, sort_keys=True) + split.fingerprint).encode()).hexdigest()

    @property
    def suffix(self) -> str:
        """What metric names end in: "/99neg", or nothing for the whole catalogue."""
        return "" if self.num_negatives is None else f"/{self.num_negatives}neg"

    def describe(self) -> str:
        """The rules in one line."""
        how = {"expectation": "in expectation", "one draw": "drawn once"}[self.draw]
        ranked = "full ranking" if self.num_negatives is None else f"{self.num_negatives} negatives {how}"
        return (
            f"leave-one-out, {self.tie_rule} ties in time, training negatives avoid "
            f"{'training items only' if self.exclusion == 'strict' else 'held-out items too'}, {ranked}, "
            f"{self.ties} ties in score, {self.selection}, scored by the {self.scored}"
        )


PFEDREC_PAPER = Protocol("pfedrec_paper", "file_first", exclusion="paper", num_negatives=99, ties="pessimistic")
"""Zhang et al. (2023): held-out items are never training negatives; ties count against the positive. The authors fix
one draw of 99 negatives; here the draw is in expectation."""

FEDRAP_PAPER = dataclasses.replace(PFEDREC_PAPER, name="fedrap_paper", selection="best test round")
"""Li et al. (2024): as PFedRec, and the round is chosen by the test set."""

NCF = Protocol("ncf", "file_first", exclusion="strict", num_negatives=99, selection="best test round")
"""He et al. (2017), "Neural Collaborative Filtering": training negatives avoid training items only."""

STRICT_99 = dataclasses.replace(PFEDREC_PAPER, name="strict_99", exclusion="strict")
"""PFedRec's protocol without its leak."""

STRICT_FULL = dataclasses.replace(STRICT_99, name="strict_full", num_negatives=None)
"""The same against the whole catalogue."""

PAPER_FULL = dataclasses.replace(PFEDREC_PAPER, name="paper_full", num_negatives=None)
"""PFedRec's training negatives, the whole catalogue ranked."""

PRESETS = {
    protocol.name: protocol for protocol in (PFEDREC_PAPER, FEDRAP_PAPER, NCF, STRICT_99, STRICT_FULL, PAPER_FULL)
}
"""The protocols of papers, and the same without the leak, by name."""

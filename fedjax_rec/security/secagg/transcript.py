"""What happened in one secure sum: messages, bytes, who fell silent when, and what the server got to see."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from scipy.stats import chi2

from fedjax_rec.security.secagg.config import RoundTerms
from fedjax_rec.security.secagg.stages import STAGES

SHOWN_WORDS = 16
_BINS = 16


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Messages and bytes of one stage: up from the clients to the server, and down from it."""

    messages_up: int = 0
    bytes_up: int = 0
    messages_down: int = 0
    bytes_down: int = 0


@dataclasses.dataclass(frozen=True)
class ServerView:
    """What the server saw beside the sum: masked vectors, and the secrets that it rebuilt to unmask the sum.

    Attributes:
      client: whose upload came first.
      masked: the first words of that upload, `SHOWN_WORDS` at most.
      masked_counts: how many of all masked words fell into each sixteenth of the ring, from the lowest.
      num_self_seeds: rebuilt, one for each survivor.
      num_mask_keys: rebuilt, one for each client who shared keys and did not upload.
    """

    client: int
    masked: tuple[int, ...]
    masked_counts: tuple[int, ...]
    num_self_seeds: int
    num_mask_keys: int

    @property
    def uniform_p_value(self) -> float:
        """Of the chi-squared test that masked words are uniform; small for masks that do not hide."""
        counts = np.array(self.masked_counts, float)
        statistic = ((counts - counts.mean()) ** 2).sum() / counts.mean()
        return float(chi2.sf(statistic, _BINS - 1))


@dataclasses.dataclass(frozen=True)
class Transcript:
    """One finished round.

    Attributes:
      terms: what was agreed before.
      clients: who was invited.
      survivors: whose vectors are in the sum.
      dropped: client -> the first stage at which it was silent.
      stages: stage -> its traffic. Sizes are of the messages as sent, without what a network adds.
      bytes_up: client -> bytes that it sent.
      bytes_down: client -> bytes that it was sent.
      server_view: what the server saw beside the sum.
    """

    terms: RoundTerms
    clients: tuple[int, ...]
    survivors: tuple[int, ...]
    dropped: Mapping[int, str]
    stages: Mapping[str, Traffic]
    bytes_up: Mapping[int, int]
    bytes_down: Mapping[int, int]
    server_view: ServerView

    @property
    def total_bytes(self) -> int:
        """Of all messages, both ways."""
        return sum(self.bytes_up.values()) + sum(self.bytes_down.values())

    @property
    def expansion(self) -> float:
        """Bytes that the largest upload took, over the bytes of the bare vector."""
        return max(self.bytes_up.values(), default=0) / (4 * self.terms.num_words)

    def __rich__(self):
        from rich.console import Group
        from rich.table import Table

        table = Table("stage", "silent from here", "messages up", "bytes up", "messages down", "bytes down")
        for stage in STAGES:
            traffic = self.stages[stage]
            silent = sorted(client for client, since in self.dropped.items() if since == stage)
            numbers = (traffic.messages_up, traffic.bytes_up, traffic.messages_down, traffic.bytes_down)
            names = ", ".join(map(str, silent)) if len(silent) <= 6 else f"{len(silent)} clients"
            table.add_row(stage, names, *(f"{number:,}" for number in numbers))
        view, terms = self.server_view, self.terms
        return Group(
            table,
            f"{len(self.clients)} clients, {terms.degree} neighbours each; {terms.threshold} of the {terms.degree + 1} "
            f"holders of a secret rebuild it; {len(self.survivors)} clients are in the sum. {self.total_bytes:,} bytes "
            f"in all; a client sent at most {max(self.bytes_up.values()):,}, {self.expansion:.3g} times its bare "
            "vector.",
            f"The server saw {sum(view.masked_counts):,} masked words (test for a uniform distribution: p = "
            f"{view.uniform_p_value:.2g}), the sum, who is in it, {view.num_self_seeds} self seeds of clients who "
            f"uploaded, and {view.num_mask_keys} mask keys of clients who did not: both of no client.",
        )


def histogram(words: np.ndarray) -> np.ndarray:
    """How many of the uint32 words fall into each sixteenth of the ring, int64 ``[16]``."""
    return np.bincount(words >> np.uint32(28), minlength=_BINS)

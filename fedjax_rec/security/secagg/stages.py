"""The stages of a round, and what a party does when a message does not fit: refuse, and stay refused."""

import contextlib
from collections.abc import Iterator

STAGES = ("keys", "shares", "upload", "consistency", "unmask")
"""What a client sends, in this order: public keys, sealed shares, masked words, tags of the lists, shares asked for."""


class ProtocolError(RuntimeError):
    """A party refuses to go on: a message is wrong, late, repeated or forged, or too few clients are left."""


class Progress:
    """Where one party is in a round. Steps come in order, and after a refusal no step is taken any more."""

    def __init__(self, who: str):
        self._who, self.stage = who, STAGES[0]

    @contextlib.contextmanager
    def step(self, stage: str, *, then: str) -> Iterator[None]:
        """Runs one step: from ``stage`` on to ``then``, or to "refused" if anything goes wrong inside.

        Raises:
          ProtocolError: if the party is at another stage.
        """
        at, self.stage = self.stage, "refused"
        if at == "refused":
            raise ProtocolError(f"{self._who} has refused this round; nothing more comes from it. Begin a new round.")
        if at != stage:
            raise ProtocolError(f'{self._who} was asked for a step of stage "{stage}" at stage "{at}", and refuses.')
        yield
        self.stage = then

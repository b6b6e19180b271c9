"""What all parties of a secure sum agree on before it begins: public numbers, checked together."""

import dataclasses
import hashlib

from fedjax_rec.security.graph import graph_parameters
from fedjax_rec.security.secagg.stages import ProtocolError


@dataclasses.dataclass(frozen=True)
class RoundTerms:
    """What every client and the server of one round know from the start, and check in each message.

    Attributes:
      session: 16 bytes that name the run.
      round_index: number of the round.
      num_words: length of every vector.
      degree: neighbours per client.
      threshold: t, how many of the ``degree + 1`` holders of a secret rebuild it.
      min_clients: fewer survivors than these get no sum.
    """

    session: bytes
    round_index: int
    num_words: int
    degree: int
    threshold: int
    min_clients: int

    def context(self, label: bytes, *ids: int) -> bytes:
        """A byte string that no other use of a key has: label, session, round and parties."""
        numbers = b"".join(number.to_bytes(8, "little") for number in (self.round_index, *ids))
        return b"fedjax-rec secagg " + label.ljust(16) + self.session + numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class SecAggConfig:
    """A secure sum over uint32 words modulo 2^32.

    Guarantee: for a server that follows the protocol and is curious, pooling what it sees with up to ``threshold - 1``
    neighbours of a client: of the client's vector, they learn no more than the sum of the survivors' vectors tells
    them, under the usual assumptions on X25519, HKDF-SHA256, AES-256 and ChaCha20-Poly1305. On a sparse graph it holds
    except for the small chance that `graph_parameters` bounds, provided that who colludes and who drops out does not
    depend on the graph, which is drawn from a hash of session and round. Not promised: anything against a server that
    deviates (it hands out the public keys, and nothing here proves whose they are), that the vectors make sense, or
    differential privacy of the sum.

    Attributes:
      num_words: length of every vector.
      session: name of the run, different for every run: messages of another session are refused.
      degree: neighbours per client, even; a cohort that is no larger takes its complete graph. None: as
        `graph_parameters` says for the cohort.
      threshold: t, how many of the ``degree + 1`` holders of a secret (the client and its neighbours) rebuild it. More
        protect against more colluding neighbours, fewer survive more dropouts. None: as `graph_parameters` says.
      min_clients: a sum of fewer survivors is refused, at least 2; colluding clients can subtract their own vectors, so
        ask for more than may collude.
      majority: ask for ``t > (degree + 1) / 2``. Then no two disjoint groups of holders can each rebuild a secret, so
        a server that tells some neighbours that a client survived and others that it dropped does not get both its
        secrets, unless neighbours collude too. The honest-but-curious guarantee does not need it.
    """

    num_words: int
    session: str
    degree: int | None = None
    threshold: int | None = None
    min_clients: int = 2
    majority: bool = False

    def __post_init__(self):
        if self.num_words < 1:
            raise ValueError(f"num_words must be at least 1; got {self.num_words}.")
        if not self.session:
            raise ValueError("session must name this run; an empty name would let messages of other runs in.")
        if self.min_clients < 2:
            raise ValueError(
                f"min_clients must be at least 2: a sum of one vector is the vector; got {self.min_clients}."
            )
        if self.degree is not None and self.degree < 1:
            raise ValueError(f"degree must be at least 1; got {self.degree}.")
        if self.degree is None and self.threshold is not None:
            raise ValueError(f"A threshold of {self.threshold} says nothing without a degree; give both or neither.")
        if self.degree is not None and self.threshold is not None:
            _check_threshold(self.degree, self.threshold, self.majority)

    def for_cohort(self, num_clients: int, *, round_index: int) -> RoundTerms:
        """The terms of one round.

        Raises:
          ValueError: if the degree, the threshold or the round's number is none that such a cohort can have.
          ProtocolError: for a cohort below `min_clients`, or below the threshold.
        """
        least = max(self.min_clients, self.threshold or 0)
        if num_clients < least:
            raise ProtocolError(
                f"A cohort of {num_clients} gets no secure sum: min_clients and threshold ask for {least}. Nothing was "
                "sent."
            )
        if not 0 <= round_index < 2**32:
            raise ValueError(f"round_index must be from 0 to 2^32 - 1; got {round_index}.")
        degree, threshold = self.degree, self.threshold
        if degree is None:
            degree, threshold = graph_parameters(num_clients, majority=self.majority)
        degree = min(degree, num_clients - 1)
        if degree % 2 and degree != num_clients - 1:
            raise ValueError(
                f"degree must be even for {num_clients} clients, half on either side of the circle; got {degree}."
            )
        if threshold is None:
            threshold = (degree + 1) // 2 + 1
        _check_threshold(degree, threshold, self.majority)
        session = hashlib.sha256(self.session.encode()).digest()[:16]
        return RoundTerms(session, round_index, self.num_words, degree, threshold, self.min_clients)


def _check_threshold(degree: int, threshold: int, majority: bool) -> None:
    if not 2 <= threshold <= degree + 1:
        raise ValueError(
            f"threshold must be from 2 (with 1, a single holder has the secret) to {degree + 1}, the client and its "
            f"{degree} neighbours; got {threshold}."
        )
    if majority and 2 * threshold <= degree + 1:
        raise ValueError(
            f"With majority, the threshold must be more than half of the {degree + 1} holders of a secret, at least "
            f"{(degree + 1) // 2 + 1}; got {threshold}. Raise it, or give up the protection from split survivor lists."
        )

"""Runs secure sums: every client, the server and the network between them, in one process.

The cryptography is real, and every message is a byte string made by one party and read by another. The parties are
simulated: one process holds all of them, so whoever reads its memory reads every vector. It shows what the protocol
computes, costs and refuses; it protects nobody's data by itself.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import numpy as np

from fedjax_rec.security.secagg.client import Client
from fedjax_rec.security.secagg.config import SecAggConfig
from fedjax_rec.security.secagg.messages import MaskedInput, decode
from fedjax_rec.security.secagg.server import Server
from fedjax_rec.security.secagg.stages import STAGES
from fedjax_rec.security.secagg.transcript import SHOWN_WORDS, ServerView, Traffic, Transcript, histogram

Entropy = Callable[[int], bytes]
NOBODY: Mapping[int, str] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class SumResult:
    """A secure sum.

    Attributes:
      total: uint32 ``[num_words]``, the sum of the survivors' vectors modulo 2^32.
      survivors: whose vectors are in it, in rising order.
      transcript: what happened.
    """

    total: np.ndarray
    survivors: tuple[int, ...]
    transcript: Transcript


def secure_sum(
    vectors: Mapping[int, np.ndarray] | np.ndarray,
    *,
    config: SecAggConfig,
    round_index: int = 0,
    dropped: Mapping[int, str] = NOBODY,
    entropy: Entropy = os.urandom,
) -> SumResult:
    """The sum of the clients' vectors modulo 2^32, by the protocol of Bonawitz et al. (2017) on a sparse graph.

    Guarantee: as `SecAggConfig` says, between parties that are apart; here one process plays all of them.

    Args:
      vectors: client -> uint32 ``[num_words]``, or ``[n, num_words]`` for clients 0 to n - 1.
      config: public numbers.
      round_index: number of the round; a message of another round is refused.
      dropped: client -> the first of `STAGES` at which it is silent: "keys", "shares" and "upload" leave its vector
        out, "consistency" and "unmask" leave it in.
      entropy: gives so many unpredictable bytes.

    Raises:
      ValueError: for vectors or stages that do not fit the config.
      ProtocolError: if the cohort is too small, or too few clients are left; no sum comes out then.
    """
    vectors = vectors if isinstance(vectors, Mapping) else dict(enumerate(np.asarray(vectors)))
    run = HostSum(config, entropy=entropy)
    run.begin(vectors, round_index, dropped=dropped)
    for client, words in vectors.items():
        if dropped.get(client, STAGES[-1]) in ("consistency", "unmask"):
            run.upload(client, words)
    total, survivors = run.finish()
    return SumResult(total, survivors, run.transcript)


class HostSum:
    """A secure sum whose vectors come one by one, as a training round makes them.

    For each round ``begin(cohort, round_index)``, ``upload(client, words)`` for every client who has something to send,
    then ``finish()``. A vector is masked and added as it comes, and not kept: memory is a few keys for each pair of
    neighbours and one vector. One process plays all parties: real cryptography, simulated network.

    Args:
      config: public numbers, for all rounds.
      entropy: gives so many unpredictable bytes; keys are fresh in every round.
    """

    def __init__(self, config: SecAggConfig, *, entropy: Entropy = os.urandom):
        self._config, self._entropy = config, entropy
        self._open = False
        self._transcript: Transcript | None = None

    @property
    def transcript(self) -> Transcript:
        """Of the round that was finished last.

        Raises:
          ValueError: before the first round is finished.
        """
        if self._transcript is None:
            raise ValueError("There is no transcript before a round is finished.")
        return self._transcript

    def begin(self, client_ids: Iterable[int], round_index: int, *, dropped: Mapping[int, str] = NOBODY) -> None:
        """Stages "keys" and "shares", for all clients of the cohort. A round that was left open is forgotten.

        Raises:
          ValueError: for a config that suits no cohort of this size, or a stage that does not exist.
          ProtocolError: if the cohort is too small, or too few clients got through both stages.
        """
        cohort = [int(client) for client in client_ids]
        _check_cohort(cohort, dropped)
        self._open = False
        self._terms = self._config.for_cohort(len(cohort), round_index=int(round_index))
        self._cohort, self._dropped, self._post = cohort, dict(dropped), _Post()
        self._server = Server(self._terms, cohort, graph_seed=self._terms.context(b"graph"))
        self._clients = {
            client: Client(client, self._terms, entropy=self._entropy) for client in self._talking("keys", cohort)
        }
        self._counts, self._example = np.zeros(16, np.int64), ()
        for client in self._clients:
            self._up("keys", client, self._clients[client].advertise())
        rosters = self._down("keys", self._server.send_rosters())
        for client in self._talking("shares", rosters):
            self._up("shares", client, self._clients[client].share(rosters[client]))
        inboxes = self._down("shares", self._server.send_inboxes())
        for client, inbox in inboxes.items():
            self._clients[client].open_inbox(inbox)
        self._open = True

    def upload(self, client_id: int, words: np.ndarray) -> None:
        """Stage "upload" of one client: masks its vector, uint32 ``[num_words]``, and adds it up.

        Raises:
          ValueError: before `begin`, for a client who is not in the round, or for a vector of another type or length.
          ProtocolError: for a second vector of the same client.
        """
        client_id = int(client_id)
        if not self._open:
            raise ValueError(f"Client {client_id} uploads before a round has begun; call begin first.")
        if client_id not in self._clients or client_id not in self._talking("upload", self._clients):
            raise ValueError(f"Client {client_id} is not in this round, or has dropped out of it.")
        words = np.asarray(words)
        if words.dtype != np.uint32 or words.shape != (self._config.num_words,):
            raise ValueError(
                f"Client {client_id} uploads {words.dtype} {list(words.shape)}; the round has uint32 "
                f"[{self._config.num_words}]."
            )
        masked = self._clients[client_id].mask(words)
        seen = decode(masked, MaskedInput).words
        self._counts += histogram(seen)
        if not self._example:
            self._example = (client_id, tuple(seen[:SHOWN_WORDS].tolist()))
        self._up("upload", client_id, masked)

    def finish(self) -> tuple[np.ndarray, tuple[int, ...]]:
        """Stages "consistency" and "unmask"; clients of the cohort who did not upload count as dropped.

        Returns:
          The sum modulo 2^32, uint32 ``[num_words]``, and the clients whose vectors are in it.

        Raises:
          ValueError: before `begin`.
          ProtocolError: if too few clients are left, or a share is wrong; no sum comes out then.
        """
        if not self._open:
            raise ValueError("There is no round to finish; call begin first.")
        self._open = False
        lists = self._down("upload", self._server.send_survivors())
        for client in self._talking("consistency", lists):
            self._up("consistency", client, self._clients[client].confirm(lists[client]))
        tags = self._down("consistency", self._server.send_confirmations())
        for client in self._talking("unmask", tags):
            self._up("unmask", client, self._clients[client].reveal(tags[client]))
        total, survivors = self._server.finish()
        self._transcript = self._write(survivors)
        return total, survivors

    def _talking(self, stage: str, clients: Iterable[int]) -> list[int]:
        """Those of the clients who are not silent yet."""
        at = STAGES.index(stage)
        return [c for c in clients if c not in self._dropped or STAGES.index(self._dropped[c]) > at]

    def _up(self, stage: str, client: int, data: bytes) -> None:
        self._post.up[stage, client] += len(data)
        self._server.receive(data)

    def _down(self, stage: str, messages: dict[int, bytes]) -> dict[int, bytes]:
        for client, data in messages.items():
            self._post.down[stage, client] += len(data)
        return messages

    def _write(self, survivors: tuple[int, ...]) -> Transcript:
        post = self._post
        shared = {client for stage, client in post.up if stage == "shares"}
        missing = {client: "upload" for client in shared - set(survivors)}
        stages = {
            stage: Traffic(
                sum(at == stage for at, _ in post.up),
                sum(size for (at, _), size in post.up.items() if at == stage),
                sum(at == stage for at, _ in post.down),
                sum(size for (at, _), size in post.down.items() if at == stage),
            )
            for stage in STAGES
        }
        return Transcript(
            terms=self._terms,
            clients=tuple(sorted(self._cohort)),
            survivors=survivors,
            dropped=missing | self._dropped,
            stages=stages,
            bytes_up=_by_client(post.up),
            bytes_down=_by_client(post.down),
            server_view=ServerView(
                *self._example,
                masked_counts=tuple(self._counts.tolist()),
                num_self_seeds=len(survivors),
                num_mask_keys=len(shared) - len(survivors),
            ),
        )


@dataclasses.dataclass(frozen=True)
class _Post:
    """Bytes of each (stage, client), both ways; one message each."""

    up: Counter = dataclasses.field(default_factory=Counter)
    down: Counter = dataclasses.field(default_factory=Counter)


def _by_client(sizes: Mapping[tuple[str, int], int]) -> dict[int, int]:
    found = Counter()
    for (_, client), size in sizes.items():
        found[client] += size
    return dict(sorted(found.items()))


def _check_cohort(cohort: list[int], dropped: Mapping[int, str]) -> None:
    if len(set(cohort)) != len(cohort):
        raise ValueError(f"A cohort names every client once; got {len(cohort)} numbers of {len(set(cohort))} clients.")
    unknown = {client: stage for client, stage in dropped.items() if client not in cohort or stage not in STAGES}
    if unknown:
        raise ValueError(f"dropped must give clients of the cohort and one of {', '.join(STAGES)}; got {unknown}.")

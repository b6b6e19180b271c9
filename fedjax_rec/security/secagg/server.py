"""The server's side of one round of a secure sum: it forwards, adds masked vectors up, and removes masks at the end.

It holds no secret of a client before the last stage, and then only what unmasks the sum: self seeds of clients who
uploaded, and mask keys of clients who did not.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from fedjax_rec.security import shamir
from fedjax_rec.security.graph import neighbors, public_permutation
from fedjax_rec.security.secagg import primitives
from fedjax_rec.security.secagg.client import pair_seed, pair_sign
from fedjax_rec.security.secagg.config import RoundTerms
from fedjax_rec.security.secagg.messages import (
    SERVER,
    Confirmation,
    Confirmed,
    Header,
    Inbox,
    Keys,
    MaskedInput,
    Reveal,
    Roster,
    Shares,
    Survivors,
    decode,
    encode,
)
from fedjax_rec.security.secagg.stages import STAGES, Progress, ProtocolError

_EXPECTED = dict(zip(STAGES, (Keys, Shares, MaskedInput, Confirmation, Reveal), strict=True))


class Server:
    """The server in one round. `receive` takes what clients send; a `send_...` closes a stage and gives the answers.

    Whoever has not been heard when a stage closes has dropped out. `finish` gives the sum. It fails closed: after any
    refusal, be it of a late or repeated message, no sum comes out of this object. (A deployment may drop such messages
    before they get here.)

    Args:
      terms: of the round.
      cohort: numbers of the invited clients, distinct.
      graph_seed: public randomness; must not be known when clients are chosen to collude.
    """

    def __init__(self, terms: RoundTerms, cohort: Iterable[int], *, graph_seed: bytes):
        self._terms, self._graph_seed = terms, graph_seed
        self._progress = Progress("The server")
        self._expected = set(cohort)  # whom this stage may still hear from
        self._heard: set[int] = set()
        self._keys: dict[int, Keys] = {}
        self._public_keys: set[bytes] = set()
        self._shared: dict[int, Shares] = {}
        self._neighbors: dict[int, set[int]] = {}  # in the roster's graph
        self._survivors: set[int] = set()
        self._total = np.zeros(terms.num_words, np.uint32)
        self._tags: dict[int, Mapping[int, bytes]] = {}
        self._reveals: dict[int, Reveal] = {}

    @property
    def stage(self) -> str:
        """The stage that messages are received for; "done" or "refused" at the end."""
        return self._progress.stage

    def receive(self, data: bytes) -> None:
        """Takes one message of the present stage.

        Raises:
          ProtocolError: for a message of another stage, round or session, of somebody not in this stage, or a second
            one of the same client.
        """
        stage = self.stage
        with self._progress.step(stage if stage in STAGES else STAGES[0], then=stage):
            message = decode(data, _EXPECTED[stage])
            sender = message.header.sender
            if message.header != Header(self._terms.session, self._terms.round_index, sender, SERVER):
                raise ProtocolError(f"A message of client {sender} is of another session or round: a replay?")
            if sender in self._heard:
                raise ProtocolError(f'Client {sender} sent a second message at stage "{stage}": a replay?')
            if sender not in self._expected:
                raise ProtocolError(f'Client {sender} is not in this round at stage "{stage}"; it may be late.')
            self._heard.add(sender)
            self._takers[stage](sender, message)

    def send_rosters(self) -> dict[int, bytes]:
        """Closes stage "keys": draws the graph, and gives every client its neighbours' public keys."""
        with self._progress.step("keys", then="shares"):
            clients = sorted(self._heard)
            degree = self._roster_degree(len(clients))
            order = public_permutation(len(clients), self._graph_seed)
            graph = neighbors(len(clients), degree=degree, permutation=order)
            self._neighbors = {
                client: {clients[place] for place in places} for client, places in zip(clients, graph, strict=True)
            }
            self._next_stage()
            both = {client: keys.mask_key + keys.channel_key for client, keys in self._keys.items()}
            return self._to_all(lambda c: Roster(self._header(c), {other: both[other] for other in self._neighbors[c]}))

    def send_inboxes(self) -> dict[int, bytes]:
        """Closes stage "shares": forwards the sealed shares."""
        with self._progress.step("shares", then="upload"):
            self._check_enough(self._heard, among=self._heard, did="shared their keys")
            self._next_stage()
            boxes = {client: {} for client in self._shared}
            for owner, message in self._shared.items():
                for holder in boxes.keys() & message.sealed.keys():
                    boxes[holder][owner] = message.sealed[holder]
            return self._to_all(lambda client: Inbox(self._header(client), boxes[client]))

    def send_survivors(self) -> dict[int, bytes]:
        """Closes stage "upload": tells the survivors who they are, and who dropped out after sharing keys."""
        with self._progress.step("upload", then="consistency"):
            self._check_enough(self._heard, among=self._shared, did="uploaded")
            self._survivors = set(self._heard)
            self._next_stage()
            lists = tuple(sorted(self._survivors)), tuple(sorted(self._shared.keys() - self._survivors))
            return self._to_all(lambda client: Survivors(self._header(client), *lists))

    def send_confirmations(self) -> dict[int, bytes]:
        """Closes stage "consistency": forwards the tags."""
        with self._progress.step("consistency", then="unmask"):
            self._check_enough(self._heard, among=self._shared, did="confirmed the survivors")
            self._next_stage()

            def confirmed(client: int) -> Confirmed:
                tags = {
                    sender: self._tags[sender].get(client) for sender in self._neighbors[client] & self._tags.keys()
                }
                return Confirmed(self._header(client), {sender: tag for sender, tag in tags.items() if tag is not None})

            return self._to_all(confirmed)

    def finish(self) -> tuple[np.ndarray, tuple[int, ...]]:
        """Closes stage "unmask": rebuilds and checks the secrets of the masks still in the sum, and removes these.

        Returns:
          The sum of the survivors' vectors modulo 2^32, uint32 ``[num_words]``, and the survivors.

        Raises:
          ProtocolError: if fewer than t shares of a secret came, or one does not fit what its owner published.
        """
        with self._progress.step("unmask", then="done"):
            self._check_enough(self._heard, among=self._shared, did="sent their shares")
            total, scratch = self._total, primitives.mask_scratch(self._terms.num_words)
            for owner in sorted(self._survivors):
                seed = self._rebuild(owner, {holder: reveal.seed_shares for holder, reveal in self._reveals.items()})
                committed = primitives.commit(seed, self._terms.context(b"commitment", owner))
                self._check_fits(committed, self._shared[owner].commitment, owner)
                primitives.add_mask(total, seed, sign=-1, scratch=scratch)
            for owner in sorted(self._shared.keys() - self._survivors):
                secret = self._rebuild(owner, {holder: reveal.key_shares for holder, reveal in self._reveals.items()})
                key = primitives.private_key(secret)
                self._check_fits(primitives.public_bytes(key), self._keys[owner].mask_key, owner)
                for survivor in self._neighbors[owner] & self._survivors:
                    pair = pair_seed(self._terms, key, self._keys[survivor].mask_key, owner, survivor)
                    primitives.add_mask(total, pair, sign=-pair_sign(survivor, owner), scratch=scratch)
            self._reveals.clear()
            return total, tuple(sorted(self._survivors))

    @property
    def _takers(self) -> dict[str, Callable]:
        return {
            "keys": self._take_keys,
            "shares": self._take_shares,
            "upload": self._take_words,
            "consistency": lambda sender, message: self._tags.update({sender: message.tags}),
            "unmask": self._take_reveal,
        }

    def _take_keys(self, sender: int, message: Keys) -> None:
        if {len(message.mask_key), len(message.channel_key)} != {primitives.KEY_BYTES}:
            raise ProtocolError(f"Client {sender} sent a public key of another length.")
        pair = {message.mask_key, message.channel_key}
        if len(pair) < 2 or pair & self._public_keys:
            raise ProtocolError(f"Client {sender} sent a public key that is there already; one party poses as two.")
        self._public_keys |= pair
        self._keys[sender] = message

    def _take_shares(self, sender: int, message: Shares) -> None:
        if message.sealed.keys() != self._neighbors[sender]:
            raise ProtocolError(f"Client {sender} sealed shares for others than its neighbours.")
        self._shared[sender] = message

    def _take_words(self, sender: int, message: MaskedInput) -> None:
        if message.words.shape != self._total.shape:
            raise ProtocolError(
                f"Client {sender} uploaded {message.words.size} words; the round has {self._terms.num_words}."
            )
        self._total += message.words

    def _take_reveal(self, sender: int, message: Reveal) -> None:
        held = (self._neighbors[sender] | {sender}) & self._shared.keys()
        if message.seed_shares.keys() != held & self._survivors or message.key_shares.keys() != held - self._survivors:
            raise ProtocolError(f"Client {sender} sent other shares than the survivor list asks for.")
        self._reveals[sender] = message

    def _rebuild(self, owner: int, tables: Mapping[int, Mapping[int, bytes]]) -> bytes:
        shares = {holder: table[owner] for holder, table in tables.items() if owner in table}
        if len(shares) < self._terms.threshold:
            raise ProtocolError(f"{len(shares)} shares of client {owner} came; it takes {self._terms.threshold}.")
        try:
            return shamir.reconstruct(shares)
        except ValueError as error:
            raise ProtocolError(f"The shares of client {owner} do not fit together: {error}") from error

    def _check_fits(self, rebuilt: bytes, published: bytes, owner: int) -> None:
        if not primitives.same_bytes(rebuilt, published):
            raise ProtocolError(
                f"The shares of client {owner} rebuild a secret that it did not commit to; at least one is wrong."
            )

    def _check_enough(self, present: set[int], *, among: Iterable[int], did: str) -> None:
        """Enough clients in all, and t holders of every secret that may have to be rebuilt."""
        if len(present) < self._terms.min_clients:
            raise ProtocolError(f"{len(present)} clients {did}; min_clients is {self._terms.min_clients}: no sum.")
        for client in among:
            count = len((self._neighbors[client] | {client}) & present)
            if count < self._terms.threshold:
                raise ProtocolError(
                    f"Of client {client} and its neighbours {count} {did}; the threshold is {self._terms.threshold}: "
                    "no sum."
                )

    def _roster_degree(self, num_clients: int) -> int:
        if num_clients < max(self._terms.min_clients, self._terms.threshold):
            raise ProtocolError(
                f"{num_clients} clients sent keys; it takes {self._terms.min_clients} for a sum and "
                f"{self._terms.threshold} to hold a secret: no sum."
            )
        return min(self._terms.degree, num_clients - 1)

    def _next_stage(self) -> None:
        self._expected, self._heard = self._heard, set()

    def _to_all(self, message: Callable) -> dict[int, bytes]:
        return {client: encode(message(client)) for client in sorted(self._expected)}

    def _header(self, client: int) -> Header:
        return Header(self._terms.session, self._terms.round_index, SERVER, client)

"""The client's side of one round of a secure sum: it answers each stage once, and refuses what does not fit."""

import hashlib
import struct
from collections.abc import Callable

import numpy as np

from fedjax_rec.security import shamir
from fedjax_rec.security.secagg import primitives
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
from fedjax_rec.security.secagg.stages import Progress, ProtocolError


class Client:
    """One client in one round: `advertise`, `share`, `open_inbox`, `mask`, `confirm`, `reveal`, in this order.

    Each step takes the server's message as bytes and gives the answer as bytes. A step out of order, and a message of
    another round, session or client, forged or repeated, raises `ProtocolError`, after which the client stays silent:
    it never gives both kinds of share of one client, because it reveals at most once.

    Args:
      client_id: from 0 to 2^32 - 2.
      terms: of the round, known before it begins.
      entropy: gives so many unpredictable bytes; ``os.urandom`` unless this is a test.
    """

    def __init__(self, client_id: int, terms: RoundTerms, *, entropy: Callable[[int], bytes]):
        if not 0 <= client_id < SERVER:
            raise ValueError(f"A client's number must be from 0 to 2^32 - 2; got {client_id}.")
        self.client_id, self._terms, self._entropy = client_id, terms, entropy
        self._progress = Progress(f"Client {client_id}")
        self._mask_key = primitives.new_private_key(entropy)
        self._channel_key = primitives.new_private_key(entropy)
        self._seed = entropy(primitives.KEY_BYTES)
        self._mask_keys: dict[int, bytes] = {}  # public, by neighbour
        self._channels: dict[int, bytes] = {}  # agreed secrets, by neighbour
        self._shares: dict[int, tuple[bytes, bytes]] = {}  # of seed and mask key, by owner; my own among them
        self._lists, self._lists_digest = Survivors(self._header(), (), ()), b""

    def advertise(self) -> bytes:
        """Stage "keys": two public keys."""
        with self._progress.step("keys", then="shares"):
            mask_key, channel_key = (primitives.public_bytes(key) for key in (self._mask_key, self._channel_key))
            return encode(Keys(self._header(), mask_key, channel_key))

    def share(self, roster: bytes) -> bytes:
        """Stage "shares": t of k + 1 shares of the self seed and of the mask key, sealed for each neighbour."""
        with self._progress.step("shares", then="inbox"):
            keys = self._read(roster, Roster).keys
            self._check_roster(keys)
            for neighbor, both in keys.items():
                self._mask_keys[neighbor] = both[: primitives.KEY_BYTES]
                self._channels[neighbor] = primitives.agree(self._channel_key, both[primitives.KEY_BYTES :])
            holders = [self.client_id, *sorted(keys)]
            seed_shares, key_shares = (
                shamir.split(secret, threshold=self._terms.threshold, holders=holders, entropy=self._entropy)
                for secret in (self._seed, self._mask_key.private_bytes_raw())
            )
            self._shares[self.client_id] = (seed_shares[self.client_id], key_shares[self.client_id])
            sealed = {}
            for neighbor in keys:
                context = self._terms.context(b"shares", self.client_id, neighbor)
                key = primitives.derive(self._channels[neighbor], context)
                sealed[neighbor] = primitives.seal(key, seed_shares[neighbor] + key_shares[neighbor], context)
            commitment = primitives.commit(self._seed, self._terms.context(b"commitment", self.client_id))
            return encode(Shares(self._header(), commitment, sealed))

    def open_inbox(self, inbox: bytes) -> None:
        """Takes the shares that neighbours sealed for this client. Whoever sent none has dropped out."""
        with self._progress.step("inbox", then="upload"):
            sealed = self._read(inbox, Inbox).sealed
            strangers = sorted(set(sealed) - set(self._channels))
            if strangers:
                raise ProtocolError(f"Client {self.client_id} got shares of client {strangers[0]}, no neighbour of it.")
            for owner, box in sealed.items():
                context = self._terms.context(b"shares", owner, self.client_id)
                plain = primitives.unseal(primitives.derive(self._channels[owner], context), box, context)
                if len(plain) != 2 * shamir.SHARE_BYTES:
                    raise ProtocolError(f"Client {owner} sealed {len(plain)} bytes, which are no two shares.")
                self._shares[owner] = (plain[: shamir.SHARE_BYTES], plain[shamir.SHARE_BYTES :])
            self._check_enough(len(self._shares), "shared their keys")

    def mask(self, words: np.ndarray) -> bytes:
        """Stage "upload": ``y_i = q_i + PRG(b_i) + sum_{j > i} PRG(k_ij) - sum_{j < i} PRG(k_ij)`` modulo 2^32.

        Args:
          words: q_i, uint32 ``[num_words]``.

        Raises:
          ValueError: for a vector of another type or length; the client is out of the round then.
        """
        with self._progress.step("upload", then="consistency"):
            if words.dtype != np.uint32 or words.shape != (self._terms.num_words,):
                raise ValueError(f"Expected uint32 [{self._terms.num_words}]; got {words.dtype} {list(words.shape)}.")
            masked, scratch = words.copy(), primitives.mask_scratch(words.size)
            primitives.add_mask(masked, self._seed, sign=1, scratch=scratch)
            for neighbor in self._shares.keys() - {self.client_id}:
                pair = pair_seed(self._terms, self._mask_key, self._mask_keys[neighbor], self.client_id, neighbor)
                primitives.add_mask(masked, pair, sign=pair_sign(self.client_id, neighbor), scratch=scratch)
            return encode(MaskedInput(self._header(), masked))

    def confirm(self, survivors: bytes) -> bytes:
        """Stage "consistency": checks the survivor list, and tags it for every surviving neighbour."""
        with self._progress.step("consistency", then="unmask"):
            self._lists = self._read(survivors, Survivors)
            self._check_lists()
            ids = (len(self._lists.survivors), *self._lists.survivors, *self._lists.dropped)
            self._lists_digest = hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).digest()
            return encode(Confirmation(self._header(), {other: self._tag(me, other) for me, other in self._pairs()}))

    def reveal(self, confirmed: bytes) -> bytes:
        """Stage "unmask": seed shares of survivors and key shares of the dropped, if t holders saw the same lists."""
        with self._progress.step("unmask", then="done"):
            tags = self._read(confirmed, Confirmed).tags
            expected = {other: self._tag(other, me) for me, other in self._pairs()}
            for neighbor, got in tags.items():
                if neighbor not in expected or not primitives.same_bytes(got, expected[neighbor]):
                    raise ProtocolError(
                        f"Client {neighbor} did not confirm the survivor list that client {self.client_id} has; "
                        "somebody was told another one."
                    )
            self._check_enough(len(tags) + 1, "confirmed the survivor list")
            alive, dropped = (self._shares.keys() & set(ids) for ids in (self._lists.survivors, self._lists.dropped))
            seed_shares = {owner: self._shares[owner][0] for owner in alive}
            key_shares = {owner: self._shares[owner][1] for owner in dropped}
            return encode(Reveal(self._header(), seed_shares, key_shares))

    def _header(self) -> Header:
        return Header(self._terms.session, self._terms.round_index, self.client_id, SERVER)

    def _read(self, data: bytes, kind):
        message = decode(data, kind)
        expected = Header(self._terms.session, self._terms.round_index, SERVER, self.client_id)
        if message.header != expected:
            raise ProtocolError(
                f"Client {self.client_id} got a {kind.__name__} of another session, round, sender or receiver: "
                "a replay?"
            )
        return message

    def _check_roster(self, keys) -> None:
        me = self.client_id
        if me in keys or not self._terms.threshold - 1 <= len(keys) <= self._terms.degree:
            raise ProtocolError(
                f"Client {me} needs from {self._terms.threshold - 1} to {self._terms.degree} neighbours other than "
                f"itself; the roster has {sorted(keys)}."
            )
        mine = [primitives.public_bytes(self._mask_key), primitives.public_bytes(self._channel_key)]
        if any(len(both) != 2 * primitives.KEY_BYTES for both in keys.values()):
            raise ProtocolError(f"The roster of client {me} has keys of another length.")
        halves = [both[at : at + primitives.KEY_BYTES] for both in keys.values() for at in (0, primitives.KEY_BYTES)]
        if len(set(halves + mine)) < len(halves) + 2:
            raise ProtocolError(f"The roster of client {me} has the same public key twice; one party poses as two.")

    def _check_lists(self) -> None:
        """Everybody whose shares I hold is on one list, nobody on both, and no neighbour without my mask survived."""
        me, lists = self.client_id, self._lists
        survivors, dropped = set(lists.survivors), set(lists.dropped)
        if survivors & dropped or len(survivors) + len(dropped) < len(lists.survivors) + len(lists.dropped):
            raise ProtocolError(
                f"Client {me} was asked for both shares of one client, or for one of them twice: "
                f"{sorted(survivors & dropped)}. Both would unmask that client's vector."
            )
        if me not in survivors:
            raise ProtocolError(f"Client {me} uploaded its vector and is not on the survivor list.")
        if len(survivors) < self._terms.min_clients:
            raise ProtocolError(f"A sum of {len(survivors)} clients is refused; it takes {self._terms.min_clients}.")
        listed = survivors | dropped
        unlisted, unmasked = self._shares.keys() - listed, (self._channels.keys() - self._shares.keys()) & listed
        if unlisted or unmasked:
            raise ProtocolError(
                f"The survivor list of client {me} omits {sorted(unlisted)}, whose shares it holds, or names "
                f"{sorted(unmasked)}, neighbours who shared no keys with it."
            )
        self._check_enough(len(self._shares.keys() & survivors), "survived")

    def _check_enough(self, count: int, did: str) -> None:
        if count < self._terms.threshold:
            raise ProtocolError(
                f"Of client {self.client_id} and its neighbours {count} {did}; the threshold is "
                f"{self._terms.threshold}, so it goes no further."
            )

    def _pairs(self) -> list[tuple[int, int]]:
        others = self._shares.keys() & set(self._lists.survivors)
        return [(self.client_id, other) for other in others - {self.client_id}]

    def _tag(self, sender: int, receiver: int) -> bytes:
        neighbor = receiver if sender == self.client_id else sender
        context = self._terms.context(b"confirm", sender, receiver)
        return primitives.tag(primitives.derive(self._channels[neighbor], context), context + self._lists_digest)


def pair_seed(terms: RoundTerms, key: primitives.PrivateKey, public: bytes, owner: int, other: int) -> bytes:
    """k_ij, 32 bytes: the same from i's private and j's public mask key as the other way round."""
    context = terms.context(b"pair mask", min(owner, other), max(owner, other))
    return primitives.derive(primitives.agree(key, public), context)


def pair_sign(owner: int, other: int) -> int:
    """Sign of PRG(k_ij) in what the owner uploads; the other has the other sign."""
    return 1 if other > owner else -1

"""What travels between the clients and the server of a secure sum, as values and as bytes.

A message on the wire is its kind (1 byte), the header (session, round, sender, receiver: 28 bytes), and its fields,
each behind its length (4 bytes). Numbers are little-endian. `decode` takes nothing that `encode` does not write.
"""

import dataclasses
import itertools
import struct
from collections.abc import Mapping
from typing import TypeVar

import numpy as np

from fedjax_rec.security.secagg.stages import ProtocolError

SERVER = 2**32 - 1
"""The server's number in headers; clients have smaller ones."""

Ids = tuple[int, ...]
Table = Mapping[int, bytes]


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    """Which session and round a message belongs to, who sends it, and to whom."""

    session: bytes
    round_index: int
    sender: int
    receiver: int


@dataclasses.dataclass(frozen=True, slots=True)
class Keys:
    """Client to server, stage "keys": two X25519 public keys of 32 bytes, of this round only."""

    header: Header
    mask_key: bytes
    channel_key: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Roster:
    """Server to client: the neighbours' mask key and channel key, 64 bytes each neighbour."""

    header: Header
    keys: Table


@dataclasses.dataclass(frozen=True, slots=True)
class Shares:
    """Client to server, stage "shares": a commitment to the self seed, and two sealed shares for every neighbour."""

    header: Header
    commitment: bytes
    sealed: Table


@dataclasses.dataclass(frozen=True, slots=True)
class Inbox:
    """Server to client: what its neighbours sealed for it."""

    header: Header
    sealed: Table


@dataclasses.dataclass(frozen=True, slots=True)
class MaskedInput:
    """Client to server, stage "upload": the masked vector, uint32."""

    header: Header
    words: np.ndarray


@dataclasses.dataclass(frozen=True, slots=True)
class Survivors:
    """Server to client: who uploaded, and who shared keys but did not upload."""

    header: Header
    survivors: Ids
    dropped: Ids


@dataclasses.dataclass(frozen=True, slots=True)
class Confirmation:
    """Client to server, stage "consistency": for every surviving neighbour a tag of the lists that this client got."""

    header: Header
    tags: Table


@dataclasses.dataclass(frozen=True, slots=True)
class Confirmed:
    """Server to client: its neighbours' tags."""

    header: Header
    tags: Table


@dataclasses.dataclass(frozen=True, slots=True)
class Reveal:
    """Client to server, stage "unmask": shares of the survivors' self seeds, and of the dropped clients' mask keys."""

    header: Header
    seed_shares: Table
    key_shares: Table


Message = Keys | Roster | Shares | Inbox | MaskedInput | Survivors | Confirmation | Confirmed | Reveal
M = TypeVar("M", bound=Message)

_KINDS = (Keys, Roster, Shares, Inbox, MaskedInput, Survivors, Confirmation, Confirmed, Reveal)
_HEADER = struct.Struct("<B16sIII")
_LENGTH = struct.Struct("<I")


def encode(message: Message) -> bytes:
    """The message as bytes."""
    header = message.header
    kind = _KINDS.index(type(message))
    parts = [_HEADER.pack(kind, header.session, header.round_index, header.sender, header.receiver)]
    for field in dataclasses.fields(message)[1:]:
        body = _WRITERS[field.type](getattr(message, field.name))
        parts += [_LENGTH.pack(len(body)), body]
    return b"".join(parts)


def decode(data: bytes, kind: type[M]) -> M:
    """The message of this kind in the bytes.

    Raises:
      ProtocolError: for another kind of message, or bytes that `encode` does not write.
    """
    try:
        index, *header = _HEADER.unpack_from(data)
    except struct.error as error:
        raise ProtocolError(f"A message of {len(data)} bytes is too short to be one.") from error
    if index != _KINDS.index(kind):
        name = _KINDS[index].__name__ if index < len(_KINDS) else f"kind {index}"
        raise ProtocolError(f"Expected a message {kind.__name__} at this stage; got {name}.")
    values, at = [], _HEADER.size
    try:
        for field in dataclasses.fields(kind)[1:]:
            (length,) = _LENGTH.unpack_from(data, at)
            at += _LENGTH.size
            if at + length > len(data):
                raise ValueError("it is cut short")
            values.append(_READERS[field.type](data[at : at + length]))
            at += length
        if at != len(data):
            raise ValueError(f"{len(data) - at} bytes follow its end")
    except (struct.error, ValueError) as error:
        raise ProtocolError(f"A message {kind.__name__} cannot be read: {error}.") from error
    return kind(Header(*header), *values)


def _write_words(words: np.ndarray) -> bytes:
    return np.ascontiguousarray(words, "<u4").tobytes()


def _read_words(body: bytes) -> np.ndarray:
    return np.frombuffer(body, "<u4").astype(np.uint32, copy=False)


def _write_table(table: Table) -> bytes:
    """All ids in rising order, then all entries, which have one length."""
    ids = sorted(table)
    if len({len(entry) for entry in table.values()}) > 1:
        raise ValueError("The entries of a table must have one length.")
    return struct.pack("<I", len(ids)) + struct.pack(f"<{len(ids)}I", *ids) + b"".join(table[i] for i in ids)


def _read_table(body: bytes) -> dict[int, bytes]:
    (count,) = struct.unpack_from("<I", body)
    ids = struct.unpack_from(f"<{count}I", body, 4)
    entries = body[4 + 4 * count :]
    if any(left >= right for left, right in itertools.pairwise(ids)):
        raise ValueError("a client is named twice, or out of order")
    if len(entries) % max(count, 1):
        raise ValueError("its entries have different lengths")
    width = len(entries) // max(count, 1)
    if count == 0 and entries:
        raise ValueError("it has entries for nobody")
    return {client: entries[place * width : (place + 1) * width] for place, client in enumerate(ids)}


_WRITERS = {bytes: bytes, Ids: lambda ids: struct.pack(f"<{len(ids)}I", *ids), Table: _write_table}
_WRITERS[np.ndarray] = _write_words
_READERS = {bytes: bytes, Ids: lambda body: struct.unpack(f"<{len(body) // 4}I", body), Table: _read_table}
_READERS[np.ndarray] = _read_words

"""Keyed pseudonyms: fresh user labels that only the holder of a key can link to the old ones.

HMAC-SHA256 of the label under a key of 256 bits (Krawczyk, Bellare and Canetti, 1997, RFC 2104, "HMAC: Keyed-Hashing
for Message Authentication"). A plain hash is no pseudonym: user ids are few, so anybody hashes them all and reads the
table backwards. Take a new key for each release, or two releases can be joined on their labels; throw the key away, or
keep it apart from the data. Pseudonyms hide the label and nothing else: items, dates and attributes still identify.
"""

import dataclasses
import hmac
import os
import secrets
from pathlib import Path

import numpy as np

from fedjax_rec.anonymization.released import released
from fedjax_rec.data.interactions import Interactions

_KEY_BYTES = 32
_LABEL_BYTES = 16  # of 128 bits: two of a billion labels collide with probability 1e-21


def new_key() -> bytes:
    """256 random bits from the operating system."""
    return secrets.token_bytes(_KEY_BYTES)


def pseudonyms(labels: np.ndarray, key: bytes) -> np.ndarray:
    """One pseudonym for each label: 128 bits of HMAC-SHA256, as str of 32 hexadecimal digits ``[labels]``.

    The number 7 and the text "7" are one label. Equal labels have equal pseudonyms under one key.

    Args:
      labels: int or str ``[labels]``.
      key: from `new_key` or `load_key`.

    Raises:
      ValueError: for a short key, labels of another kind, or a collision.
    """
    if len(key) < _KEY_BYTES:
        raise ValueError(f"A key of {len(key)} bytes can be guessed; make one of {_KEY_BYTES} with new_key().")
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iuUT":
        raise ValueError(f"Labels must be whole numbers or text, and are {labels.dtype}; convert them first.")
    if not len(labels):
        return np.empty(0, f"<U{2 * _LABEL_BYTES}")
    distinct, places = np.unique(labels, return_inverse=True)
    names = np.array([_digest(key, str(label)) for label in distinct.tolist()])
    if len(np.unique(names)) < len(distinct):
        raise ValueError("Two labels have the same pseudonym under this key; make another key.")
    return names[places]


def pseudonymize(interactions: Interactions, key: bytes) -> Interactions:
    """The same interactions under pseudonyms, users in the order of these and rows numbered anew.

    Order is a secret too: pseudonyms in the order of the old ids would be those ids. So users are sorted by pseudonym
    with their attributes, rows of equal time by item, and ``file_rows`` counts the new order. Timestamps still order a
    user's rows: `hierarchies.coarsen_times` is against that.

    Args:
      interactions: any; users without rows stay.
      key: from `new_key`, one for each release.
    """
    labels = pseudonyms(interactions.user_labels, key)
    order = np.argsort(labels)
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    users = places[interactions.user_ids]
    relabelled = dataclasses.replace(
        interactions,
        user_labels=labels[order],
        user_attributes={name: values[order] for name, values in interactions.user_attributes.items()},
    )
    return released(
        relabelled,
        users,
        interactions.item_ids,
        ratings=interactions.ratings,
        timestamps=interactions.timestamps,
        suffix="pseudonyms",
    )


def save_key(path: str | Path, key: bytes) -> None:
    """Writes the key as hexadecimal to a new file that only its owner can read (mode 0600).

    Raises:
      FileExistsError: rather than overwrite: the old key may be all that links an earlier release.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise FileExistsError(f"{path} exists and may hold the key of another release; name a new file.") from None
    with os.fdopen(descriptor, "w") as file:
        file.write(key.hex() + "\n")


def load_key(path: str | Path) -> bytes:
    """The key from a file of `save_key`.

    Raises:
      ValueError: when others may read the file, or it holds no key.
    """
    path = Path(path)
    mode = path.stat().st_mode & 0o777
    if os.name == "posix" and mode & 0o077:
        raise ValueError(f"Others may read the key in {path} (mode {mode:04o}); run chmod 600, and think of a new key.")
    try:
        key = bytes.fromhex(path.read_text().strip())
    except ValueError:
        key = b""
    if len(key) < _KEY_BYTES:
        raise ValueError(f"{path} holds no key of {_KEY_BYTES} bytes in hexadecimal; write one with save_key.")
    return key


def _digest(key: bytes, label: str) -> str:
    return hmac.digest(key, label.encode(), "sha256")[:_LABEL_BYTES].hex()

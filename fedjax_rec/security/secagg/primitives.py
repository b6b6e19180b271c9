"""The cryptography of a secure sum, each function a few lines around the `cryptography` package.

Every key is 256 bits whole, comes from fresh key pairs of one round, and serves one purpose between one sender and one
receiver: HKDF-SHA256 binds it to label, session, round and both parties.
"""

import functools
import hashlib
import hmac
from collections.abc import Callable

import numpy as np

from fedjax_rec.security.secagg.stages import ProtocolError

try:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "A secure sum with real cryptography needs the package cryptography: pip install 'fedjax-rec[crypto]'."
    ) from error

KEY_BYTES = 32
TAG_BYTES = 16
PrivateKey = X25519PrivateKey
_BLOCK_BYTES = 16


def new_private_key(entropy: Callable[[int], bytes]) -> PrivateKey:
    """A fresh X25519 key, its secret bytes in the form that RFC 7748 (section 5) gives them."""
    return X25519PrivateKey.from_private_bytes(_canonical(entropy(KEY_BYTES)))


def private_key(secret: bytes) -> PrivateKey:
    """The X25519 key whose 32 secret bytes are these.

    Raises:
      ProtocolError: for bytes that `new_private_key` does not make. They would pass for the key that differs from them
        in bits that X25519 ignores.
    """
    if secret != _canonical(secret):
        raise ProtocolError("Shares of a mask key rebuild bytes that are no such key; at least one share is wrong.")
    return X25519PrivateKey.from_private_bytes(secret)


def public_bytes(key: PrivateKey) -> bytes:
    """The public key that belongs to it, 32 bytes."""
    return key.public_key().public_bytes_raw()


def agree(key: PrivateKey, public: bytes) -> bytes:
    """What two parties share, 32 bytes, each from its own private and the other's public key: input of `derive`.

    Raises:
      ProtocolError: for bytes that are no usable public key.
    """
    try:
        return key.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise ProtocolError("A public key is not one that keys can be agreed with; the round is refused.") from error


def derive(shared: bytes, context: bytes) -> bytes:
    """A 256-bit key for one purpose: HKDF-SHA256 (RFC 5869) of an agreed secret, bound to the context."""
    return HKDF(SHA256(), KEY_BYTES, None, context).derive(shared)


def seal(key: bytes, plain: bytes, context: bytes) -> bytes:
    """ChaCha20-Poly1305 (RFC 8439). The nonce is zero: a key comes from fresh keys and seals one message, ever."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), plain, context)


def unseal(key: bytes, sealed: bytes, context: bytes) -> bytes:
    """What was sealed.

    Raises:
      ProtocolError: if it was sealed with another key or for another context, or changed on the way.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), sealed, context)
    except InvalidTag as error:
        raise ProtocolError("An encrypted share was changed on its way, or is not for this place.") from error


def commit(seed: bytes, context: bytes) -> bytes:
    """SHA-256 commitment, 32 bytes: hides a seed of 256 random bits, and fits no other."""
    return hashlib.sha256(context + seed).digest()


def tag(key: bytes, message: bytes) -> bytes:
    """HMAC-SHA256, cut to 16 bytes."""
    return hmac.digest(key, message, "sha256")[:TAG_BYTES]


def same_bytes(left: bytes, right: bytes) -> bool:
    """Whether both are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(left, right)


def _canonical(secret: bytes) -> bytes:
    return bytes([secret[0] & 248]) + secret[1:31] + bytes([secret[31] & 127 | 64])


def add_mask(words: np.ndarray, seed: bytes, *, sign: int, scratch: bytearray) -> None:
    """Adds ``sign * PRG(seed)`` modulo 2^32 in place.

    PRG is the keystream of AES-256 in counter mode, from counter zero, read as little-endian words; the whole seed is
    the key. With AES instructions it is four times as fast as ChaCha20.

    Args:
      words: uint32 ``[n]``, changed.
      seed: 32 bytes that mask nothing else.
      sign: 1 or -1.
      scratch: from `mask_scratch`, to write the keystream to.
    """
    encryptor = Cipher(algorithms.AES(seed), modes.CTR(bytes(_BLOCK_BYTES))).encryptor()
    encryptor.update_into(_zeros(words.nbytes), scratch)
    mask = np.frombuffer(scratch, "<u4", words.size)
    (np.add if sign > 0 else np.subtract)(words, mask, out=words)


def mask_scratch(num_words: int) -> bytearray:
    """Room for a keystream of ``num_words`` words, to use again for every mask."""
    return bytearray(4 * num_words + _BLOCK_BYTES)


@functools.lru_cache(maxsize=4)
def _zeros(num_bytes: int) -> bytes:
    return bytes(num_bytes)

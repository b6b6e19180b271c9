"""Sums of encrypted updates: clients encrypt, the server adds what it cannot read, a key holder opens only the sum.

BFV (Fan and Vercauteren, 2012, "Somewhat Practical Fully Homomorphic Encryption") works on integers modulo a prime t,
so sums of fixed-point updates are exact, and equal to the secure sum's and the plain sum's bit for bit. TenSEAL
(Benaissa et al., 2021, "TenSEAL: A Library for Encrypted Tensor Operations Using Homomorphic Encryption") does the
cryptography; it comes with the extra ``[he]``.

Guarantee: the server, which holds the public key and ciphertexts, learns nothing about uploads that it cannot compute
itself, under the hardness of ring learning with errors at the parameters of the homomorphic encryption standard for 128
bits. The key holder is another party: who joins it with the server, or hands it a single upload to open, sees that
upload. It opens sums of at least ``min_clients`` uploads by the server's word, so the server must not lie about that
number. Nothing is promised about the sum itself: differential privacy is for that.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from fedjax_rec.federated.transforms import UpdateTransform, Wire
from fedjax_rec.security.host_sum import NoSum, host_sum
from fedjax_rec.security.simulated import check_dropout

SLOTS = 4096
"""Numbers in one ciphertext: the degree of its polynomials."""
PLAIN_MODULUS = 67_084_289
"""t, a prime of 26 bits that is 1 modulo ``2 * SLOTS``, as packing needs; sums lie within t / 2 of zero."""


@dataclasses.dataclass(frozen=True)
class EncryptedSum:
    """What the server hands to the key holder: ciphertexts, and how many uploads are in them."""

    ciphertexts: tuple[bytes, ...]
    num_clients: int
    num_words: int


class KeyHolder:
    """Makes the keys, gives the public one away, and decrypts sums. Not the server.

    Args:
      min_clients: sums of fewer uploads are not decrypted; at least 2.

    Raises:
      ValueError: if it would open single uploads.
    """

    def __init__(self, *, min_clients: int = 2):
        check_dropout(min_clients, 0.0)
        seal = _tenseal()
        self._context = seal.context(seal.SCHEME_TYPE.BFV, poly_modulus_degree=SLOTS, plain_modulus=PLAIN_MODULUS)
        self._min_clients = min_clients

    def public_context(self) -> bytes:
        """The parameters and the public key, for clients and server; the secret key is not in it."""
        return self._context.serialize(save_secret_key=False, save_galois_keys=False, save_relin_keys=False)

    def decrypt(self, encrypted: EncryptedSum) -> np.ndarray:
        """uint32 ``[num_words]``, the sum modulo 2^32.

        Raises:
          NoSum: for a sum of fewer uploads than ``min_clients``.
        """
        if encrypted.num_clients < self._min_clients:
            raise NoSum(f"A sum of {encrypted.num_clients} uploads is not opened; at least {self._min_clients} are.")
        seal = _tenseal()
        parts = [seal.bfv_vector_from(self._context, c).decrypt() for c in encrypted.ciphertexts]
        values = np.concatenate([np.asarray(part, np.int64) for part in parts])[: encrypted.num_words]
        return values.astype(np.int32).view(np.uint32)


class EncryptingClient:
    """Encrypts with the public key; reads nothing."""

    def __init__(self, public_context: bytes):
        self._context = _tenseal().context_from(public_context)

    def encrypt(self, words: np.ndarray) -> tuple[bytes, ...]:
        """The ciphertexts of one upload, uint32 ``[num_words]``, `SLOTS` numbers in each."""
        return tuple(vector.serialize() for vector in self.encrypt_vectors(words))

    def encrypt_vectors(self, words: np.ndarray) -> list:
        """The same as TenSEAL's objects, for a client that lives in the server's process."""
        seal, values = _tenseal(), words.view(np.int32)
        blocks = [values[i : i + SLOTS].tolist() for i in range(0, len(values), SLOTS)]
        return [seal.bfv_vector(self._context, block) for block in blocks]


class EncryptedSumServer:
    """Adds ciphertexts, which it has no key to read.

    Args:
      public_context: from `KeyHolder.public_context`.
    """

    def __init__(self, public_context: bytes):
        self._context = _tenseal().context_from(public_context)
        if self._context.is_private():
            raise ValueError("The server was given the secret key; give it KeyHolder.public_context() only.")
        self._total, self._num_clients, self._num_words = None, 0, 0

    def add(self, ciphertexts: Sequence, num_words: int) -> None:
        """Adds one upload: serialised ciphertexts, or TenSEAL's objects."""
        seal = _tenseal()
        vectors = [seal.bfv_vector_from(self._context, c) if isinstance(c, bytes) else c for c in ciphertexts]
        if self._total is None:
            self._total, self._num_words = [v.copy() for v in vectors], num_words
        elif num_words != self._num_words or len(vectors) != len(self._total):
            raise ValueError(f"An upload has {num_words} words, and the sum so far {self._num_words}.")
        else:
            for mine, other in zip(self._total, vectors, strict=True):
                mine += other
        self._num_clients += 1

    def take(self) -> EncryptedSum:
        """The sum so far, for the key holder; the server starts anew."""
        if self._total is None:
            raise NoSum("Nobody has sent anything.")
        total = EncryptedSum(tuple(v.serialize() for v in self._total), self._num_clients, self._num_words)
        self._total, self._num_clients = None, 0
        return total


def encrypted_sum(*, bits: int, max_clients: int, min_clients: int = 2, dropout_prob: float = 0.0) -> UpdateTransform:
    """Sums the integers of an earlier `fixed_point` under encryption: the last link of a chain.

    Args:
      bits: of the `fixed_point` before it.
      max_clients: most clients in one sum.
      min_clients: the key holder opens no sum of fewer.
      dropout_prob: chance of each client to drop out before it sends.

    Raises:
      ModuleNotFoundError: without TenSEAL; the message names the extra that brings it.
      ValueError: if a sum may leave the plain text's range, or for other numbers out of range.
    """
    most = max_clients * (2 ** (bits - 1) - 1)
    if most > PLAIN_MODULUS // 2:
        fitting = (PLAIN_MODULUS // 2 // max_clients + 1).bit_length()
        raise ValueError(
            f"A sum of {max_clients} clients of {bits} bits can reach {most:,}, and an encrypted sum holds integers up "
            f"to {PLAIN_MODULUS // 2:,}. Use at most {fitting} bits, or smaller cohorts."
        )
    holder = KeyHolder(min_clients=min_clients)
    client, public = EncryptingClient(holder.public_context()), holder.public_context()

    class Session:
        """A `SumSession`."""

        def begin(self, client_ids: Sequence[int], dropped: Sequence[int], round_index: int, num_words: int) -> None:
            self.server = EncryptedSumServer(public)

        def upload(self, client_id: int, words: np.ndarray) -> None:
            self.server.add(client.encrypt(words), len(words))

        def finish(self) -> np.ndarray:
            return holder.decrypt(self.server.take())

    block_bits = 8 * len(client.encrypt(np.zeros(SLOTS, np.uint32))[0])

    def upload(wire, update):
        return Wire(-(-wire.numbers // SLOTS), bits=block_bits)

    return host_sum(Session(), min_clients=min_clients, dropout_prob=dropout_prob)._replace(upload=upload)


def _tenseal():
    try:
        import tenseal
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Encrypted sums need TenSEAL, which is not installed: pip install 'fedjax-rec[he]'."
        ) from error
    return tenseal

"""Shamir's secret sharing of 32 bytes: any t holders rebuild the secret, and t - 1 learn nothing about it.

Shamir, 1979, "How to Share a Secret". The secret is the value at zero of a random polynomial f of degree t - 1 over the
integers modulo a prime above 2^256, and the holder with number h gets f(h + 1).
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping

PRIME = 2**256 + 297
"""A prime just above 2^256: every 32-byte secret is a number of the field."""

SECRET_BYTES = 32
SHARE_BYTES = 33
_COEFFICIENT_BYTES = 48  # 128 bits more than the prime: reduced modulo the prime, as good as uniform


def split(
    secret: bytes, *, threshold: int, holders: Iterable[int], entropy: Callable[[int], bytes]
) -> dict[int, bytes]:
    """One share of ``SHARE_BYTES`` bytes for every holder.

    Args:
      secret: ``SECRET_BYTES`` bytes.
      threshold: shares that it takes to rebuild the secret.
      holders: distinct numbers from 0 to 2^32 - 1.
      entropy: gives so many unpredictable bytes, such as ``os.urandom``.

    Raises:
      ValueError: for a secret of another length, holders who are not distinct, or a threshold out of range.
    """
    holders = tuple(holders)
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"A secret has {SECRET_BYTES} bytes; got {len(secret)}.")
    _check_holders(holders)
    if not 1 <= threshold <= len(holders):
        raise ValueError(f"The threshold must be from 1 to {len(holders)}, the number of holders; got {threshold}.")
    randoms = entropy(_COEFFICIENT_BYTES * (threshold - 1))
    chunks = [randoms[start : start + _COEFFICIENT_BYTES] for start in range(0, len(randoms), _COEFFICIENT_BYTES)]
    coefficients = [int.from_bytes(secret, "little")] + [int.from_bytes(chunk, "little") % PRIME for chunk in chunks]
    return {holder: _evaluate(coefficients, holder + 1).to_bytes(SHARE_BYTES, "little") for holder in holders}


def reconstruct(shares: Mapping[int, bytes]) -> bytes:
    """The secret behind shares, given as holder -> share: ``sum_h share_h prod_{j != h} x_j / (x_j - x_h)``.

    All shares are used, so one wrong share among more than t gives another secret: compare it with what was committed.
    Fewer than t shares give noise, not an error: whoever calls counts them.

    Raises:
      ValueError: for no shares, shares of another length, or shares that cannot belong to one secret of 32 bytes.
    """
    holders = tuple(shares)
    _check_holders(holders)
    wrong = [holder for holder in holders if len(shares[holder]) != SHARE_BYTES]
    if wrong:
        raise ValueError(f"A share has {SHARE_BYTES} bytes; holder {wrong[0]} gave {len(shares[wrong[0]])}.")
    weights = _weights_at_zero(holders)
    value = sum(w * int.from_bytes(shares[h], "little") for w, h in zip(weights, holders, strict=True)) % PRIME
    if value >= 2 ** (8 * SECRET_BYTES):
        raise ValueError(f"The shares of holders {sorted(holders)} do not belong to one secret.")
    return value.to_bytes(SECRET_BYTES, "little")


def _evaluate(coefficients: list[int], point: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % PRIME
    return value


@functools.lru_cache(maxsize=4096)
def _weights_at_zero(holders: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights at zero; kept, because both secrets of a neighbourhood ask for the same."""
    points = [holder + 1 for holder in holders]
    product = math.prod(points)
    below = [x * math.prod(y - x for y in points if y != x) for x in points]
    return tuple(product * pow(number, -1, PRIME) % PRIME for number in below)


def _check_holders(holders: tuple[int, ...]) -> None:
    if not holders or len(set(holders)) != len(holders) or not all(0 <= holder < 2**32 for holder in holders):
        raise ValueError(f"Holders must be distinct numbers from 0 to 2^32 - 1, at least one; got {list(holders)}.")

"""Random numbers for whole tables, as fast as the processor's cache allows: normal, Laplace, and integers."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# Parts of a table drawn side by side, so that up to as many devices can share the work without moving a number.
_PARTS = 16
# Numbers of one part drawn at a time: on a CPU, all that the generator has in hand then stays in its cache.
_PIECE = 1 << 12

MOST_INTEGER_STDDEV = 2.0**14
"""Largest standard deviation of integer noise: its table then has some 150,000 entries."""

_TABLE_BITS = 63  # of a probability in a table; the 64th random bit is the sign
_LOW_BITS = 31


def standard_normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Independent standard normal numbers, float32.

    A large table is drawn piece by piece, each piece from a key of its own. JAX's generator makes some 20 passes over
    its numbers on a CPU, so drawing 3.2 million at once takes twice as long. Other backends draw all pieces at
    once; the numbers are the same.

    Args:
      key: of these numbers and no others.
      shape: any.
    """
    return _in_pieces(jax.random.normal, key, shape)


def standard_laplace(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Independent Laplace numbers of scale 1, float32, in pieces as `standard_normal`.

    A float32 uniform ends the tail at 16.6 scales, which one number in 17 million exceeds. Here a word of its own
    gives the octave, by its leading zeros: the tail ends at 22.9 scales, which one in 8 billion exceeds.

    Args:
      key: of these numbers and no others.
      shape: any.
    """
    return _in_pieces(_laplace, key, shape)


def _laplace(key, shape):
    octave, rest = jax.random.bits(key, (2, *shape), jnp.uint32)
    # A uniform number is 2^-(zeros + 1) (1 + fraction), and minus its logarithm an exponential one.
    zeros = jax.lax.clz(octave).astype(jnp.float32)
    fraction = (rest >> 9).astype(jnp.float32) * 2.0**-23
    magnitude = (zeros + 1) * math.log(2) - jnp.log1p(fraction)
    return jnp.where(rest & 1 == 1, -magnitude, magnitude)


def discrete_gaussian(key: jax.Array, shape: tuple[int, ...], stddev: float) -> jax.Array:
    """Independent integers with ``P(k) ~ exp(-k^2 / (2 stddev^2))``, as float32, in pieces as `standard_normal`.

    The exact sampler of Canonne, Kamath, Steinke (2020, "The Discrete Gaussian for Differential Privacy") rejects with
    rational arithmetic. On a device float32 would stand in for it, and its error grows with ``stddev``; so here the
    distribution function is inverted: a table of tail probabilities, computed once in extended precision, against 63
    random bits. The tail ends where it holds 2^-63, near 9.2 standard deviations, and the total variation distance to
    the true distribution is below ``max(stddev, 1) * 1e-16`` a number where NumPy's long doubles have 64 bits, as on
    x86. All the numbers that a run draws add that, times ``1 + exp(epsilon)``, to its delta. On a CPU it is ten times
    as fast as drawing until all numbers of a table are accepted.

    Args:
      key: of these numbers and no others.
      shape: any.
      stddev: in (0, `MOST_INTEGER_STDDEV`], a public constant.

    Raises:
      ValueError: if ``stddev`` is not in that range.
    """
    check_integer_stddev(stddev)
    steps = np.arange(_reach(stddev) + 1).astype(np.longdouble)
    return _symmetric_integers(key, shape, np.exp(-(steps**2) / (2 * np.longdouble(stddev) ** 2)))


def skellam(key: jax.Array, shape: tuple[int, ...], stddev: float) -> jax.Array:
    """Independent differences of two Poisson numbers of mean ``stddev^2 / 2``, as float32, by the table as above.

    ``jax.random.poisson`` decides in float32 on logarithms as large as its mean, so its probabilities are off by a
    share of about ``mean * 1e-6``; here they are ``exp(-m) I_k(m)``, m = ``stddev^2``, by the recurrence of Bessel
    functions ``I_(k-1) = I_(k+1) + (2 k / m) I_k`` from the tail inward, which adds positive terms only.

    Args:
      key: of these numbers and no others.
      shape: any.
      stddev: in (0, `MOST_INTEGER_STDDEV`], a public constant.

    Raises:
      ValueError: if ``stddev`` is not in that range.
    """
    check_integer_stddev(stddev)
    mass = [np.longdouble(0), np.longdouble(1e-60)]  # the true start is a multiple of this, and it is normalised
    for k in range(2 * _reach(stddev), 0, -1):
        mass.append(mass[-2] + 2 * k / np.longdouble(stddev) ** 2 * mass[-1])
        if mass[-1] > 1e250:
            mass = [m * np.longdouble(1e-250) for m in mass]
    return _symmetric_integers(key, shape, np.array(mass[::-1]))


def check_integer_stddev(stddev: float) -> None:
    """Raises a ValueError unless integer noise of that standard deviation can be drawn."""
    if not 0 < stddev <= MOST_INTEGER_STDDEV:
        raise ValueError(
            f"The standard deviation of integer noise must be above 0 and at most {MOST_INTEGER_STDDEV:g} steps of the "
            f"grid; got {stddev}. A coarser granularity makes it smaller."
        )


def _reach(stddev: float) -> int:
    """An integer beyond which such noise holds less than 2^-70 of the probability."""
    return int(12 * stddev) + 30


def tail_thresholds(mass: np.ndarray) -> list[int]:
    """``2^63 P(|X| >= k)`` for k = 1, 2 ..., where X has these probabilities, up to a factor, at 0, 1 ... and -1 ..."""
    at_least = 2 * np.cumsum(mass[:0:-1])[::-1]  # from the tail inward, to lose nothing
    probs = np.ldexp(at_least / (mass[0] + at_least[0]), _TABLE_BITS)
    return [int(p) for p in probs if p >= 1]


def _symmetric_integers(key, shape, mass):
    thresholds = tail_thresholds(mass)
    # Padded with what no number is below, to one less than a power of two, for a search by halves.
    num_halvings = max(len(thresholds).bit_length(), 1)
    thresholds += [0] * ((1 << num_halvings) - 1 - len(thresholds))
    low_mask = (1 << _LOW_BITS) - 1
    high_table = np.array([p >> _LOW_BITS for p in thresholds], np.uint32)
    low_table = np.array([p & low_mask for p in thresholds], np.uint32)

    def draw(key, shape):
        high, low = jax.random.bits(key, (2, *shape), jnp.uint32)
        sign, low = low >> _LOW_BITS, low & low_mask

        def halve(step, magnitude):
            probe = magnitude + (1 << (num_halvings - 1 - step))
            high_threshold, low_threshold = jnp.asarray(high_table)[probe - 1], jnp.asarray(low_table)[probe - 1]
            below = (high < high_threshold) | ((high == high_threshold) & (low < low_threshold))
            return jnp.where(below, probe, magnitude)

        # The number of thresholds above (high, low): they descend.
        magnitude = jax.lax.fori_loop(0, num_halvings, halve, jnp.zeros(shape, jnp.int32))
        return jnp.where(sign == 1, -magnitude, magnitude).astype(jnp.float32)

    return _in_pieces(draw, key, shape)


def _in_pieces(draw: Callable, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``draw(key, shape)``, a large table in pieces of a few thousand numbers, each from a key of its own."""
    if len(shape) < 2 or math.prod(shape) <= _PARTS * _PIECE:
        return draw(key, shape)
    parts = math.gcd(shape[0], _PARTS)
    part_size = math.prod(shape) // parts
    num_pieces = -(-part_size // _PIECE)
    part_keys = jax.vmap(lambda part: jax.random.fold_in(key, part))(jnp.arange(parts))

    def piece(index):
        return jax.vmap(lambda k: draw(jax.random.fold_in(k, index), (_PIECE,)))(part_keys)

    if jax.default_backend() == "cpu":
        numbers = jnp.zeros((parts, num_pieces, _PIECE))
        numbers = jax.lax.fori_loop(0, num_pieces, lambda i, x: x.at[:, i].set(piece(i)), numbers)
    else:
        numbers = jax.vmap(piece, out_axes=1)(jnp.arange(num_pieces))
    return numbers.reshape(parts, -1)[:, :part_size].reshape(shape)

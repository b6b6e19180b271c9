"""Uniform quantisation of a client's update: a few bits a number, and a scale of its own."""

import jax
import jax.numpy as jnp

from fedjax_rec.compression.flat import ravel_update, update_size
from fedjax_rec.compression.rotation import block_size, rotate, rotate_back, rotated_size
from fedjax_rec.federated.transforms import Bound, UpdateTransform

ROUNDINGS = ("stochastic", "nearest")
MOST_BITS = 16
_GOLDEN = 2654435769  # 2^32 over the golden ratio: its multiples fill the unit interval evenly


def quantize(bits: int, *, rounding: str = "stochastic", rotation: bool = True) -> UpdateTransform:
    """Rounds each client's update to a grid of ``2^bits - 1`` levels (one bit: 2) between minus and plus its largest.

        q = round((x / m + 1) L / 2),    decoded x = (2 q / L - 1) m,    m = max |x|,    L = 2^bits - 2 (one bit: 1)

    With rotation, x are the numbers of one block of the rotated update, and m is that block's; without, there is one m
    for all, and a single large number makes the grid coarse for everything else. The signs of the rotation are public
    and of the round. Zero is a level, from two bits on. A client's update is sent as ``bits`` a number and 32 bits for
    each m; ids of rows are sent beside it, as before. As it is the client's own scale that its numbers are multiplied
    by, they cannot be summed before they are decoded: not linear.

    Stochastic rounding goes up with a probability of ``frac``, to 2^-24, so the decoded update is unbiased. Random bits
    would cost more than all the rest, and unbiasedness needs each offset uniform, but not independent of the others:
    ``offset_j = word + j g mod 2^32``, g the golden ratio's and the word a client's own, is uniform for each j. The
    expected squared error is that of independent offsets, being a sum over numbers, and clients are independent; what
    is lost is that the errors of one client's numbers depend on one another.
    Nearest rounding has about half that squared error, and a bias that the mean over clients keeps.

    No error is fed back into later rounds: a client that is sampled now and then would feed it back when it is stale.

    Guarantee: none on the norm: rounding can lengthen an update, so a clip must follow it before any noise ("clip last,
    on the decoded vector"). An update that is not finite is not finite after it, for that clip to drop.

    Args:
      bits: a number, 1 to 16.
      rounding: "stochastic" or "nearest".
      rotation: whether to rotate first; it takes most of the time (see `rotation`).

    Raises:
      ValueError: for other bits or another rounding.
    """
    if not (isinstance(bits, int) and 1 <= bits <= MOST_BITS):
        raise ValueError(f"bits must be a whole number between 1 and {MOST_BITS}; got {bits}.")
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}; got {rounding!r}.")
    num_steps = max(2**bits - 2, 1)

    def prepare(state, context, key):
        del context
        return key if rotation else state

    def client(update, prepared, key):
        vector, unravel = ravel_update(update)
        # One column for each scale; without rotation, all is one, and stays flat.
        blocks = rotate(vector, prepared).reshape(block_size(vector.size), -1) if rotation else vector
        offsets = jnp.float32(0.5)
        if rounding == "stochastic":
            offsets = random_offsets(key, blocks.size).reshape(blocks.shape)
        decoded = to_grid(blocks, offsets, num_steps).reshape(-1)
        return unravel(rotate_back(decoded, prepared, vector.size) if rotation else decoded), {}

    def server(total, prepared, key):
        del prepared, key
        return total, ()

    def upload(wire, update):
        size = update_size(update)
        numbers, num_scales = (rotated_size(size), rotated_size(size) // block_size(size)) if rotation else (size, 1)
        return wire._replace(numbers=float(numbers), bits=float(bits), side_bits=wire.side_bits + 32.0 * num_scales)

    return UpdateTransform(
        prepare=prepare,
        client=client,
        server=server,
        sensitivity=lambda bound: Bound(noised=bound.noised),
        upload=upload,
        linear=False,
    )


def to_grid(x: jax.Array, offsets: jax.Array, num_steps: int) -> jax.Array:
    """Rounds to ``num_steps`` equal steps between minus and plus the largest magnitude along the first axis.

    Args:
      x: float32 ``[n]`` or ``[n, blocks]``.
      offsets: of the same shape, or a scalar, in (0, 1): a number goes up if what it has above a level is more.
      num_steps: levels less one.
    """
    largest = jnp.max(jnp.abs(x), axis=0, keepdims=True)
    inverse = jnp.where(largest == 0, 0.0, 1 / largest)
    steps = jnp.minimum((x * inverse + 1) * (num_steps / 2), num_steps)
    below = jnp.floor(steps)
    code = below + (offsets < steps - below)
    return (code * (2 / num_steps) - 1) * largest


def random_offsets(key: jax.Array, num_numbers: int) -> jax.Array:
    """Numbers in (0, 1), each uniform, all from one random word: multiples of the golden ratio after it.

    Returns:
      float32 ``[num_numbers]``, odd multiples of 2^-24.
    """
    word = jax.random.bits(key, (), jnp.uint32)
    bits = (word + jnp.arange(num_numbers, dtype=jnp.uint32) * jnp.uint32(_GOLDEN)) >> 9
    return bits.astype(jnp.float32) * 2.0**-23 + 2.0**-24

"""Sparsification: only the largest numbers, or the largest rows, of a client's update."""

import math

import jax
import jax.numpy as jnp

from fedjax_rec.compression.flat import ravel_update, update_size
from fedjax_rec.federated.rows import Rows, is_rows, merge_duplicates
from fedjax_rec.federated.transforms import Bound, UpdateTransform, Wire, plain_wire


def top_k(share: float, *, rows: bool = False) -> UpdateTransform:
    """Keeps the largest numbers of each client's update, and drops the rest; or the longest rows of its item tables.

    Of n numbers, k = ceil(share n) are kept, those of largest magnitude over all leaves (Aji and Heafield, 2017,
    "Sparse Communication for Distributed Gradient Descent"). Each is sent in 32 bits, with its place among all numbers
    of the model, N, in ceil(log2 N) bits, which stands for the ids of rows too. With ``rows``, a table of n rows keeps
    the ceil(share n) with the largest L2 norms, whole, at ceil(log2 num_rows) bits for an id, and dense leaves are sent
    whole; later links and the sum then have fewer rows to work on, which makes a round faster.

    Biased: small numbers are never sent, and no error is fed back into later rounds (a client that is sampled now and
    then would feed it back when it is stale). Which numbers are sent depends on the data, and differs between clients:
    not linear, and a server sees it. A sum with noise on every entry hides it; a secure sum cannot be taken.

    Guarantee: it only drops numbers, so bounds before it hold after it. Rows that occur twice are merged first.

    Args:
      share: of numbers, or of rows, in (0, 1]; padding is counted in n.
      rows: whether to choose whole rows.

    Raises:
      ValueError: if ``share`` is not such a number.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1; got {share}.")

    def kept(size):
        return max(math.ceil(share * size - 1e-9), 1)

    def client(update, state, key):
        del state, key
        update = jax.tree.map(lambda x: merge_duplicates(x) if is_rows(x) else x, update, is_leaf=is_rows)
        if rows:
            return jax.tree.map(
                lambda x: longest_rows(x, kept(x.ids.size)) if is_rows(x) else x, update, is_leaf=is_rows
            ), {}
        vector, unravel = ravel_update(update)
        return unravel(jnp.where(largest_numbers(vector, kept(vector.size)), vector, 0)), {}

    def upload(wire, update):
        beside = wire.side_bits - plain_wire(update).side_bits  # of other links; the ids are counted anew
        leaves = jax.tree.leaves(update, is_leaf=is_rows)
        if rows:
            numbers = sum(kept(x.ids.size) * x.values.shape[-1] if is_rows(x) else x.size for x in leaves)
            ids = sum(kept(x.ids.size) * _index_bits(x.num_rows) for x in leaves if is_rows(x))
            return Wire(float(numbers), wire.bits, beside + ids)
        places = sum(x.num_rows * x.values.shape[-1] if is_rows(x) else x.size for x in leaves)
        numbers = kept(update_size(update))
        return Wire(float(numbers), wire.bits, beside + numbers * _index_bits(places))

    def sensitivity(bound):
        return Bound(noised=True) if bound.noised else bound

    return UpdateTransform(client=client, sensitivity=sensitivity, upload=upload, linear=False)


def longest_rows(rows: Rows, num_kept: int) -> Rows:
    """The ``num_kept`` rows with the largest L2 norms, unordered; padding where there are fewer.

    Args:
      rows: each id once.
      num_kept: at most the rows there are, padding counted.
    """
    _, places = jax.lax.top_k(jnp.sum(jnp.square(rows.values), axis=-1), num_kept)
    return Rows(rows.ids[places], rows.values[places], rows.num_rows)


def largest_numbers(vector: jax.Array, num_kept: int) -> jax.Array:
    """True for exactly ``num_kept`` numbers, those of largest magnitude; the first ones of equals.

    The threshold is found bit by bit, by counting: on a CPU a sort takes several times as long. Magnitudes in float32
    are ordered as their bits are, NaN last.

    Args:
      vector: float32 ``[n]``.
      num_kept: in 1 .. n.

    Returns:
      bool ``[n]``.
    """
    bits = jax.lax.bitcast_convert_type(jnp.abs(vector), jnp.int32)
    place = jnp.arange(vector.size, dtype=jnp.int32)

    def last(holds, num_bits):
        """The largest integer of so many bits that ``holds``, which is true of 0 and of all below one that it is."""

        def try_bit(i, found):
            candidate = found | jnp.left_shift(jnp.int32(1), num_bits - 1 - i)
            return jnp.where(holds(candidate), candidate, found)

        return jax.lax.fori_loop(0, num_bits, try_bit, jnp.int32(0))

    threshold = last(lambda t: jnp.sum(bits >= t) >= num_kept, 31)
    above, tied = bits > threshold, bits == threshold
    missing = num_kept - jnp.sum(above)
    last_place = last(lambda p: jnp.sum(tied & (place < p)) < missing, vector.size.bit_length())
    return above | (tied & (place <= last_place))


def _index_bits(count: int) -> int:
    return (count - 1).bit_length()

"""The ring that secure and encrypted sums add in: fixed-point updates as integers modulo 2^32, in uint32 words.

    q = clip(round(x / granularity), -L, L),  L = 2^(bits - 1) - 1,      word = q mod 2^32

`fixed_point` makes the integers q on each client, and the server turns their sum back. Sums modulo 2^32 that lie within
2^31 of zero are the integers' own, so nothing overflows while ``bits + log2(max_clients) <= 32``, which is checked.
Every way to take the sum (`ring_sum`, `simulated_secure_sum`, `crypto_secure_sum`, `encrypted_sum`) adds the same
words, so all of them train the same model, bit for bit.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_rec.compression.quantize import random_offsets
from fedjax_rec.compression.rotation import rotate, rotate_back, rotated_size
from fedjax_rec.federated.rows import is_rows, merge_duplicates, to_dense, whole_size
from fedjax_rec.federated.transforms import PLAIN_SUM, Bound, UpdateTransform, Wire, plain_wire
from fedjax_rec.privacy.discrete import rounded_norm_bound

RING_BITS = 32
LEAST_BITS, DEFAULT_BITS, MOST_BITS = 12, 16, 22
ROUNDINGS = ("stochastic", "nearest")

# 1.5 * 2^23: added to a number below 2^22, it leaves the nearest integer in the last bits of the float32, so rounding
# and conversion are one addition each. On a CPU that halves their time.
_PAST_FRACTIONS = 12582912.0
_PAST_FRACTIONS_BITS = 0x4B400000
_LEEWAY = 1 + 1e-5  # for what float32 adds to norms
_NUM_TRIES = 16


def fixed_point(
    *,
    largest: float,
    max_clients: int,
    bits: int = DEFAULT_BITS,
    rounding: str = "stochastic",
    rotation: bool = False,
    num_numbers: int | None = None,
    count_clipped: bool = True,
) -> UpdateTransform:
    """Rounds each client's update to ``bits`` signed bits a number; the server turns the sum of integers back.

    Between this link and the server's side of it, updates are float32 integers, in steps of
    ``granularity = largest / (2^(bits - 1) - 1)``. Numbers beyond ``largest`` are clipped to it and NaN becomes zero;
    the metric ``out_of_range`` is their share of the update. Stochastic rounding goes up or down with the probability
    that keeps the mean, to within a float32's last bit, and zeros stay zeros; the numbers of one client are rounded by
    multiples of the golden ratio after one random word, each uniform and not independent (see `quantize`).

    With ``rotation`` the whole update is first turned by a randomised Hadamard rotation that the round's clients have
    in common, so that no number stands out: then few bits describe all of them, and none says which rows a client
    touched.

    Guarantee: where an earlier link bounds the L2 norm by C and ``num_numbers`` is given, a client adds integers of L2
    norm at most ``rounded_norm_bound(C / granularity, num_numbers)``, whatever the draws: stochastic rounding is
    redrawn until it is met, and is towards zero after 16 misses, which the metric ``truncated`` counts (Kairouz, Liu,
    Steinke, 2021, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure Aggregation").

    Args:
      largest: largest magnitude of a number, in units of the update; public. With a clip before it, the clip norm.
      max_clients: most clients in one sum.
      bits: signed bits of one client's number, at least 12.
      rounding: "stochastic" or "nearest", which is biased.
      rotation: whether to rotate.
      num_numbers: most numbers in one client's update, padding included, as `largest_update` has it; with
        ``rotation``, numbers of whole tables. Needed for a bound, and so for any noise after it.
      count_clipped: whether to give ``out_of_range``; behind a clip to ``largest`` it is zero, and counting takes
        longer than rounding.

    Raises:
      ValueError: for numbers out of range, or if a sum could overflow.
    """
    check_headroom(bits, max_clients)
    if not 0 < largest < math.inf:
        raise ValueError(f"largest must be a positive number, the largest magnitude that is sent; got {largest}.")
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}; got {rounding!r}.")
    limit = 2 ** (bits - 1) - 1
    granularity = largest / limit
    num_rounded = None if num_numbers is None else rotated_size(num_numbers) if rotation else num_numbers

    def client(update, prepared, key):
        update = flat_update(update, prepared[0]) if rotation else jax.tree.map(_merged, update, is_leaf=is_rows)
        leaves, structure = jax.tree.flatten(update, is_leaf=is_rows)
        values = [(leaf.values if is_rows(leaf) else leaf) * (1 / granularity) for leaf in leaves]
        inside = [jnp.abs(x) <= limit for x in values]  # False for NaN
        values = [jnp.where(x == x, jnp.clip(x, -limit, limit), 0.0) for x in values]
        size = sum(x.size for x in values)
        if num_rounded is not None and size > num_rounded:
            raise ValueError(f"A client's update has {size} numbers, more than num_numbers={num_numbers}; raise it.")
        if rounding == "nearest":
            rounded, truncated = [_nearest(x) for x in values], jnp.zeros(())
        else:
            rounded, truncated = _round_at_random(values, num_rounded, key)
        leaves = [with_values(leaf, r) for leaf, r in zip(leaves, rounded, strict=True)]
        metrics = {"truncated": truncated}
        if count_clipped:
            metrics["out_of_range"] = sum(jnp.sum(~x) for x in inside) / size
        return jax.tree.unflatten(structure, leaves), metrics

    def server(total, prepared, key):
        del key
        total = jax.tree.map(lambda x: x * granularity, total)
        return (unflatten(total, prepared[0]) if rotation else total), ()

    def sensitivity(bound):
        if num_rounded is None or bound.l2 == math.inf:
            return Bound(noised=bound.noised, integers=not bound.noised)
        steps = _LEEWAY * bound.l2 / granularity
        if rounding == "nearest":
            l2 = steps + math.sqrt(num_rounded) / 2
        else:
            l2 = rounded_norm_bound(steps, num_rounded) * _LEEWAY
        return Bound(min(math.sqrt(num_rounded) * l2, l2**2), l2, bound.noised, integers=not bound.noised)

    def upload(wire, update):
        numbers = wire.numbers
        if wire.side_bits:  # rows with ids become whole tables
            numbers += whole_size(update) - plain_wire(update).numbers
        return Wire(rotated_size(int(numbers)) if rotation else numbers, RING_BITS)

    return UpdateTransform(
        prepare=lambda state, context, key: (key,),
        client=client,
        server=server,
        sensitivity=sensitivity,
        upload=upload,
        decodes=True,
    )


def check_headroom(bits: int, max_clients: int) -> None:
    """Refuses what could overflow a sum modulo 2^32, or is too coarse to be of use.

    Raises:
      ValueError: a sentence with the numbers and the way out.
    """
    if max_clients < 1:
        raise ValueError(f"max_clients must be at least 1; got {max_clients}.")
    room = min(MOST_BITS, RING_BITS - math.ceil(math.log2(max_clients)))
    if not LEAST_BITS <= bits <= room:
        raise ValueError(
            f"A sum of {max_clients} clients modulo 2^{RING_BITS} has room for {LEAST_BITS} to {room} bits a number "
            f"(below {LEAST_BITS}, rounding costs more than noise does); got bits={bits}."
        )


def ring_sum() -> UpdateTransform:
    """Adds the integers of an earlier `fixed_point` modulo 2^32, in the open: the sum that secure ones equal."""
    # Plain addition, and said so: then no link comes after it whose server would take words for numbers.
    return UpdateTransform(
        client=lambda update, prepared, key: (to_words(update), {}), summation=PLAIN_SUM, server=words_server
    )


def words_server(total, prepared, key):
    """The server's side of a link that sums words: back to float32 integers."""
    del prepared, key
    return from_words(total), ()


def to_words(update: Any) -> Any:
    """float32 integers, of magnitude below 2^22, as uint32 words: ``q mod 2^32``."""
    return jax.tree.map(
        lambda leaf: with_values(leaf, _words(leaf.values)) if is_rows(leaf) else _words(leaf), update, is_leaf=is_rows
    )


def from_words(total: Any) -> Any:
    """A sum of words as float32: the integer nearest to zero that is equal to it modulo 2^32."""
    return jax.tree.map(lambda x: jax.lax.bitcast_convert_type(x, jnp.int32).astype(jnp.float32), total)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlatUpdate:
    """An update written out as one rotated vector.

    Attributes:
      vector: ``[rotated_size(whole_size(update))]``.
      shape: its structure, and the shape of each leaf, ``Rows`` as whole tables.
    """

    vector: jax.Array
    shape: tuple = dataclasses.field(metadata={"static": True})


def flat_update(update: Any, key: jax.Array) -> FlatUpdate:
    """Rotates a whole update; tables are written out, so all clients' vectors mean the same."""
    leaves, structure = jax.tree.flatten(to_dense(update))
    vector = jnp.concatenate([x.reshape(-1) for x in leaves])
    return FlatUpdate(rotate(vector, key), (structure, tuple(x.shape for x in leaves)))


def unflatten(total: FlatUpdate, key: jax.Array) -> Any:
    """A sum of rotated updates as the pytree that `flat_update` was given, tables whole."""
    structure, shapes = total.shape
    sizes = [math.prod(shape) for shape in shapes]
    vector = rotate_back(total.vector, key, sum(sizes))
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    parts = [vector[end - size : end].reshape(shape) for end, size, shape in zip(ends, sizes, shapes, strict=True)]
    return jax.tree.unflatten(structure, parts)


def _merged(leaf):
    return merge_duplicates(leaf) if is_rows(leaf) else leaf


def with_values(leaf: Any, values: jax.Array) -> Any:
    """A leaf of an update, array or ``Rows``, with other numbers."""
    return dataclasses.replace(leaf, values=values) if is_rows(leaf) else values


def _round_at_random(values: list[jax.Array], num_rounded: int | None, key: jax.Array):
    """Rounds up or down, redrawn until the norm is within its bound; returns the integers and whether that failed."""

    def draw(tries):
        keys = jax.random.split(jax.random.fold_in(key, tries), len(values))
        return [_up_or_down(x, k) for x, k in zip(values, keys, strict=True)]

    if num_rounded is None:
        return draw(0), jnp.zeros(())
    limit = jnp.square(rounded_norm_bound(jnp.sqrt(_squared_norm(values)), num_rounded))

    def too_long(carry):
        tries, rounded = carry
        return (_squared_norm(rounded) > limit) & (tries < _NUM_TRIES)

    _, rounded = jax.lax.while_loop(too_long, lambda carry: (carry[0] + 1, draw(carry[0])), (1, draw(0)))
    truncated = _squared_norm(rounded) > limit
    return [jnp.where(truncated, jnp.trunc(x), r) for x, r in zip(values, rounded, strict=True)], truncated.astype(
        jnp.float32
    )


def _up_or_down(values: jax.Array, key: jax.Array) -> jax.Array:
    """The nearest integer to the value plus a number between -1/2 and 1/2, uniform for each by itself."""
    return _nearest(values + (random_offsets(key, values.size).reshape(values.shape) - 0.5))


def _nearest(values: jax.Array) -> jax.Array:
    """The nearest integer, as float32, for magnitudes below 2^22."""
    return from_words(_words(values))


def _words(values: jax.Array) -> jax.Array:
    """The nearest integer as a word, for magnitudes below 2^22.

    By way of the bits: XLA takes ``(values + c) - c`` for ``values``.
    """
    return jax.lax.bitcast_convert_type(values + _PAST_FRACTIONS, jnp.uint32) - jnp.uint32(_PAST_FRACTIONS_BITS)


def _squared_norm(leaves: list[jax.Array]) -> jax.Array:
    return sum(jnp.sum(jnp.square(x)) for x in leaves)

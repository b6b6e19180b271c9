"""Negative items drawn on the device, anew each round, without a repeat within a client's epoch.

Sampling without replacement keeps a client's items unique, so the rows it trains can ride along with its examples and
no scatter is needed. Uniqueness comes from a keyed pseudo-random permutation evaluated point by point: no sort, no
table of the catalogue per client.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

NUM_FEISTEL_ROUNDS = 10


def _mix(x: jax.Array) -> jax.Array:
    """A 32-bit finaliser (the avalanche step of MurmurHash3) on uint32."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def permute(key: jax.Array, index: jax.Array, size: jax.Array | int) -> jax.Array:
    """Where a pseudo-random permutation of ``0 .. size-1`` sends each index; ``size`` may be traced.

    A Feistel network over a near-square grid of at least ``size`` cells (Black and Rogaway, 2002, "Ciphers with
    Arbitrary Finite Domains"): each half-round shifts one coordinate by a hash of the other, and points that leave the
    domain walk on until they are back in it.

    Args:
      key: a JAX key.
      index: int32 of any shape. Entries outside ``[0, size)`` come back as some value, to be masked by the caller.
      size: int32 scalar, 0 <= size < 2**31.

    Returns:
      int32, shape of ``index``: distinct values in ``[0, size)`` for distinct indices in ``[0, size)``.
    """
    round_keys = jax.random.bits(key, (NUM_FEISTEL_ROUNDS,), jnp.uint32)
    size = jnp.maximum(jnp.asarray(size, jnp.int32), 1)
    # +1 absorbs float32 rounding. On grids below 5 x 4 the few shifts there are leave the permutation visibly uneven.
    width = jnp.maximum(jnp.ceil(jnp.sqrt(size.astype(jnp.float32))).astype(jnp.int32) + 1, 5)
    height = jnp.maximum(-(-size // width), 4)

    def shift(coordinate, other, extent, round_key):
        # The high half of a product maps a 16-bit hash to [0, extent) without a division, which is slow on CPU.
        hashed = (_mix(other.astype(jnp.uint32) ^ round_key) >> 16) * extent.astype(jnp.uint32) >> 16
        moved = coordinate + hashed.astype(jnp.int32)
        return jnp.where(moved >= extent, moved - extent, moved)

    def both_shifts(i, cell):
        row, column = cell
        row = shift(row, column, height, round_keys[2 * i])
        return row, shift(column, row, width, round_keys[2 * i + 1])

    def walk(carry):
        cell, pending = carry
        # A loop, not unrolled: the ten shifts would be half of a round's compilation time.
        moved = jax.lax.fori_loop(0, NUM_FEISTEL_ROUNDS // 2, both_shifts, cell)
        row, column = (jnp.where(pending, new, old) for new, old in zip(moved, cell, strict=True))
        return (row, column), pending & (row * width + column >= size)

    index = jnp.clip(index, 0, size - 1)
    start = (index // width, index % width), jnp.ones(index.shape, bool)
    (row, column), _ = jax.lax.while_loop(lambda carry: carry[1].any(), walk, start)
    return row * width + column


class Negatives(NamedTuple):
    """What a client draws beside its own items.

    Attributes:
      num_per_positive: negatives for each positive; a client whose remaining catalogue is smaller gets all of it.
      distribution: ``"uniform"`` over the items that may be drawn, or ``"popularity"`` with ``item_cdf``.
      item_cdf: float32 ``[num_items]``, cumulative share of each item, ending at 1; only for ``"popularity"``. It is
        computed from all clients' data, so under DP it must come from a released histogram.
      replacement: True lets each positive draw on its own, so that an item may come up again in a client's epoch, as in
        most published code. It tells a client less about its unseen items, and local training then gathers and
        scatters rows a batch at a time, which is slower. Uniform only.
      mixed: True shuffles positives and negatives of an epoch together, so that a batch holds some of both by chance,
        as in most published code; columns then mean nothing, so this is not for BPR.
    """

    num_per_positive: int = 4
    distribution: str = "uniform"
    item_cdf: jax.Array | None = None
    replacement: bool = False
    mixed: bool = False


def popularity_cdf(item_counts: jax.Array, *, exponent: float = 0.75) -> jax.Array:
    """The cumulative distribution of popularity sampling, counts to the power ``exponent``; float32 ``[num_items]``."""
    weights = jnp.maximum(jnp.asarray(item_counts, jnp.float32), 0.0) ** exponent
    total = weights.sum()
    cdf = jnp.cumsum(jnp.where(total > 0, weights, 1.0))
    return cdf / cdf[-1]


def uniform_negatives(
    key: jax.Array, *, num: int, wanted: jax.Array, excluded: jax.Array, num_excluded: jax.Array, num_items: int
) -> tuple[jax.Array, jax.Array]:
    """Draws distinct items uniformly from those not in ``excluded``.

    Args:
      key: a JAX key.
      num: length of the result (static).
      wanted: int32 scalar, how many of the ``num`` are asked for.
      excluded: int32 ``[E]``, sorted item ids, padded with ``num_items``.
      num_excluded: int32 scalar, real entries of ``excluded``.
      num_items: catalogue size.

    Returns:
      ids int32 ``[num]``, padded with ``num_items``, and weights float32 ``[num]``: ``wanted`` over the number drawn
      (1 unless the catalogue ran out), so that the expected loss is that of ``wanted`` draws.
    """
    available = num_items - num_excluded
    drawn = jnp.minimum(wanted, available)
    index = jnp.arange(num, dtype=jnp.int32)
    ids = _allowed_item(permute(key, index, available), excluded, num_excluded, num_items)
    real = index < drawn
    weight = wanted.astype(jnp.float32) / jnp.maximum(drawn, 1).astype(jnp.float32)
    return jnp.where(real, ids, num_items), jnp.where(real, weight, 0.0)


def independent_negatives(
    key: jax.Array, *, num: int, wanted: jax.Array, excluded: jax.Array, num_excluded: jax.Array, num_items: int
) -> tuple[jax.Array, jax.Array]:
    """Draws items uniformly and with replacement from those not in ``excluded``; arguments as in `uniform_negatives`.

    Returns:
      ids int32 ``[num]``, padded with ``num_items``, and weights float32 ``[num]``: 1, or 0 where nothing is left to
      draw.
    """
    available = num_items - num_excluded
    rank = jax.random.randint(key, (num,), 0, jnp.maximum(available, 1), jnp.int32)
    real = (jnp.arange(num) < wanted) & (available > 0)
    ids = _allowed_item(rank, excluded, num_excluded, num_items)
    return jnp.where(real, ids, num_items), real.astype(jnp.float32)


def _allowed_item(rank: jax.Array, excluded: jax.Array, num_excluded: jax.Array, num_items: int) -> jax.Array:
    """The r-th item that is not excluded, for each r of ``rank``: r plus the number of excluded items before it."""
    gaps = excluded - jnp.arange(len(excluded), dtype=excluded.dtype)
    gaps = jnp.where(jnp.arange(len(excluded)) < num_excluded, gaps, num_items)
    return rank + jnp.searchsorted(gaps, rank, side="right").astype(jnp.int32)


def popularity_negatives(
    key: jax.Array, *, num: int, wanted: jax.Array, excluded: jax.Array, item_cdf: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draws items in proportion to their share in ``item_cdf``, distinct, each with the number of times it was hit.

    One point is drawn in each of ``wanted`` equal strata of the distribution, so an item of share p is hit
    ``wanted * p`` times in expectation. Hits are merged into a weight, and excluded items get weight zero.

    Args:
      key: a JAX key.
      num: length of the result (static).
      wanted: int32 scalar, number of strata.
      excluded: int32 ``[E]``, sorted item ids, padded with ``num_items``.
      item_cdf: float32 ``[num_items]``.

    Returns:
      ids int32 ``[num]`` padded with ``num_items``, weights float32 ``[num]``.
    """
    num_items = len(item_cdf)
    order_key, jitter_key = jax.random.split(key)
    strata = jnp.maximum(wanted, 1).astype(jnp.float32)
    seed = jax.random.bits(jitter_key, (), jnp.uint32)

    def point(stratum):
        jitter = (_mix(stratum.astype(jnp.uint32) ^ seed) >> 8).astype(jnp.float32) / 2.0**24
        return (stratum.astype(jnp.float32) + jitter) / strata

    def item_at(stratum):
        return jnp.minimum(jnp.searchsorted(item_cdf, point(stratum), side="right"), num_items - 1).astype(jnp.int32)

    index = jnp.arange(num, dtype=jnp.int32)
    stratum = permute(order_key, index, wanted)  # so that batches mix popular and rare items
    ids = item_at(stratum)
    first = (stratum == 0) | (item_at(jnp.maximum(stratum - 1, 0)) != ids)
    # Hits of an item: every stratum wholly inside its share, and the one at its end if its point falls inside.
    last = jnp.minimum((item_cdf[ids] * strata).astype(jnp.int32), wanted - 1)
    last = jnp.where(item_at(jnp.maximum(last, 0)) == ids, last, last - 1)
    hits = jnp.maximum(last - stratum + 1, 1)
    place = jnp.minimum(jnp.searchsorted(excluded, ids), len(excluded) - 1)
    real = (index < wanted) & first & (excluded[place] != ids)
    return jnp.where(real, ids, num_items), jnp.where(real, hits.astype(jnp.float32), 0.0)

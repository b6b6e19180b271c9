"""Robust rules as pure functions of all uploads of a round: order statistics of each coordinate, and Krum.

Uploads of one table are ``values [uploads, rows, dim]`` beside ``sent [uploads, rows]``, True where a client sent that
row. A rule takes each row over the clients that sent it and gives a *sum*: s times the rule's mean for s senders, so
that dividing by the expected cohort size m gives ``(s / m) * mean``, as plain averaging does.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# Numbers of the uploads that a coordinate-wise rule works on at a time: on a CPU they stay in the cache, which takes
# two thirds of the time that 2**20 of them do; an accelerator wants many at once.
BLOCK_NUMBERS = {"cpu": 2**15}
ACCELERATOR_BLOCK_NUMBERS = 2**24

Rule = Callable[[jax.Array, jax.Array], jax.Array]
"""``(values [uploads, rows, dim], sent [uploads, rows]) -> [rows, dim]``, a mean over the senders of each row."""


def robust_sum(
    rule: Rule, values: jax.Array, sent: jax.Array, min_support: int, *, block_numbers: int | None = None
) -> jax.Array:
    """``s * rule`` for each row with ``s >= min_support`` senders, and zero for the others.

    Works through blocks of rows, so that of the uploads only a block is ever copied.

    Args:
      rule: `median_rule` or `trimmed_mean_rule`.
      values: float32 ``[uploads, rows, dim]``, finite.
      sent: bool ``[uploads, rows]``.
      min_support: fewest senders of a row that changes, at least 1.
      block_numbers: of the uploads in a block, by default chosen for the backend. Never changes a result.

    Returns:
      float32 ``[rows, dim]``.
    """
    uploads, rows, dim = values.shape
    block_numbers = block_numbers or BLOCK_NUMBERS.get(jax.default_backend(), ACCELERATOR_BLOCK_NUMBERS)
    size = min(rows, max(1, block_numbers // max(uploads * dim, 1)))

    def block(i, total):
        first = jnp.minimum(i * size, rows - size)  # the last block overlaps the one before it
        of_block = jax.lax.dynamic_slice_in_dim(values, first, size, 1)
        senders = jax.lax.dynamic_slice_in_dim(sent, first, size, 1)
        support = senders.sum(0, dtype=jnp.int32)[:, None]
        result = jnp.where(support >= min_support, support * rule(of_block, senders), 0.0)
        return jax.lax.dynamic_update_slice_in_dim(total, result, first, 0)

    return jax.lax.fori_loop(0, -(-rows // max(size, 1)), block, jnp.zeros((rows, dim), jnp.float32))


def median_rule(values: jax.Array, sent: jax.Array) -> jax.Array:
    """The median of each coordinate over its row's senders; of an even number, the mean of the middle two."""
    ordered, support = _ordered(values, sent), sent.sum(0, dtype=jnp.int32)
    low = _kth_smallest(ordered, jnp.maximum(support - 1, 0) // 2)
    high = _next_smallest(ordered, low, support // 2)
    return jnp.where(support[:, None] > 0, 0.5 * _number(low) + 0.5 * _number(high), 0.0)


def trimmed_mean_rule(share: float) -> Rule:
    """The mean of each coordinate without the ``floor(share * s)`` smallest and as many largest of its s senders."""

    def rule(values, sent):
        support = sent.sum(0, dtype=jnp.int32)
        # In float64, with room for its rounding: in float32, 0.1 * 30 might be below 3.
        trims = np.floor(share * np.arange(len(values) + 1) + 1e-9)
        trim = jnp.minimum(jnp.asarray(trims, jnp.int32)[support], jnp.maximum(support - 1, 0) // 2)
        ordered = _ordered(values, sent)
        low, high = _kth_smallest(ordered, trim), _kth_smallest(ordered, jnp.maximum(support - 1 - trim, 0))
        inside = (ordered > low[None]) & (ordered < high[None])
        # Of the uploads equal to a limit, those that the trimming leaves.
        left_low = (ordered <= low[None]).sum(0, dtype=jnp.int32) - trim[:, None]
        absent = (len(values) - support)[:, None]
        left_high = (ordered >= high[None]).sum(0, dtype=jnp.int32) - absent - trim[:, None]
        kept = jnp.maximum(support - 2 * trim, 1)[:, None]
        total = jnp.where(inside, values, 0.0).sum(0) + left_low * _number(low) + left_high * _number(high)
        mean = jnp.where(low == high, _number(low), total / kept)
        return jnp.where(support[:, None] > 0, mean, 0.0)

    return rule


def squared_distances(stacks: list[jax.Array]) -> jax.Array:
    """Squared L2 distance of each pair of uploads, joint over their leaves; infinite where it overflows.

    Args:
      stacks: float32 ``[uploads, ...]`` each.

    Returns:
      float32 ``[uploads, uploads]``.
    """
    flat = [x.reshape(len(x), -1) for x in stacks]
    products = sum(jnp.matmul(x, x.T, precision="highest") for x in flat)
    squares = jnp.diagonal(products)
    distances = squares[:, None] + squares[None, :] - 2 * products
    return jnp.where(jnp.isnan(distances), jnp.inf, jnp.maximum(distances, 0.0))


def krum_scores(distances: jax.Array, present: jax.Array, num_malicious: int) -> jax.Array:
    """Krum's score: the sum of an upload's ``n - num_malicious - 2`` smallest squared distances to others.

    Args:
      distances: float32 ``[uploads, uploads]``, squared.
      present: bool ``[uploads]``; n of them are True.
      num_malicious: f.

    Returns:
      float32 ``[uploads]``, infinite where absent.
    """
    size = len(present)
    others = present[None, :] & ~jnp.eye(size, dtype=bool)
    nearest = jnp.sort(jnp.where(others, distances, jnp.inf), axis=1)
    closest = jnp.arange(size) < jnp.maximum(present.sum() - num_malicious - 2, 1)
    return jnp.where(present, jnp.where(closest[None, :], nearest, 0.0).sum(1), jnp.inf)


# Order statistics by halving the range of values bit by bit: 32 passes of counting over a block that stays in the
# cache, twice as fast on a CPU as sorting it, and without a sorted copy.


def _ordered(values, sent):
    """uint32 in the order of the numbers; absent ones are last."""
    bits = jax.lax.bitcast_convert_type(jnp.where(sent[..., None], values, jnp.inf), jnp.int32)
    return jax.lax.bitcast_convert_type(jnp.where(bits < 0, ~bits, bits ^ jnp.int32(-(2**31))), jnp.uint32)


def _number(ordered):
    bits = jax.lax.bitcast_convert_type(ordered, jnp.int32)
    return jax.lax.bitcast_convert_type(jnp.where(bits < 0, bits ^ jnp.int32(-(2**31)), ~bits), jnp.float32)


def _kth_smallest(ordered, k):
    """The largest number with at most k smaller ones, for each coordinate; ``k`` is int32 ``[rows]``, from 0."""

    def body(i, found):
        tried = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        smaller = (ordered < tried[None]).sum(0, dtype=jnp.int32)
        return jnp.where(smaller <= k[:, None], tried, found)

    return jax.lax.fori_loop(0, 32, body, jnp.zeros(ordered.shape[1:], jnp.uint32))


def _next_smallest(ordered, low, k):
    """The k-th smallest number, where ``low`` is that or the one before it."""
    reaches = (ordered <= low[None]).sum(0, dtype=jnp.int32) > k[:, None]
    above = jnp.where(ordered > low[None], ordered, jnp.uint32(2**32 - 1)).min(0)
    return jnp.where(reaches, low, above)

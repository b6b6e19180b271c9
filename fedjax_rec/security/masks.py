"""Masks of a simulated secure sum: who shares them with whom, and sums of them that never touch memory one by one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_rec.federated.rows import add_to_total
from fedjax_rec.federated.transforms import select_update

_MASKS_AT_ONCE = 8  # in one pass over the sum
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B  # odd multipliers that mix 32 bits well


class MaskPlan(NamedTuple):
    """Who masks with whom in one round, and who will drop out before sending.

    Attributes:
      place: int32 ``[clients]``, where each stands on the circle; the cohort takes the first ``size`` places.
      survives: bool ``[clients]``, who sends.
      survives_at: bool ``[clients]``, the same by place.
      size: int32 scalar, clients of the cohort.
      first, second: uint32 scalars, the round's seed.
    """

    place: jax.Array
    survives: jax.Array
    survives_at: jax.Array
    size: jax.Array
    first: jax.Array
    second: jax.Array


def survivors_of(in_cohort: jax.Array, key: jax.Array, dropout_prob: float) -> jax.Array:
    """bool ``[clients]``: who of the cohort does not drop out, each by a coin of its own."""
    return in_cohort & (jax.random.uniform(key, in_cohort.shape) >= dropout_prob)


def plan_masks(in_cohort: jax.Array, survives: jax.Array, key: jax.Array) -> MaskPlan:
    """A random circle of the cohort, and the round's seed."""
    order_key, seed_key = jax.random.split(key)
    lots = jax.random.bits(order_key, in_cohort.shape, jnp.uint32) >> 1
    order = jnp.argsort(jnp.where(in_cohort, lots, jnp.uint32(2**32 - 1)))
    place = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype))
    return MaskPlan(place, survives, survives[order], in_cohort.sum(), *jax.random.bits(seed_key, (2,), jnp.uint32))


def add_masked(total: Any, words: Any, client_ids: jax.Array, active: jax.Array, plan: MaskPlan, degree: int) -> Any:
    """Adds the masked uploads of a chunk of clients to a sum: their words, and the masks of those who send.

    Args:
      total: pytree of uint32 arrays.
      words: updates of the chunk, leaves ``[chunk, ...]``.
      client_ids: int32 ``[chunk]``.
      active: bool ``[chunk]``.
      plan: of the round.
      degree: neighbours per client.
    """
    sends = active & plan.survives.at[client_ids].get(mode="fill", fill_value=False)
    total = add_to_total(total, jax.vmap(select_update)(sends, words))
    place = plan.place.at[client_ids].get(mode="clip")[:, None]
    steps = jnp.arange(1, _half(degree) + 1, dtype=place.dtype)[None]
    ahead, behind = (
        _edge(place, steps, plan, degree),
        _edge((place - steps) % _at_least(plan.size), steps, plan, degree),
    )
    own = _self_mask(place, plan, degree).reshape(-1)
    total = _add_masks(total, own, sends, own.size, plan)
    return _add_differences(total, ahead, behind, sends, plan)


def remove_masks(total: Any, plan: MaskPlan, degree: int, threshold: int, min_clients: int) -> tuple[Any, jax.Array]:
    """Takes out what is left of the masks; returns the sum and whether there is one.

    There is none, and zeros are returned, with fewer than ``min_clients`` survivors, or if of some client fewer than
    ``threshold`` of those who hold its shares, itself and its neighbours, are left.
    """
    num_clients, half = len(plan.place), _half(degree)
    place = jnp.arange(num_clients)[:, None]
    steps = jnp.arange(1, half + 1)[None]
    there = (place < plan.size) & plan.survives_at[:, None]
    ahead = plan.survives_at[(place + steps) % _at_least(plan.size)] & (place < plan.size)
    behind = plan.survives_at[(place - steps) % _at_least(plan.size)] & (place < plan.size)
    # The end that is ahead has subtracted the edge's mask, the other one has added it.
    left_over = ahead.astype(jnp.int32) - there.astype(jnp.int32)
    masks = jnp.concatenate([_self_mask(place, plan, degree), _edge(place, steps, plan, degree)], axis=1).reshape(-1)
    signs = jnp.concatenate([-there.astype(jnp.int32), jnp.where(place < plan.size, left_over, 0)], axis=1).reshape(-1)
    found = jnp.flatnonzero(signs, size=signs.size, fill_value=signs.size)
    masks, signs = masks.at[found].get(mode="clip"), signs.at[found].get(mode="fill", fill_value=0)
    total = _add_masks(total, masks, signs, jnp.sum(signs != 0), plan)
    num_survivors = plan.survives_at.sum()
    holders = there[:, 0] + ahead.sum(1) + behind.sum(1)
    holders = jnp.where(plan.size <= 2 * half, num_survivors, holders)
    enough = jnp.all((holders >= threshold) | (place[:, 0] >= plan.size)) & (num_survivors >= min_clients)
    return jax.tree.map(lambda x: jnp.where(enough, x, 0), total), enough


def _half(degree: int) -> int:
    return -(-degree // 2)


def _at_least(size):
    return jnp.maximum(size, 1)


def _self_mask(place, plan: MaskPlan, degree: int):
    return (len(plan.place) * _half(degree) + place).astype(jnp.uint32)


def _edge(place, steps, plan: MaskPlan, degree: int):
    """The number of the mask between ``place`` and ``place + steps``."""
    return (place * _half(degree) + steps - 1).astype(jnp.uint32)


def _add_masks(total: Any, masks: jax.Array, signs: jax.Array, count: jax.Array | int, plan: MaskPlan) -> Any:
    """Adds the first ``count`` masks, each times its sign, to every word of a pytree."""
    size = -(-masks.size // _MASKS_AT_ONCE) * _MASKS_AT_ONCE
    seeds = _seeds(jnp.pad(masks, (0, size - masks.size)), plan)
    signs = jnp.pad(signs.astype(jnp.int32), (0, size - masks.size)).astype(jnp.uint32)

    def some(i, counter):
        first, second, sign = (
            jax.lax.dynamic_slice(x, (i * _MASKS_AT_ONCE,), (_MASKS_AT_ONCE,)) for x in (*seeds, signs)
        )
        return sum(sign[j] * _mask(counter, first[j], second[j]) for j in range(_MASKS_AT_ONCE))

    return _add_to_words(total, (count + _MASKS_AT_ONCE - 1) // _MASKS_AT_ONCE, some)


def _add_differences(total: Any, plus: jax.Array, minus: jax.Array, counts: jax.Array, plan: MaskPlan) -> Any:
    """Adds the masks ``plus [clients, half]`` and takes away ``minus``, for the clients that count.

    In pairs, so that a pass multiplies once, by whether the client counts, and not once a mask: a third of the time.
    """
    pairs = min(_MASKS_AT_ONCE // 2, plus.shape[1])
    missing = -plus.shape[1] % pairs
    # A mask less itself is nothing, so that is what fills the last pass.
    plus, minus = (jnp.pad(x, ((0, 0), (0, missing))).reshape(-1, pairs) for x in (plus, minus))
    factors = jnp.repeat(counts.astype(jnp.uint32), plus.shape[0] // len(counts))
    up, down = _seeds(plus, plan), _seeds(minus, plan)

    def some(i, counter):
        pair_masks = [
            _mask(counter, up[0][i, j], up[1][i, j]) - _mask(counter, down[0][i, j], down[1][i, j])
            for j in range(pairs)
        ]
        return factors[i] * sum(pair_masks)

    return _add_to_words(total, plus.shape[0], some)


def _add_to_words(total: Any, trips: jax.Array | int, masks_of: Callable[[jax.Array, jax.Array], jax.Array]) -> Any:
    """Adds ``masks_of(i, counter)`` for each trip i, where ``counter`` numbers the words of the whole pytree."""
    leaves, structure = jax.tree.flatten(total)
    ends = [sum(x.size for x in leaves[: i + 1]) for i in range(len(leaves))]

    def trip(i, leaves):
        counters = [
            jnp.arange(end - x.size, end, dtype=jnp.uint32).reshape(x.shape)
            for x, end in zip(leaves, ends, strict=True)
        ]
        return [leaf + masks_of(i, counter) for leaf, counter in zip(leaves, counters, strict=True)]

    return jax.tree.unflatten(structure, jax.lax.fori_loop(0, trips, trip, leaves))


def _seeds(masks: jax.Array, plan: MaskPlan) -> tuple[jax.Array, jax.Array]:
    """64 bits for each mask, from its number and the round's seed."""
    first = _mask(_mask(masks, plan.first, plan.second), plan.second, plan.first)
    return first, _mask(_mask(masks, plan.second, ~plan.first), ~plan.second, plan.first)


def _mask(counter: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """uint32 words that look random: a number's place mixed with 64 bits. Whoever knows some can find the rest.

    Elementwise, so that it fuses with the sum that it is for: on a CPU some fifty times as fast as JAX's generator. The
    first product is the same for all masks, and computed once a pass.
    """
    x = counter * jnp.uint32(_FIRST) + first
    x = (x ^ (x >> 16)) * jnp.uint32(_SECOND) + second
    return x ^ (x >> 15)

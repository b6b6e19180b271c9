"""Randomised response: a client reports its items with random errors, and the server subtracts what they add.

Warner, 1965, "Randomized Response: A Survey Technique for Eliminating Evasive Answer Bias". Both links take an update
that is an indicator of a client's items, one table ``[num_items, 1]`` whose positive rows are the client's, such as
`item_counts` sends, and give the server an unbiased estimate of a sum. Coins are integers of 32 bits whose chance of an
error is rounded up, so a report is never less private than its event says.
"""

import math

import jax
import jax.numpy as jnp
from dp_accounting.dp_event import RandomizedResponseDpEvent, SelfComposedDpEvent

from fedjax_rec.federated.rows import Rows, add_update, is_rows, merge_duplicates
from fedjax_rec.federated.transforms import Bound, UpdateTransform, Wire

_COIN = 2**32


def randomized_response(
    epsilon_per_item: float, *, num_items: int, num_reports: float, unit: str = "user"
) -> UpdateTransform:
    """Every client sends a bit for each item of the catalogue, true with probability e^eps / (1 + e^eps), else flipped.

    With q the chance of a flip and S_i the sum of n bits, the server takes ``(S_i - n q) / (1 - 2 q)``: unbiased, with
    variance ``n q (1 - q) / (1 - 2 q)^2`` for every item, popular or not.

    Guarantee: replace-one; released is one client's report of one round, to anybody. One bit has a pure epsilon of
    ``epsilon_per_item``. Another history of a user may change every bit, so unit "user" costs ``num_items`` of these:
    no accuracy is left at an epsilon worth the name, and `k_randomized_response` is the design for it. Swapping one
    interaction for another changes two bits, which is what unit "example" costs; adding or removing one interaction
    changes one, and is covered. The two units are different promises: never put them in one column.

    Args:
      epsilon_per_item: of one bit, positive.
      num_items: catalogue size.
      num_reports: reports a round, public: all clients, or the size of a fixed cohort. Another number shifts all items
        alike, and the ranking not at all.
      unit: "user" or "example": whose event ``local_dp_event`` is.

    Raises:
      ValueError: for numbers out of range, or when a round is made on an update that is no such indicator.
    """
    _check(epsilon_per_item, num_items, num_reports)
    if unit not in ("user", "example"):
        raise ValueError(f'unit must be "user" or "example"; got {unit!r}.')
    flip_coin = _round_up(1 / (1 + math.exp(epsilon_per_item)))
    flip_prob = flip_coin / _COIN
    if flip_prob >= 0.5:
        raise ValueError(f"An epsilon of {epsilon_per_item} is too small for coins of 32 bits: nothing would be said.")
    changed_bits = num_items if unit == "user" else min(2, num_items)

    def client(update, state, key):
        del state
        _, structure = jax.tree.flatten(update, is_leaf=is_rows)
        leaf = _only_table(update, num_items)
        has = add_update(jnp.zeros((num_items, 1)), leaf) > 0  # NaN is no item
        flipped = jax.random.bits(key, (num_items, 1), jnp.uint32) < jnp.uint32(flip_coin)
        report = (has ^ flipped).astype(jnp.float32)
        every = jnp.arange(num_items, dtype=jnp.int32)
        return jax.tree.unflatten(structure, [Rows(every, report, num_items, whole=True)]), {}

    def server(total, state, key):
        del key
        return _debiased(total, num_reports * flip_prob, 1 - 2 * flip_prob), state

    def local_dp_event(bound, round_index):
        del bound, round_index
        return SelfComposedDpEvent(RandomizedResponseDpEvent(2 * flip_prob, 2), changed_bits)

    return UpdateTransform(
        client=client,
        server=server,
        # Bits, whatever came in: their norm is bounded with their noise, so they may be added or removed.
        sensitivity=lambda bound: Bound(l1=float(num_items), l2=math.sqrt(num_items), integers=True),
        local_dp_event=local_dp_event,
        local_unit=unit,
        upload=lambda wire, update: Wire(_only_table(update, num_items).num_rows, bits=1),
    )


def k_randomized_response(epsilon: float, *, num_items: int, num_reports: float) -> UpdateTransform:
    """Every client picks one of its items at random and names it, or with some probability any item at all.

    There are k = ``num_items`` + 1 answers, the last one "nothing", the truth of a client without items. A client says
    the truth with probability 1 - p, else a uniform one of the k, ``p = k / (e^eps + k - 1)``. With S_i reports of item
    i among n, the server takes ``(S_i - n p / k) / (1 - p)``: an unbiased estimate of sum_u 1{u has i} / |items of u|,
    of variance about ``n (k + e^eps - 2) / (e^eps - 1)^2`` an item (Kairouz, Bonawitz and Ramage, 2016, "Discrete
    Distribution Estimation under Local Privacy", for k-ary randomised response).

    Guarantee: user-level; replace-one; pure ``epsilon``; released is one client's report of one round, to anybody. A
    user's whole history decides one answer, so its length costs nothing. A new round is a new answer, and costs again.

    Args:
      epsilon: of one report, positive.
      num_items: catalogue size.
      num_reports: as in `randomized_response`.

    Raises:
      ValueError: as `randomized_response`.
    """
    _check(epsilon, num_items, num_reports)
    num_answers = num_items + 1
    lie_coin = _round_up(num_answers / (math.exp(epsilon) + num_answers - 1))
    lie_prob = lie_coin / _COIN
    if lie_prob >= 1:
        raise ValueError(
            f"At epsilon {epsilon} the truth among {num_answers} answers is rarer than coins of 32 bits can say."
        )

    def client(update, state, key):
        del state
        _, structure = jax.tree.flatten(update, is_leaf=is_rows)
        leaf = merge_duplicates(_only_table(update, num_items))
        item_key, coin_key, lie_key = jax.random.split(key, 3)
        mine = (leaf.values[:, 0] > 0) & (leaf.ids < num_items)
        place = jax.random.categorical(item_key, jnp.where(mine, 0.0, -jnp.inf))
        truth = jnp.where(mine.any(), leaf.ids[place], num_items)
        lies = jax.random.bits(coin_key, (), jnp.uint32) < jnp.uint32(lie_coin)
        answer = jnp.where(lies, jax.random.randint(lie_key, (), 0, num_answers), truth)
        one = (answer < num_items).astype(jnp.float32)
        report = Rows(answer.astype(jnp.int32).reshape(1), one.reshape(1, 1), num_items)
        return jax.tree.unflatten(structure, [report]), {}

    def server(total, state, key):
        del key
        return _debiased(total, num_reports * lie_prob / num_answers, 1 - lie_prob), state

    def upload(wire, update):
        del wire
        _only_table(update, num_items)
        return Wire(1, bits=math.ceil(math.log2(num_answers)))

    return UpdateTransform(
        client=client,
        server=server,
        sensitivity=lambda bound: Bound(l1=1.0, l2=1.0, integers=True),  # one answer, whatever came in
        local_dp_event=lambda bound, round_index: RandomizedResponseDpEvent(lie_prob, num_answers),
        upload=upload,
    )


def _check(epsilon: float, num_items: int, num_reports: float) -> None:
    if not 0 < epsilon < math.inf:
        raise ValueError(f"The epsilon of randomised response must be positive and finite; got {epsilon}.")
    if not num_items >= 1 or not num_reports > 0:
        raise ValueError(f"num_items and num_reports must be positive; got {num_items} and {num_reports}.")


def _round_up(prob: float) -> int:
    """The least number of 2^-32 parts that is at least ``prob``."""
    return math.ceil(prob * _COIN)


def _debiased(total, errors: float, truth: float):
    """The sum less the errors that each item has in expectation, over the share of truth."""
    if any(is_rows(leaf) for leaf in jax.tree.leaves(total, is_leaf=is_rows)):
        raise ValueError(
            "A later link drops rows of the sum, where the errors are still to be subtracted; leave it out."
        )
    return jax.tree.map(lambda x: (x - errors) / truth, total)


def _only_table(update, num_items: int) -> Rows:
    leaves = jax.tree.leaves(update, is_leaf=is_rows)
    if len(leaves) != 1 or not is_rows(leaves[0]) or (leaves[0].num_rows, leaves[0].values.shape[-1]) != (num_items, 1):
        raise ValueError(
            f"Randomised response takes the items of a client as rows of one table [{num_items}, 1], and this update "
            "is something else. Use it with item_counts(num_items), or PrivUnit or local noise for vectors."
        )
    return leaves[0]

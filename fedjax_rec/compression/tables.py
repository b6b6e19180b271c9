"""What links that send something else than an item table have in common: which leaves they are, and what goes out."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_rec.federated.rows import add_rows, is_rows, take_rows
from fedjax_rec.federated.transforms import Wire
from fedjax_rec.models.base import Shared


class Draw(NamedTuple):
    """k of n entries, the same for all clients of a round.

    Attributes:
      place: int32 ``[n]``, in ``0 .. k - 1``, where each entry stands among those that are sent; k or more elsewhere.
      ids: int32 ``[k]``, the entries that are sent: the inverse of ``place``.
    """

    place: jax.Array
    ids: jax.Array


def check_share(name: str, share: float) -> None:
    """Raises a ValueError unless ``share`` is in (0, 1]."""
    if not 0 < share <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, the part that is sent; got {share}.")


def num_sent(share: float, num: int) -> int:
    """How many of ``num`` entries a share of them is: rounded, and at least one."""
    return max(1, round(share * num))


def draw_uniformly(key: jax.Array, num: int, k: int) -> Draw:
    """k of ``num`` entries without replacement, all sets alike."""
    return draw_at(places(key, num, k), k)


def places(key: jax.Array, num: int, k: int) -> jax.Array:
    """``0 .. num - 1`` in random order, int32; in their own where all k = num are sent."""
    return jnp.arange(num, dtype=jnp.int32) if k == num else jax.random.permutation(key, num)


def draw_at(place: jax.Array, k: int) -> Draw:
    """A `Draw` from the places, of which ``0 .. k - 1`` occur once each."""
    ids = jnp.zeros(k, jnp.int32).at[place].set(jnp.arange(len(place), dtype=jnp.int32), mode="drop")
    return Draw(place, ids)


def pick(leaf: Any, draw: Draw) -> jax.Array:
    """The drawn rows of one client's update of a table, ``[k, dim]``: zero where it touched none of them."""
    if not is_rows(leaf) or leaf.whole:
        return take_rows(leaf.values if is_rows(leaf) else leaf, draw.ids)
    k = len(draw.ids)
    place = draw.place.at[leaf.ids].get(mode="fill", fill_value=k)
    return add_rows(jnp.zeros((k, leaf.values.shape[-1])), place, leaf.values)


def put_back(total: jax.Array, draw: Draw) -> jax.Array:
    """``[n, dim]`` with the rows of ``[k, dim]`` where they were drawn, and zeros elsewhere."""
    return jnp.take(total, draw.place, axis=0, mode="fill", fill_value=0)


def table_shape(leaf: Any) -> tuple[int, int]:
    """``(num_rows, dim)`` of the table that an update is of."""
    return (leaf.num_rows, leaf.values.shape[-1]) if is_rows(leaf) else leaf.shape


def check_tables(update: Shared, num_rows: dict[str, int], link: str) -> None:
    """Refuses an update whose tables are not the server's.

    Raises:
      ValueError: naming the table.
    """
    for name, leaf in update.tables.items():
        found = table_shape(leaf)[0]
        if found != num_rows[name]:
            raise ValueError(
                f"{link} is for whole item tables, and of table {name!r} {found} rows reach it instead of "
                f"{num_rows[name]}: an earlier link sends something else. Put {link} first, or use one of them."
            )


def resized(wire: Wire, update: Shared, numbers: dict[str, int], *, ids: bool = False) -> Wire:
    """The wire, where some tables are sent in so many numbers.

    Args:
      wire: before.
      update: one client's, shapes only.
      numbers: by the tables' names; the others are sent as before.
      ids: whether row ids are still sent beside them.
    """
    change, side_bits = 0, wire.side_bits
    for name, number in numbers.items():
        leaf = update.tables[name]
        change += number - (leaf.values if is_rows(leaf) else leaf).size
        if is_rows(leaf) and not ids:
            side_bits -= 32.0 * leaf.ids.size
    return wire._replace(numbers=wire.numbers + change, side_bits=max(side_bits, 0.0))

"""Where a recommender's item vectors come from: a table of ids, or anything that gives a vector for each item."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_rec.models.base import Shared


class ItemTower(NamedTuple):
    """The item side of a recommender, as pure functions.

    Attributes:
      init: ``key -> Shared``, its parameters.
      take: ``(params, ids int32 [...]) -> float32 ids.shape + [dim]``, vectors of some items. Ids out of range
        (padding) give any vector; mask what comes of them.
      all: ``params -> float32 [num_items, dim]``, vectors of the whole catalogue.
      num_items: catalogue size.
      dim: length of a vector.
    """

    init: Callable[[jax.Array], Shared]
    take: Callable[[Shared, jax.Array], jax.Array]
    all: Callable[[Shared], jax.Array]
    num_items: int
    dim: int


def id_table(num_items: int, *, dim: int, init_stddev: float = 0.02) -> ItemTower:
    """One free vector for each item: table "item" ``[num_items, dim]``, normal with the given standard deviation."""

    def init(key):
        return Shared({"item": init_stddev * jax.random.normal(key, (num_items, dim))}, {})

    return ItemTower(
        init=init,
        # Not `take_rows`, which has no derivative.
        take=lambda params, ids: jnp.take(params.tables["item"], ids, axis=0, mode="clip"),
        all=lambda params: params.tables["item"],
        num_items=num_items,
        dim=dim,
    )

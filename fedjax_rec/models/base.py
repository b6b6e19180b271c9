"""What a recommender is: pure functions of one client."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fedjax_rec.data.clients import Examples


class Shared(NamedTuple):
    """Parameters that the server holds and every client receives.

    Attributes:
      tables: ``{name: [num_items, dim]}`` float32, one row an item.
      dense: any pytree for the rest.
    """

    tables: dict[str, jax.Array]
    dense: Any


class View(NamedTuple):
    """What a loss sees of `Shared`: the rows of one batch's items, and the dense rest.

    Attributes:
      rows: ``{name: batch shape + [dim]}``, aligned with ``Examples.ids``.
      dense: as in `Shared`.
    """

    rows: dict[str, jax.Array]
    dense: Any


class Model(NamedTuple):
    """A recommender as pure functions of one client.

    Attributes:
      init_shared: ``key -> Shared``.
      init_private: ``key -> pytree``, one client's private parameters (``()`` if it has none).
      loss: ``(View, private, Examples, key) -> float32 scalar``, a weighted mean over the batch.
      score: ``(Shared, private) -> float32 [num_items]`` for one client, higher is better.
    """

    init_shared: Callable[[jax.Array], Shared]
    init_private: Callable[[jax.Array], Any]
    loss: Callable[[View, Any, Examples, jax.Array], jax.Array]
    score: Callable[[Shared, Any], jax.Array]

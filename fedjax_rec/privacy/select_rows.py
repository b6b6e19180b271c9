"""Train some rows of a table only: those that a private popularity list says are worth their noise.

Noise is paid for every row of a table and signal comes on the rows that many clients touch. The frequency filter of
Ghazi et al., 2023, "Sparsity-Preserving Differentially Private Training of Large Embedding Models" (DP-FEST), releases
which rows are the head once, with privacy, and trains these alone. `head_items` is the first half, `select_rows` the
second.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.federated.rows import Rows, find_rows, is_rows
from fedjax_rec.federated.transforms import UpdateTransform
from fedjax_rec.models.popularity import dp_popularity
from fedjax_rec.privacy.ledger import Ledger


class HeadItems(NamedTuple):
    """A released choice of items and what its release costs."""

    row_ids: np.ndarray  # int32 [chosen], ascending
    dp_event: dp_accounting.DpEvent

    def charge(self, ledger: Ledger) -> Ledger:
        """The ledger with this release, as phase "selection"."""
        return ledger.record(self.dp_event, phase="selection", released="items of the highest noised popularity")


def head_items(train: Interactions, *, num_rows: int, noise_multiplier: float, key: jax.Array) -> HeadItems:
    """The items of the highest noised popularity: each user gives its n items 1 / sqrt(n) each.

    Guarantee: that of `dp_popularity`, one Gaussian mechanism over all users without amplification: user-level,
    adding or removing one user, of which the choice is post-processing. `dp_event` states it and belongs in the
    run's ledger, see `HeadItems.charge`.

    Args:
      train: rows; the catalogue itself is public.
      num_rows: items to choose.
      noise_multiplier: of the popularity; 0 chooses by exact counts, whose epsilon is infinite.
      key: of the noise: secret, and used for nothing else.

    Raises:
      ValueError: if there are fewer items than that.
    """
    if not 1 <= num_rows <= train.num_items:
        raise ValueError(f"num_rows must be between 1 and the {train.num_items} items; got {num_rows}.")
    released = dp_popularity(train, noise_multiplier=noise_multiplier, key=key)
    _, row_ids = jax.lax.top_k(released.counts, num_rows)
    return HeadItems(np.sort(np.asarray(row_ids, np.int32)), released.dp_event)


def select_rows(row_ids: Sequence[int] | np.ndarray, *, num_rows: int) -> UpdateTransform:
    """Trains the chosen rows of every table with ``num_rows`` rows; the others stay as they were initialised.

    On the client, ``[num_rows, dim]`` becomes ``[chosen, dim]``: rows that were not chosen are dropped before anything
    is clipped, so that the sum, the clip and the noise of the links that follow are of the small table. The server
    puts the small table back as the rows of the large one. Put it first in the chain.

    Guarantee: none of its own; dropping rows raises no norm, so a later clip and noise hold as they do. Which rows
    are chosen must be public: from `head_items`, with its event in the ledger, or from outside the data.

    Args:
      row_ids: the chosen rows, distinct.
      num_rows: rows of the tables that are meant; tables of other sizes pass untouched.

    Raises:
      ValueError: if an id is out of range or occurs twice; from the client, if no table has so many rows, or if
        another leaf looks like a table of the chosen rows.
    """
    chosen = np.sort(np.asarray(row_ids, np.int64))
    if len(chosen) == 0 or chosen[0] < 0 or chosen[-1] >= num_rows or np.any(chosen[1:] == chosen[:-1]):
        raise ValueError(f"row_ids must be one or more distinct rows of 0 to {num_rows - 1}; got {row_ids}.")
    chosen, num_chosen = chosen.astype(np.int32), len(chosen)

    def compact(rows):
        if rows.whole:
            return Rows(jnp.arange(num_chosen, dtype=jnp.int32), rows.values[chosen], num_chosen, whole=True)
        place, found = find_rows(jnp.asarray(chosen), rows.ids)
        values = jnp.where(found[:, None], rows.values, 0)
        return Rows(jnp.where(found, place, num_chosen), values, num_chosen, unique=rows.unique)

    def client(update, state, key):
        del state, key
        leaves, structure = jax.tree.flatten(update, is_leaf=is_rows)
        meant = [is_rows(leaf) and leaf.num_rows == num_rows for leaf in leaves]
        if not any(meant):
            raise ValueError(f"No table of this update has num_rows={num_rows}; the chosen rows are of no table.")
        if any(_num_rows(leaf) == num_chosen for leaf, is_meant in zip(leaves, meant, strict=True) if not is_meant):
            raise ValueError(  # the server knows a small table by its shape
                f"Another leaf of this update has {num_chosen} rows too, as many as were chosen, so their sums look "
                "alike. Choose one row more or less."
            )
        leaves = [compact(leaf) if is_meant else leaf for leaf, is_meant in zip(leaves, meant, strict=True)]
        return jax.tree.unflatten(structure, leaves), {}

    def server(total, state, key):
        del key

        def expand(leaf):
            if _num_rows(leaf) != num_chosen:
                return leaf
            if not is_rows(leaf):
                return Rows(jnp.asarray(chosen), leaf, num_rows)
            ids = jnp.asarray(chosen).at[leaf.ids].get(mode="fill", fill_value=num_rows)
            return dataclasses.replace(leaf, ids=ids, num_rows=num_rows, whole=False)

        return jax.tree.map(expand, total, is_leaf=is_rows), state

    return UpdateTransform(client=client, server=server)


def _num_rows(leaf) -> int | None:
    if is_rows(leaf):
        return leaf.num_rows
    return leaf.shape[0] if leaf.ndim == 2 else None

"""Users' rows on the device in CSR form, written out densely for a batch of users at a time.

A dense 0/1 matrix of all users takes users x items bytes and more; the lists behind it take four bytes an interaction.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.data.interactions import Interactions


class UserRows(NamedTuple):
    """Who touched what, as int32 arrays.

    Attributes:
      starts: ``[users]``, where each user's items begin.
      counts: ``[users]``.
      item_ids: ``[interactions + 1]``, the last one padding.
      positions: ``[longest]``, 0, 1, 2, ...: its length is the static bound on a user's items.
    """

    starts: jax.Array
    counts: jax.Array
    item_ids: jax.Array
    positions: jax.Array


def user_rows(interactions: Interactions) -> UserRows:
    """The rows of all users, whether they have any or not."""
    longest = int(interactions.counts_per_user.max(initial=1))
    return UserRows(
        starts=jnp.asarray(interactions.offsets[:-1].astype(np.int32)),
        counts=jnp.asarray(interactions.counts_per_user.astype(np.int32)),
        item_ids=jnp.asarray(np.append(interactions.item_ids, np.int32(interactions.num_items))),  # never empty
        positions=jnp.arange(max(longest, 1), dtype=jnp.int32),
    )


def dense_rows(rows: UserRows, user_ids: jax.Array, num_items: int) -> jax.Array:
    """0/1 rows of a batch of users, float32 ``[B, num_items]``; zero rows for ids past the last user."""
    starts, counts = (x.at[user_ids].get(mode="fill", fill_value=0) for x in (rows.starts, rows.counts))
    places = starts[:, None] + rows.positions[None, :]
    shown = rows.positions[None, :] < counts[:, None]
    items = jnp.where(shown, rows.item_ids.at[places].get(mode="clip"), num_items)
    dense = jnp.zeros((len(user_ids), num_items), jnp.float32)
    return dense.at[jnp.arange(len(user_ids))[:, None], items].set(1.0, mode="drop")

"""All uploads of a cohort side by side, for rules that compare them: the memory is one dense copy a client."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_rec.federated.rows import is_rows
from fedjax_rec.federated.transforms import Metrics, RoundContext, Summation, UpdateTransform, select_update
from fedjax_rec.privacy.mechanisms import global_norm, merge_rows


class Uploads(NamedTuple):
    """The uploads of a cohort in the order of client ids; every leaf can be added up over devices.

    Attributes:
      values: in the structure of the update, float32 ``[max_clients, num_rows, dim]`` for `Rows` and ``[max_clients,
        ...]`` for dense leaves; zero where nothing was sent.
      sent: in that structure, uint8 ``[max_clients, num_rows]`` for `Rows` and ``[max_clients]`` for dense leaves.
      present: uint8 ``[max_clients]``: 1 for a finite upload.
      num_nonfinite: float32 scalar, uploads that were not finite, and are left out.
      num_left_out: float32 scalar, uploads for which there was no place.
    """

    values: Any
    sent: Any
    present: jax.Array
    num_nonfinite: jax.Array
    num_left_out: jax.Array


def of_stacked_uploads(end: Callable[[Uploads], tuple[Any, Metrics]], max_clients: int) -> UpdateTransform:
    """A link whose sum is ``end(uploads) -> (total, metrics)``.

    Args:
      end: the total has a dense ``[num_rows, dim]`` in the place of each `Rows`.
      max_clients: places; of a larger cohort, those with the largest ids are left out.
    """
    at_least("max_clients", max_clients, 1)

    def prepare(state, context: RoundContext, key):
        del state, key
        place = jnp.cumsum(context.in_cohort, dtype=jnp.int32) - 1
        return jnp.where(context.in_cohort, jnp.minimum(place, max_clients), max_clients)

    def zero(update):
        def values(leaf):
            shape = (leaf.num_rows, leaf.values.shape[-1]) if is_rows(leaf) else leaf.shape
            return jnp.zeros((max_clients, *shape), jnp.float32)

        def sent(leaf):
            return jnp.zeros((max_clients, leaf.num_rows) if is_rows(leaf) else max_clients, jnp.uint8)

        trees = (jax.tree.map(one, update, is_leaf=is_rows) for one in (values, sent))
        return Uploads(*trees, jnp.zeros(max_clients, jnp.uint8), jnp.zeros(()), jnp.zeros(()))

    def add(uploads, updates, client_ids, active, places):
        updates, present, _ = finite_only(updates, active)
        place = jnp.where(active, places.at[client_ids].get(mode="fill", fill_value=max_clients), max_clients)
        seen = present.astype(jnp.uint8)

        def put(leaf, values):
            if is_rows(leaf):  # in the tables written under each other
                flat = values.reshape(-1, values.shape[-1]).at[_flat(leaf, place, max_clients)]
                return flat.set(leaf.values, mode="drop").reshape(values.shape)
            return values.at[place].set(leaf, mode="drop")

        def mark(leaf, sent):
            if is_rows(leaf):
                flat = sent.reshape(-1).at[_flat(leaf, place, max_clients)]
                return flat.set(jnp.uint8(1), mode="drop").reshape(sent.shape)
            return sent.at[place].set(seen, mode="drop")

        return Uploads(
            jax.tree.map(put, updates, uploads.values, is_leaf=is_rows),
            jax.tree.map(mark, updates, uploads.sent, is_leaf=is_rows),
            uploads.present.at[place].set(seen, mode="drop"),
            uploads.num_nonfinite + jnp.sum(active & ~present),
            uploads.num_left_out + jnp.sum(active & (place == max_clients)),
        )

    def end_with_counts(uploads, places):
        del places
        total, metrics = end(uploads)
        counts = {"nonfinite_uploads": uploads.num_nonfinite, "uploads_left_out": uploads.num_left_out}
        return total, metrics | counts

    return UpdateTransform(
        prepare=prepare,
        summation=Summation(zero, add, end_with_counts, individual=True),
        server=lambda total, places, key: (total, ()),
    )


def finite_only(updates: Any, active: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
    """A chunk's updates with each row once, and zero where the L2 norm is not finite.

    Args:
      updates: leaves with a leading ``[chunk]`` axis.
      active: bool ``[chunk]``.

    Returns:
      The updates; bool ``[chunk]``, active and finite; float32 ``[chunk]``, norms, zero where not finite.
    """
    updates = jax.vmap(merge_rows)(updates)
    norm = jax.vmap(global_norm)(updates)
    finite = jnp.isfinite(norm)
    return jax.vmap(select_update)(finite, updates), finite & active, jnp.where(finite, norm, 0.0)


def _flat(rows, place, max_clients):
    """Where each row ``[chunk, n]`` is in ``max_clients`` tables written under each other; out of range if nowhere."""
    real = (rows.ids < rows.num_rows) & (place < max_clients)[:, None]
    return jnp.where(real, place[:, None] * rows.num_rows + rows.ids, max_clients * rows.num_rows)


def at_least(name: str, value: int, least: int) -> None:
    """Raises a ValueError unless ``value`` is a whole number of at least ``least``."""
    if value != int(value) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}; got {value}.")

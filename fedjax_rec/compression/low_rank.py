"""Low-rank updates of item tables, with a factor that all clients of a round have in common."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from fedjax_rec.compression.tables import resized, table_shape
from fedjax_rec.federated.rows import add_rows, is_rows
from fedjax_rec.federated.transforms import Bound, UpdateTransform, Wire


def low_rank(rank: int, *, unbiased: bool = True, all_rows: bool = False) -> UpdateTransform:
    """Sends each row of an item table in ``rank`` numbers, B = U A^T, and the server takes sum(B) A for the sum of U.

    A ``[rank, dim]`` has orthonormal rows, spans a uniformly random subspace, is drawn anew in each round by public
    randomness, and is the same for all clients; so their B can be summed. CoLR of Nguyen et al., 2024, "Towards
    Efficient Communication and Secure Federated Recommendation System via Low-rank Training": there a client trains B
    alone, with Q + B A for its table. For one local step of SGD that is this link, because the gradient for B is that
    for the table times A^T.

    Differs from the paper: with several local steps, it is the finished update that is projected, and the client has
    moved in all directions meanwhile. ``unbiased`` multiplies by dim / rank on the server, so that the mean over
    draws of A is the whole update; without it, as in the paper, the server's step is that much shorter.

    Tables no wider than the rank, such as biases, and dense leaves are not projected. Row ids go with the rows that a
    client touched; ``all_rows`` sends every row instead, ``[num_rows, rank]``, which shows nobody which they are and
    costs the same for everyone.

    Privacy: a projection lengthens no row in L2, so a clip bounds what is summed on either side of this link. Noise
    acts on the ``[num_rows, rank]`` sums and the server scales it with them, so it must come after this link.

    Args:
      rank: numbers a row, at least 1.
      unbiased: whether the server multiplies by dim / rank.
      all_rows: whether rows that a client has not touched are sent too, as zeros.

    Raises:
      ValueError: for a rank below 1, or above the dimension of every table.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1; got {rank}.")

    def narrowed(shapes: dict[str, tuple[int, int]]) -> list[str]:
        """The tables that are projected."""
        widest = max((dim for _, dim in shapes.values()), default=math.inf)
        if rank > widest:
            raise ValueError(
                f"rank {rank} is more than the {widest} numbers a row of the widest table; use a lower one."
            )
        return [name for name, (_, dim) in shapes.items() if dim > rank]

    def prepare(state, context, key):
        del state
        dims = {name: table.shape[1] for name, table in context.shared.tables.items()}
        names = narrowed({name: table.shape for name, table in context.shared.tables.items()})
        keys = jax.random.split(key, max(1, len(names)))
        drawn = {name: jax.random.normal(k, (dims[name], rank)) for name, k in zip(names, keys, strict=False)}
        return {name: jnp.linalg.qr(columns)[0].T for name, columns in drawn.items()}

    def client(update, factors, key):
        del key

        def project(leaf, factor):
            values = leaf.values if is_rows(leaf) else leaf
            if values.shape[-1] != factor.shape[1]:
                raise ValueError(
                    f"low_rank draws a factor for rows of {factor.shape[1]} numbers, and rows of {values.shape[-1]} "
                    "reach it: an earlier link sends something else. Put low_rank first, or use one of them."
                )
            values = jnp.matmul(values, factor.T, precision="highest")
            return dataclasses.replace(leaf, values=values) if is_rows(leaf) else values

        def whole(leaf):
            if not all_rows or not is_rows(leaf):
                return leaf
            return add_rows(jnp.zeros((leaf.num_rows, leaf.values.shape[-1])), leaf.ids, leaf.values)

        projected = {name: project(update.tables[name], factor) for name, factor in factors.items()}
        return update._replace(tables={name: whole(x) for name, x in (update.tables | projected).items()}), {}

    def server(total, factors, key):
        del key

        def expand(rows, factor):
            scale = factor.shape[1] / rank if unbiased else 1.0
            return jnp.matmul(rows, scale * factor, precision="highest")

        tables = {name: expand(total.tables[name], factor) for name, factor in factors.items()}
        return total._replace(tables=total.tables | tables), ()

    def sensitivity(bound):
        # |U A^T|_2 <= |U|_2, and a row of ``rank`` numbers has |b|_1 <= sqrt(rank) |b|_2 <= sqrt(rank) |u|_1.
        return Bound(math.sqrt(rank) * bound.l1, bound.l2, bound.noised)

    def upload(wire: Wire, update) -> Wire:
        shapes = {name: table_shape(leaf) for name, leaf in update.tables.items()}

        def rows(leaf):
            return table_shape(leaf)[0] if all_rows or not is_rows(leaf) else leaf.ids.size

        dims = {name: dim for name, (_, dim) in shapes.items()} | dict.fromkeys(narrowed(shapes), rank)
        numbers = {name: rows(update.tables[name]) * dim for name, dim in dims.items()}
        return resized(wire, update, numbers, ids=not all_rows)

    return UpdateTransform(
        prepare=prepare, client=client, server=server, sensitivity=sensitivity, upload=upload, decodes=True
    )

"""Random sparsification with a mask that all clients of a round have in common, so that uploads can be summed."""

import jax
import jax.numpy as jnp

from fedjax_rec.compression.tables import (
    check_share,
    check_tables,
    draw_uniformly,
    num_sent,
    pick,
    places,
    put_back,
    resized,
    table_shape,
)
from fedjax_rec.federated.transforms import UpdateTransform, Wire
from fedjax_rec.models.base import Shared


def rand_k(share: float) -> UpdateTransform:
    """Sends k of n entries, drawn anew in each round without replacement, and the server scales their sum by n / k:

        estimate_i = (n / k) sum_c x_ci  if i is drawn, else 0;     E[estimate] = sum_c x_c,

    with an error of n / k - 1 times the squared norm of the sum. In item tables entries are rows, and tables with as
    many rows share their draw; in dense leaves they are numbers. Konečný et al., 2016, "Federated Learning: Strategies
    for Improving Communication Efficiency" (random mask), with one mask for all clients instead of one each.

    A client sends a dense ``[k, dim]`` block of a table, with zeros for rows that it has not touched, so nobody learns
    from its shape what it touched. No ids go over the wire: the mask follows from the round's public key. Clients
    receive the whole parameters.

    Privacy: dropping entries lengthens nothing, so a clip bounds what is summed on either side of this link. Noise
    acts on the ``[k, dim]`` sums and the server scales it with them, so it must come after this link.

    Args:
      share: k / n, in (0, 1]; k is rounded, and at least one.

    Raises:
      ValueError: for a share out of range, or behind a link that sends no whole tables.
    """
    check_share("share", share)

    def prepare(state, context, key):
        del state
        shared = context.shared
        rows = sorted({len(table) for table in shared.tables.values()})
        by_size = {n: draw_uniformly(jax.random.fold_in(key, n), n, num_sent(share, n)) for n in rows}
        leaves, structure = jax.tree.flatten(shared.dense)
        keys = jax.random.split(jax.random.fold_in(key, 0), len(leaves))
        # Places in the leaf's own shape, so that the server knows it.
        sizes = [(x.size, num_sent(share, x.size)) for x in leaves]
        dense = [places(key, *size).reshape(x.shape) for x, size, key in zip(leaves, sizes, keys, strict=True)]
        tables = {name: by_size[len(table)] for name, table in shared.tables.items()}
        return Shared(tables, jax.tree.unflatten(structure, dense))

    def client(update, draws, key):
        del key
        check_tables(update, {name: len(draw.place) for name, draw in draws.tables.items()}, "rand_k")

        def pick_numbers(x, place):
            k = num_sent(share, x.size)
            return jnp.zeros(k, x.dtype).at[place.reshape(-1)].set(x.reshape(-1), mode="drop")

        tables = {name: pick(leaf, draws.tables[name]) for name, leaf in update.tables.items()}
        return Shared(tables, jax.tree.map(pick_numbers, update.dense, draws.dense)), {}

    def server(total, draws, key):
        del key

        def put_numbers_back(x, place):
            return jnp.take(x, place, mode="fill", fill_value=0) * (place.size / len(x))

        def put_rows_back(x, draw):
            return put_back(x, draw) * (len(draw.place) / len(x))

        tables = {name: put_rows_back(x, draws.tables[name]) for name, x in total.tables.items()}
        return Shared(tables, jax.tree.map(put_numbers_back, total.dense, draws.dense)), ()

    def upload(wire: Wire, update) -> Wire:
        shapes = {name: table_shape(leaf) for name, leaf in update.tables.items()}
        wire = resized(wire, update, {name: num_sent(share, n) * dim for name, (n, dim) in shapes.items()})
        dropped = sum(x.size - num_sent(share, x.size) for x in jax.tree.leaves(update.dense))
        return wire._replace(numbers=wire.numbers - dropped)

    return UpdateTransform(prepare=prepare, client=client, server=server, upload=upload, decodes=True)

"""Count sketches of item tables, with hashes that all clients of a round have in common."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_rec.compression.tables import check_tables, resized, table_shape
from fedjax_rec.federated.rows import add_rows, is_rows
from fedjax_rec.federated.transforms import UpdateTransform, Wire

ESTIMATES = ("mean", "median")


class Hashes(NamedTuple):
    """Of the rows of a table.

    Attributes:
      bucket: int32 ``[depth, num_rows]``, of ``depth * width`` in all.
      sign: float32 ``[depth, num_rows]``, 1 or -1.
    """

    bucket: jax.Array
    sign: jax.Array


def count_sketch(width: int, *, depth: int = 1, estimate: str = "mean") -> UpdateTransform:
    """Adds the rows of each item table up in ``width`` buckets with random signs, ``depth`` times over:

        S[d, b] = sum of s_d(i) x_i over rows i with h_d(i) = b,     estimate_i = mean or median over d of
        s_d(i) S[d, h_d(i)].

    Charikar, Chen and Farach-Colton, 2002, "Finding Frequent Items in Data Streams"; for federated learning Rothchild
    et al., 2020, "FetchSGD: Communication-Efficient Federated Learning with Sketching". Hashes and signs are drawn
    anew in each round by public randomness; each h_d spreads the rows evenly, ceil(num_rows / width) to a bucket at
    most, which has fewer collisions than independent hashes.

    The mean is linear in the updates and unbiased, with an error of about (num_rows / width - 1) / depth times the
    squared norm of the sum. The median of the numbers, taken after the sum, follows a few large rows better; it is not
    linear, and unbiased only where the errors are symmetric. Uploads are summed in either case.

    A client sends a dense ``[depth * width, dim]`` block of each table, whatever rows it touched, and no ids. Tables
    with no more rows than that, and dense leaves, are sent as they are.

    Privacy: rows that meet in a bucket can add up, so the L2 norm after this link has no bound by the norm before it
    (the L1 norm has: ``depth`` times). Put the clip after this link, and the noise after the clip.

    Args:
      width: buckets, at least 1.
      depth: sketches side by side, at least 1.
      estimate: "mean" or "median".

    Raises:
      ValueError: for numbers out of range or another estimate, if no table has more than ``depth * width`` rows, or
        behind a link that sends no whole tables.
    """
    if width < 1 or depth < 1:
        raise ValueError(f"A sketch has a width and a depth of at least 1; got width={width}, depth={depth}.")
    if estimate not in ESTIMATES:
        raise ValueError(f"estimate must be one of {', '.join(ESTIMATES)}; got {estimate!r}.")
    size = width * depth

    def sketched(rows: dict[str, int]) -> list[str]:
        names = [name for name, num_rows in rows.items() if num_rows > size]
        if rows and not names:
            raise ValueError(
                f"A sketch of {depth} x {width} = {size} rows is no smaller than the largest table, which has "
                f"{max(rows.values())}; use a smaller width or depth."
            )
        return names

    def prepare(state, context, key):
        del state
        rows = {name: len(table) for name, table in context.shared.tables.items()}

        def hashes(num_rows, key):
            hash_key, sign_key = jax.random.split(key)
            places = jax.vmap(lambda k: jax.random.permutation(k, num_rows))(jax.random.split(hash_key, depth))
            bucket = places % width + width * jnp.arange(depth, dtype=places.dtype)[:, None]
            return Hashes(bucket, jax.random.rademacher(sign_key, (depth, num_rows), jnp.float32))

        drawn = {n: hashes(n, jax.random.fold_in(key, n)) for n in sorted({rows[name] for name in sketched(rows)})}
        return {name: drawn[rows[name]] for name in sketched(rows)}

    def client(update, hashes, key):
        del key
        check_tables(update, _num_rows(update) | {n: h.sign.shape[1] for n, h in hashes.items()}, "count_sketch")

        def add_up(leaf, hashed):
            rows = is_rows(leaf) and not leaf.whole
            values = leaf.values if is_rows(leaf) else leaf
            bucket, sign = hashed
            if rows:
                bucket = bucket.at[:, leaf.ids].get(mode="fill", fill_value=size)
                sign = sign.at[:, leaf.ids].get(mode="clip")
            return add_rows(jnp.zeros((size, values.shape[-1])), bucket, sign[..., None] * values[None])

        sketches = {name: add_up(update.tables[name], hashed) for name, hashed in hashes.items()}
        return update._replace(tables=update.tables | sketches), {}

    def server(total, hashes, key):
        del key

        def look_up(sketch, hashed):
            each = hashed.sign[..., None] * jnp.take(sketch, hashed.bucket, axis=0)
            return each.mean(0) if estimate == "mean" else jnp.median(each, 0)

        tables = {name: look_up(total.tables[name], hashed) for name, hashed in hashes.items()}
        return total._replace(tables=total.tables | tables), ()

    def sensitivity(bound):
        # Each of the sketches keeps the L1 norm at most, and no L2 norm is above it.
        return bound._replace(l1=depth * bound.l1, l2=depth**0.5 * bound.l1)

    def upload(wire: Wire, update) -> Wire:
        dims = {name: table_shape(leaf)[1] for name, leaf in update.tables.items()}
        return resized(wire, update, {name: size * dims[name] for name in sketched(_num_rows(update))})

    return UpdateTransform(
        prepare=prepare, client=client, server=server, sensitivity=sensitivity, upload=upload, decodes=True
    )


def _num_rows(update) -> dict[str, int]:
    return {name: table_shape(leaf)[0] for name, leaf in update.tables.items()}

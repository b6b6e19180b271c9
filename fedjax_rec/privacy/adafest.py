"""Noise on the rows that the cohort touched: DP-AdaFEST.

Each round releases two things with one Gaussian: how many clients touched each row of a table, which is one number a
row, and the update of the rows whose noised count stands out. At a million items that is a million normal numbers for
the choice and ``max_rows * dim`` for the update, in place of ``1e6 * dim``. Ghazi, Huang, Kamath, Kumar, Manurangsi,
Sinha, Zhang, 2023, "Sparsity-Preserving Differentially Private Training of Large Embedding Models".

Differs from the paper: the unit is a user and not an example; a client's indicator is scaled to its norm and not only
clipped to it; and at most ``max_rows`` rows go through, so that shapes are fixed.
"""

import math

import dp_accounting
import jax
import jax.numpy as jnp

from fedjax_rec.federated.rows import Rows, is_rows, take_rows
from fedjax_rec.federated.transforms import Bound, UpdateTransform, chain
from fedjax_rec.privacy.mechanisms import clip_by_global_norm
from fedjax_rec.privacy.noise import standard_normal


def adafest(
    *,
    l2_clip_norm: float,
    noise_multiplier: float,
    max_rows: int,
    selection_share: float = 0.2,
    threshold: float = 3.0,
) -> UpdateTransform:
    """Clip, choose rows by their noised counts, and noise these rows and the dense leaves.

    A client sends its update u, clipped to norm C, and beside it the rows it touched as a vector v of norm at most t,
    each 1 / sqrt(rows touched). With s = ``selection_share`` and t = C sqrt(s / (1 - s)), the two together have norm
    at most ``B = sqrt(C^2 + t^2)``, and all of their sum gets Gaussian noise of one standard deviation, z B. Seen
    apart, counts have noise multiplier ``z / sqrt(s)`` and updates ``z / sqrt(1 - s)``: the smaller s, the less noise
    on the rows and the more on their choice. Noise on rows that are not chosen need not be drawn, since nothing of
    them is released.

    Guarantee: user-level; add-or-remove-one (replace-one with samplers that say so); one Gaussian mechanism of noise
    multiplier z a round, on the sampler's cohorts. Released are the noised counts, and so the choice of rows, the
    noised update of these rows, and the noised dense leaves. Other rows of the sum go no further.

    Args:
      l2_clip_norm: C, bound on one client's update over tables and dense leaves.
      noise_multiplier: z, what a round is accounted as; 0 adds nothing, and claims nothing.
      max_rows: most rows of a table to let through, those of the highest counts; all tables with equally many rows
        share one choice.
      selection_share: s in (0, 1), the part of the round's cost ``1 / z^2`` that goes to the choice.
      threshold: noised counts above so many standard deviations of their noise are chosen. Of rows that nobody
        touched, a share of Q(threshold) is: 3 lets about 1,350 of a million through.

    Raises:
      ValueError: for a number out of range; from the client, if the update has no table.
    """
    if not 0 < selection_share < 1:
        raise ValueError(f"selection_share must be between 0 and 1; got {selection_share}.")
    if noise_multiplier < 0 or max_rows < 1 or not threshold >= 0:
        raise ValueError(
            "adafest needs noise_multiplier >= 0, max_rows >= 1 and threshold >= 0; got "
            f"{noise_multiplier}, {max_rows} and {threshold}."
        )
    touched_norm = l2_clip_norm * math.sqrt(selection_share / (1 - selection_share))
    stddev = noise_multiplier * math.hypot(l2_clip_norm, touched_norm)
    choose = choose_rows(touched_norm=touched_norm, stddev=stddev, max_rows=max_rows, threshold=threshold)
    return chain(clip_by_global_norm(l2_clip_norm), choose)


def choose_rows(*, touched_norm: float, stddev: float, max_rows: int, threshold: float) -> UpdateTransform:
    """The second half of `adafest`: indicators on the client, choice and noise on the server.

    Args:
      touched_norm: bound on the L2 norm of a client's indicator, in units of the update.
      stddev: of the noise on counts, chosen rows and dense leaves alike.
      max_rows: see `adafest`.
      threshold: see `adafest`.
    """

    def client(update, state, key):
        del state, key
        rows = jax.tree.map(lambda x: x if is_rows(x) else None, update, is_leaf=is_rows)
        dense = jax.tree.map(lambda x: None if is_rows(x) else x, update, is_leaf=is_rows)
        tables = jax.tree.leaves(rows, is_leaf=is_rows)
        sizes = sorted({table.num_rows for table in tables})
        if not sizes:
            raise ValueError("adafest chooses rows of tables, and this update has no table; use gaussian_noise.")
        touched = {size: indicator([x for x in tables if x.num_rows == size]) for size in sizes}
        scale = touched_norm / math.sqrt(len(sizes))
        touched = {size: Rows(x.ids, scale * x.values, size, unique=False) for size, x in touched.items()}
        return {"rows": rows, "dense": dense, "touched": touched}, {}

    def server(total, state, key):
        del state
        count_key, rows_key, dense_key = jax.random.split(key, 3)
        chosen = {}
        for index, (size, counts) in enumerate(sorted(total["touched"].items())):
            noised = counts + stddev * standard_normal(jax.random.fold_in(count_key, index), counts.shape)
            highest, ids = jax.lax.top_k(noised[:, 0], min(max_rows, size))
            chosen[size] = jnp.where(highest > threshold * stddev, ids, size)
        rows = _map_with_keys(lambda x, k: _noised_rows(x, chosen[x.shape[0]], stddev, k), total["rows"], rows_key)
        dense = _map_with_keys(lambda x, k: x + stddev * standard_normal(k, x.shape), total["dense"], dense_key)
        merged = jax.tree.map(
            lambda r, d: d if r is None else r, rows, dense, is_leaf=lambda x: x is None or is_rows(x)
        )
        return merged, sum(jnp.sum(ids < size, dtype=jnp.int32) for size, ids in chosen.items())

    def sensitivity(bound):
        return Bound(l2=math.hypot(bound.l2, touched_norm), noised=bound.noised)

    def dp_event(bound, round_index):
        del round_index
        if stddev == 0:
            return dp_accounting.NonPrivateDpEvent()
        if bound.l2 == math.inf:
            raise ValueError("choose_rows needs an earlier link that bounds the update: put a clip before it.")
        return dp_accounting.GaussianDpEvent(stddev / bound.l2)

    # The state is how many rows were chosen last: it follows from the noised counts, and tells if max_rows binds.
    return UpdateTransform(
        init=lambda params: jnp.zeros((), jnp.int32),
        client=client,
        server=server,
        sensitivity=sensitivity,
        dp_event=dp_event,
    )


def indicator(tables: list[Rows]) -> Rows:
    """The rows that one client touched in tables of equal size, as a ``[num_rows, 1]`` table of L2 norm at most 1.

    A row is touched if any of its values is not zero. Each table gives its n rows ``1 / sqrt(n)``, and the tables are
    averaged: of T vectors of norm 1 the mean has norm at most 1, and exactly the vector's if all touch the same rows.
    """
    ids, values = [], []
    for table in tables:
        real = (table.ids < table.num_rows) & jnp.any(table.values != 0, axis=-1)
        weight = 1.0 / (len(tables) * jnp.sqrt(jnp.maximum(real.sum(), 1).astype(jnp.float32)))
        ids.append(jnp.where(real, table.ids, table.num_rows))
        values.append(jnp.where(real, weight, 0.0))
    return Rows(jnp.concatenate(ids), jnp.concatenate(values)[:, None], tables[0].num_rows, unique=False)


def _noised_rows(table: jax.Array, ids: jax.Array, stddev: float, key: jax.Array) -> Rows:
    """The chosen rows of a sum, noised; ids are padded with the table's number of rows."""
    values = take_rows(table, ids) + stddev * standard_normal(key, (len(ids), table.shape[1]))
    return Rows(ids, jnp.where((ids < table.shape[0])[:, None], values, 0), table.shape[0])


def _map_with_keys(function, tree, key):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, max(len(leaves), 1))
    return jax.tree.unflatten(structure, [function(x, k) for x, k in zip(leaves, keys[: len(leaves)], strict=True)])

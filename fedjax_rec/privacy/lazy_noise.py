"""Noise that a row of a table gets when somebody reads it, and not before.

Dense noise changes every row in every round. A row that nobody reads for n rounds owes n independent normal numbers
an entry, whose sum is one normal number of n times the variance: drawn when the row is next read, it has the same
distribution, at 1 / n of the work. Lim et al., 2024, "LazyDP: Co-Designing Algorithm-Software for Scalable Training
of Differentially Private Recommendation Models".

Exact in distribution, jointly over all that is read, if

- the server's step is linear with a fixed rate, ``w <- w + rate * (sum + noise) / m``: noise then only adds up. It is
  not so with momentum, Adam or weight decay, which put one round's noise into later rounds;
- every row is brought up to date before anyone reads it, and which rows are read depends on data, on keys and on what
  was read before, never on rows that still owe noise;
- what is published is what was read, and whole tables after `flush`. A table that owes noise shows the sums of other
  people's updates with less noise than was accounted for, and `LazyTable.noised` shows who read what: neither may be
  published. If each round's whole table is, nothing can be put off.

`fedjax_rec.federated.lazy_rounds` trains this way.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_rec.federated.rows import take_rows

# Rows brought up to date at a time when all are: few stay in a CPU's cache.
_PIECE = {"cpu": 1024}
_ACCELERATOR_PIECE = 1 << 16


class LazyTable(NamedTuple):
    """A table some of whose rows owe noise. Secret until it is flushed.

    Attributes:
      values: float32 ``[num_rows, dim]``.
      noised: int32 ``[num_rows]``, rounds whose noise the row has.
    """

    values: jax.Array
    noised: jax.Array


def lazy_table(values: jax.Array, round_index: jax.Array | int) -> LazyTable:
    """A table that is up to date before that round; the first round is 0."""
    return LazyTable(values, jnp.full(values.shape[0], round_index, jnp.int32))


def catch_up(table: LazyTable, row_ids: jax.Array, round_index: jax.Array, key: jax.Array, stddev: float) -> LazyTable:
    """Gives rows the noise of all rounds before ``round_index`` that they do not have yet.

    Row r, up to date before round a, gets ``stddev * sqrt(round_index - a) * N(0, I)`` from a key of (r, a,
    round_index): the order in which rows are read changes nothing, and reading one twice gives nothing more.

    Args:
      table: the table.
      row_ids: int32 of any shape; repeats allowed, ``num_rows`` is padding.
      round_index: int32 scalar, at least the rounds that the rows have.
      key: of this table's noise for the whole run, and of nothing else.
      stddev: of one round's noise in an entry of the table: ``rate * noise_multiplier * l2_clip_norm / m``.
    """
    row_ids = row_ids.reshape(-1)
    since = table.noised.at[row_ids].get(mode="fill", fill_value=0)
    # Set and not added: a row that occurs twice is the same number twice.
    values = table.values.at[row_ids].set(_noised(table.values, row_ids, since, round_index, key, stddev), mode="drop")
    # What is written comes from what was read, or the compiler copies the array to keep the two apart.
    return LazyTable(values, table.noised.at[row_ids].set(jnp.maximum(since, round_index), mode="drop"))


def _noised(values, row_ids, since, round_index, key, stddev):
    """Rows ``row_ids`` of ``values`` with the noise of rounds ``since .. round_index - 1``."""
    key = jax.random.fold_in(key, round_index)

    def noise_of(row, since):
        row_key = jax.random.fold_in(jax.random.fold_in(key, row), since)
        return jax.random.normal(row_key, (values.shape[1],))

    owed = stddev * jnp.sqrt((round_index - since).astype(jnp.float32))
    return take_rows(values, row_ids) + owed[:, None] * jax.vmap(noise_of)(row_ids, since)


def read(
    table: LazyTable, row_ids: jax.Array, round_index: jax.Array, key: jax.Array, stddev: float
) -> tuple[jax.Array, LazyTable]:
    """Rows brought up to date, ``row_ids.shape + [dim]``, and the table that has them so; arguments as `catch_up`."""
    table = catch_up(table, row_ids, round_index, key, stddev)
    return take_rows(table.values, row_ids), table


def apply(
    table: LazyTable, total: jax.Array, row_ids: jax.Array, rate: jax.Array | float
) -> tuple[LazyTable, jax.Array]:
    """Steps rows by ``rate`` times their noiseless sum; that round's noise is owed from then on.

    Args:
      table: whose rows are up to date: they were read in this round.
      total: float32 ``[num_rows, dim]``, the sum of a round.
      row_ids: int32 of any shape; repeats allowed, ``num_rows`` is padding.
      rate: learning rate over the expected cohort.

    Returns:
      The table, and the total with these rows cleared, so that the next round need not clear them all.
    """
    row_ids = row_ids.reshape(-1)
    change = take_rows(total, row_ids)
    values = table.values.at[row_ids].set(take_rows(table.values, row_ids) + rate * change, mode="drop")
    # Zero, sums of clipped updates being finite, and written so because a plain zero would copy the total, as above.
    return table._replace(values=values), total.at[row_ids].set(change - change, mode="drop")


def flush(table: LazyTable, round_index: jax.Array, key: jax.Array, stddev: float) -> jax.Array:
    """The whole table with the noise of all rounds before ``round_index``: what may be published.

    Costs as much as one round of dense noise. Arguments as `catch_up`.
    """
    num_rows = table.values.shape[0]
    piece = min(_PIECE.get(jax.default_backend(), _ACCELERATOR_PIECE), num_rows)
    place = jnp.arange(piece, dtype=jnp.int32)

    def body(i, values):
        row_ids = i * piece + place
        since = table.noised.at[row_ids].get(mode="fill", fill_value=0)
        return values.at[row_ids].set(_noised(values, row_ids, since, round_index, key, stddev), mode="drop")

    return jax.lax.fori_loop(0, -(-num_rows // piece), body, table.values)

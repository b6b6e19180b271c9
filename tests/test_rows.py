"""Risk: sparse updates gather, merge or scatter other rows than a whole table: under vmap, on padding, on repeats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedjax_rec.federated.rows import (
    Rows,
    add_rows,
    add_to_total,
    add_update,
    distinct_rows,
    is_rows,
    merge_duplicates,
    take_rows,
    to_dense,
    zero_total,
)
from fedjax_rec.federated.transforms import select_update
from fedjax_rec.privacy.mechanisms import global_norm

NUM_ROWS, DIM, CLIENTS = 6, 2, 3
some_ids = hnp.arrays(np.int32, (CLIENTS, 2, 4), elements=st.integers(0, NUM_ROWS - 1))
padded_ids = hnp.arrays(np.int32, (CLIENTS, 2, 4), elements=st.integers(0, NUM_ROWS + 2))
numbers = st.floats(-100, 100, width=32)


@jax.jit
def take_every_way(tables, ids):
    """Table and ids batched or not, and a vmap over the vmap."""
    plain = jax.vmap(take_rows, in_axes=(0, 0))(tables, ids)
    one_table = jax.vmap(take_rows, in_axes=(None, 0))(tables[0], ids)
    one_list = jax.vmap(take_rows, in_axes=(0, None))(tables, ids[0])
    nested = jax.vmap(jax.vmap(take_rows, in_axes=(None, 0)))(tables, ids)
    twice = jax.vmap(jax.vmap(take_rows))(jnp.stack([tables, tables + 1]), jnp.stack([ids, ids]))
    return plain, one_table, one_list, nested, twice


@settings(max_examples=30, deadline=None, derandomize=True)
@given(ids=some_ids, tables=hnp.arrays(np.float32, (CLIENTS, NUM_ROWS, DIM), elements=numbers))
def test_taking_rows_is_indexing(ids, tables):
    expected = np.stack([table[i] for table, i in zip(tables, ids, strict=True)])
    plain, one_table, one_list, nested, twice = take_every_way(tables, ids)
    np.testing.assert_array_equal(plain, expected)
    np.testing.assert_array_equal(nested, expected)
    np.testing.assert_array_equal(one_table, tables[0][ids])
    np.testing.assert_array_equal(one_list, tables[:, ids[0]])
    np.testing.assert_array_equal(
        twice, np.stack([expected, np.stack([t[i] for t, i in zip(tables + 1, ids, strict=True)])])
    )


@jax.jit
def add_every_way(tables, ids, values):
    plain = jax.vmap(add_rows)(tables, ids, values)
    one_table = jax.vmap(add_rows, in_axes=(None, 0, 0))(tables[0], ids, values)
    one_list = jax.vmap(add_rows, in_axes=(0, None, 0))(tables, ids[0], values)
    one_value = jax.vmap(add_rows, in_axes=(0, 0, None))(tables, ids, values[0])
    twice = jax.vmap(jax.vmap(add_rows))(jnp.stack([tables] * 2), jnp.stack([ids, ids[::-1]]), jnp.stack([values] * 2))
    return plain, one_table, one_list, one_value, twice


def added(table, ids, values):
    """NumPy: duplicates accumulate, ids past the end are dropped."""
    longer = np.concatenate([table, np.zeros((100, table.shape[1]))]).astype(np.float64)
    np.add.at(longer, ids, values)
    return longer[: len(table)]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    ids=padded_ids,
    tables=hnp.arrays(np.float32, (CLIENTS, NUM_ROWS, DIM), elements=numbers),
    values=hnp.arrays(np.float32, (CLIENTS, 2, 4, DIM), elements=numbers),
)
def test_adding_rows_accumulates_and_drops_padding(ids, tables, values):
    """In particular, one client's padding never lands in the next client's table, which lies right behind it."""
    plain, one_table, one_list, one_value, twice = add_every_way(tables, ids, values)
    for client, (table, i, v) in enumerate(zip(tables, ids, values, strict=True)):
        np.testing.assert_allclose(plain[client], added(table, i, v), atol=1e-3)
        np.testing.assert_allclose(one_table[client], added(tables[0], i, v), atol=1e-3)
        np.testing.assert_allclose(one_list[client], added(table, ids[0], v), atol=1e-3)
        np.testing.assert_allclose(one_value[client], added(table, i, values[0]), atol=1e-3)
        np.testing.assert_allclose(twice[0, client], plain[client], atol=1e-3)
        np.testing.assert_allclose(twice[1, client], added(table, ids[CLIENTS - 1 - client], v), atol=1e-3)
    np.testing.assert_allclose(add_rows(tables[0], ids[0], values[0]), plain[0], atol=1e-3)


merge = jax.jit(lambda ids, values: merge_duplicates(Rows(ids, values, NUM_ROWS, unique=False)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    ids=hnp.arrays(np.int32, 9, elements=st.integers(0, NUM_ROWS)),
    values=hnp.arrays(np.float32, (9, DIM), elements=numbers),
)
def test_merging_keeps_the_sum_and_gives_its_norm(ids, values):
    table = added(np.zeros((NUM_ROWS, DIM)), ids, values)
    merged = merge(ids, values)
    kept = np.asarray(merged.ids)[merged.ids < NUM_ROWS]
    assert merged.unique
    assert sorted(kept) == sorted(set(ids[ids < NUM_ROWS]))
    np.testing.assert_allclose(to_dense(merged), table, atol=1e-3)
    np.testing.assert_allclose(
        global_norm({"t": merged, "d": jnp.ones(4)}), np.hypot(np.linalg.norm(table), 2), rtol=1e-5
    )
    assert not np.any(np.asarray(merged.values)[merged.ids >= NUM_ROWS])  # whatever padding held


def test_padding_with_rubbish_is_merged_away():
    merged = merge(jnp.array([NUM_ROWS] * 3 + [1] * 6), jnp.full((9, DIM), np.nan).at[3:].set(1.0))
    np.testing.assert_array_equal(global_norm(merged), np.float32(np.sqrt(2) * 6))


def test_unique_rows_pass_through_a_merge_untouched():
    rows = Rows(jnp.arange(3), jnp.ones((3, DIM)), NUM_ROWS)
    assert merge_duplicates(rows) is rows


def test_a_chunk_of_updates_adds_up():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, NUM_ROWS + 1, (CLIENTS, 4)).astype(np.int32)
    values = rng.normal(size=(CLIENTS, 4, DIM)).astype(np.float32)
    dense = rng.normal(size=(CLIENTS, 5)).astype(np.float32)
    updates = {"rows": Rows(jnp.asarray(ids), jnp.asarray(values), NUM_ROWS), "dense": [jnp.asarray(dense)]}
    one = jax.tree.map(lambda x: x[0], updates)
    total = zero_total(one)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), total) == {
        "rows": ((NUM_ROWS, DIM), jnp.float32),
        "dense": [((5,), jnp.float32)],
    }
    total = add_to_total(add_to_total(total, updates), updates)
    np.testing.assert_allclose(total["rows"], 2 * added(np.zeros((NUM_ROWS, DIM)), ids, values), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total["dense"][0], 2 * dense.sum(0), rtol=1e-5)
    per_client = [to_dense(jax.tree.map(lambda x, i=i: x[i], updates)) for i in range(CLIENTS)]
    summed = jax.tree.map(lambda *x: 2 * sum(x), *per_client)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), total, summed)


def test_rows_are_one_leaf_where_asked():
    update = {"rows": Rows(jnp.arange(2), jnp.ones((2, 1)), 4, unique=False), "dense": jnp.ones(3)}
    assert [is_rows(leaf) for leaf in jax.tree.leaves(update, is_leaf=is_rows)] == [False, True]
    again = jax.tree.map(lambda x: x, update)
    assert (again["rows"].num_rows, again["rows"].unique) == (4, False)


@pytest.mark.parametrize("num_rows", [1, 2])
def test_tiny_tables(num_rows):
    """A table of one row, and ids that are all padding."""
    padding = jnp.full((CLIENTS, 3), num_rows)
    out = jax.vmap(add_rows)(jnp.zeros((CLIENTS, num_rows, 1)), padding, jnp.ones((CLIENTS, 3, 1)))
    assert not np.any(out)
    merged = merge_duplicates(Rows(padding[0], jnp.ones((3, 1)), num_rows, unique=False))
    assert not np.any(merged.values)


def test_distinct_rows_give_every_id_one_row():
    """With repeats and padding, one client or several: each slot leads to a row of its id, and no id has two rows."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 12, (5, 9)).astype(np.int32)  # 11 is padding
    one = [distinct_rows(jnp.asarray(row), 11) for row in ids]
    many = jax.vmap(lambda row: distinct_rows(row, 11))(jnp.asarray(ids))
    for row, (row_ids, slots), both_ids, both_slots in zip(ids, one, *many, strict=True):
        np.testing.assert_array_equal(row_ids, both_ids)
        np.testing.assert_array_equal(slots, both_slots)
        real = row < 11
        np.testing.assert_array_equal(np.asarray(row_ids)[np.asarray(slots)[real]], row[real])
        assert np.all(np.asarray(slots)[~real] == len(row))
        kept = np.asarray(row_ids)[np.asarray(row_ids) < 11]
        assert sorted(kept) == sorted(set(row[real]))


def test_whole_tables_add_like_rows():
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.normal(size=(3, 6, 2)), jnp.float32)
    ids = jnp.broadcast_to(jnp.arange(6), (3, 6))
    total = jnp.asarray(rng.normal(size=(6, 2)), jnp.float32)
    sums = [add_to_total(total, Rows(ids, values, 6, whole=whole)) for whole in (False, True)]
    np.testing.assert_allclose(*sums, rtol=1e-6, atol=1e-6)
    one = Rows(ids[0], values[0], 6, whole=True)
    np.testing.assert_array_equal(add_update(total, one), add_rows(total, one.ids, one.values))
    np.testing.assert_array_equal(add_update(total, values[0]), total + values[0])
    kept = select_update(jnp.array(False), one)
    assert not np.any(kept.values)
    assert kept.whole

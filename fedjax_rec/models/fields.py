"""The fields of an example: categorical, many-valued and numeric columns, as rows of one table and factors of them.

Every field owns some rows of one embedding table, at an offset of its own. An example names rows and gives each a
factor, and a field's vector is the sum of its rows times their factors:

    categorical     the row of its value, with factor 1
    many-valued     the rows of its k values, with factor 1 / k: their mean
    numeric         its one row, with factor sign(x) log(1 + |x|)
    missing         no row: a zero vector

which is x_i v_i of Rendle, 2010, "Factorization Machines", a field at a time. A categorical field is enumerated over a
public list of values, or hashed into a public number of buckets; then nothing about the values has to be read from the
data beforehand, which under differential privacy would be a release of its own.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class FieldBatch(NamedTuple):
    """Examples as rows of the table and factors; leading axes as they come, none for one example.

    Attributes:
      ids: int32 ``[..., slots]``, rows of the one table; ``num_rows`` where a slot is empty.
      values: float32 ``[..., slots]``, their factors; 0 where a slot is empty.
    """

    ids: jax.Array
    values: jax.Array


@dataclass(frozen=True)
class Fields:
    """The layout, which is public: what a table's rows and an example's slots are.

    Attributes:
      names: of the fields.
      sizes: rows of each field in the table.
      widths: slots of each field in an example; above 1 for many-valued fields.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def num_fields(self) -> int:
        """Number of fields."""
        return len(self.names)

    @property
    def num_rows(self) -> int:
        """Rows of the one table."""
        return sum(self.sizes)

    @property
    def offsets(self) -> tuple[int, ...]:
        """The first row of each field."""
        return tuple(int(x) for x in np.cumsum((0, *self.sizes))[:-1])


@dataclass(frozen=True, eq=False)
class Column:
    """One field of n examples, on the host.

    Attributes:
      name: of the field.
      size: rows that it needs.
      ids: int32 ``[n, width]`` in ``0 .. size - 1``; ``size`` where a slot is empty.
      values: float32 ``[n, width]``; 0 where a slot is empty.
    """

    name: str
    size: int
    ids: np.ndarray
    values: np.ndarray


def enumerated(name: str, values: np.ndarray, *, vocabulary: Sequence) -> Column:
    """A categorical field over a public list of values; any other value is missing.

    Args:
      name: of the field.
      values: ``[n]``, of the kind of the vocabulary.
      vocabulary: distinct values.

    Raises:
      ValueError: for an empty vocabulary, or one with a value twice.
    """
    vocabulary = np.asarray(vocabulary)
    if not len(vocabulary) or len(np.unique(vocabulary)) != len(vocabulary):
        raise ValueError(f"The vocabulary of {name} must hold distinct values, at least one; got {len(vocabulary)}.")
    order = np.argsort(vocabulary, kind="stable")
    place = np.minimum(np.searchsorted(vocabulary[order], values), len(vocabulary) - 1)
    known = vocabulary[order][place] == values
    return _column(name, len(vocabulary), np.where(known, order[place], -1)[:, None], known[:, None])


def hashed(name: str, values: np.ndarray, *, num_buckets: int) -> Column:
    """A categorical field hashed into buckets; values that meet in one share its row. "" is missing.

    The hash is BLAKE2 of the field's name and the value, the same on every machine.

    Args:
      name: of the field.
      values: ``[n]`` str or integers.
      num_buckets: a public number.

    Raises:
      ValueError: for no bucket.
    """
    if num_buckets < 1:
        raise ValueError(f"num_buckets must be at least 1; got {num_buckets} for {name}.")
    distinct, place = np.unique(values, return_inverse=True)

    def bucket(value):
        digest = hashlib.blake2b(f"{name}\x00{value}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % num_buckets

    ids = np.array([-1 if value == "" else bucket(value) for value in distinct.tolist()], np.int64)[place]
    return _column(name, num_buckets, ids[:, None], (ids >= 0)[:, None])


def placed(name: str, places: np.ndarray, *, size: int) -> Column:
    """A categorical field whose values are places ``[n]`` in ``0 .. size - 1`` already; -1 is missing.

    Raises:
      ValueError: for a place out of range.
    """
    if len(places) and not -1 <= places.min() <= places.max() < size:
        raise ValueError(f"{name} has places {places.min()} .. {places.max()}, and needs -1 .. {size - 1}.")
    return _column(name, size, places[:, None], (places >= 0)[:, None])


def many_valued(name: str, flags: np.ndarray) -> Column:
    """A field with any number of values, from flags bool ``[n, size]``; slots for the most in one example."""
    counts = flags.sum(1)
    width = max(int(counts.max(initial=0)), 1)
    order = np.argsort(~flags, axis=1, kind="stable")[:, :width]
    real = np.arange(width)[None, :] < counts[:, None]
    return _column(name, flags.shape[1], np.where(real, order, -1), real / np.maximum(counts, 1)[:, None])


def numeric(name: str, values: np.ndarray) -> Column:
    """A numeric field ``[n]``; not a number is missing. The factor is sign(x) log(1 + |x|), which tames long tails."""
    values = np.asarray(values, np.float64)
    real = np.isfinite(values)
    values = np.where(real, values, 0.0)
    return _column(name, 1, np.where(real, 0, -1)[:, None], (np.sign(values) * np.log1p(np.abs(values)))[:, None])


def _column(name: str, size: int, ids: np.ndarray, values: np.ndarray) -> Column:
    ids = np.where(ids < 0, size, ids).astype(np.int32)
    return Column(name, size, ids, np.where(ids < size, values, 0).astype(np.float32))


def join(columns: Sequence[Column]) -> tuple[Fields, FieldBatch]:
    """Columns of the same n examples side by side: their layout, and NumPy arrays ``[n, slots]``.

    Raises:
      ValueError: without columns, for a name that occurs twice, or columns of different lengths.
    """
    names = tuple(column.name for column in columns)
    lengths = {len(column.ids) for column in columns}
    if len(lengths) != 1 or len(set(names)) != len(names):
        raise ValueError(
            f"Columns need distinct names and one length, and at least one column; got {', '.join(names) or 'none'} "
            f"with lengths {sorted(lengths)}."
        )
    fields = Fields(names, tuple(c.size for c in columns), tuple(c.ids.shape[1] for c in columns))
    ids = [
        np.where(c.ids < c.size, c.ids + first, fields.num_rows)
        for c, first in zip(columns, fields.offsets, strict=True)
    ]
    values = np.concatenate([c.values for c in columns], axis=1)
    return fields, FieldBatch(np.concatenate(ids, axis=1).astype(np.int32), values)


def dense_values(fields: Fields, batch: FieldBatch) -> np.ndarray:
    """The factors written out over all rows, float32 ``[n, num_rows]``, for fields of few rows; see `embed_dense`."""
    ids, values = np.asarray(batch.ids), np.asarray(batch.values)
    out = np.zeros((len(ids), fields.num_rows + 1), np.float32)
    np.add.at(out, (np.arange(len(ids))[:, None], ids), values)
    return out[:, : fields.num_rows]


def embed(fields: Fields, table: jax.Array, example: FieldBatch) -> jax.Array:
    """The vectors of one example's fields.

    Args:
      fields: the layout.
      table: float32 ``[num_rows, columns]``.
      example: leaves ``[slots]``.

    Returns:
      float32 ``[num_fields, columns]``.
    """
    rows = jnp.take(table, example.ids, axis=0, mode="clip")
    rows = jnp.where((example.ids < fields.num_rows)[:, None], rows * example.values[:, None], 0.0)
    if max(fields.widths) == 1:
        return rows
    return jnp.matmul(_owners(fields.widths), rows, precision="highest")


def embed_dense(fields: Fields, table: jax.Array, values: jax.Array) -> jax.Array:
    """The same from factors float32 ``[num_rows]`` over all rows: float32 ``[num_fields, columns]``."""
    return jnp.matmul(_owners(fields.sizes) * values[None, :], table, precision="highest")


def _owners(counts: tuple[int, ...]) -> np.ndarray:
    """0/1 ``[fields, sum of counts]``: which slots (or rows) are which field's."""
    return np.repeat(np.eye(len(counts), dtype=np.float32), counts, axis=1)


def take_examples(batch: FieldBatch, index: jax.Array) -> FieldBatch:
    """The examples at some places of the first axis; out of range gives any example."""
    return jax.tree.map(partial(jnp.take, indices=index, axis=0, mode="clip"), batch)

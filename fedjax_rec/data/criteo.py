"""Files in the format of Criteo's click logs: a label, 13 integers and 26 hashed categories a line, tab separated.

    label \\t I1 \\t ... \\t I13 \\t C1 \\t ... \\t C26

An empty field is missing; categories are hexadecimal numbers of up to 32 bits. A line is an example; who saw it is not
in the file, so privacy for it is example-level. From the rows to the fields of a network there are two ways:

- by hash, into a public number of buckets: nothing is read from the data, so this is the way under privacy;
- by a vocabulary of the categories that occur often enough: usual in published results, and itself a release of the
  data that no epsilon of the training covers.
"""

import gzip
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

NUM_INTEGERS, NUM_CATEGORIES = 13, 26
NUM_COLUMNS = 1 + NUM_INTEGERS + NUM_CATEGORIES
_LINES_AT_ONCE = 50_000
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, eq=False)
class CriteoRows:
    """Examples by column, in the order of the file.

    Attributes:
      labels: float32 ``[n]``, 1 for a click and 0 else.
      integers: float32 ``[n, 13]``, NaN where missing.
      categories: int64 ``[n, 26]``, -1 where missing.
      repairs: counted repairs, such as {"rows without a label of 0 or 1 dropped": 2}.
    """

    labels: np.ndarray
    integers: np.ndarray
    categories: np.ndarray
    repairs: Mapping[str, int]

    def __len__(self) -> int:
        """Examples."""
        return len(self.labels)

    def part(self, start: int, stop: int) -> "CriteoRows":
        """A contiguous block of the rows; the log is in time order."""
        parts = (self.labels, self.integers, self.categories)
        return CriteoRows(*(x[start:stop] for x in parts), repairs={})


def read_criteo(file: str | Path, *, max_rows: int | None = None) -> CriteoRows:
    """Reads a file, plain or ``.gz``, as a whole or its first lines.

    Unusable numbers and categories become missing and rows without a usable label are dropped; each is counted.

    Args:
      file: such as the train.txt of Criteo's display advertising challenge.
      max_rows: most lines to read; None for all. A row takes 264 bytes.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for a line of another number of columns, with its number; or a file without usable rows.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}; give the path of a click log in Criteo's format.")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, or None for all; got {max_rows}.")
    opener = gzip.open if file.suffix == ".gz" else open
    parts, repairs, first = [], {}, 1
    with opener(file, "rb") as stream:
        for lines in _blocks(islice(stream, max_rows)):
            parts.append(_parsed(lines, file, first, repairs))
            first += len(lines)
    labels, integers, categories = (np.concatenate(x) for x in zip(*parts, strict=True)) if parts else ([], [], [])
    if not len(labels):
        raise ValueError(f"{file} holds no usable row ({first - 1} lines read, repairs {repairs}); check the file.")
    return CriteoRows(labels, integers, categories, repairs)


def _blocks(lines: Iterator[bytes]) -> Iterator[list[bytes]]:
    while block := list(islice(lines, _LINES_AT_ONCE)):
        yield block


def _parsed(lines: list[bytes], file: Path, first: int, repairs: dict[str, int]):
    """Labels, integers and categories of some lines; adds to ``repairs``."""
    cells = []
    for number, line in enumerate(lines, first):
        row = line.rstrip(b"\r\n").split(b"\t")
        if len(row) != NUM_COLUMNS:
            hint = "; it looks like a test file, which has no labels" if len(row) == NUM_COLUMNS - 1 else ""
            raise ValueError(
                f"Line {number} of {file} has {len(row)} columns and needs {NUM_COLUMNS} separated by tabs: a label, "
                f"{NUM_INTEGERS} integers and {NUM_CATEGORIES} categories{hint}."
            )
        cells.append(row)
    keep = np.array([row[0] in (b"0", b"1") for row in cells], bool)
    _count(repairs, "rows without a label of 0 or 1 dropped", np.count_nonzero(~keep))
    cells = [row for row, kept in zip(cells, keep, strict=True) if kept]
    labels = np.array([row[0] == b"1" for row in cells], np.float32)
    integers = np.array([[_integer(x) for x in row[1 : 1 + NUM_INTEGERS]] for row in cells], np.float64)
    categories = np.array([[_category(x) for x in row[1 + NUM_INTEGERS :]] for row in cells], np.int64)
    integers = integers.reshape(-1, NUM_INTEGERS)
    categories = categories.reshape(-1, NUM_CATEGORIES)
    _count(repairs, "unusable integers set to missing", np.isinf(integers).sum())
    _count(repairs, "unusable categories set to missing", (categories == _UNUSABLE).sum())
    integers = np.where(np.isinf(integers), np.nan, integers).astype(np.float32)
    return labels, integers, np.maximum(categories, -1)


def _count(repairs: dict[str, int], name: str, number) -> None:
    if number:
        repairs[name] = repairs.get(name, 0) + int(number)


def _integer(cell: bytes) -> float:
    """NaN where missing, infinity where it is no whole number."""
    if not cell:
        return np.nan
    digits = cell[1:] if cell[:1] == b"-" else cell
    return float(cell) if digits.isdigit() and len(digits) < 16 else np.inf


_UNUSABLE = -2
_HEX = frozenset(b"0123456789abcdefABCDEF")


def _category(cell: bytes) -> int:
    """-1 where missing, -2 where it is no hexadecimal number of 32 bits."""
    if not cell:
        return -1
    return int(cell, 16) if len(cell) <= 8 and _HEX.issuperset(cell) else _UNUSABLE


def hash_categories(categories: np.ndarray, num_buckets: int) -> np.ndarray:
    """Buckets int64 ``[n, 26]`` of categories, other ones for each column; -1 where missing.

    Multiplicative hashing of the category and its column, the same on every machine.

    Args:
      categories: int64 ``[n, 26]``, -1 where missing.
      num_buckets: of each column, a public number.

    Raises:
      ValueError: for no bucket.
    """
    if num_buckets < 1:
        raise ValueError(f"num_buckets must be at least 1; got {num_buckets}.")
    columns = np.arange(categories.shape[1], dtype=np.uint64)[None, :]
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        mixed = (categories.astype(np.uint64) + (columns << np.uint64(32))) * _MULTIPLIER
        mixed = (mixed ^ (mixed >> np.uint64(32))) * _MULTIPLIER
    buckets = (mixed >> np.uint64(32)) % np.uint64(num_buckets)
    return np.where(categories < 0, -1, buckets.astype(np.int64))


def frequent_categories(rows: CriteoRows, *, min_count: int) -> tuple[np.ndarray, ...]:
    """The categories of each column that occur at least ``min_count`` times, ascending.

    Not private: this list is read from the data.

    Raises:
      ValueError: for a threshold below 1.
    """
    if min_count < 1:
        raise ValueError(f"min_count must be at least 1; got {min_count}.")
    found = []
    for column in rows.categories.T:
        values, counts = np.unique(column[column >= 0], return_counts=True)
        found.append(values[counts >= min_count])
    return tuple(found)


def place_categories(categories: np.ndarray, vocabularies: Sequence[np.ndarray]) -> np.ndarray:
    """Places int64 ``[n, 26]`` in the columns' vocabularies; a rare or new category has the place after the last.

    Args:
      categories: int64 ``[n, 26]``, -1 where missing; it stays -1.
      vocabularies: from `frequent_categories` of the training rows.
    """
    places = np.empty_like(categories)
    for c, words in enumerate(vocabularies):
        place = np.searchsorted(words, categories[:, c])
        known = (place < len(words)) & (np.append(words, -1)[place] == categories[:, c])
        places[:, c] = np.where(categories[:, c] < 0, -1, np.where(known, place, len(words)))
    return places

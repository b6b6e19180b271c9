"""Columns out of separated text, fast where every value is a number, and with the line's number where one is wrong."""

import csv
import io
import warnings
from collections.abc import Mapping, Sequence

import numpy as np

_NUMBERS = ("rating", "timestamp")


def read_columns(
    data: bytes,
    columns: Mapping[str, int],
    *,
    num_columns: int,
    separator: str,
    source: str,
    first_line: int = 1,
) -> dict[str, np.ndarray]:
    """Named columns of a table without header.

    Args:
      data: the lines; every line must have `num_columns` fields.
      columns: place of each wanted column, 0-based; "rating" and "timestamp" become numbers, an empty one NaN.
      num_columns: fields a line.
      separator: one character, or several as in MovieLens's "::".
      source: file name for messages.
      first_line: line number of the first line of `data`, for messages.

    Returns:
      `{name: [rows]}`: ids as int64 if every value of the table is a number, else as str; ratings float64.

    Raises:
      ValueError: naming the first line with another number of fields, or the first value that is no number.
    """
    data = data.replace(b"\r\n", b"\n")
    if not data.endswith(b"\n"):
        data += b"\n"
    numbers = _all_numbers(data, columns, num_columns=num_columns, separator=separator)
    if numbers is not None:
        return numbers
    rows = list(split_rows(data, separator=separator, source=source, first_line=first_line, num_columns=num_columns))
    result = {}
    for name, place in columns.items():
        text = np.array([row[place].strip() for row in rows])
        if name in _NUMBERS:
            result[name] = _floats(text, name=name, source=source, first_line=first_line)
        else:
            result[name] = text
    return result


def split_rows(data: bytes, *, separator: str, source: str, first_line: int, num_columns: int) -> list[list[str]]:
    """Fields of each line as str; in comma or semicolon files a quoted field may hold the separator.

    Raises:
      ValueError: naming the first line that is empty or has another number of fields.
    """
    text = decode(data)
    text = text.removesuffix("\n")
    if '"' in text and separator in (",", ";"):
        rows = list(csv.reader(io.StringIO(text), delimiter=separator))
    else:
        rows = [line.rstrip("\r").split(separator) for line in text.split("\n")]
    bad = next((place for place, row in enumerate(rows) if len(row) != num_columns), None)
    if bad is not None:
        found = len(rows[bad]) if rows[bad] != [""] else 0
        raise ValueError(
            f"Line {first_line + bad} of {source} has {found} field{'s' * (found != 1)}, and {num_columns} separated "
            f"by {separator!r} are needed; mend or remove it, or name another separator if every line is like that."
        )
    return rows


def read_lists(data: bytes, *, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Lines of numbers or words separated by blanks: every token `[tokens]` and the tokens of each line `[lines]`.

    Raises:
      ValueError: naming the first empty line.
    """
    lines = data.removesuffix(b"\n").split(b"\n")
    lengths = np.fromiter((len(line.split()) for line in lines), np.int64, len(lines))
    if not lengths.all():
        raise ValueError(f"Line {1 + int(np.argmin(lengths))} of {source} is empty; remove it.")
    tokens = np.array(data.split())
    return tokens, lengths


def decode(data: bytes) -> str:
    """UTF-8 (with or without its mark), else Latin-1, in which GroupLens wrote its older files."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _all_numbers(
    data: bytes, columns: Mapping[str, int], *, num_columns: int, separator: str
) -> dict[str, np.ndarray] | None:
    """The columns by NumPy's C reader, a million rows in a third of a second; None where the slow path must decide."""
    lines = data.count(b"\n")
    if data.count(separator.encode()) != lines * (num_columns - 1):
        return None
    if len(separator) > 1:
        if b"\t" in data:
            return None
        data, separator = data.replace(separator.encode(), b"\t"), "\t"
    places = sorted(columns.items(), key=lambda entry: entry[1])
    dtype = [(name, np.float64 if name == "rating" else np.int64) for name, _ in places]
    usecols: Sequence[int] | None = None if len(places) == num_columns else [place for _, place in places]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "1.0" as an integer only warns, and the slow path reads it right
            table = np.loadtxt(io.BytesIO(data), dtype, delimiter=separator, comments=None, usecols=usecols, ndmin=1)
    except (ValueError, OverflowError, UserWarning, DeprecationWarning):
        return None
    if len(table) != lines:  # the C reader skips empty lines, the slow path names them
        return None
    return {name: np.ascontiguousarray(table[name]) for name, _ in places}


def _floats(text: np.ndarray, *, name: str, source: str, first_line: int) -> np.ndarray:
    text = np.where(text == "", "nan", text)
    try:
        return text.astype(np.float64)
    except ValueError:
        bad = next(place for place, value in enumerate(text.tolist()) if not _is_number(value))
        raise ValueError(
            f"Line {first_line + bad} of {source} has {str(text[bad])!r} as its {name}, which is not a number; "
            "mend or remove the line."
        ) from None


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True

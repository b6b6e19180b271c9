"""Interactions in and out of Parquet and CSV files: what `write_interactions` writes, `load` reads back.

Columns are user, item, and where there are any rating and timestamp. Parquet also keeps user attributes, one column
``user:NAME`` each, repeated on every row of a user (which Parquet stores once).
"""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from fedjax_rec.data.interactions import Interactions

SUFFIXES = (".parquet", ".csv")
ATTRIBUTE = "user:"
NULL = -np.inf  # what a null among numbers is read as: NaN may be in the file itself


def write_interactions(path: str | Path, interactions: Interactions) -> Path:
    """Writes rows by user, each user's in time order; a reader, or a full disk, never meets half a file.

    What only the source file knew (`file_rows`), the catalogue's items without a row and users without a row are not
    written. CSV holds no user attributes.

    Args:
      path: ends in .parquet or .csv; its folder is made if need be.
      interactions: the rows.

    Raises:
      ValueError: for another suffix, no rows, or unknown ratings in CSV.
    """
    path = Path(path)
    check_writable(path)
    if not interactions.num_interactions:
        raise ValueError(f"{interactions.name} has no rows to write into {path}.")
    unknown = interactions.ratings is not None and bool(np.isnan(interactions.ratings).any())
    if unknown and path.suffix == ".csv":
        raise ValueError(
            f"{interactions.name} has unknown ratings, which CSV cannot tell from bad ones; write .parquet."
        )
    table = _as_table(interactions, attributes=path.suffix == ".parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        if path.suffix == ".parquet":
            pq.write_table(table, unfinished, compression="zstd")
        else:
            pyarrow.csv.write_csv(table, unfinished, pyarrow.csv.WriteOptions(quoting_style="needed"))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def check_writable(path: Path) -> None:
    """Refuses a name that `write_interactions` cannot write, before any work is done.

    Raises:
      ValueError: for a suffix that is not .parquet or .csv.
      IsADirectoryError: if it is a folder.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"The output must end in {' or '.join(SUFFIXES)}; got {path}.")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it.")


def read_parquet(path: Path) -> tuple[list[str], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Every column of a Parquet file.

    Returns:
      Names of the columns in order; columns by name, nulls as `NULL` in numbers and "" in text, times in seconds; and
      user attributes by name, ``[rows]``, nulls as NaN and "".

    Raises:
      ValueError: if the file is damaged, or no Parquet.
    """
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is no Parquet file, or damaged ({str(error).splitlines()[0]}).") from error
    columns, attributes = {}, {}
    for name in table.column_names:
        values = table.column(name)
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        if name.startswith(ATTRIBUTE):
            found = _to_numpy(values)
            found = np.where(found == NULL, np.nan, found) if found.dtype.kind == "f" else found
            attributes[name.removeprefix(ATTRIBUTE)] = found
        else:
            columns[name] = _to_numpy(values)
    return list(columns), columns, attributes


def _as_table(interactions: Interactions, *, attributes: bool) -> pa.Table:
    users = interactions.user_ids
    columns = {
        "user": interactions.user_labels[users],
        "item": interactions.item_labels[interactions.item_ids],
    }
    if interactions.ratings is not None:
        columns["rating"] = pa.array(interactions.ratings, mask=np.isnan(interactions.ratings))
    if interactions.timestamps is not None:
        columns["timestamp"] = interactions.timestamps
    for name, values in interactions.user_attributes.items() if attributes else ():
        columns[ATTRIBUTE + name] = values[users]
    return pa.table(columns)


def _to_numpy(values: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_timestamp(values.type) or pa.types.is_date(values.type):
        values = pc.cast(pc.cast(values, pa.timestamp("s"), safe=False), pa.int64())
    if pa.types.is_floating(values.type) or (pa.types.is_integer(values.type) and values.null_count):
        return pc.fill_null(pc.cast(values, pa.float64()), NULL).to_numpy()
    if pa.types.is_integer(values.type):
        return values.to_numpy().astype(np.int64)
    if pa.types.is_boolean(values.type):
        return values.to_numpy(zero_copy_only=False).astype(bool)
    try:
        text = pc.fill_null(pc.cast(values, pa.string()), "")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"A column of type {values.type} is neither numbers, text nor times: {error}") from error
    return np.array(text.to_pylist(), str)

"""MovieLens as prepared by TensorFlow Datasets (TFDS).

Reading a data set that was prepared as ArrayRecord needs no TensorFlow. Downloading and preparing does, because TFDS
extracts the zip with it.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedjax_rec.data.interactions import Interactions, from_rows

_CHUNK = 10_000  # records decoded at a time
_ATTRIBUTES: dict[str, tuple[str, Callable]] = {
    "user_gender": ("gender", lambda male: "M" if male else "F"),
    "bucketized_user_age": ("age", int),
    "raw_user_age": ("age", int),  # after the buckets: where the exact age is there, it wins
    "user_occupation_text": ("occupation", bytes.decode),
    "user_zip_code": ("zip_code", bytes.decode),
}


def default_data_dir() -> Path:
    """Where TFDS keeps prepared data: `$TFDS_DATA_DIR`, or `~/tensorflow_datasets`."""
    return Path(os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets")


def find_prepared(name: str, data_dir: Path) -> Path | None:
    """Folder of the newest prepared version of `name` ("movielens/100k") below a TFDS data folder; None = not there."""
    configuration = data_dir / f"{name}-ratings"
    prepared = [entry.parent for entry in configuration.glob("*/dataset_info.json")]
    return max(prepared, key=_version, default=None)


def read_prepared(folder: Path, *, name: str, strict: bool = False) -> Interactions:
    """Reads a prepared `movielens/*-ratings`, about ten thousand records a second.

    TFDS shuffles records by a hash, so `file_rows`, and with them the file tie rules, mean that order here.

    Args:
      folder: of one version, as `find_prepared` returns.
      name: of the data set.
      strict: raise at the first record that would need a repair.

    Raises:
      ValueError: if it was prepared in a format without random access.
    """
    import tensorflow_datasets as tfds  # here, because importing it takes longer than reading MovieLens 100K

    builder = tfds.builder_from_directory(folder)
    try:
        # What tfds.data_source(name, split="train") returns, for exactly the folder that was found.
        source = builder.as_data_source(split="train")
    except NotImplementedError as error:
        raise ValueError(
            f'{folder} was prepared in a format without random access; prepare it with file_format="array_record".'
        ) from error
    genre_names = tuple(builder.info.features["movie_genres"].feature.names)
    present = [key for key in _ATTRIBUTES if key in builder.info.features]
    columns: dict[str, list] = {key: [] for key in ("user_id", "movie_id", "user_rating", "timestamp")}
    items: dict[bytes, tuple[bytes, list[int]]] = {}
    users: dict[bytes, dict] = {}
    for start in range(0, len(source), _CHUNK):
        for record in source.__getitems__(list(range(start, min(start + _CHUNK, len(source))))):
            for key, values in columns.items():
                values.append(record[key])
            items.setdefault(record["movie_id"], (record["movie_title"], record["movie_genres"]))
            if present and record["user_id"] not in users:
                users[record["user_id"]] = {key: record[key] for key in present}
    interactions = from_rows(
        np.array(columns["user_id"]),
        np.array(columns["movie_id"]),
        ratings=np.array(columns["user_rating"], np.float32),
        timestamps=np.array(columns["timestamp"], np.int64),
        name=name,
        rating_range=(0.5, 5.0),
        smallest_id=1,
        strict=strict,
        source=str(folder),
    )
    of_item = [items[str(label).encode()] for label in interactions.item_labels.tolist()]
    genres = np.zeros((interactions.num_items, len(genre_names)), bool)
    for place, (_, listed) in enumerate(of_item):
        genres[place, np.asarray(listed, int)] = True
    of_user = [users[str(label).encode()] for label in interactions.user_labels.tolist()] if present else []
    attributes = {}
    for key in present:
        attribute, convert = _ATTRIBUTES[key]
        attributes[attribute] = np.array([convert(known[key]) for known in of_user])
    return dataclasses.replace(
        interactions,
        item_titles=np.array([title.decode() for title, _ in of_item]),
        item_genres=genres,
        genre_names=genre_names,
        user_attributes=attributes,
    )


def prepare(name: str, data_dir: Path) -> Path:
    """Downloads and prepares `name` as ArrayRecord through TFDS; returns the prepared folder.

    A zip in `data_dir/downloads/manual/` is used instead of the network.

    Raises:
      ModuleNotFoundError: without TensorFlow, which TFDS needs to extract the zip.
      Exception: whatever TFDS raises without network, or for a wrong checksum.
    """
    if not _has_tensorflow():
        raise ModuleNotFoundError("TFDS needs tensorflow to prepare a download, and it is not installed")
    from tensorflow_datasets.structured.movielens import Movielens

    builder = Movielens(config=f"{name.partition('/')[2]}-ratings", data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_path)


def _has_tensorflow() -> bool:
    return importlib.util.find_spec("tensorflow") is not None


def _version(folder: Path) -> tuple[int, ...]:
    parts = folder.name.split(".")
    return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else (-1,)

"""Parsed data kept as columns on disk, so that the second start reads arrays instead of text."""

import hashlib
import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fedjax_rec.data.interactions import Interactions

_VERSION = 1  # raise it when the meaning of a stored column changes
_ARRAYS = (
    "offsets",
    "item_ids",
    "file_rows",
    "timestamps",
    "ratings",
    "user_labels",
    "item_labels",
    "item_titles",
    "item_genres",
)


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/fedjax_rec`, or `~/.cache/fedjax_rec`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedjax_rec"


def cached(
    build: Callable[[], Interactions],
    *,
    name: str,
    sources: Sequence[Path],
    options: Mapping[str, object],
    cache_dir: Path | None,
) -> Interactions:
    """What `build()` returns, from the cache if it was built before from the same files with the same options.

    An entry is valid while every source keeps its size and modification time. A damaged entry is rebuilt with a
    warning, and a folder that cannot be written only costs the time of parsing: also with a warning.

    Args:
      build: parses the sources.
      name: name of the data set.
      sources: every file that `build` reads.
      options: what else decides the result.
      cache_dir: folder of the entries, e.g. `default_cache_dir()`; None = no cache.
    """
    if cache_dir is None:
        return build()
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
    stamp = json.dumps([_VERSION, stats])
    identity = json.dumps(
        [name, [path for path, _, _ in stats], sorted((key, repr(value)) for key, value in options.items())]
    )
    slug = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")
    entry = cache_dir / f"{slug}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npz"
    if entry.is_file():
        try:
            interactions = _read(entry, stamp)
        except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
            warnings.warn(f"The cache file {entry} is damaged ({error}); it is built again from {name}.", stacklevel=2)
            interactions = None
        if interactions is not None:
            return interactions
    interactions = build()
    try:
        _write(entry, interactions, stamp)
    except OSError as error:
        warnings.warn(
            f"{name} could not be cached in {entry.parent} ({error}); every start parses it anew.", stacklevel=2
        )
    return interactions


def _read(entry: Path, stamp: str) -> Interactions | None:
    """The stored interactions, or None if their sources have changed since."""
    with np.load(entry, allow_pickle=False) as columns:
        meta = json.loads(str(columns["meta"]))
        if meta["stamp"] != stamp:
            return None
        return Interactions(
            **{key: columns.get(key) for key in _ARRAYS},
            name=meta["name"],
            num_items=meta["num_items"],
            genre_names=tuple(meta["genre_names"]),
            user_attributes={key: columns[f"user_{key}"] for key in meta["user_attributes"]},
            repairs=meta["repairs"],
        )


def _write(entry: Path, interactions: Interactions, stamp: str) -> None:
    """Writes beside the entry and renames, so that a reader never sees half a file."""
    meta = {
        "stamp": stamp,
        "name": interactions.name,
        "num_items": interactions.num_items,
        "genre_names": interactions.genre_names,
        "user_attributes": list(interactions.user_attributes),
        "repairs": interactions.repairs,
    }
    columns = {key: getattr(interactions, key) for key in _ARRAYS if getattr(interactions, key) is not None}
    columns |= {f"user_{key}": values for key, values in interactions.user_attributes.items()}
    entry.parent.mkdir(parents=True, exist_ok=True)
    partial = entry.with_name(f"{entry.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, meta=np.array(json.dumps(meta)), **columns)
        partial.replace(entry)
    finally:
        partial.unlink(missing_ok=True)

"""Bytes of a file that may be plain, gzipped, or a member of a zip; damaged ones are named, with the line."""

import gzip
import zipfile
import zlib
from pathlib import Path

_CHUNK = 1 << 16


def read_bytes(path: Path) -> bytes:
    """Content of a plain or gzipped (`.gz`) file.

    Raises:
      ValueError: if the gzip stream is truncated or damaged, naming the last readable line.
    """
    data = path.read_bytes()
    return _gunzip(data, str(path)) if path.suffix == ".gz" else data


def locate(root: Path, *names: str) -> str | None:
    """The first of `names` (or of each with `.gz` added) that `root`, a folder or a zip, holds; None = none of them."""
    if root.suffix == ".zip":
        members = {Path(member).name for member in _members(root)}
    else:
        members = {entry.name for entry in root.iterdir()} if root.is_dir() else set()
    tried = (name + suffix for name in names for suffix in ("", ".gz"))
    return next((name for name in tried if name in members), None)


def read_member(root: Path, name: str) -> bytes:
    """Content of file `name` in `root`, a folder or a zip (in whatever folder inside it), gunzipped if need be.

    Raises:
      ValueError: if the zip or gzip is damaged.
    """
    if root.suffix != ".zip":
        return read_bytes(root / name)
    member = next(member for member in _members(root) if Path(member).name == name)
    try:
        with zipfile.ZipFile(root) as archive:
            data = archive.read(member)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{member} in {root} is damaged ({error}); download the zip again.") from error
    return _gunzip(data, f"{root}/{member}") if name.endswith(".gz") else data


def _members(root: Path) -> list[str]:
    try:
        with zipfile.ZipFile(root) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, EOFError) as error:
        size = root.stat().st_size
        raise ValueError(
            f"{root} is not a whole zip file ({error}; {size:,} bytes); it is truncated or something else, "
            "download it again."
        ) from error


def _gunzip(data: bytes, source: str) -> bytes:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        lines = _readable(data).count(b"\n")
        raise ValueError(
            f"{source} is a truncated or damaged gzip file: it ends in line {lines + 1} ({error}); fetch it again."
        ) from error


def _readable(data: bytes) -> bytes:
    """What can be decompressed before the damage."""
    stream, parts = zlib.decompressobj(wbits=31), []
    try:
        for start in range(0, len(data), _CHUNK):
            parts.append(stream.decompress(data[start : start + _CHUNK]))
    except zlib.error:
        pass  # the caller reports how far this came
    return b"".join(parts)

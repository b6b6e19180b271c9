"""The one value every data source produces: who touched what, when, and how it was rated."""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

_ARRAY_DTYPES = {
    "offsets": np.int64,
    "item_ids": np.int32,
    "file_rows": np.int64,
    "timestamps": np.int64,
    "ratings": np.float32,
}


@dataclass(frozen=True, eq=False)
class Interactions:
    """Implicit or explicit feedback, CSR by user, each user's rows in time order (ties in file order).

    User `u` owns rows `offsets[u]:offsets[u + 1]`. Users may have zero rows, as in the parts of a split. All arrays
    are read-only views. Build one with `from_rows` or `load`; the constructor checks shapes and dtypes only.

    Attributes:
      name: what the reader of a table calls this data set, e.g. "movielens/100k".
      offsets: int64 `[num_users + 1]`, where each user's rows start.
      item_ids: int32 `[num_interactions]`, in `0..num_items-1`, unique within a user.
      file_rows: int64 `[num_interactions]`, the row's place in its source file, 0-based: file tie rules need it.
      num_items: size of the catalogue.
      timestamps: int64 `[num_interactions]` in seconds, 0 = unknown (sorts first), or None.
      ratings: float32 `[num_interactions]`, NaN = unknown, or None for implicit feedback.
      user_labels: original ids `[num_users]`, int64 or str, ascending.
      item_labels: original ids `[num_items]`, int64 or str, ascending.
      item_titles: str `[num_items]` or None.
      item_genres: bool `[num_items, num_genres]` or None.
      genre_names: names of the columns of `item_genres`.
      user_attributes: public or side information by name, each `[num_users]`, e.g. {"gender": ...}.
      repairs: counted repairs made while loading, e.g. {"duplicate rows dropped": 3}.

    Raises:
      ValueError: if lengths or dtypes do not fit each other.
    """

    name: str
    offsets: np.ndarray
    item_ids: np.ndarray
    file_rows: np.ndarray
    num_items: int
    timestamps: np.ndarray | None
    ratings: np.ndarray | None
    user_labels: np.ndarray
    item_labels: np.ndarray
    item_titles: np.ndarray | None = None
    item_genres: np.ndarray | None = None
    genre_names: tuple[str, ...] = ()
    user_attributes: Mapping[str, np.ndarray] = field(default_factory=dict)
    repairs: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, dtype in _ARRAY_DTYPES.items():
            value = getattr(self, key)
            if value is not None and value.dtype != dtype:
                raise ValueError(
                    f"Interactions.{key} must be {np.dtype(dtype).name}, and is {value.dtype}; cast it first."
                )
        rows, users = len(self.item_ids), len(self.offsets) - 1
        _check_length("file_rows", self.file_rows, rows)
        _check_length("timestamps", self.timestamps, rows)
        _check_length("ratings", self.ratings, rows)
        _check_length("user_labels", self.user_labels, users)
        _check_length("item_labels", self.item_labels, self.num_items)
        _check_length("item_titles", self.item_titles, self.num_items)
        _check_length("item_genres", self.item_genres, self.num_items)
        for key, value in self.user_attributes.items():
            _check_length(f"user_attributes[{key!r}]", value, users)
        if users < 0 or self.offsets[0] != 0 or self.offsets[-1] != rows or np.any(np.diff(self.offsets) < 0):
            raise ValueError(f"Interactions.offsets must rise from 0 to the {rows} rows; build with from_rows.")
        if rows and (self.item_ids.min() < 0 or self.item_ids.max() >= self.num_items):
            raise ValueError(
                f"Interactions.item_ids must lie in 0..{self.num_items - 1}, and span "
                f"{self.item_ids.min()}..{self.item_ids.max()}; build with from_rows."
            )
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, np.ndarray):
                object.__setattr__(self, item.name, _read_only(value))
        attributes = {key: _read_only(value) for key, value in self.user_attributes.items()}
        object.__setattr__(self, "user_attributes", attributes)
        object.__setattr__(self, "repairs", dict(self.repairs))

    @property
    def num_users(self) -> int:
        """Size of the user id space, users without rows included."""
        return len(self.offsets) - 1

    @property
    def num_interactions(self) -> int:
        """Number of rows."""
        return len(self.item_ids)

    @cached_property
    def counts_per_user(self) -> np.ndarray:
        """Rows of each user, int64 `[num_users]`."""
        return _read_only(np.diff(self.offsets))

    @cached_property
    def item_counts(self) -> np.ndarray:
        """Users who touched each item, int64 `[num_items]`."""
        return _read_only(np.bincount(self.item_ids, minlength=self.num_items).astype(np.int64))

    @cached_property
    def user_ids(self) -> np.ndarray:
        """The user of each row, int32 `[num_interactions]`."""
        return _read_only(np.repeat(np.arange(self.num_users, dtype=np.int32), self.counts_per_user))

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 (hex) over labels, ids, timestamps and ratings.

        Rows are hashed in (user, item) order, so the same data read from a file in another order, or prepared by
        another library, has the same fingerprint. What file order decides (ties) shows in the fingerprint of the split.
        """
        order = np.argsort(self.user_ids * np.int64(max(self.num_items, 1)) + self.item_ids, kind="stable")
        digest = hashlib.sha256(f"{self.num_users} {self.num_items} {self.num_interactions}".encode())
        digest.update(self.offsets.astype("<i8").tobytes())
        digest.update(self.item_ids[order].astype("<i4").tobytes())
        for values, dtype in ((self.timestamps, "<i8"), (self.ratings, "<f4")):
            digest.update(b"none" if values is None else values[order].astype(dtype).tobytes())
        for labels in (self.user_labels, self.item_labels):
            integers = labels.dtype.kind == "i"
            digest.update(labels.astype("<i8").tobytes() if integers else "\n".join(labels.tolist()).encode())
        return digest.hexdigest()

    def items_of(self, user: int) -> np.ndarray:
        """Items of one user in time order, int32 `[n]`."""
        return self.item_ids[self.offsets[user] : self.offsets[user + 1]]

    def take(self, mask: np.ndarray, *, name: str | None = None) -> "Interactions":
        """The rows where `mask` (bool `[num_interactions]`) is True; user and item id spaces stay as they are."""
        if mask.dtype != bool or mask.shape != self.item_ids.shape:
            raise ValueError(
                f"take needs a bool mask [{self.num_interactions}], and got {mask.dtype} {list(mask.shape)}."
            )
        kept_before = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
        return dataclasses.replace(
            self,
            name=self.name if name is None else name,
            offsets=kept_before[self.offsets],
            item_ids=self.item_ids[mask],
            file_rows=self.file_rows[mask],
            timestamps=None if self.timestamps is None else self.timestamps[mask],
            ratings=None if self.ratings is None else self.ratings[mask],
        )


def from_rows(
    users: ArrayLike,
    items: ArrayLike,
    *,
    name: str,
    ratings: ArrayLike | None = None,
    timestamps: ArrayLike | None = None,
    rating_range: tuple[float, float] | None = None,
    unknown_rating: float | None = None,
    smallest_id: int = 0,
    strict: bool = False,
    source: str | None = None,
    first_line: int = 1,
) -> Interactions:
    """Builds validated `Interactions` from rows in file order.

    Ids become `0..n-1` in the order of their labels: numeric where every label is a whole number, else lexical. Of
    rows with the same user and item the latest stays (of equal timestamps, the later row). Each repair is counted in
    `repairs`; with `strict` the first bad row raises instead.

    Args:
      users: raw user ids `[rows]`, integers or str.
      items: raw item ids `[rows]`, integers or str.
      name: name of the data set.
      ratings: `[rows]`; NaN, infinite or out-of-range ratings are dropped.
      timestamps: `[rows]` in seconds; fractions are cut off; NaN or negative becomes 0 = unknown.
      rating_range: smallest and largest legal rating; None accepts every finite one.
      unknown_rating: a rating that the file uses for "unknown"; kept as NaN and counted.
      smallest_id: rows with a smaller numeric user or item id are dropped.
      strict: raise at the first row that would need a repair.
      source: file name for messages.
      first_line: line number of the first row in that file, for messages.

    Returns:
      `Interactions` with int64 or str labels.

    Raises:
      ValueError: in strict mode at the first bad row, naming its line; when lengths differ; when no row is left.
    """
    users, items = _labels(users), _labels(items)
    rows, where = len(users), source or name
    for key, values in (("items", items), ("ratings", ratings), ("timestamps", timestamps)):
        _check_length(key, values, rows)
    repairs: dict[str, int] = {}

    def mend(problem: _Problem) -> np.ndarray:
        """Counts the bad rows, or raises when strict; True = row stays."""
        bad, repair, complaint = problem
        if strict and bad.any():
            line = first_line + int(np.argmax(bad))
            raise ValueError(
                f"Line {line} of {where} {complaint}; mend it, or load with strict=False to count such rows."
            )
        if bad.any():
            repairs[repair] = int(np.count_nonzero(bad))
        return ~bad

    keep = mend(_bad_ids("user", users, smallest_id)) & mend(_bad_ids("item", items, smallest_id))
    if ratings is not None:
        ratings, bad, unknown = _clean_ratings(ratings, rating_range, unknown_rating)
        keep &= mend(bad)
        repairs.update(unknown)
    if timestamps is not None:
        timestamps, bad, unknown = _clean_timestamps(timestamps)
        mend(bad)
        repairs.update(unknown)
    keep &= mend(_repeated(users, items, timestamps, keep))
    if not keep.any():
        raise ValueError(f"{where} holds no usable interaction ({rows} rows read, repairs {repairs}); check the file.")
    return _grouped(
        users[keep],
        items[keep],
        np.flatnonzero(keep),
        name=name,
        timestamps=None if timestamps is None else timestamps[keep],
        ratings=None if ratings is None else ratings[keep],
        repairs=repairs,
    )


def dense_ids(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct labels in ascending order, and the place of each row's label among them (int32 `[rows]`)."""
    # A lookup table is ten times faster than sorting when ids are small whole numbers, and they nearly always are.
    if labels.dtype.kind == "i" and len(labels) and labels.min() >= 0 and labels.max() < 4 * len(labels) + 1_000_000:
        seen = np.zeros(int(labels.max()) + 1, bool)
        seen[labels] = True
        return np.flatnonzero(seen), (np.cumsum(seen, dtype=np.int32) - 1)[labels].astype(np.int32)
    distinct, ids = np.unique(labels, return_inverse=True)
    return distinct, ids.astype(np.int32)


def _grouped(users, items, file_rows, *, name, timestamps, ratings, repairs) -> Interactions:
    user_labels, user_ids = dense_ids(users)
    item_labels, item_ids = dense_ids(items)
    keys = (user_ids,) if timestamps is None else (timestamps, user_ids)
    order = np.lexsort(keys)  # stable, so rows with equal timestamps stay in file order
    counts = np.bincount(user_ids, minlength=len(user_labels))
    return Interactions(
        name=name,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        item_ids=item_ids[order],
        file_rows=file_rows[order].astype(np.int64),
        num_items=len(item_labels),
        timestamps=None if timestamps is None else timestamps[order],
        ratings=None if ratings is None else ratings[order],
        user_labels=user_labels,
        item_labels=item_labels,
        repairs=repairs,
    )


class _Problem(NamedTuple):
    bad: np.ndarray  # bool [rows]
    repair: str  # what is done about it, the key in `repairs`
    complaint: str  # what a strict reader is told: "Line 7 of x.csv <complaint>"


def _bad_ids(key: str, labels: np.ndarray, smallest_id: int) -> _Problem:
    if labels.dtype.kind != "i":
        return _Problem(labels == "", f"rows without {key} id dropped", f"has no {key} id")
    what = f"{key} id below {smallest_id}"
    return _Problem(labels < smallest_id, f"rows with {what} dropped", f"has a {what}")


def _clean_ratings(
    ratings: ArrayLike, rating_range: tuple[float, float] | None, unknown_rating: float | None
) -> tuple[np.ndarray, _Problem, dict[str, int]]:
    """Ratings with NaN for unknown, the rows to drop, and how many are unknown (which is information, no repair)."""
    ratings = np.array(ratings, np.float32)
    unknown = np.zeros(len(ratings), bool) if unknown_rating is None else ratings == unknown_rating
    low, high = rating_range or (-np.inf, np.inf)
    usable = np.isfinite(ratings) & (ratings >= low) & (ratings <= high)
    asked = "a finite rating" if rating_range is None else f"a rating between {low:g} and {high:g}"
    ratings[unknown] = np.nan
    problem = _Problem(~usable & ~unknown, "rows with unusable ratings dropped", f"does not have {asked}")
    return ratings, problem, {"ratings unknown": int(unknown.sum())} if unknown.any() else {}


def _clean_timestamps(timestamps: ArrayLike) -> tuple[np.ndarray, _Problem, dict[str, int]]:
    """Whole seconds with 0 for unknown, the rows that needed it, and how many are unknown."""
    timestamps = np.asarray(timestamps)
    usable = np.isfinite(timestamps) & (timestamps >= 0)
    seconds = np.where(usable, timestamps, 0).astype(np.int64)
    complaint = "does not have a timestamp of 0 or more seconds"
    unknown = len(seconds) - int(np.count_nonzero(seconds))
    problem = _Problem(~usable, "unusable timestamps set to unknown", complaint)
    return seconds, problem, {"timestamps unknown": unknown} if unknown else {}


def _repeated(users: np.ndarray, items: np.ndarray, timestamps: np.ndarray | None, keep: np.ndarray) -> _Problem:
    """Of the rows kept so far, all but the latest (and then the last in the file) of each user and item."""
    repeated = np.zeros(len(users), bool)
    rows = np.flatnonzero(keep)
    user_labels, user_ids = dense_ids(users[rows])
    item_labels, item_ids = dense_ids(items[rows])
    pairs = user_ids.astype(np.int64) * len(item_labels) + item_ids
    cells = len(user_labels) * len(item_labels)
    distinct = False
    if cells <= 1 << 26:  # one byte a cell: marking cells costs a tenth of sorting a million rows
        seen = np.zeros(cells, bool)
        seen[pairs] = True
        distinct = np.count_nonzero(seen) == len(rows)
    if not distinct:
        order = np.lexsort((pairs,) if timestamps is None else (timestamps[rows], pairs))
        repeated[rows[order[:-1]]] = pairs[order][1:] == pairs[order][:-1]
    return _Problem(repeated, "duplicate rows dropped", "repeats a user and item of another line")


def _labels(values: ArrayLike) -> np.ndarray:
    """Raw ids as int64 where every one is a whole number in plain form, else as str: "7" and 7 are one label."""
    values = np.asarray(values)
    if values.ndim != 1:
        raise ValueError(f"Ids must be one-dimensional, and have shape {list(values.shape)}.")
    if values.dtype.kind in "iu":
        return values.astype(np.int64)
    if values.dtype.kind == "f" and np.all(values == np.floor(values)):
        return values.astype(np.int64)
    text = values if values.dtype.kind in "SU" else values.astype(str)
    try:
        whole = text.astype(np.int64)
    except (ValueError, OverflowError):
        whole = None
    if whole is not None and np.array_equal(_num_characters(whole), np.strings.str_len(text)):
        return whole
    return np.strings.decode(text, "utf-8") if text.dtype.kind == "S" else text


def _num_characters(whole: np.ndarray) -> np.ndarray:
    """Length of each number in plain form: "007" and "+7" are longer than that, and so no numbers but labels."""
    powers = 10 ** np.arange(1, 19, dtype=np.int64)
    return 1 + np.searchsorted(powers, np.abs(whole), side="right") + (whole < 0)


def _check_length(key: str, values: np.ndarray | None, length: int) -> None:
    if values is not None and len(values) != length:
        raise ValueError(
            f"{key} has {len(values)} entries and needs {length}, one for each row, user or item it describes."
        )


def _read_only(values: np.ndarray) -> np.ndarray:
    view = values.view()
    view.flags.writeable = False
    return view

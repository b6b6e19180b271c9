"""Generalisation: values made coarser step by step, from exact to "*", and coarser times and ratings.

A hierarchy is public: it is written down before the data is looked at, or the choice itself would tell something of
the data. Every level is a function of the one before, so that values that are equal stay equal (Sweeney, 2002,
"Achieving k-Anonymity Privacy Protection Using Generalization and Suppression").
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedjax_rec.anonymization.released import released
from fedjax_rec.data.interactions import Interactions

ANY = "*"
_UNKNOWN = "unknown"
_DAY = 86_400


class Level(NamedTuple):
    """One step of a hierarchy: a name for tables, and values ``[rows]`` -> str ``[rows]``."""

    name: str
    apply: Callable[[np.ndarray], np.ndarray]


class Hierarchy(NamedTuple):
    """Levels of one column, from exact (level 0) to "*" (the last)."""

    name: str
    levels: tuple[Level, ...]


def _exact(values: np.ndarray) -> np.ndarray:
    return np.asarray(values).astype(str)


def _any(values: np.ndarray) -> np.ndarray:
    return np.full(len(values), ANY)


EXACT, ANYTHING = Level("exact", _exact), Level(ANY, _any)


def suppression(name: str) -> Hierarchy:
    """Exact or "*", nothing between: for gender, and for columns without a public order or grouping."""
    return Hierarchy(name, (EXACT, ANYTHING))


def bands(name: str, widths: Sequence[int], *, unknown: int | None = None) -> Hierarchy:
    """Whole numbers in bands that begin at multiples of their width, e.g. 5, 10, 20 for ages.

    Args:
      name: of the column.
      widths: ascending, each a multiple of the one before, or bands would overlap.
      unknown: a number that means "not known", which is never banded.

    Raises:
      ValueError: for widths that do not nest.
    """
    widths = tuple(int(width) for width in widths)
    nested = all(wide % narrow == 0 and wide > narrow for narrow, wide in itertools.pairwise(widths))
    if not widths or widths[0] < 2 or not nested:
        raise ValueError(f"Band widths must each be a multiple of the one before, from 2 on; got {widths}.")

    def banded(width):
        def apply(values):
            values = _whole(name, values)
            low = values // width * width
            text = np.array([f"{start}-{start + width - 1}" for start in low.tolist()], dtype=str)
            return text if unknown is None else np.where(values == unknown, _UNKNOWN, text)

        return Level(f"bands of {width}", apply)

    return Hierarchy(name, (EXACT, *map(banded, widths), ANYTHING))


def prefixes(name: str, lengths: Sequence[int]) -> Hierarchy:
    """The first characters of a code, e.g. 4, 3, 2, 1 of a zip code; an empty code is "unknown".

    Args:
      name: of the column.
      lengths: descending.

    Raises:
      ValueError: for lengths that do not fall.
    """
    lengths = tuple(int(length) for length in lengths)
    if not lengths or lengths[-1] < 1 or any(a <= b for a, b in itertools.pairwise(lengths)):
        raise ValueError(f"Prefix lengths must fall, down to 1 at least; got {lengths}.")

    def cut(length):
        def apply(values):
            text = _exact(values)
            return np.where(text == "", _UNKNOWN, np.strings.add(text.astype(f"<U{length}"), ANY))

        return Level(f"{length} characters", apply)

    return Hierarchy(name, (EXACT, *map(cut, lengths), ANYTHING))


def groups(name: str, group_of: Mapping[str, str], *, otherwise: str = "other") -> Hierarchy:
    """Exact, then a public group of each value, then "*"; values that the mapping does not list are ``otherwise``."""

    def apply(values):
        return np.array([group_of.get(value, otherwise) for value in _exact(values).tolist()], dtype=str)

    return Hierarchy(name, (EXACT, Level("groups", apply), ANYTHING))


_OCCUPATION_GROUPS = {
    "learning": "student, college/grad student, K-12 student",
    "teaching and research": "educator, academic/educator, scientist, librarian",
    "technical": "programmer, technician, engineer, technician/engineer, tradesman/craftsman, farmer",
    "business": "executive, executive/managerial, administrator, clerical/admin, marketing, salesman, sales/marketing, "
    "customer service, self-employed",
    "health and law": "doctor, healthcare, doctor/health care, lawyer",
    "arts": "artist, entertainment, entertainer, writer",
    "not employed": "homemaker, none, retired, unemployed",
}
OCCUPATION_GROUPS = {value: group for group, values in _OCCUPATION_GROUPS.items() for value in values.split(", ")}


def movielens_hierarchies() -> dict[str, Hierarchy]:
    """Hierarchies for the user attributes of MovieLens 100K and 1M: "age", "zip_code", "occupation", "gender".

    Ages in bands of 5, 10 and 20 years (0 is unknown), zip codes by 4, 3, 2 and 1 leading characters, occupations in
    eight groups ("other" with them), gender exact or not at all.
    """
    return {
        "age": bands("age", (5, 10, 20), unknown=0),
        "zip_code": prefixes("zip_code", (4, 3, 2, 1)),
        "occupation": groups("occupation", OCCUPATION_GROUPS),
        "gender": suppression("gender"),
    }


def coarsen_times(interactions: Interactions, *, to: str) -> Interactions:
    """Timestamps cut to the start of their span in UTC, and rows of one span in the order of their items.

    Args:
      interactions: with or without timestamps; 0 = unknown stays 0.
      to: "hour", "day", "week" (from Monday), "month", "quarter", "year", or "none" to drop them.

    Raises:
      ValueError: for another span.
    """
    if to not in _SPANS and to != "none":
        raise ValueError(f"Times can be coarsened to {', '.join([*_SPANS, 'none'])}; got {to!r}.")
    times = interactions.timestamps
    if times is not None:
        # The first week of 1970 begins in 1969, and a known time may become 0: both read as unknown.
        times = None if to == "none" else np.where(times == 0, 0, np.maximum(_SPANS[to](times), 0))
    return _with_rows(interactions, interactions.ratings, times, f"times to {to}")


def coarsen_ratings(interactions: Interactions, *, to: str, liked_from: float = 4.0) -> Interactions:
    """Ratings made whole, reduced to liked or not, or dropped; unknown ones stay unknown.

    Args:
      interactions: with or without ratings.
      to: "whole" = rounded, halves up; "liked" = 1 from ``liked_from`` on, else 0; "none" = dropped.
      liked_from: the smallest rating that counts as liked.

    Raises:
      ValueError: for another target.
    """
    if to not in ("whole", "liked", "none"):
        raise ValueError(f"Ratings can be coarsened to whole, liked or none; got {to!r}.")
    ratings = interactions.ratings
    if ratings is not None and to == "whole":
        ratings = np.floor(ratings + 0.5)
    elif ratings is not None and to == "liked":
        ratings = np.where(np.isnan(ratings), np.nan, ratings >= liked_from)
    return _with_rows(interactions, None if to == "none" else ratings, interactions.timestamps, f"ratings to {to}")


def _calendar(unit: str) -> Callable[[np.ndarray], np.ndarray]:
    def start(seconds):
        return seconds.astype("datetime64[s]").astype(f"datetime64[{unit}]").astype("datetime64[s]").astype(np.int64)

    return start


def _quarter(seconds: np.ndarray) -> np.ndarray:
    months = seconds.astype("datetime64[s]").astype("datetime64[M]").astype(np.int64) // 3 * 3
    return months.astype("datetime64[M]").astype("datetime64[s]").astype(np.int64)


_SPANS = {
    "hour": lambda seconds: seconds // 3600 * 3600,
    "day": lambda seconds: seconds // _DAY * _DAY,
    "week": lambda seconds: ((seconds // _DAY + 3) // 7 * 7 - 3) * _DAY,  # day 0 of Unix time is a Thursday
    "month": _calendar("M"),
    "quarter": _quarter,
    "year": _calendar("Y"),
}


def _with_rows(interactions: Interactions, ratings, timestamps, suffix: str) -> Interactions:
    return released(
        interactions,
        interactions.user_ids,
        interactions.item_ids,
        ratings=ratings,
        timestamps=timestamps,
        suffix=suffix,
    )


def _whole(name: str, values: np.ndarray) -> np.ndarray:
    try:
        numbers = np.asarray(values).astype(float)
    except ValueError:
        numbers = np.array([np.nan])
    if not np.all(np.isfinite(numbers)) or np.any(numbers != np.floor(numbers)):
        raise ValueError(
            f"Column {name!r} must hold whole numbers to be banded; it holds others or NaN. Clean it first."
        )
    return numbers.astype(np.int64)

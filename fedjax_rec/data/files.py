"""Interactions and candidate lists from a user's own file, in the formats that the field passes around."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedjax_rec.data.archive import read_bytes
from fedjax_rec.data.interactions import Interactions, from_rows
from fedjax_rec.data.parquet import NULL, read_parquet
from fedjax_rec.data.tables import decode, read_columns, read_lists

FORMATS = ("named", "inter", "triplets", "lists", "parquet")
# suffix -> format and separator; a trailing .gz is looked through
_BY_SUFFIX = {
    ".csv": ("named", ","),
    ".tsv": ("named", "\t"),
    ".inter": ("inter", "\t"),
    ".rating": ("triplets", "\t"),
    ".data": ("triplets", "\t"),
    ".base": ("triplets", "\t"),
    ".test": ("triplets", "\t"),
    ".dat": ("triplets", "::"),
    ".txt": ("lists", " "),
    ".parquet": ("parquet", ","),
}
_GUESSES = {
    "user": {"user", "userid", "uid", "reviewerid", "customerid", "visitorid"},
    "item": {"item", "itemid", "iid", "movieid", "productid", "asin", "parentasin", "artistid", "trackid", "bookid"},
    "rating": {"rating", "userrating", "score", "stars", "overall"},
    "timestamp": {"timestamp", "time", "ts", "unixreviewtime"},
}


@dataclass(frozen=True, eq=False)
class Candidates:
    """A published candidate file on the ids of some interactions.

    Attributes:
      test_items: int32 `[num_users]`, the item each user is tested on, `num_items` where the file has no line for it.
      negatives: int32 `[num_users, C]`, the negatives to rank it among, padded with `num_items`.
    """

    test_items: np.ndarray
    negatives: np.ndarray


def load_file(
    path: str | Path,
    *,
    format: str | None = None,
    separator: str | None = None,
    user_column: str | None = None,
    item_column: str | None = None,
    rating_column: str | None = None,
    timestamp_column: str | None = None,
    rating_range: tuple[float, float] | None = None,
    strict: bool = False,
    name: str | None = None,
) -> Interactions:
    """Reads one file, plain or gzipped.

    Formats, chosen by suffix unless named: "named" (`.csv`, `.tsv`: a header, columns found by name), "inter"
    (`.inter`: RecBole's typed header `user_id:token ...`), "triplets" (`.rating`, `.data`, `.base`, `.test`, `.dat`: no
    header, `user item [rating [timestamp]]`), "lists" (`.txt`: `user item item ...`), "parquet" (`.parquet`: columns
    found by name, and `user:NAME` for user attributes, as `write_interactions` writes them; a null rating is unknown).

    Args:
      path: the file.
      format: one of the formats above.
      separator: between fields, when it is not the suffix's usual one.
      user_column: name of the column of user ids; None = guessed from the header, as are the next three.
      item_column: of item ids.
      rating_column: of ratings; without one, feedback is implicit.
      timestamp_column: of seconds; without one, file order stands for time.
      rating_range: smallest and largest legal rating; rows beyond are dropped and counted.
      strict: raise at the first row that would need a repair, see `from_rows`.
      name: of the data set; None = the file's name.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for a line, a column or a format that cannot be read, naming it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; check the path, or name a data set such as movielens/100k.")
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if format is None and suffix not in _BY_SUFFIX:
        raise ValueError(
            f"The suffix {suffix!r} of {path.name} does not tell its format; pass format= one of {', '.join(FORMATS)}."
        )
    if format is not None and format not in FORMATS:
        raise ValueError(f"Unknown format {format!r}; choose one of {', '.join(FORMATS)}.")
    usual_format, usual_separator = _BY_SUFFIX.get(suffix, ("triplets", "\t"))
    format, separator = format or usual_format, separator or usual_separator
    asked = {"user": user_column, "item": item_column, "rating": rating_column, "timestamp": timestamp_column}
    if format not in ("named", "inter", "parquet") and any(asked.values()):
        raise ValueError(f"{path.name} is read as {format!r}, which has no column names; drop the *_column options.")
    if format == "parquet":
        return _from_parquet(path, asked, name=name or path.name, rating_range=rating_range, strict=strict)
    data = read_bytes(path).removeprefix(b"\xef\xbb\xbf")
    if not data.strip():
        raise ValueError(f"{path} is empty; fetch it again.")
    if format == "lists":
        return _from_lists(data, path=path, name=name or path.name, strict=strict)
    if format == "triplets":
        columns, num_columns, first_line = _triplet_columns(data, separator, path=path), None, 1
    else:
        header, _, data = data.partition(b"\n")
        columns = _named_columns(decode(header).strip(), separator, asked, typed=format == "inter", path=path)
        num_columns, first_line = len(_fields(decode(header).strip(), separator)), 2
        if not data.strip():
            raise ValueError(f"{path} has a header and no line below it; fetch it again.")
    table = read_columns(
        data,
        columns,
        num_columns=num_columns or len(columns),
        separator=separator,
        source=str(path),
        first_line=first_line,
    )
    return from_rows(
        table["user"],
        table["item"],
        ratings=table.get("rating"),
        timestamps=table.get("timestamp"),
        name=name or path.name,
        rating_range=rating_range,
        strict=strict,
        source=str(path),
        first_line=first_line,
    )


def load_candidates(path: str | Path, interactions: Interactions, *, ids: str = "labels") -> Candidates:
    """Reads an NCF candidate file, `(user,item) negative negative ...` a line, onto the ids of `interactions`.

    The format of He, Liao, Zhang, Nie, Hu, Chua (2017), "Neural Collaborative Filtering".

    Args:
      path: the `.negative` file, plain or gzipped.
      interactions: the data the file belongs to.
      ids: what the numbers in the file are: "labels" (the original ids), or "first_appearance" (users and items counted
        from 0 in the order in which they first appear in the ratings file).

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for a line without `(user,item)`, or an id that the data do not have.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no candidate file {path}; check the path.")
    data = read_bytes(path)
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), start=1):
        if not re.match(rb"\([^,()\s]+,[^,()\s]+\)", line):
            raise ValueError(f"Line {number} of {path} does not begin with (user,item); this is no NCF candidate file.")
    tokens, lengths = read_lists(data.translate(bytes.maketrans(b"(),", b"   ")), source=str(path))
    ends = np.cumsum(lengths)
    starts = ends - lengths
    user_of_token = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(tokens)) - starts[user_of_token]
    users = _to_ids(tokens[starts], interactions, what="user", ids=ids, path=path)
    items = np.full(len(tokens), interactions.num_items, np.int32)
    items[place > 0] = _to_ids(tokens[place > 0], interactions, what="item", ids=ids, path=path)
    negatives = np.full((interactions.num_users, int(lengths.max()) - 2), interactions.num_items, np.int32)
    is_negative = place >= 2
    negatives[users[user_of_token[is_negative]], place[is_negative] - 2] = items[is_negative]
    test_items = np.full(interactions.num_users, interactions.num_items, np.int32)
    test_items[users] = items[starts + 1]
    return Candidates(test_items=test_items, negatives=negatives)


def _to_ids(tokens: np.ndarray, interactions: Interactions, *, what: str, ids: str, path: Path) -> np.ndarray:
    labels = interactions.user_labels if what == "user" else interactions.item_labels
    if ids == "first_appearance":
        rows_of = interactions.user_ids if what == "user" else interactions.item_ids
        first = np.full(len(labels), np.iinfo(np.int64).max)
        np.minimum.at(first, rows_of, interactions.file_rows)
        in_file_order = np.argsort(first, kind="stable")
        places = tokens.astype(np.int64)
        bad = (places < 0) | (places >= len(labels))
        result = in_file_order[np.where(bad, 0, places)]
    elif ids == "labels":
        wanted = tokens.astype(np.int64) if labels.dtype.kind == "i" else np.char.decode(tokens, "utf-8")
        result = np.minimum(np.searchsorted(labels, wanted), len(labels) - 1)
        bad = labels[result] != wanted
    else:
        raise ValueError(f'Unknown ids={ids!r}; choose "labels" or "first_appearance".')
    if bad.any():
        raise ValueError(
            f"{path} names {what} {decode(tokens[np.argmax(bad)])}, which {interactions.name} does not have "
            f"({int(bad.sum())} such entries); the file belongs to other data, or its ids are not {ids!r}."
        )
    return result.astype(np.int32)


def _from_parquet(path: Path, asked: dict[str, str | None], *, name: str, rating_range, strict: bool) -> Interactions:
    names, columns, attributes = read_parquet(path)
    places = _places_by_name(names, asked, path=path)
    table = {key: columns[names[place]] for key, place in places.items()}
    for key in ("user", "item"):
        if table[key].dtype.kind == "f":  # integers with nulls
            known = np.isfinite(table[key])
            table[key] = np.where(known, np.char.mod("%d", np.where(known, table[key], 0)), "")
    for key in ("rating", "timestamp"):
        if key in table and table[key].dtype.kind not in "if":
            raise ValueError(f"The column {names[places[key]]!r} of {path} holds no numbers; pass {key}_column=.")
    interactions = from_rows(
        table["user"],
        table["item"],
        ratings=table.get("rating"),
        timestamps=table.get("timestamp"),
        name=name,
        rating_range=rating_range,
        unknown_rating=NULL,
        strict=strict,
        source=str(path),
    )
    first_row = interactions.file_rows[interactions.offsets[:-1]]
    return dataclasses.replace(interactions, user_attributes={key: v[first_row] for key, v in attributes.items()})


def _from_lists(data: bytes, *, path: Path, name: str, strict: bool) -> Interactions:
    tokens, lengths = read_lists(data, source=str(path))
    starts = np.cumsum(lengths) - lengths
    empty = lengths == 1
    if strict and empty.any():
        line = 1 + int(np.argmax(empty))
        raise ValueError(f"Line {line} of {path} names a user without items; remove it, or load with strict=False.")
    is_item = np.ones(len(tokens), bool)
    is_item[starts] = False
    users = np.repeat(tokens[starts], lengths - 1)
    try:
        interactions = from_rows(users, tokens[is_item], name=name, strict=strict)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not empty.any():
        return interactions
    repairs = {**interactions.repairs, "users without items dropped": int(np.count_nonzero(empty))}
    return dataclasses.replace(interactions, repairs=repairs)


def _fields(line: str, separator: str) -> list[str]:
    return [field.strip().strip('"') for field in line.split(separator)]


def _triplet_columns(data: bytes, separator: str, *, path: Path) -> dict[str, int]:
    found = len(_fields(decode(data.partition(b"\n")[0]).strip("\r\n"), separator))
    if not 2 <= found <= 4:
        raise ValueError(
            f"Line 1 of {path} has {found} field{'s' * (found != 1)} separated by {separator!r}, and needs 2 to 4: "
            "user item [rating [timestamp]]; pass separator= or format=."
        )
    return {key: place for place, key in enumerate(("user", "item", "rating", "timestamp")[:found])}


def _named_columns(
    header: str, separator: str, asked: dict[str, str | None], *, typed: bool, path: Path
) -> dict[str, int]:
    """Places of the wanted columns in a header."""
    names = _fields(header, separator)
    if typed:
        untyped = [field for field in names if ":" not in field]
        if untyped:
            raise ValueError(
                f"Line 1 of {path} must be a typed header such as user_id:token, and holds {untyped[0]!r}; "
                'if it is an ordinary header pass format="named".'
            )
        names = [field.rpartition(":")[0] for field in names]
    if all(re.fullmatch(r"[-+.\d]+(e[-+]?\d+)?", field) for field in names):
        raise ValueError(
            f'Line 1 of {path} holds only numbers and no column names; pass format="triplets" to read '
            f"user{separator}item[{separator}rating[{separator}timestamp]]."
        )
    return _places_by_name(names, asked, path=path, separated=f", separated by {separator!r}")


def _places_by_name(
    names: list[str], asked: dict[str, str | None], *, path: Path, separated: str = ""
) -> dict[str, int]:
    plain = [re.sub(r"[^a-z]", "", field.lower()) for field in names]
    places: dict[str, int] = {}
    for key, column in asked.items():
        if column is not None and column not in names:
            raise ValueError(f"{path} has no column {column!r}; its columns are {', '.join(names)}.")
        matches = (
            [names.index(column)] if column else [place for place, word in enumerate(plain) if word in _GUESSES[key]]
        )
        if not matches and key in ("user", "item"):
            raise ValueError(
                f"No column of {path} looks like {key} ids (columns: {', '.join(names)}{separated}); "
                f"pass {key}_column={' or separator=' if separated else ''}."
            )
        if len(matches) > 1:
            found = ", ".join(names[place] for place in matches)
            raise ValueError(f"Several columns of {path} look like a {key}: {found}; pass {key}_column=.")
        if matches:
            places[key] = matches[0]
    return places

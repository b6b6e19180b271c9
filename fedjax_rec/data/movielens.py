"""MovieLens in the files that GroupLens publishes, zipped or unpacked; needs no other library.

Harper, Konstan (2015), "The MovieLens Datasets: History and Context".
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedjax_rec.data.archive import locate, read_member
from fedjax_rec.data.interactions import Interactions, from_rows
from fedjax_rec.data.tables import decode, read_columns, split_rows

# ml-1m's README lists these under the codes 0..20.
_OCCUPATIONS_1M = (
    "other",
    "academic/educator",
    "artist",
    "clerical/admin",
    "college/grad student",
    "customer service",
    "doctor/health care",
    "executive/managerial",
    "farmer",
    "homemaker",
    "K-12 student",
    "lawyer",
    "programmer",
    "retired",
    "sales/marketing",
    "scientist",
    "self-employed",
    "technician/engineer",
    "tradesman/craftsman",
    "unemployed",
    "writer",
)
# An assembled copy of ml-1m's ratings in which some ratings and timestamps are 0 = unknown.
_PARTIAL = "ratings_partial.dat"


@dataclass(frozen=True)
class Release:
    """One published MovieLens release.

    Attributes:
      name: as in `load(name)`.
      folder: of the unpacked zip; the zip is `folder + ".zip"`.
      ratings: the ratings file in it.
      separator: between its fields.
      header: whether its first line names the columns.
      rating_range: smallest and largest rating.
      num_rows: rows as published; None where GroupLens changes the release over time.
      sha256: of the zip, from the checksum file of TensorFlow Datasets 4.9.10.
    """

    name: str
    folder: str
    ratings: str
    separator: str
    header: bool
    rating_range: tuple[float, float]
    num_rows: int | None
    sha256: str

    @property
    def url(self) -> str:
        """Address of the zip."""
        return f"https://files.grouplens.org/datasets/movielens/{self.folder}.zip"


def _csv_release(version: str, num_rows: int | None, sha256: str) -> Release:
    return Release(f"movielens/{version}", f"ml-{version}", "ratings.csv", ",", True, (0.5, 5.0), num_rows, sha256)


RELEASES = {
    release.name: release
    for release in (
        Release(
            "movielens/100k",
            "ml-100k",
            "u.data",
            "\t",
            False,
            (1.0, 5.0),
            100_000,
            "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
        ),
        Release(
            "movielens/1m",
            "ml-1m",
            "ratings.dat",
            "::",
            False,
            (1.0, 5.0),
            1_000_209,
            "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
        ),
        _csv_release("20m", 20_000_263, "96f243c338a8665f6bcc89c53edf6ee39162a846940de6b7c8c48aeada765ff3"),
        _csv_release("25m", 25_000_095, "8b21cfb7eb1706b4ec0aac894368d90acf26ebdfb6aced3ebd4ad5bd1eb9c6aa"),
        _csv_release("latest-small", None, "696d65a3dfceac7c45750ad32df2c259311949efec81f0f144fdfb91ebc9e436"),
    )
}


def find_release(release: Release, folder: Path) -> Path | None:
    """The folder or zip with the ratings: `folder` itself, or the release's folder or zip inside it; None = neither."""
    others = {other.folder for other in RELEASES.values()} - {release.folder}
    for root in (folder / release.folder, folder / f"{release.folder}.zip", folder):
        readable = root.is_dir() or (root.suffix == ".zip" and root.is_file())
        # 20m, 25m and latest-small share their file names: a folder named for one is not another.
        if readable and root.name.removesuffix(".zip") not in others and locate(root, *_ratings_names(release)):
            return root
    return None


def release_files(release: Release, root: Path) -> list[Path]:
    """Every file that `read_release` reads: what a cache entry depends on."""
    if root.suffix == ".zip":
        return [root]
    names = [locate(root, *_ratings_names(release))]
    names += [locate(root, name) for name in ("u.item", "u.genre", "u.user", "movies.dat", "users.dat", "movies.csv")]
    return [root / name for name in names if name]


def read_release(release: Release, root: Path, *, strict: bool = False) -> Interactions:
    """Ratings, titles, genres and user attributes of an unpacked folder or a zip.

    Only rated items are in the catalogue: 3706 of the 3883 of ml-1m. Fewer rows than published are counted in `repairs`
    as they cannot be told from a file cut at the end of a line.

    Args:
      release: which one.
      root: folder or zip, as `find_release` returns.
      strict: raise at the first row that would need a repair, and for fewer rows than published.

    Raises:
      ValueError: for a damaged archive or a line that cannot be read, naming it.
    """
    name = locate(root, *_ratings_names(release))
    data = read_member(root, name)
    source, first_line = str(root / name), 1
    if release.header:
        _, _, data = data.partition(b"\n")
        first_line = 2
    if not data.strip():
        raise ValueError(f"{source} holds no ratings; fetch {release.url} again.")
    places = {"user": 0, "item": 1, "rating": 2, "timestamp": 3}
    table = read_columns(data, places, num_columns=4, separator=release.separator, source=source, first_line=first_line)
    interactions = from_rows(
        table["user"],
        table["item"],
        ratings=table["rating"],
        timestamps=table["timestamp"],
        name=release.name,
        rating_range=release.rating_range,
        unknown_rating=0.0 if name.startswith(_PARTIAL) else None,
        smallest_id=1,
        strict=strict,
        source=source,
        first_line=first_line,
    )
    missing = (release.num_rows or 0) - len(table["user"])
    if missing > 0:
        what = f"{source} has {len(table['user']):,} rows and {release.num_rows:,} were published"
        if strict:
            raise ValueError(f"{what}; fetch {release.url} again, or load with strict=False.")
        repairs = {**interactions.repairs, "rows fewer than published": missing}
        interactions = dataclasses.replace(interactions, repairs=repairs)
    return _with_users(_with_items(interactions, root), root)


def _ratings_names(release: Release) -> tuple[str, ...]:
    return (release.ratings, _PARTIAL) if release.folder == "ml-1m" else (release.ratings,)


def _with_items(interactions: Interactions, root: Path) -> Interactions:
    """Titles and genres from whichever item file is there; none is no error."""
    readers: dict[str, Callable] = {"u.item": _items_100k, "movies.dat": _items_1m, "movies.csv": _items_csv}
    name = locate(root, *readers)
    if name is None:
        return interactions
    labels, titles, genre_names, genres = readers[name.removesuffix(".gz")](root, name)
    rows, known = _places_of(interactions.item_labels, labels)
    return dataclasses.replace(
        interactions,
        item_titles=np.where(known, titles[rows], ""),
        item_genres=genres[rows] & known[:, None],
        genre_names=genre_names,
    )


def _items_100k(root: Path, name: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], np.ndarray]:
    rows = _table(root, name, separator="|", num_columns=24)
    listed = locate(root, "u.genre")
    if listed is None:
        genre_names = tuple(f"genre {number}" for number in range(19))
    else:
        lines = decode(read_member(root, listed)).split("\n")
        genre_names = tuple(line.rpartition("|")[0] for line in lines if "|" in line)
    if len(genre_names) != 19:
        raise ValueError(f"{root / 'u.genre'} names {len(genre_names)} genres and u.item has 19; fetch it again.")
    genres = np.array([[flag == "1" for flag in row[5:]] for row in rows])
    return _labels(rows), np.array([row[1] for row in rows]), genre_names, genres


def _items_1m(root: Path, name: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], np.ndarray]:
    return _items_with_words(_table(root, name, separator="::", num_columns=3))


def _items_csv(root: Path, name: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], np.ndarray]:
    return _items_with_words(_table(root, name, separator=",", num_columns=3)[1:])


def _items_with_words(rows: list[list[str]]) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], np.ndarray]:
    words = [set(row[2].strip().split("|")) - {"(no genres listed)", ""} for row in rows]
    genre_names = tuple(sorted(set().union(*words)))
    genres = np.array([[genre in of_item for genre in genre_names] for of_item in words])
    return _labels(rows), np.array([row[1] for row in rows]), genre_names, genres


def _with_users(interactions: Interactions, root: Path) -> Interactions:
    """Gender, age, occupation and zip code from u.user or users.dat; the later releases have none."""
    name = locate(root, "u.user", "users.dat")
    if name is None:
        return interactions
    if name.startswith("u.user"):
        rows = _table(root, name, separator="|", num_columns=5)
        ages, genders, occupations, zip_codes = zip(*(row[1:] for row in rows), strict=True)
    else:
        rows = _table(root, name, separator="::", num_columns=5)
        genders, ages, codes, zip_codes = zip(*(row[1:] for row in rows), strict=True)
        occupations = [_OCCUPATIONS_1M[int(code)] for code in codes]
    places, known = _places_of(interactions.user_labels, _labels(rows))
    columns = {"gender": genders, "occupation": occupations, "zip_code": zip_codes}
    attributes = {key: np.where(known, np.array(values)[places], "") for key, values in columns.items()}
    attributes["age"] = np.where(known, np.array(ages).astype(np.int32)[places], 0)
    return dataclasses.replace(interactions, user_attributes=attributes)


def _table(root: Path, name: str, *, separator: str, num_columns: int) -> list[list[str]]:
    data = read_member(root, name).replace(b"\r\n", b"\n")
    return split_rows(data, separator=separator, source=str(root / name), first_line=1, num_columns=num_columns)


def _labels(rows: list[list[str]]) -> np.ndarray:
    return np.array([row[0] for row in rows]).astype(np.int64)


def _places_of(wanted: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row of each wanted label in a side table, and whether it is there."""
    order = np.argsort(labels)
    found = order[np.minimum(np.searchsorted(labels[order], wanted), len(labels) - 1)]
    return found, labels[found] == wanted

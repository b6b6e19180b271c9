"""One door to every data set: `load(name)` for interactions, `load_split(name)` for splits that others published."""

import dataclasses
import difflib
import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fedjax_rec.data import tfds
from fedjax_rec.data.archive import locate
from fedjax_rec.data.cache import cached, default_cache_dir
from fedjax_rec.data.files import load_candidates, load_file
from fedjax_rec.data.interactions import Interactions, from_rows
from fedjax_rec.data.movielens import RELEASES, Release, find_release, read_release, release_files
from fedjax_rec.data.split import Split, leave_given_out, predefined_split, with_candidates
from fedjax_rec.data.synthetic import synthetic

DATASETS = ("synthetic", *RELEASES, "gowalla")
SPLITS = ("gowalla", "movielens/1m/ncf", *(f"movielens/100k/u{fold}" for fold in range(1, 6)))


def load(
    name: str | Path,
    *,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    cache: bool = True,
    download: bool = True,
    **options,
) -> Interactions:
    """Loads interactions by name, or from a file.

    Args:
      name: "synthetic" (options of `synthetic`); "movielens/100k", "1m", "20m", "25m" or "latest-small" (option
        `strict`); "gowalla" (train and test lists together); or the path of a file (options of `load_file`).
      data_dir: the folder with the unpacked data set or its zip, or the folder above it; None = `$FEDJAX_REC_DATA`.
        MovieLens is then looked for as a prepared TFDS data set, here and in TFDS's own folder.
      cache_dir: where parsed columns are kept; None = `$XDG_CACHE_HOME/fedjax_rec` or `~/.cache/fedjax_rec`.
      cache: False parses anew and writes nothing.
      download: let TFDS download MovieLens if it is nowhere on this machine (needs network and tensorflow).
      **options: see `name`.

    Returns:
      The data set, with every repair made while loading counted in `repairs`.

    Raises:
      FileNotFoundError: if the data set is not here, with its address, checksum and the folder to put it in.
      ValueError: for an unknown name (suggesting the nearest), an unknown option, or a damaged file (naming the line).
    """
    name = str(name)
    store = (Path(cache_dir) if cache_dir else default_cache_dir()) if cache else None
    if name == "synthetic":
        _check_options(name, options, inspect.signature(synthetic).parameters)
        return synthetic(**options)
    if name in RELEASES:
        _check_options(name, options, ("strict",))
        return _movielens(RELEASES[name], _folder(data_dir), store=store, download=download, **options)
    if name == "gowalla":
        _check_options(name, options, ())
        return _together(_gowalla(_folder(data_dir), store), name=name)
    path = Path(name).expanduser()
    if path.is_file() or Path(name.removesuffix(".gz")).suffix:
        _check_options(path.name, options, list(inspect.signature(load_file).parameters)[1:])
        return _file(path, store, **options)
    raise _unknown(name, DATASETS)


def load_split(
    name: str,
    *,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    cache: bool = True,
    tie_rule: str = "hash",
    seed: int = 0,
) -> Split:
    """Loads a split that somebody else published, on the ids of its data set.

    Args:
      name: "movielens/100k/u1" to "u5" (GroupLens's folds); "movielens/1m/ncf" (test items and 99 negatives of He,
        Liao, Zhang, Nie, Hu, Chua (2017), "Neural Collaborative Filtering": the file `ml-1m.test.negative` beside the
        ratings; the validation item is the latest of the rest); "gowalla" (train and test lists of He, Deng,
        Wang, Li, Zhang, Wang (2020), "LightGCN").
      data_dir: as in `load`.
      cache_dir: as in `load`.
      cache: as in `load`.
      tie_rule: for the validation item of "movielens/1m/ncf", see `ties.tie_key`.
      seed: of the tie rule "hash".

    Raises:
      FileNotFoundError: if a file is missing, saying where to put it.
      ValueError: for an unknown name or a damaged file.
    """
    if name not in SPLITS:
        raise _unknown(name, SPLITS)
    folder = _folder(data_dir)
    store = (Path(cache_dir) if cache_dir else default_cache_dir()) if cache else None
    if name == "gowalla":
        return predefined_split(*_gowalla(folder, store))
    if name == "movielens/1m/ncf":
        interactions = _movielens(RELEASES["movielens/1m"], folder, store=store, download=True)
        candidates = load_candidates(_ncf_file(folder), interactions, ids="first_appearance")
        split = leave_given_out(interactions, candidates.test_items, tie_rule=tie_rule, seed=seed)
        return with_candidates(split, candidates.negatives)
    fold, release = name.rpartition("/")[2], RELEASES["movielens/100k"]
    base, test = (
        _movielens(
            dataclasses.replace(release, ratings=f"{fold}.{part}", num_rows=rows), folder, store=store, download=False
        )
        for part, rows in (("base", 80_000), ("test", 20_000))
    )
    return predefined_split(base, test)


def _movielens(
    release: Release, folder: Path | None, *, store: Path | None, download: bool, strict: bool = False
) -> Interactions:
    """GroupLens's files, else prepared by TFDS, else downloaded by TFDS, else the sentence that says what to do."""
    options = {"strict": strict, "file": release.ratings}
    root = find_release(release, folder) if folder else None
    if root is not None:
        return cached(
            lambda: read_release(release, root, strict=strict),
            name=release.name,
            sources=release_files(release, root),
            options=options,
            cache_dir=store,
        )
    reason = "downloading is off" if not download else ""
    prepared = None
    if release == RELEASES[release.name]:  # TFDS knows whole releases, not the folds of one
        places = [folder, tfds.default_data_dir()] if folder else [tfds.default_data_dir()]
        prepared = next((found for place in places if (found := tfds.find_prepared(release.name, place))), None)
        if prepared is None and download:
            try:
                prepared = tfds.prepare(release.name, tfds.default_data_dir())
            except Exception as error:  # TFDS raises a dozen types; each one means: not by this way
                reason = f"downloading through TFDS failed ({type(error).__name__}: {error})"
    if prepared is None:
        raise FileNotFoundError(_where_to_get(release, folder, reason))
    return cached(
        lambda: tfds.read_prepared(prepared, name=release.name, strict=strict),
        name=release.name,
        sources=sorted(entry for entry in prepared.iterdir() if entry.is_file()),
        options=options,
        cache_dir=store,
    )


def _where_to_get(release: Release, folder: Path | None, reason: str) -> str:
    target = folder or "a folder, and pass it as data_dir="
    return (
        f"{release.name} ({release.ratings}) is not on this machine: {_looked(folder)}; TFDS has not prepared it either"
        f"{'; ' + reason if reason else ''}.\n"
        f"Download {release.url}\n(sha256 {release.sha256})\n"
        f"and put {release.folder}.zip, or the unpacked folder {release.folder}/, into {target}."
    )


def _gowalla(folder: Path | None, store: Path | None) -> tuple[Interactions, Interactions]:
    for root in (folder / "gowalla", folder) if folder else ():
        names = [locate(root, f"{part}.txt") for part in ("train", "test")]
        if all(names):
            train, test = (_file(root / name, store) for name in names)
            return train, test
    raise FileNotFoundError(
        f"gowalla is not on this machine: {_looked(folder)}.\nDownload train.txt and test.txt from "
        "https://github.com/gusye1234/LightGCN-PyTorch, folder data/gowalla\n(no checksum is published) and put them "
        f"into {folder or 'a folder passed as data_dir='}/gowalla/."
    )


def _together(parts: tuple[Interactions, ...], *, name: str) -> Interactions:
    """The rows of several files as one data set, in the order of the files."""
    in_file_order = [np.argsort(part.file_rows) for part in parts]
    users = [part.user_labels[part.user_ids][order] for part, order in zip(parts, in_file_order, strict=True)]
    items = [part.item_labels[part.item_ids][order] for part, order in zip(parts, in_file_order, strict=True)]
    return from_rows(np.concatenate(users), np.concatenate(items), name=name)


def _ncf_file(folder: Path | None) -> Path:
    for root in (folder / "ml-1m", folder) if folder else ():
        name = locate(root, "ml-1m.test.negative")
        if name:
            return root / name
    raise FileNotFoundError(
        f"ml-1m.test.negative is not on this machine: {_looked(folder)}.\nDownload it from "
        "https://github.com/hexiangnan/neural_collaborative_filtering, folder Data\n(no checksum is published) and "
        f"put it beside ratings.dat in {folder or 'a folder passed as data_dir='}/ml-1m/."
    )


def _file(path: Path, store: Path | None, **options) -> Interactions:
    if not path.is_file():
        return load_file(path, **options)  # which says so
    return cached(lambda: load_file(path, **options), name=path.name, sources=[path], options=options, cache_dir=store)


def _folder(data_dir: str | Path | None) -> Path | None:
    if data_dir is None:
        from_environment = os.environ.get("FEDJAX_REC_DATA")
        return Path(from_environment).expanduser() if from_environment else None
    folder = Path(data_dir).expanduser()
    if not folder.exists():
        raise FileNotFoundError(f"data_dir {folder} does not exist; name the folder that holds the data set.")
    return folder


def _looked(folder: Path | None) -> str:
    return f"it is not in {folder}" if folder else "neither data_dir= nor FEDJAX_REC_DATA names a folder"


def _check_options(name: str, options: Mapping[str, object], allowed: Iterable[str]) -> None:
    allowed = list(allowed)
    for option in options:
        if option not in allowed:
            raise ValueError(
                f"{name} has no option {option!r}{_nearest(option, allowed)}; {_choices('it has', allowed)}."
            )


def _unknown(name: str, known: Sequence[str]) -> ValueError:
    return ValueError(
        f"Unknown data set {name!r}{_nearest(name, known)}; {_choices('there is', known)}, or the path of a file."
    )


def _nearest(word: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.3)
    return f", did you mean {nearest[0]!r}?" if nearest else ""


def _choices(verb: str, known: Sequence[str]) -> str:
    return f"{verb} {', '.join(known)}" if known else f"{verb} none"

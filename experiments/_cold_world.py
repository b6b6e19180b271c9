"""Whom the study of cold items asks for what: some items are held out whole, and users are asked for one of them."""

import dataclasses
import hashlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.data import Interactions, Split, leave_one_out, load
from fedjax_rec.data.cache import default_cache_dir
from fedjax_rec.evaluation import Scorer
from fedjax_rec.models.content import Modality, content_tower
from fedjax_rec.models.items import ItemTower
from fedjax_rec.text.encoder import embed_texts, find_encoder, load_encoder
from fedjax_rec.text.random_encoder import random_encoder

SHARE = 0.1  # of items, held out for test; as many for validation
LAST_USER = 2999  # of MovieLens 1M
SMOKE_WORDS = ("red", "blue", "green", "stone", "river", "night")


class World(NamedTuple):
    """Interactions and what is known of their items; ``warm`` is the split of items that training knows."""

    data: Interactions
    modalities: dict[str, Modality]
    warm: Split


class Unseen(NamedTuple):
    """Items held out whole.

    Attributes:
      split: train has no row of them; one test and one validation row a user, each of an item of its own fold; history
        has the user's other rows of them, which are only masked.
      folds: int ``[num_items]``: 0 known, 1 held out for validation, 2 for test.
      protocol: fingerprint of the rule and the data; the folds follow from the seed.
    """

    split: Split
    folds: np.ndarray
    protocol: str


@cache
def world(dataset: str, data_dir: Path | None) -> World:
    """A data set with vectors of titles, of genres, and of a sentence of both."""
    data = _made_up() if dataset == "smoke" else load(f"movielens/{dataset}", data_dir=data_dir)
    if dataset == "1m":
        data = data.take((data.user_labels <= LAST_USER)[data.user_ids])
    genres = [", ".join(name for name, on in zip(data.genre_names, row, strict=True) if on) for row in data.item_genres]
    titles = [str(title) for title in data.item_titles]
    sentences = [f"{title}. {said}" for title, said in zip(titles, genres, strict=True)]
    encoder = random_encoder(sentences, seed=0) if dataset == "smoke" else load_encoder(find_encoder())
    cache_dir = None if dataset == "smoke" else default_cache_dir() / "text"
    everywhere = np.ones(data.num_items, bool)
    modalities = {
        "title": Modality(embed_texts(encoder, titles, cache_dir), everywhere),
        "sentence": Modality(embed_texts(encoder, sentences, cache_dir), everywhere),
        "genres": Modality(data.item_genres.astype(np.float32), data.item_genres.any(1)),
    }
    return World(data, modalities, leave_one_out(data))


def hold_out_items(data: Interactions, *, seed: int) -> Unseen:
    """Draws the folds, and cuts every user's rows at the last one of a test item.

    That row is the user's test row. Train is what the user did before it with known items: no later taste leaks in.
    """
    places, folds = np.arange(data.num_interactions), np.zeros(data.num_items, int)
    drawn = np.random.default_rng(seed).permutation(np.flatnonzero(data.item_counts))
    size = max(int(SHARE * len(drawn)), 1)
    folds[drawn[:size]], folds[drawn[size : 2 * size]] = 2, 1
    fold = folds[data.item_ids]

    def last_rows(mask):
        last = np.full(data.num_users, -1)
        np.maximum.at(last, data.user_ids[mask], places[mask])
        return last

    test = last_rows(fold == 2)
    before = places < np.where(test >= 0, test, data.num_interactions)[data.user_ids]
    validation = last_rows((fold == 1) & before)
    is_test, is_validation = (np.isin(places, rows[rows >= 0]) for rows in (test, validation))
    split = Split(
        train=data.take((fold == 0) & before),
        validation=data.take(is_validation),
        test=data.take(is_test),
        history=data.take((fold > 0) & before & ~is_validation),
        rule="items held out",
        seed=seed,
    )
    said = f"items held out, {SHARE} {data.fingerprint}"
    return Unseen(split, folds, hashlib.sha256(said.encode()).hexdigest())


def known_only(train: Interactions, known: np.ndarray) -> tuple[Interactions, np.ndarray]:
    """The same rows over a catalogue of the known items alone, and the ids of these.

    A softmax over the whole catalogue would learn that what is like an unseen item is never chosen.

    Args:
      train: rows of known items only.
      known: bool ``[num_items]``, no matter who has touched them: under privacy a catalogue must not tell.
    """
    ids = np.flatnonzero(known)
    places = np.zeros(train.num_items, np.int32)
    places[ids] = np.arange(len(ids))
    columns = {
        name: None if (values := getattr(train, name)) is None else values[ids]
        for name in ("item_labels", "item_titles", "item_genres")
    }
    return dataclasses.replace(train, item_ids=places[train.item_ids], num_items=len(ids), **columns), ids


def tower(modalities: dict[str, Modality], ids: np.ndarray, *, dim: int, with_ids: bool, known=None) -> ItemTower:
    """A `content_tower` on some items of a catalogue."""
    rows = {name: Modality(m.values[ids], m.present[ids]) for name, m in modalities.items()}
    return content_tower(len(ids), dim=dim, modalities=rows, ids=with_ids, known=known)


class _Among(NamedTuple):
    fn: object

    def __call__(self, params, user_ids: jax.Array) -> jax.Array:
        inner, mask = params
        return self.fn(inner, user_ids) + mask[None]


def among(scorer: Scorer, items: np.ndarray) -> Scorer:
    """The same scores, but items outside bool ``[num_items]`` are never recommended."""
    return Scorer(_Among(scorer.fn), (scorer.params, jnp.where(items, 0.0, -jnp.inf)))


def _made_up() -> Interactions:
    """Users who like one word of titles each."""
    data = load("synthetic", num_users=60, num_items=60)
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, len(SMOKE_WORDS), data.num_items)
    titles = np.array([f"the {SMOKE_WORDS[kind]} film {number}" for number, kind in enumerate(kinds)])
    genres = np.eye(3, dtype=bool)[kinds % 3]
    return dataclasses.replace(data, item_titles=titles, item_genres=genres, genre_names=("Drama", "Comedy", "War"))

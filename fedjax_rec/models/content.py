"""Items known by what they are: an id table and any number of modalities, fused by gates.

    e_m = W_m x_m / |x_m| + c_m,    e_id = row of the id table
    v = sum_m g_m e_m,    g = softmax over what the item has of <u_m, e_m> + b_m

x_m is the vector of a modality: a text's embedding, genres, an image's or a sound's vector from elsewhere. An item that
lacks one is fused from the others; one that has nothing has the vector 0. The row of an item that nobody has trained on
says nothing, so its id counts as missing and its content alone serves it. For that the content must have learned to
stand alone: `with_id_dropout` hides ids by chance while training, after Volkovs, Yu and Poutanen, 2017, "DropoutNet:
Addressing Cold Start in Recommender Systems".

Modalities are public and frozen: they are no parameters, and a client receives them once. They are constants of what is
compiled; of millions of items they want a projection to fewer numbers first.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.models.base import Shared
from fedjax_rec.models.items import ItemTower
from fedjax_rec.models.sequence import SequenceModel

_ID = "id"


class Modality(NamedTuple):
    """One kind of content.

    Attributes:
      values: float32 ``[num_items, size]``; rows are brought to length 1.
      present: bool ``[num_items]``; what stands in the other rows is never read.
    """

    values: np.ndarray
    present: np.ndarray


def content_tower(
    num_items: int,
    *,
    dim: int,
    modalities: Mapping[str, Modality],
    ids: bool = True,
    known: jax.Array | None = None,
    init_stddev: float = 0.02,
) -> ItemTower:
    """Item vectors made of ids and content.

    Shared: table "item" ``[num_items, dim]`` with ``ids``; dense, by modality, "text.kernel" ``[size, dim]``,
    "text.bias" ``[dim]``, and of the gates "text.gate" ``[dim]`` and "text.gate_bias" ``[]``; "id.gate" too with ids.

    Args:
      num_items: catalogue size.
      dim: length of an item's vector.
      modalities: by name.
      ids: have a table of ids.
      known: bool ``[num_items]``, traceable: items whose id counts. None: all. In training, items with a row in train,
        less those that `with_id_dropout` hides; at serving, items that training has seen.
      init_stddev: of the id table, and of what a modality gives at first.

    Raises:
      ValueError: for modalities of another catalogue, with values that are not finite, or none at all.
    """
    if not modalities and not ids:
        raise ValueError("Nothing is left to make item vectors of: give ids or modalities.")
    columns = {name: _unit_rows(name, modality, num_items) for name, modality in modalities.items()}
    present = {name: jnp.asarray(modality.present) for name, modality in modalities.items()}
    if ids:
        present[_ID] = jnp.ones(num_items, bool)

    def init(key):
        id_key, *keys = jax.random.split(key, len(columns) + 1)
        dense = {}
        for (name, values), name_key in zip(columns.items(), keys, strict=True):
            dense[f"{name}.kernel"] = init_stddev * jax.random.normal(name_key, (values.shape[1], dim))
            dense[f"{name}.bias"] = jnp.zeros(dim)
        for name in present:
            dense |= {f"{name}.gate": jnp.zeros(dim), f"{name}.gate_bias": jnp.zeros(())}
        tables = {"item": init_stddev * jax.random.normal(id_key, (num_items, dim))} if ids else {}
        return Shared(tables, dense)

    def fused(params, rows):
        """Of the items that ``rows`` looks up: ``table [num_items, ...] -> [..., ...]``."""
        dense = params.dense
        parts = {name: _projected(dense, name, rows(values)) for name, values in columns.items()}
        if ids:
            parts[_ID] = rows(params.tables["item"])
        logits = {name: part @ dense[f"{name}.gate"] + dense[f"{name}.gate_bias"] for name, part in parts.items()}
        there = {name: rows(mask) for name, mask in present.items()}
        whole = _gated(parts, logits, there)
        if not ids or known is None:
            return whole
        # Chosen at the end: where every client hides other ids, only this is computed for each of them.
        content = _gated(parts, logits, there | {_ID: jnp.zeros_like(there[_ID])})
        return jnp.where(rows(known)[..., None], whole, content)

    return ItemTower(
        init=init,
        take=lambda params, item_ids: fused(params, lambda table: jnp.take(table, item_ids, axis=0, mode="clip")),
        all=lambda params: fused(params, lambda table: table),
        num_items=num_items,
        dim=dim,
    )


def with_id_dropout(
    build: Callable[[ItemTower], SequenceModel],
    tower: Callable[[jax.Array], ItemTower],
    known: np.ndarray,
    *,
    rate: float,
) -> SequenceModel:
    """A recommender whose loss hides the ids of some items by chance, so that their content learns to stand alone.

    Every history hides its own items. Queries, catalogue and parameters are those of ``build(tower(known))``.

    Args:
      build: makes the recommender on an item side, such as `sasrec`.
      tower: ``known bool [num_items] -> ItemTower``, a `content_tower` with ids.
      known: bool ``[num_items]``, items with a row in train.
      rate: probability that an item's id is hidden, in [0, 1).

    Raises:
      ValueError: for a rate out of range.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate must lie in [0, 1), and is {rate:g}.")
    known = jnp.asarray(known)
    model = build(tower(known))

    def loss(params, history, key):
        hide_key, loss_key = jax.random.split(key)
        kept = known & jax.random.bernoulli(hide_key, 1.0 - rate, known.shape)
        return build(tower(kept)).loss(params, history, loss_key)

    return model._replace(loss=loss)


def load_vectors(path: Path | str, item_labels: np.ndarray) -> Modality:
    """Vectors computed elsewhere, such as of posters or sounds, brought into the order of a catalogue.

    ``posters.npy`` holds float ``[n, size]``, and ``posters.ids.npy`` beside it the item label of each row, int or str
    ``[n]``. Rows of items outside the catalogue are left out; items without a row are not present.

    Args:
      path: of the vectors.
      item_labels: ``[num_items]``, `Interactions.item_labels`.

    Raises:
      FileNotFoundError: if either file is missing.
      ValueError: for shapes that do not fit, an item with two rows, or no item of the catalogue at all.
    """
    path = Path(path)
    labels_path = path.with_suffix(".ids.npy")
    for file in (path, labels_path):
        if not file.is_file():
            raise FileNotFoundError(
                f"There is no {file}; vectors [n, size] and their item labels [n] are two .npy files."
            )
    vectors, labels = np.load(path), np.load(labels_path)
    if vectors.ndim != 2 or labels.shape != (len(vectors),):
        raise ValueError(
            f"{path} is {list(vectors.shape)} and {labels_path.name} {list(labels.shape)}, not [n, size] and [n]."
        )
    labels, wanted = labels.astype(str), np.asarray(item_labels).astype(str)
    order = np.argsort(labels, kind="stable")
    again = labels[order][1:][labels[order][1:] == labels[order][:-1]]
    if len(again):
        raise ValueError(f"Item {again[0]} has two rows in {path} ({len(again)} such rows); keep one.")
    place = np.minimum(np.searchsorted(labels[order], wanted), max(len(labels) - 1, 0))
    present = labels[order][place] == wanted if len(labels) else np.zeros(len(wanted), bool)
    if not present.any():
        raise ValueError(
            f"{labels_path} names no item of the catalogue, such as {wanted[0]}; is it of another data set?"
        )
    values = np.where(present[:, None], vectors[order][place], 0).astype(np.float32)
    return Modality(values, present)


def _unit_rows(name: str, modality: Modality, num_items: int) -> jax.Array:
    values, present = np.asarray(modality.values, np.float32), np.asarray(modality.present)
    if values.ndim != 2 or len(values) != num_items or present.shape != (num_items,) or present.dtype != bool:
        raise ValueError(
            f"Modality {name!r} has values {list(values.shape)} and present {present.dtype} {list(present.shape)}; "
            f"they must be [{num_items}, size] and bool [{num_items}]."
        )
    if name == _ID:
        raise ValueError('A modality cannot be called "id": that is the table\'s name.')
    if not np.isfinite(values[present]).all():
        raise ValueError(f"Modality {name!r} has values that are not finite where it is present.")
    values = np.where(present[:, None], values, 0)
    return jnp.asarray(values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12))


def _gated(parts: dict, logits: dict, there: dict) -> jax.Array:
    """The sum of parts ``[..., dim]`` by gates over those that are there; 0 where nothing is."""
    masks = jnp.stack([there[name] for name in parts], axis=-1)
    gates = jax.nn.softmax(jnp.where(masks, jnp.stack(list(logits.values()), axis=-1), -1e9), axis=-1)
    return jnp.einsum("...m,...md->...d", jnp.where(masks, gates, 0.0), jnp.stack(list(parts.values()), axis=-2))


def _projected(dense: dict, name: str, values: jax.Array) -> jax.Array:
    out = values @ dense[f"{name}.kernel"]
    return out + jnp.broadcast_to(dense[f"{name}.bias"], out.shape)

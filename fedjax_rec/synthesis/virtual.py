"""Drawn histories as a data set like any other: fresh ids, the catalogue's items."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.synthesis.generator import Generator, draw_histories
from fedjax_rec.synthesis.lengths import DpLengths, draw_lengths


def virtual_users(
    generator: Generator,
    lengths: DpLengths,
    *,
    num_users: int,
    key: jax.Array,
    catalogue: Interactions,
    report: Callable[[int, int], None] | None = None,
) -> Interactions:
    """Draws virtual users.

    Post-processing of releases: no epsilon, for any number of users. Their number is an argument and not the number of
    real users, which is not public. Labels are 1 .. num_users and stand for nobody.

    Args:
      generator: fitted.
      lengths: released.
      num_users: how many.
      key: of the draws.
      catalogue: gives item labels, titles and genres, which are public; none of its rows is read.
      report: ``(done, total)``.

    Returns:
      `Interactions` on the catalogue's item ids. Rows of a generator of sequences are in time order, with places
      1, 2, ... for timestamps; others have none.

    Raises:
      ValueError: for no users, or a catalogue of another size.
    """
    if num_users < 1:
        raise ValueError(f"num_users must be at least 1; got {num_users}.")
    if catalogue.num_items != generator.num_items:
        raise ValueError(
            f"The generator knows {generator.num_items} items and the catalogue has {catalogue.num_items}; pass "
            "the data set that it was fitted on."
        )
    length_key, item_key = jax.random.split(key)
    drawn = draw_histories(generator, draw_lengths(lengths, num_users, key=length_key), key=item_key, report=report)
    return from_histories(
        drawn, catalogue=catalogue, name=f"virtual users ({generator.name})", ordered=generator.ordered
    )


def from_histories(histories: np.ndarray, *, catalogue: Interactions, name: str, ordered: bool) -> Interactions:
    """Histories int ``[users, longest]``, padded with ``num_items``, as `Interactions` on the catalogue's items."""
    real = histories < catalogue.num_items
    counts = real.sum(axis=1)
    item_ids = histories[real].astype(np.int32)
    places = np.broadcast_to(np.arange(1, histories.shape[1] + 1), histories.shape)[real]
    return dataclasses.replace(
        catalogue,
        name=name,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        item_ids=item_ids,
        file_rows=np.arange(len(item_ids), dtype=np.int64),
        timestamps=places.astype(np.int64) if ordered else None,
        ratings=None,
        user_labels=np.arange(1, len(histories) + 1),
        user_attributes={},
        repairs={},
    )

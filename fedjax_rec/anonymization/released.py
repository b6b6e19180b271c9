"""Rows built anew for a release, so that no order, row number or repair count of the source is left in them."""

import dataclasses

import numpy as np

from fedjax_rec.data.interactions import Interactions


def released(
    interactions: Interactions,
    users: np.ndarray,
    items: np.ndarray,
    *,
    ratings: np.ndarray | None,
    timestamps: np.ndarray | None,
    suffix: str,
) -> Interactions:
    """`Interactions` over the same users and catalogue with other rows, in an order that tells nothing.

    Rows with equal timestamps stand in the order of their items, all rows if there are no timestamps: file order is
    time order in disguise. ``file_rows`` are numbered in the new order and ``repairs``, counts of the source, go.

    Args:
      interactions: whose users, labels, attributes and catalogue stay.
      users: whole numbers ``[rows]``, in any order.
      items: whole numbers ``[rows]``, unique within a user.
      ratings: ``[rows]`` or None.
      timestamps: ``[rows]`` in seconds, or None.
      suffix: what was done, added to the name.
    """
    keys = (items, users) if timestamps is None else (items, timestamps, users)
    order = np.lexsort(keys)
    counts = np.bincount(users, minlength=interactions.num_users)
    return dataclasses.replace(
        interactions,
        name=f"{interactions.name}, {suffix}",
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        item_ids=items[order].astype(np.int32),
        file_rows=np.arange(len(order), dtype=np.int64),
        timestamps=None if timestamps is None else timestamps[order].astype(np.int64),
        ratings=None if ratings is None else ratings[order].astype(np.float32),
        repairs={},
    )


def keep_users(interactions: Interactions, mask: np.ndarray, *, suffix: str = "some users") -> Interactions:
    """The users where `mask` (bool ``[users]``) is True, with their rows and attributes; the catalogue stays.

    Raises:
      ValueError: when the mask does not fit, or keeps nobody.
    """
    if mask.dtype != bool or mask.shape != (interactions.num_users,):
        raise ValueError(f"keep_users needs a bool mask [{interactions.num_users}]; got {mask.dtype} {mask.shape}.")
    if not mask.any():
        raise ValueError(f"Nobody of the {interactions.num_users} users of {interactions.name} would be left.")
    kept = interactions.take(mask[interactions.user_ids])
    fewer = dataclasses.replace(
        kept,
        offsets=np.concatenate([[0], np.cumsum(kept.counts_per_user[mask])]).astype(np.int64),
        user_labels=interactions.user_labels[mask],
        user_attributes={key: values[mask] for key, values in interactions.user_attributes.items()},
    )
    return released(
        fewer, fewer.user_ids, fewer.item_ids, ratings=fewer.ratings, timestamps=fewer.timestamps, suffix=suffix
    )


def membership(interactions: Interactions) -> np.ndarray:
    """Dense indicators float32 ``[users, items]``: 1 where the user has the item."""
    rows = np.zeros((interactions.num_users, interactions.num_items), np.float32)
    rows[interactions.user_ids, interactions.item_ids] = 1
    return rows

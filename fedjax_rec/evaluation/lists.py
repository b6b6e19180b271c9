"""What all top lists together show: coverage, concentration and novelty, from how often each item is shown."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def exposure_counts(top_item_ids: jax.Array, real: jax.Array, *, ks: tuple[int, ...], num_items: int) -> jax.Array:
    """How many of the top-k lists show each item, float32 `[cut-offs, items]`.

    Args:
      top_item_ids: int32 `[B, K]` with K >= max(ks), best first, padded with `num_items`.
      real: bool `[B]`, False = padding.
      ks: cut-offs, ascending.
      num_items: size of the catalogue.
    """
    # Each place of the list is counted once, at the smallest cut-off that includes it; larger cut-offs add up.
    segment = jnp.searchsorted(jnp.asarray(ks), jnp.arange(top_item_ids.shape[1]), side="right")
    shown = jnp.where(real[:, None], top_item_ids, num_items)
    segments = jnp.broadcast_to(segment[None, :], shown.shape)
    return jnp.cumsum(jnp.zeros((len(ks), num_items)).at[segments, shown].add(1.0, mode="drop"), axis=0)


def list_metrics(
    exposure: np.ndarray, *, ks: Sequence[int], item_counts: np.ndarray, num_train_users: int
) -> dict[str, float]:
    """Metrics of all lists together, by name; x_i = lists that show item i, q_i = x_i / sum x.

    - coverage@k: share of the catalogue in at least one list.
    - gini@k: sum over items in ascending order of x of (2 i - n - 1) x_i / (n sum x), i = 1..n; 0 when every item is
      shown equally often, (n - 1) / n when it is always the same one. Items never shown are included.
    - entropy@k: - sum q_i ln q_i, in nats, at most ln n.
    - novelty@k: sum q_i (-log2(train users of i / train users)), in bits; an item that nobody trained on counts as one
      that a single user did.

    Args:
      exposure: `[cut-offs, items]`.
      ks: cut-offs.
      item_counts: int `[items]`, train users of each item.
      num_train_users: users with a row in train.
    """
    surprise = -np.log2(np.maximum(item_counts, 1) / max(num_train_users, 1))
    num_items = len(item_counts)
    weight = 2 * np.arange(1, num_items + 1) - num_items - 1
    values = {name: {} for name in ("coverage", "gini", "entropy", "novelty")}
    for k, shown in zip(ks, np.asarray(exposure, np.float64), strict=True):
        share = shown / max(shown.sum(), 1.0)
        positive = share[share > 0]
        values["coverage"][k] = np.count_nonzero(shown > 0) / num_items
        values["gini"][k] = weight @ np.sort(share) / num_items
        values["entropy"][k] = -(positive * np.log(positive)).sum()
        values["novelty"][k] = share @ surprise
    return {f"{name}@{k}": float(value) for name, by_k in values.items() for k, value in by_k.items()}

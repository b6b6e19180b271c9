"""What to know about a data set before training on it."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedjax_rec.data.interactions import Interactions


@dataclass(frozen=True)
class DataStatistics:
    """Size, shape and oddities of a data set.

    Attributes:
      name: of the data set.
      num_users: users with rows.
      num_items: size of the catalogue, items without rows included.
      num_interactions: rows.
      density: `num_interactions / (num_users * num_items)`.
      activity_p10: tenth percentile of rows per user.
      activity_p50: median of rows per user.
      activity_p90: ninetieth percentile.
      activity_max: rows of the most active user.
      popularity_gini: 0 = every item equally popular, near 1 = all rows on one item; unseen items included.
      head_share: share of the rows that fall on the most popular 1 % of the items (at least one item).
      tied_latest_users: users whose latest timestamp is on two or more rows, where a tie rule decides what is latest;
        all users with two rows or more if there are no timestamps.
      first_timestamp: earliest known second, or None.
      last_timestamp: latest second, or None.
      mean_rating: of the known ratings, or None.
      repairs: counted while loading.
      fingerprint: sha256 of the rows.
    """

    name: str
    num_users: int
    num_items: int
    num_interactions: int
    density: float
    activity_p10: float
    activity_p50: float
    activity_p90: float
    activity_max: int
    popularity_gini: float
    head_share: float
    tied_latest_users: int
    first_timestamp: int | None
    last_timestamp: int | None
    mean_rating: float | None
    repairs: Mapping[str, int]
    fingerprint: str

    @property
    def days(self) -> float | None:
        """Time span in days, or None without timestamps."""
        if self.first_timestamp is None or self.last_timestamp is None:
            return None
        return (self.last_timestamp - self.first_timestamp) / 86_400


def statistics(interactions: Interactions) -> DataStatistics:
    """Computes `DataStatistics`; exact, not private.

    Raises:
      ValueError: if there are no rows.
    """
    if not interactions.num_interactions:
        raise ValueError(f"{interactions.name} has no rows, so there is nothing to describe.")
    activity = interactions.counts_per_user[interactions.counts_per_user > 0]
    popularity = np.sort(interactions.item_counts)
    rows, items = interactions.num_interactions, interactions.num_items
    head = max(1, items // 100)
    known = interactions.timestamps[interactions.timestamps > 0] if interactions.timestamps is not None else []
    rated = interactions.ratings[~np.isnan(interactions.ratings)] if interactions.ratings is not None else []
    p10, p50, p90 = np.percentile(activity, [10, 50, 90])
    return DataStatistics(
        name=interactions.name,
        num_users=len(activity),
        num_items=items,
        num_interactions=rows,
        density=rows / (len(activity) * items),
        activity_p10=float(p10),
        activity_p50=float(p50),
        activity_p90=float(p90),
        activity_max=int(activity.max()),
        popularity_gini=gini(popularity),
        head_share=float(popularity[-head:].sum() / rows),
        tied_latest_users=tied_latest_users(interactions),
        first_timestamp=int(np.min(known)) if len(known) else None,
        last_timestamp=int(np.max(known)) if len(known) else None,
        mean_rating=float(np.mean(rated, dtype=np.float64)) if len(rated) else None,
        repairs=dict(interactions.repairs),
        fingerprint=interactions.fingerprint,
    )


def tied_latest_users(interactions: Interactions) -> int:
    """Users whose latest timestamp stands on two or more of their rows."""
    long_enough = interactions.counts_per_user >= 2
    if interactions.timestamps is None:
        return int(np.count_nonzero(long_enough))
    last = interactions.offsets[1:][long_enough] - 1
    return int(np.count_nonzero(interactions.timestamps[last] == interactions.timestamps[last - 1]))


def gini(counts: np.ndarray) -> float:
    """Gini coefficient of non-negative counts `[n]`: mean absolute difference over twice the mean."""
    ordered = np.sort(counts).astype(np.float64)
    n, total = len(ordered), ordered.sum()
    if not total:
        return 0.0
    return float(2 * np.sum(np.arange(1, n + 1) * ordered) / (n * total) - (n + 1) / n)

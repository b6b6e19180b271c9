"""Errors of predicted ratings: rmse and mae over ratings (micro), and over users."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class RatingState(NamedTuple):
    """Sums over ratings; add two of them with `jax.tree.map(jnp.add, a, b)`."""

    squared: jax.Array  # float32 []
    absolute: jax.Array  # float32 []
    num_ratings: jax.Array  # float32 []


@dataclass(frozen=True, eq=False)
class RatingErrors:
    """Errors in the unit of the ratings.

    Attributes:
      rmse, mae: over all ratings, so that a user weighs as much as it rated (micro).
      user_rmse, user_mae: means over users of each user's own error (macro), as some libraries report.
      per_user: {"rmse": float32 `[users]`, "mae": float32 `[users]`} in the order of `user_ids`.
      user_ids: int32 `[users]`, those with a rating.
      num_ratings: ratings compared.
    """

    rmse: float
    mae: float
    user_rmse: float
    user_mae: float
    per_user: dict[str, np.ndarray]
    user_ids: np.ndarray
    num_ratings: int


def rating_state(
    predicted: jax.Array, actual: jax.Array, *, real: jax.Array, clip: tuple[float, float] | None = None
) -> RatingState:
    """The additive sums of a batch, on device.

    Args:
      predicted: float32 `[n]`.
      actual: float32 `[n]`.
      real: bool `[n]`, False = padding.
      clip: smallest and largest rating to clip predictions to, or None.
    """
    error = jnp.where(real, (predicted if clip is None else jnp.clip(predicted, *clip)) - actual, 0.0)
    return RatingState((error**2).sum(), jnp.abs(error).sum(), real.sum(dtype=jnp.float32))


def finalize_ratings(state: RatingState) -> dict[str, float]:
    """{"rmse": ..., "mae": ...} of a state.

    Raises:
      ValueError: for a state without ratings.
    """
    if not float(state.num_ratings) > 0:
        raise ValueError("An error over 0 ratings is undefined; compare at least one rating.")
    return {
        "rmse": float(np.sqrt(float(state.squared) / float(state.num_ratings))),
        "mae": float(state.absolute) / float(state.num_ratings),
    }


def rating_errors(
    predicted: np.ndarray, actual: np.ndarray, *, user_ids: np.ndarray, clip: tuple[float, float] | None = None
) -> RatingErrors:
    """rmse and mae of predicted ratings, over ratings and over users.

    Args:
      predicted: float `[n]`.
      actual: float `[n]`, no NaN: drop unknown ratings first.
      user_ids: int `[n]`, whose rating each is.
      clip: smallest and largest rating to clip predictions to, or None.

    Raises:
      ValueError: when nothing is compared, lengths differ, or a number is NaN.
    """
    predicted, actual = np.asarray(predicted, np.float64), np.asarray(actual, np.float64)
    if not (predicted.shape == actual.shape == np.shape(user_ids)) or not predicted.size:
        raise ValueError(
            f"rating_errors needs as many predictions as ratings and user ids, at least one, and got "
            f"{list(predicted.shape)}, {list(actual.shape)} and {list(np.shape(user_ids))}."
        )
    for name, values in (("predictions", predicted), ("ratings", actual)):
        if np.isnan(values).any():
            first = np.flatnonzero(np.isnan(values))[0]
            raise ValueError(
                f"{np.isnan(values).sum()} of {values.size} {name} are NaN, first at row {first} (user id "
                f"{user_ids[first]}); drop unknown ratings, and look for divergence in predictions."
            )
    error = (predicted if clip is None else np.clip(predicted, *clip)) - actual
    users, place, counts = np.unique(user_ids, return_inverse=True, return_counts=True)
    user_squared = np.bincount(place, error**2) / counts
    user_absolute = np.bincount(place, np.abs(error)) / counts
    return RatingErrors(
        rmse=float(np.sqrt(np.mean(error**2))),
        mae=float(np.mean(np.abs(error))),
        user_rmse=float(np.sqrt(user_squared).mean()),
        user_mae=float(user_absolute.mean()),
        per_user={"rmse": np.sqrt(user_squared).astype(np.float32), "mae": user_absolute.astype(np.float32)},
        user_ids=users.astype(np.int32),
        num_ratings=error.size,
    )

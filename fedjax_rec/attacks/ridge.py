"""Ridge regression with its penalty chosen by leave-one-out errors: a strong linear attacker in closed form."""

from typing import NamedTuple

import numpy as np

PENALTIES = 10.0 ** np.arange(-6.0, 3.1, 0.5)


class Linear(NamedTuple):
    """Scores ``(x - mean) w + offset``.

    Attributes:
      mean: float64 ``[features]``.
      weights: float64 ``[features, targets]``.
      offset: float64 ``[targets]``.
    """

    mean: np.ndarray
    weights: np.ndarray
    offset: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Scores ``[examples, targets]``."""
        return (features - self.mean) @ self.weights + self.offset


def fit_ridge(features: np.ndarray, targets: np.ndarray) -> Linear:
    """Minimises ``|y - (x - mean) w - offset|^2 + p |w|^2`` for each target, with the p of least leave-one-out error.

    With the eigenvalues s of the features' Gram matrix, all leave-one-out residuals are ``(y - y^) / (1 - h)``, where
    ``h`` is the diagonal of the hat matrix; no model is fitted twice. Penalties are in units of the largest s.

    Args:
      features: float ``[examples, features]``, more or fewer features than examples.
      targets: float ``[examples, targets]``, such as 0 and 1.
    """
    mean, offset = features.mean(0, dtype=np.float64), targets.mean(0, dtype=np.float64)
    centred, targets = features - mean, targets - offset
    few = len(centred) <= centred.shape[1]  # then examples span a smaller Gram matrix than features
    squares, vectors = np.linalg.eigh(centred @ centred.T if few else centred.T @ centred)
    squares = np.maximum(squares, squares[-1] * 1e-12)
    left = vectors if few else centred @ vectors / np.sqrt(squares)
    projected = left.T @ targets
    errors = []
    for penalty in PENALTIES * squares[-1]:
        kept = squares / (squares + penalty)
        leverage = np.square(left) @ kept + 1 / len(features)
        residual = (targets - left @ (kept[:, None] * projected)) / np.maximum(1 - leverage, 1e-6)[:, None]
        errors.append(np.square(residual).sum(0))
    shrunk = projected / (squares[:, None] + PENALTIES[np.argmin(errors, axis=0)] * squares[-1])
    weights = centred.T @ (vectors @ shrunk) if few else vectors @ (np.sqrt(squares)[:, None] * shrunk)
    return Linear(mean, weights, offset)

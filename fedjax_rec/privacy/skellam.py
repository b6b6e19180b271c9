"""The Skellam mechanism's event and its Renyi divergence, which dp_accounting does not have."""

import math
from collections.abc import Sequence

import attr
import numpy as np
from dp_accounting.dp_event import DpEvent


@attr.s(frozen=True, slots=True, auto_attribs=True)
class SkellamDpEvent(DpEvent):
    """Integers plus the difference of two Poisson numbers of equal mean, on each of them.

    Attributes:
      stddev: the noise's standard deviation, whose square is the sum of the two means.
      l1_sensitivity: largest L1 norm of one unit's integers.
      l2_sensitivity: their largest L2 norm.
    """

    stddev: float
    l1_sensitivity: float
    l2_sensitivity: float


def doubled(event: SkellamDpEvent) -> SkellamDpEvent:
    """The same noise on twice the sensitivities: what replacing a unit costs where removing it costs ``event``."""
    return attr.evolve(event, l1_sensitivity=2 * event.l1_sensitivity, l2_sensitivity=2 * event.l2_sensitivity)


def skellam_rdp(event: SkellamDpEvent, orders: Sequence[float]) -> np.ndarray:
    """The mechanism's Renyi divergence, bounded, at each order.

    At integers a, with variance m and sensitivities D1 and D2 (Agarwal, Kairouz, Liu, 2021, "The Skellam Mechanism for
    Differentially Private Federated Learning", Corollary 4.1 at scale 1):

      ``a D2^2 / (2 m) + min(((2 a - 1) D2^2 + 6 D1) / (4 m^2), 3 D1 / (2 m))``.

    Between integers, (a - 1) times the divergence is convex in a and 0 at a = 1, so a straight line bounds it.

    Args:
      event: with ``stddev`` above 0.
      orders: above 1.

    Returns:
      float64 ``[orders]``.
    """
    variance, l1, l2 = event.stddev**2, event.l1_sensitivity, event.l2_sensitivity

    def log_moment(order: int) -> float:
        if order == 1:
            return 0.0
        second = min(((2 * order - 1) * l2**2 + 6 * l1) / (4 * variance**2), 3 * l1 / (2 * variance))
        return (order - 1) * (order * l2**2 / (2 * variance) + second)

    def divergence(order: float) -> float:
        whole = math.floor(order)
        part = order - whole
        between = (1 - part) * log_moment(whole) + (part * log_moment(whole + 1) if part else 0.0)
        return between / (order - 1)

    return np.array([divergence(order) for order in orders])

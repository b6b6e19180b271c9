"""Distributed differential privacy: every client adds a share of the noise, so the server only ever sees a noised sum.

Under a secure sum the server learns ``sum_i (q_i + n_i)`` and nothing else, so the noise has to be in it already.
Shares are integers, as the ring's words are. They are planned for a named number of survivors: the secure sum refuses
fewer, and more survivors bring more noise than the event claims.
"""

import math
from collections.abc import Callable

import attr
import dp_accounting
import jax
from dp_accounting.dp_event import DpEvent

from fedjax_rec.federated.rows import is_rows, whole_tables
from fedjax_rec.federated.transforms import Bound, UpdateTransform
from fedjax_rec.privacy.noise import check_integer_stddev, discrete_gaussian, skellam
from fedjax_rec.privacy.skellam import SkellamDpEvent
from fedjax_rec.security.ring import with_values


def skellam_shares(stddev: float, *, min_clients: int) -> UpdateTransform:
    """Each client adds Skellam noise of variance ``stddev^2 / min_clients`` to every number of its integers.

    Sums of Skellam numbers are Skellam numbers, so a sum of exactly ``min_clients`` uploads carries noise of standard
    deviation ``stddev`` (Agarwal, Kairouz, Liu, 2021, "The Skellam Mechanism for Differentially Private Federated
    Learning").

    Guarantee: user-level; replace-one, since who is removed takes its noise along; no sampling; each round's sum of at
    least ``min_clients`` uploads is a `SkellamDpEvent`. Colluding clients know their own shares: `without_colluders`
    says what is left then. The client key must be secret, as noise keys are.

    Args:
      stddev: of the noise in a sum of ``min_clients`` uploads, in steps of the grid.
      min_clients: survivors that are planned for; the secure sum has to refuse fewer.

    Raises:
      ValueError: if ``stddev`` or its share is out of range, or (from `chain`) if no earlier link gives integers of
        bounded norm, or (from `make_rounds`) if smaller sums would be let through.
    """

    def event(bound):
        return SkellamDpEvent(stddev, l1_sensitivity=bound.l1, l2_sensitivity=bound.l2)

    return _shares("skellam_shares", skellam, stddev, min_clients, event)


def discrete_gaussian_shares(stddev: float, *, min_clients: int, num_numbers: int) -> UpdateTransform:
    """Each client adds discrete Gaussian noise of variance ``stddev^2 / min_clients`` to every number of its integers.

    A sum of discrete Gaussians is nearly one. With share variance s^2 and n shares,
    ``tau = 10 sum_(k<n) exp(-2 pi^2 s^2 k / (k + 1))`` bounds how nearly, and a round is ``eps^2 / 2``-zCDP with

      ``eps = min(sqrt(D2^2 / (n s^2) + 2 tau d), D2 / (sqrt(n) s) + tau sqrt(d))``

    (Kairouz, Liu, Steinke, 2021, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
    Aggregation", Theorem 1). With a share of two steps or more, tau is nothing.

    Guarantee: as `skellam_shares`, with that event. For more survivors than planned, both terms are smaller.

    Args:
      stddev: as in `skellam_shares`, and so ``min_clients``.
      num_numbers: d, numbers in one client's integers.

    Raises:
      ValueError: as `skellam_shares`.
    """

    def event(bound):
        tau = _sum_distance(stddev / math.sqrt(min_clients), min_clients)
        gaussian = bound.l2 / stddev
        epsilon = min(math.sqrt(gaussian**2 + 2 * tau * num_numbers), gaussian + tau * math.sqrt(num_numbers))
        return dp_accounting.ZCDpEvent(rho=epsilon**2 / 2)

    return _shares("discrete_gaussian_shares", discrete_gaussian, stddev, min_clients, event)


def without_colluders(event: DpEvent, *, colluding: int, min_clients: int) -> DpEvent:
    """The event of a sum whose observer also knows the shares of some clients: only the honest ones' noise counts.

    Args:
      event: of `skellam_shares`, or of `discrete_gaussian_shares` with shares of two steps or more.
      colluding: clients who tell the observer their noise, fewer than ``min_clients``.
      min_clients: survivors that the noise was planned for.

    Raises:
      ValueError: if nobody honest is left, or for another event.
    """
    if not 0 <= colluding < min_clients:
        raise ValueError(f"colluding must be from 0 to {min_clients - 1}: somebody's noise has to be left.")
    honest = 1 - colluding / min_clients
    match event:
        case SkellamDpEvent():
            return attr.evolve(event, stddev=event.stddev * math.sqrt(honest))
        case dp_accounting.ZCDpEvent():
            return dp_accounting.ZCDpEvent(rho=event.rho / honest)
    raise ValueError(f"{type(event).__name__} is no event of noise in shares.")


def _sum_distance(share_stddev: float, num_shares: int) -> float:
    exponent = -2 * (math.pi * share_stddev) ** 2
    return 10 * math.fsum(math.exp(exponent * k / (k + 1)) for k in range(1, num_shares))


def _shares(name: str, draw: Callable, stddev: float, min_clients: int, event: Callable[[Bound], DpEvent]):
    if min_clients < 1:
        raise ValueError(f"min_clients must be at least 1; got {min_clients}.")
    share = stddev / math.sqrt(min_clients)
    check_integer_stddev(share)

    def client(update, prepared, key):
        del prepared
        leaves, structure = jax.tree.flatten(whole_tables(update), is_leaf=is_rows)
        keys = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(structure, [add(x, k) for x, k in zip(leaves, keys, strict=True)]), {}

    def add(leaf, key):
        values = leaf.values if is_rows(leaf) else leaf
        return with_values(leaf, values + draw(key, values.shape, share))

    def dp_event(bound, round_index):
        del round_index
        if bound.l2 == math.inf or not bound.integers:
            raise ValueError(
                f"{name} needs integers of bounded norm: put a clip and fixed_point with num_numbers before it."
            )
        return event(bound)

    return UpdateTransform(
        client=client,
        sensitivity=lambda bound: bound._replace(noised=True),
        dp_event=dp_event,
        min_clients=min_clients,
    )

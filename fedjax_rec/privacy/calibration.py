"""Searches over epsilon: the noise for a target, the rounds a budget affords, and the curve of epsilon over rounds.

Accounting with a fine PLD grid inside a search is what makes calibration slow. Here RDP gives the bracket (it bounds
epsilon from above in milliseconds), PLDs on a coarse grid do the search, and the fine grid only confirms the result.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import dp_accounting
import numpy as np
from dp_accounting import dp_event
from dp_accounting.dp_event import DpEvent
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.rdp import compute_epsilon

from fedjax_rec.privacy import accounting
from fedjax_rec.privacy.events import Terms, describe, flatten

_LEAST_NOISE, _MOST_NOISE = 1e-3, 1e7
_MOST_ROUNDS = 10**7
# The confirmed epsilon is between these shares of the target; below the first, the noise is lowered and confirmed again.
_ACCEPT_FROM, _AIM_AT = 0.998, 0.9995


@dataclass(frozen=True)
class Calibration:
    """A noise multiplier that meets a target, with the epsilon it was confirmed to have.

    Attributes:
      noise_multiplier: standard deviation over the clip norm, rounded up to six digits.
      epsilon: what ``privacy_spent`` reports for it; at most the target.
      delta: as asked.
      accountant: which accountant confirmed it.
      seconds: wall time of the search.
    """

    noise_multiplier: float
    epsilon: float
    delta: float
    accountant: str
    seconds: float


def calibrate_noise_multiplier(
    make_event: Callable[[float], DpEvent],
    *,
    target_epsilon: float,
    delta: float,
    relation: str = "add_or_remove_one",
    unit: str = "user",
) -> Calibration:
    """The least noise multiplier whose epsilon does not exceed the target, to within 0.5 % of the target.

    Args:
      make_event: the event of the whole run (other phases included) for a noise multiplier; more noise must not
        raise its epsilon.
      target_epsilon: positive.
      delta: in (0, 1).
      relation: as in ``privacy_spent``.
      unit: as in ``privacy_spent``.

    Raises:
      ValueError: a sentence, if an argument is out of range, no accountant applies, or no noise reaches the target.
    """
    start = time.perf_counter()
    accounting.check_claim(delta=delta, relation=relation, unit=unit)
    _check_target(target_epsilon)

    def confirmed(noise: float) -> accounting.PrivacySpent:
        return accounting.privacy_spent(make_event(noise), delta=delta, relation=relation, unit=unit)

    def rough(noise: float) -> float:
        return accounting.rough_epsilon(flatten(make_event(noise)), delta=delta, relation=relation)

    def coarse(noise: float) -> float:
        terms = flatten(make_event(noise))
        if not terms or accounting.choose_accountant(terms, delta=delta, relation=relation) != accounting.PLD:
            return confirmed(noise).epsilon
        interval = accounting.coarse_interval(target_epsilon)
        return accounting.pld_epsilon(terms, delta=delta, relation=relation, interval=interval)

    _check_reachable(confirmed, target_epsilon)
    start_noise = _solve(rough, target_epsilon, guess=1.0, tolerance=0.05)
    noise = _solve(coarse, target_epsilon * _AIM_AT, guess=start_noise, tolerance=1e-3)
    spent, noise = _confirm(confirmed, noise, target_epsilon)
    seconds = time.perf_counter() - start
    return Calibration(noise, spent.epsilon, delta, spent.accountant, seconds)


def _check_target(target_epsilon: float) -> None:
    if not 0 < target_epsilon < math.inf:
        raise ValueError(f"The target epsilon must be positive and finite; got {target_epsilon!r}.")


def _check_reachable(confirmed: Callable[[float], accounting.PrivacySpent], target_epsilon: float) -> None:
    floor = confirmed(_MOST_NOISE).epsilon
    if floor >= target_epsilon * _AIM_AT:
        raise ValueError(
            f"No noise reaches epsilon {target_epsilon:g}: at a noise multiplier of {_MOST_NOISE:g} it is still "
            f"{floor:.4g}, spent by the other releases. Raise the target, or drop or quieten a phase."
        )


def _solve(epsilon_of: Callable[[float], float], target: float, *, guess: float, tolerance: float) -> float:
    """A noise multiplier with ``target (1 - tolerance) <= epsilon <= target``, or the least noise that is searched.

    Epsilon falls with the noise about as a power of it, so the search interpolates between logarithms.
    """
    low = high = guess  # less and more noise
    epsilon_low = epsilon_high = epsilon_of(guess)
    while epsilon_high > target and high < _MOST_NOISE:
        low, epsilon_low = high, epsilon_high
        high *= 1.3 if epsilon_high < 2 * target else 3
        epsilon_high = epsilon_of(high)
    while epsilon_low <= target and low > _LEAST_NOISE:
        high, epsilon_high = low, epsilon_low
        low /= 1.3
        epsilon_low = epsilon_of(low)
    # Aiming inside the accepted band ends the search with the first hit; every third step halves the bracket, so that
    # no curvature can stall it.
    aim, step = target * (1 - tolerance / 2), 0
    while epsilon_high < target * (1 - tolerance) and high / low > 1 + 1e-6:
        step += 1
        noise = low * (high / low) ** (_log_share(epsilon_low, epsilon_high, aim) if step % 3 else 0.5)
        epsilon = epsilon_of(noise)
        if epsilon > target:
            low, epsilon_low = noise, epsilon
        else:
            high, epsilon_high = noise, epsilon
    return high


def _log_share(epsilon_low: float, epsilon_high: float, aim: float) -> float:
    if not 0 < epsilon_high < aim < epsilon_low < math.inf:
        return 0.5
    share = math.log(epsilon_low / aim) / math.log(epsilon_low / epsilon_high)
    return min(max(share, 0.02), 0.98)


def _confirm(
    confirmed: Callable[[float], accounting.PrivacySpent], noise: float, target: float
) -> tuple[accounting.PrivacySpent, float]:
    """Moves the noise in small steps until the fine epsilon is at most, and close to, the target."""
    best: tuple[accounting.PrivacySpent, float] | None = None
    for _ in range(20):
        noise = _round_up(noise)
        spent = confirmed(noise)
        if spent.epsilon <= target and (best is None or noise < best[1]):
            best = (spent, noise)
        if _ACCEPT_FROM * target <= spent.epsilon <= target or noise <= _LEAST_NOISE:
            break
        # epsilon ~ noise^-1 (large noise) to noise^-2: the milder step never overshoots below the needed noise.
        noise *= (spent.epsilon / (_AIM_AT * target)) ** (0.5 if spent.epsilon < target else 1.0)
    if best is None:
        raise ValueError(f"No noise multiplier above {_LEAST_NOISE:g} could be confirmed for epsilon {target:g}.")
    return best


def _round_up(value: float) -> float:
    unit = 10.0 ** (math.floor(math.log10(value)) - 5)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.6g}")


def max_rounds(
    event_per_round: DpEvent,
    *,
    target_epsilon: float,
    delta: float,
    relation: str = "add_or_remove_one",
    prior: DpEvent | None = None,
    limit: int = 10**7,
) -> int:
    """How many rounds fit into a budget: the largest count whose epsilon, after ``prior``, is at most the target.

    Args:
      event_per_round: what one round releases.
      target_epsilon: positive.
      delta: in (0, 1).
      relation: as in ``privacy_spent``.
      prior: what was released before the first of these rounds, or None.
      limit: never answers more; also the answer when a round costs nothing.

    Returns:
      0 if not even one round fits.

    Raises:
      ValueError: a sentence, if an argument is out of range or no accountant applies.
    """
    accounting.check_claim(delta=delta, relation=relation, unit="user")
    _check_target(target_epsilon)
    before = [prior] if prior is not None else []

    def run(rounds: int) -> DpEvent:
        repeated = [dp_event.SelfComposedDpEvent(event_per_round, rounds)] if rounds else []
        return dp_event.ComposedDpEvent([*before, *repeated])

    def fits(rounds: int) -> bool:
        return accounting.privacy_spent(run(rounds), delta=delta, relation=relation).epsilon <= target_epsilon

    def roughly_fits(rounds: int) -> bool:
        return accounting.rough_epsilon(flatten(run(rounds)), delta=delta, relation=relation) <= target_epsilon

    if not flatten(event_per_round):
        return limit if fits(0) else 0
    guess = _last_true(roughly_fits, guess=1, limit=limit) if flatten(run(1)) else limit
    return _last_true(fits, guess=max(guess, 1), limit=limit)


def _last_true(holds: Callable[[int], bool], *, guess: int, limit: int) -> int:
    """The largest count in [0, limit] for which a property holds that ends once and for all; 0 if it never holds."""
    low, high = 0, limit + 1  # holds (or is 0), does not hold (or is past the limit)
    probe = guess
    while high - low > 1:
        if holds(probe):
            low, probe = probe, min(probe + max(probe // 4, 1), (low_high := (probe + high) // 2) or low_high)
        else:
            high, probe = probe, probe - max(probe // 4, 1)
    return low

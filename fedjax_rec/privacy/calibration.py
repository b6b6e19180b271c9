"""Searches over epsilon: the noise that meets a target, and the rounds that a budget affords.

Accounting with a fine PLD grid inside a search is what makes calibration slow. Here RDP gives the bracket (it bounds
epsilon from above at once), PLDs on a coarse grid do the search, and the fine grid only confirms the result.
"""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from dp_accounting import dp_event
from dp_accounting.dp_event import DpEvent

from fedjax_rec.privacy import accounting
from fedjax_rec.privacy.events import flatten

_LEAST_NOISE, _MOST_NOISE = 1e-3, 1e7
# A confirmed epsilon below the first share of the target is not accepted: the noise is lowered, towards the second.
_ACCEPT_FROM, _AIM_AT = 0.999, 0.9999


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

    usual = flatten(make_event(1.0))
    takes_pld = target_epsilon <= accounting.MOST_PLD_EPSILON and accounting.trivial_epsilon(usual) is None
    takes_pld &= accounting.choose_accountant(usual, delta=delta, relation=relation) == accounting.PLD

    def coarse(noise: float) -> float:
        terms = flatten(make_event(noise))
        if not takes_pld:
            return confirmed(noise).epsilon
        interval = accounting.coarse_interval(target_epsilon)
        return accounting.pld_epsilon(terms, delta=delta, relation=relation, interval=interval)

    if rough(_MOST_NOISE) >= target_epsilon * _AIM_AT:  # RDP, a bound: below the target, it is reachable
        _check_reachable(confirmed, target_epsilon)
    start_noise = _solve(rough, target_epsilon, guess=1.0, tolerance=0.05)
    tolerance = 2e-4 if takes_pld else 8e-4  # RDP is slow and has no grid to confirm
    noise = _solve(coarse, target_epsilon * _AIM_AT, guess=start_noise, tolerance=tolerance)
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
    factor = 1.1
    while epsilon_high > target and high < _MOST_NOISE:
        low, epsilon_low = high, epsilon_high
        high, factor = min(high * factor, _MOST_NOISE), min(factor**2, 10)
        epsilon_high = epsilon_of(high)
    while epsilon_low <= target * (1 - tolerance) and low > _LEAST_NOISE:
        high, epsilon_high = low, epsilon_low
        low, factor = max(low / factor, _LEAST_NOISE), min(factor**2, 1.5)  # little noise makes large PLDs: go slowly
        epsilon_low = epsilon_of(low)
    if epsilon_low <= target:
        return low
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

    def spent(rounds: int) -> float:
        return accounting.privacy_spent(run(rounds), delta=delta, relation=relation).epsilon

    def rough(rounds: int) -> float:
        return accounting.rough_epsilon(flatten(run(rounds)), delta=delta, relation=relation)

    if spent(1) > target_epsilon:
        return 0
    if not flatten(event_per_round):
        return limit
    guess = _largest_count(rough, target_epsilon, guess=1, limit=limit)
    return _largest_count(spent, target_epsilon, guess=max(guess, 1), limit=limit)


def _largest_count(epsilon_of: Callable[[int], float], target: float, *, guess: int, limit: int) -> int:
    """The largest count in [0, limit] whose epsilon is at most the target, for an epsilon that grows with the count."""
    low, high = 0, limit + 1  # within the target (or nothing at all), beyond it (or beyond the limit)
    epsilon_low, epsilon_high = 0.0, math.inf
    probe, step = min(guess, limit), max(guess // 8, 1)
    for turn in itertools.count(1):
        epsilon = epsilon_of(probe)
        if epsilon <= target:
            low, epsilon_low = probe, epsilon
        else:
            high, epsilon_high = probe, epsilon
        if high - low <= 1:
            break
        if epsilon_high == math.inf and low:
            probe, step = low + step, 2 * step
        elif epsilon_high == math.inf or turn % 4 == 0:
            probe = (low + high) // 2
        else:
            probe = low + int((target - epsilon_low) / (epsilon_high - epsilon_low) * (high - low))
        probe = min(max(probe, low + 1), high - 1)
    return low

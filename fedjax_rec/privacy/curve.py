"""Epsilon as a function of the number of rounds, for progress bars and plots."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from dp_accounting import dp_event
from dp_accounting.dp_event import DpEvent

from fedjax_rec.privacy import accounting
from fedjax_rec.privacy.events import Terms, flatten

_TOLERANCE = 5e-4  # of the last point; a plot shows no more


def epsilon_curve(
    event_per_round: DpEvent,
    rounds: Sequence[int],
    *,
    delta: float,
    relation: str = "add_or_remove_one",
    prior: DpEvent | None = None,
) -> np.ndarray:
    """Epsilon after each of several numbers of rounds, each an upper bound.

    One round is accounted once and composed onwards from point to point, so many points cost little more than
    a few single calls of ``privacy_spent``; equally spaced points cost least. All points come from the accountant that
    is right for the last one, and are good to about 5e-4 of the last one's epsilon.

    Args:
      event_per_round: what one round releases.
      rounds: numbers of rounds, at least 0, in any order.
      delta: in (0, 1).
      relation: as in ``privacy_spent``.
      prior: what was released before the first of these rounds, or None.

    Returns:
      float64 ``[len(rounds)]``, infinite where something was released without noise.

    Raises:
      ValueError: a sentence, if an argument is out of range or no accountant applies.
    """
    accounting.check_claim(delta=delta, relation=relation, unit="user")
    counts = np.asarray(rounds)
    if counts.size == 0:
        return np.zeros(0)
    if counts.ndim != 1 or counts.dtype.kind not in "iu" or counts.min() < 0:
        raise ValueError(f"rounds must be a flat sequence of integers of at least 0; got {rounds!r}.")
    points, places = np.unique(counts, return_inverse=True)
    before = flatten(prior) if prior is not None else ()
    return _epsilons(flatten(event_per_round), before, [int(n) for n in points], delta, relation)[places]


def epsilon_after(
    releases: Callable[[int, int], Sequence[tuple[DpEvent, int]]],
    rounds: Sequence[int],
    *,
    delta: float,
    relation: str = "add_or_remove_one",
    prior: DpEvent | None = None,
) -> np.ndarray:
    """Epsilon after each of several numbers of rounds, where rounds may differ (noise schedules, cohorts in turn).

    Args:
      releases: of `Rounds`: ``(first_round, num_rounds) -> ((event, count), ...)``.
      rounds: numbers of rounds, at least 0, ascending.
      delta: in (0, 1).
      relation: as in ``privacy_spent``.
      prior: what was released before the first of these rounds, or None.

    Returns:
      float64 ``[len(rounds)]``, each an upper bound.
    """
    every = releases(0, rounds[-1])
    if len(every) == 1 and every[0][1] == rounds[-1]:  # all alike
        return epsilon_curve(every[0][0], rounds, delta=delta, relation=relation, prior=prior)
    before = [prior] if prior is not None else []

    def run(first: int, last: int) -> list[DpEvent]:
        return [dp_event.SelfComposedDpEvent(event, count) for event, count in releases(first, last - first)]

    last = flatten(dp_event.ComposedDpEvent([*before, *run(0, rounds[-1])]))
    trivial = accounting.trivial_epsilon(last)
    if trivial is not None:
        return np.full(len(rounds), trivial)
    if accounting.choose_accountant(last, delta=delta, relation=relation) != accounting.PLD:
        joint = [dp_event.ComposedDpEvent([*before, *run(0, n)]) for n in rounds]
        return np.array([accounting.privacy_spent(event, delta=delta, relation=relation).epsilon for event in joint])
    interval = accounting.coarse_interval(accounting.rough_epsilon(last, delta=delta, relation=relation)) / 2
    total, done, epsilons = accounting.composed_pld(flatten(prior) if before else (), relation, interval), 0, []
    for n in rounds:
        total = total.compose(
            accounting.composed_pld(flatten(dp_event.ComposedDpEvent(run(done, n))), relation, interval)
        )
        epsilons.append(total.get_epsilon_for_delta(delta))
        done = n
    return np.array(epsilons)


def _epsilons(one: Terms, before: Terms, points: list[int], delta: float, relation: str) -> np.ndarray:
    runs = [_joint(one, before, count) for count in points]
    trivial = [accounting.trivial_epsilon(terms) for terms in runs]
    todo = [i for i, epsilon in enumerate(trivial) if epsilon is None]
    epsilons = np.array([math.nan if epsilon is None else epsilon for epsilon in trivial])
    if not todo:
        return epsilons
    # One accountant for all points: a curve must not jump where another one would take over.
    accountant = accounting.choose_accountant(runs[-1], delta=delta, relation=relation)
    counts = [points[i] for i in todo]
    if accountant == accounting.ANALYTIC:
        epsilons[todo] = [accounting.analytic_epsilon(runs[i], delta, relation) for i in todo]
    elif accountant == accounting.RDP:
        epsilons[todo] = _rdp_curve(one, before, counts, delta, relation)
    else:
        epsilons[todo] = _pld_curve(one, before, counts, delta, relation)
    return epsilons


def _joint(one: Terms, before: Terms, count: int) -> Terms:
    parts = [dp_event.SelfComposedDpEvent(event, n) for event, n in before]
    parts += [dp_event.SelfComposedDpEvent(event, n * count) for event, n in one if count]
    return flatten(dp_event.ComposedDpEvent(parts))


def _rdp_curve(one: Terms, before: Terms, counts: list[int], delta: float, relation: str) -> list[float]:
    start, step = accounting.rdp(before, relation), accounting.rdp(one, relation)
    return [accounting.rdp_epsilon(start + count * step, accounting.DEFAULT_RDP_ORDERS, delta) for count in counts]


def _pld_curve(one: Terms, before: Terms, counts: list[int], delta: float, relation: str) -> list[float]:
    last = _joint(one, before, counts[-1])
    interval, epsilon = accounting.refine_interval(
        lambda spacing: accounting.pld_epsilon(last, delta=delta, relation=relation, interval=spacing),
        scale=accounting.rough_epsilon(last, delta=delta, relation=relation),
        tolerance=_TOLERANCE,
    )
    if accounting.beyond_pld(epsilon, last, relation):
        return _rdp_curve(one, before, counts, delta, relation)
    one_round = accounting.composed_pld(one, relation, interval)
    total = accounting.composed_pld(before, relation, interval)
    epsilons, done, steps = [], 0, {}
    for count in counts:
        gap = count - done
        if gap and gap not in steps:
            steps[gap] = one_round.self_compose(gap)
        total = total.compose(steps[gap]) if gap else total
        epsilons.append(total.get_epsilon_for_delta(delta))
        done = count
    return epsilons

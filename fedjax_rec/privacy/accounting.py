"""Epsilon of dp_accounting's events: the tightest of its accountants that is right for them, and what it means.

An analytic Gaussian where there is nothing else, privacy loss distributions (PLD) where they can, Renyi (RDP)
otherwise. Every number is an upper bound. dp_accounting 0.6.0 has three traps, each closed here and held by a test:

1. ``PLDAccountant`` ignores the count of ``RandomizedResponseDpEvent``: here PLDs are composed by hand.
2. ``REPLACE_ONE`` means two things: ``PLDAccountant`` doubles the sensitivity, ``RdpAccountant`` takes the noise
   multiplier as already doubled. Here a noise multiplier is always the standard deviation over the largest norm of ONE
   unit's contribution; ``replace_one`` doubles the sensitivity under either accountant, also inside
   ``SampledWithoutReplacementDpEvent``.
3. PLDs are convolved by FFT, so a delta near the rounding error of many rounds yields an epsilon BELOW the true one:
   such deltas go to RDP.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import attr
import numpy as np
from dp_accounting import NeighboringRelation, dp_event, get_epsilon_gaussian
from dp_accounting.dp_event import DpEvent
from dp_accounting.pld import PLDAccountant, privacy_loss_distribution
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from dp_accounting.rdp import RdpAccountant, compute_epsilon
from dp_accounting.rdp.rdp_privacy_accountant import DEFAULT_RDP_ORDERS

from fedjax_rec.privacy.events import Terms, describe, flatten
from fedjax_rec.privacy.skellam import SkellamDpEvent, doubled, skellam_rdp

RELATIONS = {"add_or_remove_one": "adding or removing", "replace_one": "replacing"}
"""Neighbouring relations, and the verb of each."""

UNITS = {"user": "one user's whole history", "example": "one interaction of one user"}
"""Units of privacy, and what one is."""

ANALYTIC, PLD, RDP = "analytic Gaussian", "PLD", "RDP"
ACCOUNTANTS = (ANALYTIC, PLD, RDP)

_ADD_OR_REMOVE, _REPLACE = NeighboringRelation.ADD_OR_REMOVE_ONE, NeighboringRelation.REPLACE_ONE

# n-fold Gaussians have a known epsilon, and PLDs fall below it where delta nears n roundings of a double (1e-16);
# tests/test_accounting_facts.py shows one such case. This leaves a factor of about a hundred.
_FFT_NOISE_PER_ROUND = 2e-14
MOST_PLD_EPSILON = 500.0
"""Epsilon up to which PLDs are used; dp_accounting sums exp(-loss), which underflows from 700 on."""

# Few integer orders: fast, near enough for a search to start from, and without the series that may not converge.
_QUICK_ORDERS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512)


@dataclass(frozen=True)
class PrivacySpent:
    """What was released, bounded: (epsilon, delta)-differential privacy, of whom, and against what change.

    Attributes:
      epsilon: an upper bound; infinite when something was released without noise.
      delta: probability that the bound by epsilon may fail.
      accountant: "PLD", "RDP" or "analytic Gaussian"; "none" when epsilon is 0 or infinite without any accounting.
      unit: "user" or "example".
      relation: "add_or_remove_one" or "replace_one".
    """

    epsilon: float
    delta: float
    accountant: str
    unit: str
    relation: str

    @property
    def sentence(self) -> str:
        """The guarantee in words, with its unit, relation and delta; epsilon is rounded up."""
        subject = f"{RELATIONS[self.relation]} {UNITS[self.unit]}"
        if self.epsilon == math.inf:
            return f"No {self.unit}-level differential privacy: {subject} may be visible with certainty."
        rounded = math.ceil(self.epsilon * 1e4) / 1e4
        factor = f"exp({rounded:g})" + (f" = {math.exp(rounded):.3g}" if rounded < 100 else "")
        return (
            f"{self.unit.capitalize()}-level ({rounded:g}, {self.delta:g})-differential privacy: {subject} changes the "
            f"probability of anything released by at most a factor of {factor}, except with probability {self.delta:g}."
        )


def check_claim(*, delta: float, relation: str, unit: str) -> None:
    """Raises a ValueError with a sentence unless the three can stand beside an epsilon."""
    if not 0 < delta < 1:
        raise ValueError(f"delta must be between 0 and 1, and far below 1 / number of users; got {delta!r}.")
    if relation not in RELATIONS:
        raise ValueError(f"The neighbouring relation must be one of {', '.join(RELATIONS)}; got {relation!r}.")
    if unit not in UNITS:
        raise ValueError(f"The unit of privacy must be one of {', '.join(UNITS)}; got {unit!r}.")


def delta_warning(delta: float, num_users: int, *, unit: str = "user") -> str | None:
    """A sentence when ``delta`` is too large for a population of ``num_users`` (or examples), else None."""
    if delta < 1 / num_users:
        return None
    return (
        f"delta {delta:g} is not below 1 / {num_users} {unit}s = {1 / num_users:.3g}: publishing one {unit} in "
        f"full, chosen at random, also satisfies it, so epsilon says little. Take at most {0.1 / num_users:.1g}."
    )


def privacy_spent(
    event: DpEvent,
    *,
    delta: float,
    relation: str = "add_or_remove_one",
    unit: str = "user",
    accountant: str | None = None,
) -> PrivacySpent:
    """The epsilon of everything in ``event``, composed jointly.

    The PLD's grid is refined until the bound lies within about 1e-4 (relative) of its limit; see
    ``benchmarks/accounting.py`` for what that costs.

    Args:
      event: the whole run, any nesting of events.
      delta: in (0, 1).
      relation: "add_or_remove_one" or "replace_one"; the latter doubles every sensitivity.
      unit: "user" or "example": whose contribution the noise multipliers are relative to.
      accountant: "PLD", "RDP" or "analytic Gaussian" forces one; None takes the tightest that is right.

    Raises:
      ValueError: a sentence, if an argument is out of range or no accountant can bound the event.
    """
    check_claim(delta=delta, relation=relation, unit=unit)
    terms = flatten(event)
    trivial = trivial_epsilon(terms)
    if trivial is not None:
        return PrivacySpent(trivial, delta, "none", unit, relation)
    forced = accountant is not None
    accountant = choose_accountant(terms, delta=delta, relation=relation, accountant=accountant)
    if accountant == ANALYTIC:
        epsilon = analytic_epsilon(terms, delta, relation)
    else:
        epsilon = _refined_pld_epsilon(terms, delta, relation) if accountant == PLD else math.inf
        if accountant == RDP or (not forced and beyond_pld(epsilon, terms, relation)):
            accountant = RDP
            epsilon = rdp_epsilon(rdp(terms, relation), DEFAULT_RDP_ORDERS, delta)
    return PrivacySpent(float(epsilon), delta, accountant, unit, relation)


def trivial_epsilon(terms: Terms) -> float | None:
    """0 for a composition of nothing, infinity if anything in it has no noise, None if it must be accounted."""
    if not terms:
        return 0.0
    return math.inf if any(isinstance(event, dp_event.NonPrivateDpEvent) for event, _ in terms) else None


def choose_accountant(terms: Terms, *, delta: float, relation: str, accountant: str | None = None) -> str:
    """The tightest accountant that is right for the whole composition: analytic Gaussian, then PLD, then RDP.

    Raises:
      ValueError: a sentence that names the release no accountant supports, or the delta that is too small.
    """
    if accountant is not None and accountant not in ACCOUNTANTS:
        raise ValueError(f"The accountant must be one of {', '.join(ACCOUNTANTS)}; got {accountant!r}.")
    not_pld = [event for event, _ in terms if not _pld_supports(event, relation)]
    not_rdp = [event for event, _ in terms if not _rdp_supports(event, relation)]
    least_delta = _FFT_NOISE_PER_ROUND * sum(count for _, count in terms)
    only_gaussian = len(terms) == 1 and isinstance(terms[0][0], dp_event.GaussianDpEvent)
    able = {ANALYTIC: only_gaussian, PLD: not not_pld and delta >= least_delta, RDP: not not_rdp}
    for name in ACCOUNTANTS if accountant is None else (accountant,):
        if able[name]:
            return name
    if not_pld and not_rdp:
        raise ValueError(_no_accountant_sentence(not_pld, not_rdp, relation))
    reason = f"delta {delta:g} is below the {least_delta:.1g} that PLD resolves after so many rounds"
    if accountant in (None, PLD) and not not_pld:
        raise ValueError(f"{reason}, and RDP does not apply; use a delta of at least {least_delta:.1g}.")
    raise ValueError(f"{accountant} does not apply to {' + '.join(describe(e) for e, _ in terms)} under {relation}.")


def check_supported(event: DpEvent, *, relation: str) -> None:
    """Returns if some accountant has a bound for the event.

    Raises:
      ValueError: a sentence that names the release that has none, and the way out.
    """
    terms = flatten(event)
    if trivial_epsilon(terms) is None:
        choose_accountant(terms, delta=0.5, relation=relation)


def _no_accountant_sentence(not_pld: list[DpEvent], not_rdp: list[DpEvent], relation: str) -> str:
    culprit = next((event for event in not_pld if event in not_rdp), None)
    if culprit is None:
        return (
            f"No accountant takes all of it: PLD has no bound for {describe(not_pld[0])}, RDP none for "
            f"{describe(not_rdp[0])} under {relation}. Replace one of them, or report the two phases apart."
        )
    match culprit:
        case dp_event.SampledWithoutReplacementDpEvent() if relation != "replace_one":
            advice = "Fixed-size cohorts have a bound only under relation='replace_one'; or sample by Poisson."
        case dp_event.RandomizedResponseDpEvent() if relation != "replace_one":
            advice = "A report is always sent, so randomized response compares two values: use relation='replace_one'."
        case dp_event.PoissonSampledDpEvent() | dp_event.SampledWithoutReplacementDpEvent():
            advice = (
                "Sampling has a bound around one Gaussian (Laplace: Poisson, add_or_remove_one); use that, or cohorts "
                "without sampling, full_participation or in_turn."
            )
        case _:
            advice = "Try the other neighbouring relation, or another mechanism."
    return f"No accountant has a bound for {describe(culprit)} under {relation}. {advice}"


def _doubled(event: DpEvent) -> DpEvent:
    """The same release with twice the sensitivity: what replacing a unit costs where removing it costs ``event``."""
    match event:
        case dp_event.GaussianDpEvent() | dp_event.LaplaceDpEvent():
            return attr.evolve(event, noise_multiplier=event.noise_multiplier / 2)
        case dp_event.DiscreteLaplaceDpEvent():
            return attr.evolve(event, sensitivity=event.sensitivity * 2)
        case dp_event.ZCDpEvent():  # group privacy for two: Bun and Steinke (2016)
            return dp_event.ZCDpEvent(rho=4 * event.rho, xi=3 * event.xi)
        case SkellamDpEvent():
            return doubled(event)
        case dp_event.SampledWithoutReplacementDpEvent() | dp_event.RepeatAndSelectDpEvent():
            return attr.evolve(event, event=_doubled(event.event))
        case dp_event.SelfComposedDpEvent():
            return attr.evolve(event, event=_doubled(event.event))
        case dp_event.ComposedDpEvent():
            return dp_event.ComposedDpEvent([_doubled(part) for part in event.events])
    return event


def _for_pld(event: DpEvent, relation: str) -> tuple[DpEvent, NeighboringRelation]:
    """The event and dp_accounting relation whose PLD is this event's under ``relation``."""
    if relation == "add_or_remove_one":
        return event, _ADD_OR_REMOVE
    if isinstance(event, dp_event.GaussianDpEvent | dp_event.LaplaceDpEvent | dp_event.DiscreteLaplaceDpEvent):
        return _doubled(event), _ADD_OR_REMOVE
    return event, _REPLACE


def _pld_supports(event: DpEvent, relation: str) -> bool:
    event, neighbors = _for_pld(event, relation)
    return PLDAccountant(neighbors).supports(event)


def _rdp_supports(event: DpEvent, relation: str) -> bool:
    neighbors = _REPLACE if relation == "replace_one" else _ADD_OR_REMOVE
    return isinstance(event, SkellamDpEvent) or RdpAccountant(neighboring_relation=neighbors).supports(event)


def _single_pld(event: DpEvent, relation: str, interval: float) -> PrivacyLossDistribution:
    """The PLD of one application of a release in normal form, on a grid of spacing ``interval``."""
    event, neighbors = _for_pld(event, relation)
    grid = {"value_discretization_interval": interval}
    make = privacy_loss_distribution
    match event:
        case dp_event.GaussianDpEvent():
            return make.from_gaussian_mechanism(event.noise_multiplier, **grid)
        case dp_event.LaplaceDpEvent():
            return make.from_laplace_mechanism(event.noise_multiplier, **grid)
        case dp_event.DiscreteLaplaceDpEvent():
            return make.from_discrete_laplace_mechanism(event.noise_parameter, event.sensitivity, **grid)
        case dp_event.RandomizedResponseDpEvent():
            return make.from_randomized_response(
                event.noise_parameter, event.num_buckets, neighboring_relation=neighbors, **grid
            )
        case dp_event.TruncatedSubsampledGaussianDpEvent():
            return make.from_truncated_subsampled_gaussian_mechanism(
                **attr.asdict(event), neighboring_relation=neighbors, **grid
            )
    scale, prob = event.event.noise_multiplier, event.sampling_probability
    if isinstance(event.event, dp_event.LaplaceDpEvent):
        return make.from_laplace_mechanism(scale, sampling_prob=prob, **grid)
    return make.from_gaussian_mechanism(scale, sampling_prob=prob, neighboring_relation=neighbors, **grid)


def composed_pld(terms: Terms, relation: str, interval: float) -> PrivacyLossDistribution:
    """The PLD of a whole composition, on a grid of spacing ``interval``; only where ``choose_accountant`` says PLD."""
    total = privacy_loss_distribution.identity(interval)
    for event, count in terms:
        single = _single_pld(event, relation, interval)
        total = total.compose(single.self_compose(count) if count > 1 else single)
    return total


def coarse_interval(scale: float) -> float:
    """A PLD grid spacing that is cheap, and mostly good to 1 % for an epsilon of size ``scale``."""
    return min(max(4e-4 * scale, 1e-6), 1.0)


def pld_epsilon(terms: Terms, *, delta: float, relation: str, interval: float) -> float:
    """An upper bound on epsilon by PLDs on one grid; the tighter, and slower, the smaller ``interval`` is."""
    with np.errstate(over="ignore"):  # far beyond exp(700) it answers infinity, which is true
        return composed_pld(terms, relation, interval).get_epsilon_for_delta(delta)


def beyond_pld(epsilon: float, terms: Terms, relation: str) -> bool:
    """Whether a PLD's epsilon is so large that its exponentials overflow, and RDP has a bound instead."""
    return epsilon > MOST_PLD_EPSILON and all(_rdp_supports(event, relation) for event, _ in terms)


def refine_interval(epsilon_at: Callable[[float], float], *, scale: float, tolerance: float) -> tuple[float, float]:
    """A grid spacing at which the discretisation costs less than ``tolerance`` (relative), and the epsilon there.

    Connect-the-dots PLDs (Doroshenko et al., 2022, "Connect the Dots: Tighter Discrete Approximations of Privacy Loss
    Distributions") bound epsilon from above with an error quadratic in the spacing, so two cheap grids tell it.

    Args:
      epsilon_at: epsilon as a function of the spacing.
      scale: rough size of epsilon.
      tolerance: largest relative error.
    """
    coarse = coarse_interval(scale)
    fine = coarse / 2
    epsilon = epsilon_at(fine)
    error = max(epsilon_at(coarse) - epsilon, 0.0) / 3
    if error <= tolerance * epsilon or epsilon == math.inf:
        return fine, epsilon
    spacing = max(0.7 * fine * math.sqrt(tolerance * (epsilon - error) / error) if epsilon > error else 0, fine / 16)
    return spacing, epsilon_at(spacing)


def _refined_pld_epsilon(terms: Terms, delta: float, relation: str) -> float:
    def epsilon_at(interval: float) -> float:
        return pld_epsilon(terms, delta=delta, relation=relation, interval=interval)

    return refine_interval(epsilon_at, scale=rough_epsilon(terms, delta=delta, relation=relation), tolerance=1e-4)[1]


def analytic_epsilon(terms: Terms, delta: float, relation: str) -> float:
    """The exact epsilon of one Gaussian (Balle and Wang, 2018, "Improving the Gaussian Mechanism")."""
    (event, _), *_ = terms
    event = _doubled(event) if relation == "replace_one" else event
    with np.errstate(divide="ignore"):  # where its search meets epsilon 0 exactly
        return get_epsilon_gaussian(event.noise_multiplier, delta)


def rdp(terms: Terms, relation: str, orders: Sequence[float] = DEFAULT_RDP_ORDERS) -> np.ndarray:
    """Renyi divergences ``[orders]`` of a whole composition, sensitivities doubled under "replace_one"."""
    accountant = RdpAccountant(orders, _REPLACE if relation == "replace_one" else _ADD_OR_REMOVE)
    skellam = np.zeros(len(orders))
    for event, count in terms:
        event = _doubled(event) if relation == "replace_one" else event
        if isinstance(event, SkellamDpEvent):
            skellam += count * skellam_rdp(event, orders)
        else:
            accountant.compose(event, count)
    return accountant.rdp + skellam


def rdp_epsilon(divergences: np.ndarray, orders: Sequence[float], delta: float) -> float:
    """Epsilon of Renyi divergences ``[orders]``, which float rounding may have left a little below zero."""
    return float(compute_epsilon(orders, np.maximum(divergences, 0.0), delta)[0])


def rough_epsilon(terms: Terms, *, delta: float, relation: str) -> float:
    """Epsilon by RDP at a few orders, quickly; it chooses grids and starts searches, and is never reported."""
    total = sum((count * _quick_rdp(event, relation) for event, count in terms), np.zeros(len(_QUICK_ORDERS)))
    return rdp_epsilon(total, _QUICK_ORDERS, delta)


def _quick_rdp(event: DpEvent, relation: str) -> np.ndarray:
    """RDP of one application at the quick orders; where RDP has no bound, that of a similar release."""
    match event:
        case dp_event.TruncatedSubsampledGaussianDpEvent():
            gaussian = dp_event.GaussianDpEvent(event.noise_multiplier)
            event = dp_event.PoissonSampledDpEvent(event.sampling_probability, gaussian)
        case dp_event.DiscreteLaplaceDpEvent():
            return _pure_rdp(event.noise_parameter * event.sensitivity)
        case dp_event.PoissonSampledDpEvent(event=dp_event.LaplaceDpEvent()):
            prob = event.sampling_probability
            return _pure_rdp(np.logaddexp(math.log1p(-prob), math.log(prob) + 1 / event.event.noise_multiplier))
    relation = relation if _rdp_supports(event, relation) else "add_or_remove_one"
    return rdp(((event, 1),), relation, _QUICK_ORDERS)


def _pure_rdp(epsilon: float) -> np.ndarray:
    """RDP of a pure epsilon at the quick orders (Bun and Steinke, 2016, "Concentrated Differential Privacy")."""
    return np.minimum(epsilon, epsilon**2 / 2 * np.array(_QUICK_ORDERS))

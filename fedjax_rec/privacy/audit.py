"""Audits: how much privacy the rounds that really run lose at least, seen from what they release.

Thousands of canary clients are each put into a run, or left out, by a fair coin, and go through the very chain, sampler
and round code. Whoever guesses the coins from the released sums better than epsilon allows has shown that the claim is
wrong. An audit proves bugs; it never proves that there are none.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from dp_accounting import NonPrivateDpEvent, dp_event, get_epsilon_gaussian
from jax_privacy.auditing import CanaryScoreAuditor, Explicit
from scipy.stats import norm

from fedjax_rec.federated.cohort import Sampler
from fedjax_rec.federated.round import Rounds, make_rounds
from fedjax_rec.federated.transforms import UpdateTransform
from fedjax_rec.privacy import accounting
from fedjax_rec.privacy.canaries import Layout, Scores, canary_stream, crowd_stream, kinds
from fedjax_rec.privacy.events import flatten

SHARES = (0.05, 0.25)
"""Shares of the canaries that are guessed to be in, those with the highest scores; fixed before any score is seen."""

NUM_CROWD_RUNS = 500
LEAST_CANARIES = 100
_IGNORED_DELTA = 1e-9  # of a privacy curve, in its Gaussian envelope


class Finding(NamedTuple):
    """What one score of one kind of canary shows.

    Attributes:
      score: its name.
      num_canaries: coins to guess.
      num_guesses: how many canaries were guessed to be in, at the better share of `SHARES`.
      num_correct: how many of them were.
      lower_bound: of epsilon, at the audit's delta; the confidence holds for all findings together.
    """

    score: str
    num_canaries: int
    num_guesses: int
    num_correct: int
    lower_bound: float


@dataclass(frozen=True)
class AuditResult:
    """An audit's verdict.

    Attributes:
      claimed_epsilon: of the audited rounds, by the accountant.
      lower_bound: of their true epsilon, whatever the mechanism is (Steinke et al., 2023).
      lower_bound_fdp: the same if their privacy curve is that of a Gaussian mechanism (Mahloujifar et al., 2024);
        tighter, and compared with ``gaussian_epsilon`` only.
      gaussian_epsilon: epsilon of the least noisy Gaussian mechanism whose curve covers the claimed one everywhere;
        infinite where no such curve is known, and then ``lower_bound_fdp`` decides nothing.
      delta: of all four.
      num_canaries: trials of each kind of canary.
      num_rounds: of each run.
      confidence: with which a right implementation passes.
      most_visible: the largest ``lower_bound`` that so many canaries could have shown.
      worst: the finding of ``lower_bound``.
      findings: of every score.
    """

    claimed_epsilon: float
    lower_bound: float
    lower_bound_fdp: float
    gaussian_epsilon: float
    delta: float
    num_canaries: int
    num_rounds: int
    confidence: float
    most_visible: float
    worst: Finding
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether no lower bound is above what is claimed."""
        return self.lower_bound <= self.claimed_epsilon and self.lower_bound_fdp <= self.gaussian_epsilon

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        trials = f"{self.num_canaries:,} canary clients in {self.num_rounds} round{'s' * (self.num_rounds > 1)}"
        claim = f"{self.claimed_epsilon:.3g} that {'is' if self.passed else 'was'} claimed at delta {self.delta:g}"
        sure = f"{100 * self.confidence:g} % confidence"
        if self.passed and self.claimed_epsilon >= self.most_visible:
            return (
                f"Nothing learned: {trials} could have shown an epsilon of at most {self.most_visible:.3g}, and the "
                f"claim is {self.claimed_epsilon:.3g}. Audit fewer rounds, or with more canaries."
            )
        if self.passed:
            return (
                f"No bug seen: {trials} show an epsilon of at least {self.lower_bound:.3g} ({sure}), within the "
                f"{claim}; they could have shown up to {self.most_visible:.3g}."
            )
        worst = self.worst
        guessed = f"of {worst.num_guesses:,} canaries guessed to be in by {worst.score!r}, {worst.num_correct:,} were"
        if self.lower_bound > self.claimed_epsilon:
            shown = "infinite" if self.lower_bound == math.inf else f"at least {self.lower_bound:.3g}"
            return f"A bug: {trials} show that epsilon is {shown} ({sure}), above the {claim}: {guessed}."
        return (
            f"A bug: {trials} show a privacy curve that no Gaussian mechanism of epsilon below "
            f"{self.lower_bound_fdp:.3g} has ({sure}), and the claimed curve is within one of "
            f"{self.gaussian_epsilon:.3g} at delta {self.delta:g}: {guessed}."
        )


def audit_rounds(
    transforms: UpdateTransform, sampler: Sampler, *, num_rounds: int, key: jax.Array, **options
) -> AuditResult:
    """One audit: see `make_audit`, whose options it takes, for many.

    Args:
      transforms: the chain.
      sampler: who takes part.
      num_rounds: of each run.
      key: of coins, cohorts and noise.
      **options: of `make_audit`.
    """
    return make_audit(transforms, sampler, num_rounds=num_rounds, **options)(key)


def make_audit(
    transforms: UpdateTransform,
    sampler: Sampler,
    *,
    num_rounds: int,
    num_canaries: int = 5000,
    delta: float = 1e-5,
    claimed_event: dp_event.DpEvent | None = None,
    claimed_epsilon: float | None = None,
    confidence: float = 0.95,
    num_crowd_runs: int = NUM_CROWD_RUNS,
    layout: Layout | None = None,
    make: Callable[..., Rounds] = make_rounds,
) -> Callable[[jax.Array], AuditResult]:
    """Compiles the audit of a chain and a sampler: ``audit(key) -> AuditResult``, any number of times.

    Steinke, Nasr and Jagielski, 2023, "Privacy Auditing with One (1) Training Run": if a mechanism is (epsilon,
    delta)-DP in each of m independent fair coins, then the number of right ones among r guesses is stochastically at
    most Binomial(r, 1 / (1 + exp(-epsilon))), up to a term in m * delta. Mahloujifar, Melis and Chaudhuri, 2024,
    "Auditing f-Differential Privacy in One Run", bound it by a whole privacy curve, here a Gaussian one.

    Guarantee: if the rounds satisfy what is claimed for adding or removing (or replacing) one client, the audit passes
    with a probability of at least ``confidence``. The guesses are the canaries with the highest scores, in shares that
    are fixed beforehand; scores, shares and the two theorems share the error by Bonferroni's rule.

    Args:
      transforms: the chain, as it runs.
      sampler: who takes part; its population is the canaries' (see `canary_stream`).
      num_rounds: of each run. Audit as many as cost an epsilon of about 2: few canaries see far above.
      num_canaries: coins for each kind of canary. With 5000 at epsilon 2, a third of the right noise is always seen.
      delta: of the claim, small against 1 / num_canaries.
      claimed_event: all that the rounds claim to release; by default what `Rounds.releases` says.
      claimed_epsilon: a number instead; then nothing is known of the curve, and the first theorem decides alone.
      confidence: see above.
      num_crowd_runs: trials of the crowd's canary; 0 leaves it out.
      layout: of the canaries' updates, for chains that name their tables; one table and a dense leaf by default.
      make: builds the rounds; `make_rounds`, or other round code to audit.

    Raises:
      ValueError: if nothing is claimed, or a number is out of range.
    """
    accounting.check_claim(delta=delta, relation=sampler.relation, unit="user")
    if num_canaries < LEAST_CANARIES:
        raise ValueError(f"An audit needs at least {LEAST_CANARIES} canaries to say anything; got {num_canaries}.")
    if num_rounds < 1 or not 0.5 < confidence < 1:
        raise ValueError(f"An audit needs a round and a confidence between 0.5 and 1; got {num_rounds}, {confidence}.")
    layout = layout or Layout()
    settings = {"num_rounds": num_rounds, "layout": layout, "make": make}
    rounds, stream = canary_stream(transforms, sampler, num_canaries=num_canaries, **settings)
    crowd = crowd_stream(transforms, sampler, num_runs=num_crowd_runs, **settings) if num_crowd_runs else None
    gaussian_epsilon = math.inf
    if claimed_epsilon is None:
        event = claimed_event or _composed(rounds.releases(0, num_rounds))
        claimed_epsilon = accounting.privacy_spent(event, delta=delta, relation=sampler.relation).epsilon
        if claimed_epsilon == math.inf:
            raise ValueError("These rounds claim no epsilon, so there is nothing to audit: the chain adds no noise.")
        mu = gaussian_envelope(event, relation=sampler.relation)
        gaussian_epsilon = _gaussian_epsilon(mu, delta)

    def audit(key: jax.Array) -> AuditResult:
        kind_key, crowd_key = jax.random.split(key)
        told = []  # (coins, name, scores)
        for index, kind in enumerate(kinds(layout)):
            told += _named(*stream(kind, jax.random.fold_in(kind_key, index)))
        if crowd is not None:
            told += _named(*crowd(crowd_key))
        significance = (1 - confidence) / 2 / len(told)  # half for each theorem
        findings = [find(coins, scores, name, significance, delta) for coins, name, scores in told]
        place = max(range(len(told)), key=lambda i: (findings[i].lower_bound, _precision(*told[i][::2])))
        coins, _, scores = told[place]
        return AuditResult(
            claimed_epsilon=float(claimed_epsilon),
            lower_bound=findings[place].lower_bound,
            lower_bound_fdp=_lower_bound_fdp(coins, scores, significance, delta),
            gaussian_epsilon=gaussian_epsilon,
            delta=delta,
            num_canaries=findings[0].num_canaries,
            num_rounds=num_rounds,
            confidence=confidence,
            most_visible=_most_visible(findings[0].num_canaries, significance, delta),
            worst=findings[place],
            findings=tuple(findings),
        )

    return audit


def find(coins: np.ndarray, scores: np.ndarray, score: str, significance: float, delta: float) -> Finding:
    """The larger lower bound over `SHARES`, at a level of ``significance`` for both together.

    Args:
      coins: bool ``[trials]``, True for the canaries that were in.
      scores: float64 ``[trials]``, higher for those that seem to be in.
      score: its name.
      significance: probability that the bound may be too high.
      delta: of epsilon.
    """
    if np.all(scores == np.inf):  # everything is lost: that too tells a client's NaN from its absence
        return Finding(score, len(coins), len(coins), int(coins.sum()), math.inf)
    auditor = CanaryScoreAuditor(scores[coins], scores[~coins])
    found = []
    for share in SHARES:
        guessed = scores >= _threshold(scores, share)
        bound = auditor.epsilon_one_run(
            significance / len(SHARES), delta, threshold_strategy=Explicit(_threshold(scores, share))
        )
        found.append((float(bound), -share, int(guessed.sum()), int((guessed & coins).sum())))
    bound, _, num_guesses, num_correct = max(found)
    return Finding(score, len(coins), num_guesses, num_correct, bound)


def gaussian_envelope(event: dp_event.DpEvent, *, relation: str = "add_or_remove_one", num_points: int = 500) -> float:
    """The least mu such that the privacy curve of ``event`` lies within that of a mu-Gaussian mechanism.

    A mu-Gaussian mechanism has noise of 1 / mu sensitivities (Dong, Roth and Su, 2022, "Gaussian Differential
    Privacy"), and delta(epsilon) = Phi(mu/2 - epsilon/mu) - exp(epsilon) Phi(-mu/2 - epsilon/mu). The envelope is taken
    over a grid of epsilons, on the safe side of it, where the event's delta is above 1e-9.

    Args:
      event: all that was released.
      relation: as in ``privacy_spent``.
      num_points: of the grid.

    Returns:
      mu; infinite where no accountant knows the curve well (without a privacy loss distribution).
    """
    terms = flatten(event)
    if accounting.trivial_epsilon(terms) is not None:
        return 0.0 if accounting.trivial_epsilon(terms) == 0 else math.inf
    delta = max(_IGNORED_DELTA, 1e-13 * sum(count for _, count in terms))
    try:
        accountant = accounting.choose_accountant(terms, delta=delta, relation=relation)
    except ValueError:
        return math.inf
    if accountant == accounting.ANALYTIC:
        doubled = 2.0 if relation == "replace_one" else 1.0
        return doubled / terms[0][0].noise_multiplier
    if accountant != accounting.PLD:
        return math.inf
    interval = accounting.coarse_interval(accounting.rough_epsilon(terms, delta=1e-5, relation=relation)) / 2
    curve = accounting.composed_pld(terms, relation, interval)
    top = curve.get_epsilon_for_delta(delta)
    if not 0 < top < accounting.MOST_PLD_EPSILON:
        return 0.0 if top == 0 else math.inf
    epsilons = np.linspace(0, top, num_points)
    claimed = np.asarray([curve.get_delta_for_epsilon(e) for e in epsilons])

    def covers(mu):  # between two points, the claim is at most its left end, the Gaussian at least its right end
        return np.all(gaussian_delta(epsilons[1:], mu) >= claimed[:-1])

    low, high = 1e-6, 1.0
    while not covers(high):
        low, high = high, 2 * high
        if high > 1e3:
            return math.inf
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if covers(middle) else (middle, high)
    return high


def gaussian_delta(epsilon: np.ndarray, mu: float) -> np.ndarray:
    """delta of a mu-Gaussian mechanism at ``epsilon``."""
    return norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu))


def _gaussian_epsilon(mu: float, delta: float) -> float:
    if mu in (0.0, math.inf):
        return mu
    with np.errstate(divide="ignore"):
        return float(get_epsilon_gaussian(1 / mu, delta))


def _composed(releases) -> dp_event.DpEvent:
    if not releases:
        return NonPrivateDpEvent()
    return dp_event.ComposedDpEvent([dp_event.SelfComposedDpEvent(event, count) for event, count in releases])


def _named(coins: np.ndarray, scores: Scores) -> list[tuple[np.ndarray, str, np.ndarray]]:
    return [(coins, name, values) for name, values in scores.items()]


def _threshold(scores: np.ndarray, share: float) -> float:
    """The score of the last canary that is guessed to be in; ties with it are guessed too."""
    return float(np.sort(scores)[-math.ceil(share * len(scores))])


def _precision(coins: np.ndarray, scores: np.ndarray) -> float:
    return float(coins[scores >= _threshold(scores, SHARES[0])].mean())


def _lower_bound_fdp(coins: np.ndarray, scores: np.ndarray, significance: float, delta: float) -> float:
    if np.all(scores == np.inf):
        return math.inf
    strategy = Explicit(_threshold(scores, SHARES[0]))
    auditor = CanaryScoreAuditor(scores[coins], scores[~coins])
    return float(auditor.epsilon_one_run_fdp(significance, delta, threshold_strategy=strategy))


@functools.lru_cache
def _most_visible(num_canaries: int, significance: float, delta: float) -> float:
    """The lower bound of an audit whose guesses are all right."""
    coins = np.arange(num_canaries) % 2 == 0
    return find(coins, coins * (1.0 + np.arange(num_canaries)), "all", significance, delta).lower_bound

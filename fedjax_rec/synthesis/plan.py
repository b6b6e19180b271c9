"""From a budget to a fitted generator: the noise of all releases solved together, and each of them charged."""

import math
from typing import NamedTuple

import jax
import numpy as np

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.privacy.accounting import PrivacySpent
from fedjax_rec.privacy.budget import Phase, Plan, SolvedPlan, solve
from fedjax_rec.privacy.ledger import Budget, BudgetExceeded, Ledger
from fedjax_rec.synthesis.generator import Generator
from fedjax_rec.synthesis.lengths import DpLengths, dp_lengths
from fedjax_rec.synthesis.methods import Method, Report, quiet

LENGTHS = "lengths"
LENGTHS_WEIGHT = 4.0  # of the noise in the histogram: a sixteenth of what a release of weight 1 spends
RELEASED_LENGTHS = "histogram of history lengths"


class Fitted(NamedTuple):
    """A generator, and everything that was released for it.

    Attributes:
      generator: draws histories.
      lengths: the released lengths.
      ledger: every release.
      spent: epsilon of the ledger with its unit, delta and relation; None without privacy.
    """

    generator: Generator
    lengths: DpLengths
    ledger: Ledger
    spent: PrivacySpent | None


def usual_delta(num_users: int) -> float:
    """1 / N^1.1, for N users: below the chance of publishing one of them at random."""
    return num_users**-1.1


def solve_phases(
    method: Method, *, num_users: int, num_items: int, epsilon: float, delta: float, ledger: Ledger | None = None
) -> SolvedPlan:
    """The noise of every release of a method, the lengths included, within one epsilon.

    Args:
      method: names its releases.
      num_users: of the population, public.
      num_items: of the catalogue, public.
      epsilon: for all of them together, finite.
      delta: of the guarantee.
      ledger: what was released before on the same users, which counts against epsilon.

    Raises:
      BudgetExceeded: if the earlier releases leave nothing.
      ValueError: a sentence, if no noise reaches the target.
    """
    prior = ledger.event if ledger is not None and ledger.entries else None
    if prior is not None and (before := ledger.spent(delta)).epsilon >= epsilon:
        raise BudgetExceeded(
            f"The ledger has spent epsilon {before.epsilon:.6g} at delta {delta:g} ({before.unit}-level, "
            f"{before.relation}) already, and the budget is {epsilon:g}; nothing released. Raise the budget."
        )
    phases = (Phase(LENGTHS, weight=LENGTHS_WEIGHT), *method.phases(num_users, num_items))
    return solve(Plan(phases=phases, epsilon=epsilon, delta=delta, num_users=num_users), prior=prior)


def fit_generator(
    method: Method,
    train: Interactions,
    *,
    epsilon: float,
    delta: float | None = None,
    key: jax.Array,
    ledger: Ledger | None = None,
    report: Report = quiet,
) -> Fitted:
    """Fits a generator on real users within a budget.

    Guarantee: user-level, adding or removing one user with all of its rows, a trusted curator. What the generator knows
    and how long its histories are is (epsilon, delta)-differentially private, by the ledger that comes back: the
    lengths, and each release that the method names. The catalogue and the number of users are public. The budget is
    checked before anything is released; a `ledger` given from earlier releases counts against it.

    Args:
      method: `gram_method()`, `vae_method()`, ...
      train: rows of the real users.
      epsilon: for everything together; infinite = without privacy, which says so in the generator.
      delta: None = `usual_delta`.
      key: seeds the noise: secret, and used for nothing else.
      ledger: releases made before, on the same users.
      report: progress.

    Raises:
      BudgetExceeded: before any release, if the earlier releases leave too little.
      ValueError: for an epsilon that is not positive, or no users.
    """
    num_users = int(np.count_nonzero(train.counts_per_user))  # public, by the guarantee's own words
    if num_users < 1:
        raise ValueError(f"{train.name} has no user with a row; there is nothing to fit.")
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive (infinite = without privacy); got {epsilon}.")
    length_key, fit_key = jax.random.split(key)
    ledger = Ledger() if ledger is None else ledger
    if epsilon == math.inf:
        noise = {p.name: np.zeros(p.rounds) for p in method.phases(num_users, train.num_items)}
        lengths = dp_lengths(train, noise_multiplier=0.0, key=length_key)
        return Fitted(method.fit(train, noise, fit_key, report), lengths, ledger, None)
    delta = usual_delta(num_users) if delta is None else delta
    solved = solve_phases(
        method, num_users=num_users, num_items=train.num_items, epsilon=epsilon, delta=delta, ledger=ledger
    )
    Budget(epsilon, delta).require(ledger, solved.event)
    noise = {name: found.noise_multipliers for name, found in solved.phases.items()}
    lengths = dp_lengths(train, noise_multiplier=float(noise[LENGTHS][0]), key=length_key)
    ledger = ledger.record(lengths.dp_event, phase=LENGTHS, released=RELEASED_LENGTHS)
    generator = method.fit(train, noise, fit_key, report)
    _check_charged(generator, solved)
    for entry in generator.releases:
        ledger = ledger.record(
            entry.event, phase=entry.phase, released=entry.released, sampler=entry.sampler, count=entry.count
        )
    spent = ledger.spent(delta)
    return Fitted(generator, lengths, ledger, spent)


def _check_charged(generator: Generator, solved: SolvedPlan) -> None:
    """What was planned and what was released must be the same phases, or the ledger would be short of one."""
    planned = {name for name in solved.phases if name != LENGTHS}
    charged = {entry.phase for entry in generator.releases}
    if planned != charged or not generator.private:
        raise RuntimeError(
            f"The generator {generator.name!r} planned releases {sorted(planned)} and charged {sorted(charged)} "
            f"(private={generator.private}): its method must record each release under its phase's name."
        )

"""`fedjax-rec epsilon`: what a run would spend, or the noise that meets a target, without running anything."""

import dataclasses
import json
import sys
from typing import Literal

from dp_accounting import dp_event
from dp_accounting.dp_event import DpEvent
from rich.console import Console
from rich.table import Table

from fedjax_rec.privacy.accounting import PrivacySpent, delta_warning, privacy_spent
from fedjax_rec.privacy.calibration import calibrate_noise_multiplier
from fedjax_rec.privacy.ledger import spent_to_dict


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpsilonConfig:
    """Privacy calculator: the epsilon of a training run, or the noise for a target epsilon.

    What do 500 rounds cost when each user takes part with probability 0.0424?

        fedjax-rec epsilon --sampling-prob 0.0424 --noise-multiplier 1.0 --rounds 500 --delta 1e-5

    Which noise keeps them at epsilon 2?

        fedjax-rec epsilon --sampling-prob 0.0424 --target-epsilon 2 --rounds 500 --delta 1e-5
    """

    rounds: int
    """Number of rounds, each one noised release."""
    noise_multiplier: float | None = None
    """Standard deviation of the noise on the sum, divided by the clip norm."""
    target_epsilon: float | None = None
    """Solve for the noise multiplier that stays at or below this epsilon."""
    sampling_prob: float | None = None
    """Probability that a user takes part in a round (sampler poisson); or give --cohort-size and --num-users."""
    delta: float = 1e-5
    """Probability that the bound by epsilon may fail; choose it well below 1 / number of users."""
    sampler: Literal["poisson", "fixed_size", "all"] = "poisson"
    """How cohorts are drawn: independently, exactly --cohort-size of --num-users, or everyone every round."""
    cohort_size: int | None = None
    """Users per round: exactly (fixed_size) or in expectation (poisson)."""
    num_users: int | None = None
    """Users in the population (with --unit example: examples); also checks delta."""
    unit: Literal["user", "example"] = "user"
    """Whom the guarantee protects: one user's whole history, or one interaction."""
    json: bool = False
    """Print one JSON object and nothing else."""


def run(config: EpsilonConfig) -> int:
    """Prints the answer to standard output, or a sentence to standard error.

    Returns:
      The exit code: 0, or 2 if the question cannot be answered as asked.
    """
    try:
        answer = _answer(config)
    except ValueError as error:
        print(f"fedjax-rec epsilon: {error}", file=sys.stderr)
        return 2
    if config.json:
        print(json.dumps(answer.to_dict(), allow_nan=False))
    else:
        _print_table(answer)
    if answer.warning:
        print(f"warning: {answer.warning}", file=sys.stderr)
    return 0


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the calculator found.

    Attributes:
      spent: the guarantee.
      noise_multiplier: as given or as solved for.
      sampling_prob: share of the population in a round.
      sampler: as in the config.
      rounds: as in the config.
      warning: a sentence, or None.
    """

    spent: PrivacySpent
    noise_multiplier: float
    sampling_prob: float
    sampler: str
    rounds: int
    warning: str | None

    def to_dict(self) -> dict:
        """One flat JSON object; an infinite epsilon is the string "inf"."""
        rest = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "spent"}
        return spent_to_dict(self.spent) | rest


def _answer(config: EpsilonConfig) -> Answer:
    if config.rounds < 1:
        raise ValueError(f"--rounds must be at least 1; got {config.rounds}.")
    if (config.noise_multiplier is None) == (config.target_epsilon is None):
        raise ValueError("Give either --noise-multiplier, to learn epsilon, or --target-epsilon, to learn the noise.")
    if config.num_users is not None and config.num_users < 1:
        raise ValueError(f"--num-users must be at least 1; got {config.num_users}.")
    prob = _sampling_prob(config)
    claim = {
        "delta": config.delta,
        "relation": "replace_one" if config.sampler == "fixed_size" else "add_or_remove_one",
        "unit": config.unit,
    }
    noise = config.noise_multiplier
    if noise is None:
        noise = calibrate_noise_multiplier(
            lambda z: _event(config, prob, z), target_epsilon=config.target_epsilon, **claim
        ).noise_multiplier
    spent = privacy_spent(_event(config, prob, noise), **claim)
    warning = delta_warning(config.delta, config.num_users, unit=config.unit) if config.num_users else None
    return Answer(spent, noise, prob, config.sampler, config.rounds, warning)


def _sampling_prob(config: EpsilonConfig) -> float:
    prob, cohort, population = config.sampling_prob, config.cohort_size, config.num_users
    if cohort is not None and population is not None and not 0 < cohort <= population:
        raise ValueError(f"--cohort-size must be between 1 and --num-users {population}; got {cohort}.")
    if config.sampler == "all":
        if prob not in (None, 1.0) or cohort not in (None, population):
            raise ValueError("--sampler all takes everyone every round: leave out --sampling-prob and --cohort-size.")
        return 1.0
    if config.sampler == "fixed_size" and prob is not None:
        raise ValueError("--sampler fixed_size has no --sampling-prob: give --cohort-size and --num-users.")
    if prob is not None and cohort is not None:
        raise ValueError("Give either --sampling-prob or --cohort-size with --num-users, not both.")
    if prob is None and (cohort is None or population is None):
        alternative = "" if config.sampler == "fixed_size" else "--sampling-prob, or "
        raise ValueError(f"--sampler {config.sampler} needs {alternative}--cohort-size and --num-users.")
    prob = cohort / population if prob is None else prob
    if not 0 < prob <= 1:
        raise ValueError(f"--sampling-prob must be above 0 and at most 1; got {prob:g}.")
    return prob


def _event(config: EpsilonConfig, prob: float, noise_multiplier: float) -> DpEvent:
    release = dp_event.GaussianDpEvent(noise_multiplier)
    if config.sampler == "poisson":
        release = dp_event.PoissonSampledDpEvent(prob, release)
    elif config.sampler == "fixed_size":
        release = dp_event.SampledWithoutReplacementDpEvent(config.num_users, config.cohort_size, release)
    return dp_event.SelfComposedDpEvent(release, config.rounds)


_SAMPLING = {
    "poisson": "in each round every {unit} is drawn independently with probability {prob:.4g}, in secret",
    "fixed_size": "in each round a fixed number of {unit}s, a share of {prob:.4g}, is drawn uniformly without "
    "replacement, in secret, from a population of public size",
    "all": "every {unit} takes part in every round",
}
_CONTRIBUTION = {"user": "each user's whole update", "example": "each example's gradient"}


def _print_table(answer: Answer) -> None:
    spent = answer.spent
    table = Table(show_header=False)
    for name, value in (
        ("epsilon", f"{spent.epsilon:.6g}"),
        ("delta", f"{spent.delta:g}"),
        ("unit", spent.unit),
        ("relation", spent.relation),
        ("sampler", f"{answer.sampler}, probability {answer.sampling_prob:.4g}"),
        ("rounds", str(answer.rounds)),
        ("noise multiplier", f"{answer.noise_multiplier:g}"),
        ("accountant", spent.accountant),
    ):
        table.add_row(name, value)
    sampling = _SAMPLING[answer.sampler].format(unit=spent.unit, prob=answer.sampling_prob)
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(spent.sentence)
    console.print(
        f"Assumes that {sampling}; that {_CONTRIBUTION[spent.unit]} is clipped to one L2 norm before the sum; that "
        f"Gaussian noise of {answer.noise_multiplier:g} times that norm is added to the sum once per round; and that "
        "nothing else about the data is released."
    )

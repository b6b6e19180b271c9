"""Who takes part in a round, and what that means for the accountant.

A sampler draws the cohort *and* emits the `DpEvent` of a release made on it, so sampling and accounting cannot
diverge. Sums are divided by ``expected_size``, which is public, and never by the realised size, which is not.
"""

from collections.abc import Callable
from typing import NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp


class Sampler(NamedTuple):
    """How cohorts are drawn.

    Attributes:
      name: ``"poisson"``, ``"fixed_size"`` or ``"all"``.
      draw: ``draw(key) -> bool [num_clients]``, True for the clients of this round.
      dp_event: turns the event of one release into the event of that release on a sampled cohort.
      expected_size: clients per round in expectation; public.
      sampling_prob: probability that a given client takes part in a given round.
      relation: the neighbouring relation for which ``dp_event`` holds.
    """

    name: str
    draw: Callable[[jax.Array], jax.Array]
    dp_event: Callable[[dp_accounting.DpEvent], dp_accounting.DpEvent]
    expected_size: float
    sampling_prob: float
    relation: str


def _check_cohort_size(cohort_size: float, num_clients: int) -> None:
    if not 0 < cohort_size <= num_clients:
        raise ValueError(
            f"The cohort size must be between 1 and the number of clients, {num_clients}; got {cohort_size}. "
            f"Use full_participation({num_clients}) to take everyone."
        )


def poisson(num_clients: int, *, cohort_size: float) -> Sampler:
    """Every client takes part independently with probability ``cohort_size / num_clients``.

    The cohort's size varies and may be zero. This is the sampling that amplification theorems are about
    (Abadi et al., 2016, "Deep Learning with Differential Privacy"), under the add-or-remove-one relation.

    Args:
      num_clients: clients in the population.
      cohort_size: expected clients per round.

    Raises:
      ValueError: if ``cohort_size`` is not in ``(0, num_clients]``.
    """
    _check_cohort_size(cohort_size, num_clients)
    prob = cohort_size / num_clients
    # On 32 random bits, rounded down: float32 uniforms have 23, so rare clients would take part too often for prob.
    threshold = jnp.uint32(min(int(prob * 2**32), 2**32 - 1))

    def draw(key):
        if prob == 1:
            return jnp.ones(num_clients, bool)
        return jax.random.bits(key, (num_clients,), jnp.uint32) < threshold

    return Sampler(
        name="poisson",
        draw=draw,
        dp_event=lambda release: dp_accounting.PoissonSampledDpEvent(prob, release),
        expected_size=cohort_size,
        sampling_prob=prob,
        relation="add_or_remove_one",
    )


def fixed_size(num_clients: int, *, cohort_size: int) -> Sampler:
    """Exactly ``cohort_size`` distinct clients, uniformly without replacement; accounted under replace-one.

    Replacing one client moves a sum by up to twice the clip norm; the accountant doubles the sensitivity itself, so the
    event carries the release as it is.

    Args:
      num_clients: clients in the population.
      cohort_size: clients per round.

    Raises:
      ValueError: if ``cohort_size`` is not a whole number in ``[1, num_clients]``.
    """
    _check_cohort_size(cohort_size, num_clients)
    if cohort_size != int(cohort_size):
        raise ValueError(f"A cohort of fixed size has a whole number of clients; got {cohort_size}.")
    cohort_size = int(cohort_size)

    def draw(key):
        chosen = jax.random.choice(key, num_clients, (cohort_size,), replace=False)
        return jnp.zeros(num_clients, bool).at[chosen].set(True)

    def dp_event(release):
        return dp_accounting.SampledWithoutReplacementDpEvent(num_clients, cohort_size, release)

    return Sampler("fixed_size", draw, dp_event, cohort_size, cohort_size / num_clients, "replace_one")


def full_participation(num_clients: int) -> Sampler:
    """Every client in every round: no amplification, and the event is the release's own."""
    if num_clients < 1:
        raise ValueError("There are no clients: the population is empty.")
    return Sampler(
        name="all",
        draw=lambda key: jnp.ones(num_clients, bool),
        dp_event=lambda release: release,
        expected_size=num_clients,
        sampling_prob=1.0,
        relation="add_or_remove_one",
    )

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
      name: ``"poisson"``, ``"fixed_size"``, ``"all"``, ``"in_turn"`` or ``"poisson_in_turn"``.
      draw: ``draw(key, round_index) -> bool [num_clients]``, True for the clients of that round. The key is the run's:
        the round is folded in here, and may be traced.
      dp_event: turns the event of one release into the event of that release on a sampled cohort.
      expected_size: clients per round in expectation; public.
      sampling_prob: probability that a given client takes part in a given round.
      relation: the neighbouring relation for which ``dp_event`` holds.
      num_groups: clients are in so many fixed groups that take turns, so each takes part at most once in any so many
        rounds in a row, and that many rounds together cost it what one costs. 1 promises nothing.
    """

    name: str
    draw: Callable[[jax.Array, jax.Array], jax.Array]
    dp_event: Callable[[dp_accounting.DpEvent], dp_accounting.DpEvent]
    expected_size: float
    sampling_prob: float
    relation: str
    num_groups: int = 1


def _check_cohort_size(cohort_size: float, num_clients: int) -> None:
    if not 0 < cohort_size <= num_clients:
        raise ValueError(
            f"The cohort size must be between 1 and the number of clients, {num_clients}; got {cohort_size}. "
            f"Use full_participation({num_clients}) to take everyone."
        )


def _coins(key: jax.Array, prob: float, num_clients: int) -> jax.Array:
    """True for each client independently, with a probability of at most ``prob``, and below it by less than 2^-32."""
    if prob == 1:
        return jnp.ones(num_clients, bool)
    # On 32 random bits, rounded down: float32 uniforms have 23, so rare clients would take part too often for prob.
    threshold = jnp.uint32(min(int(prob * 2**32), 2**32 - 1))
    return jax.random.bits(key, (num_clients,), jnp.uint32) < threshold


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

    def draw(key, round_index):
        return _coins(jax.random.fold_in(key, round_index), prob, num_clients)

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

    def draw(key, round_index):
        chosen = jax.random.choice(jax.random.fold_in(key, round_index), num_clients, (cohort_size,), replace=False)
        return jnp.zeros(num_clients, bool).at[chosen].set(True)

    def dp_event(release):
        return dp_accounting.SampledWithoutReplacementDpEvent(num_clients, cohort_size, release)

    return Sampler("fixed_size", draw, dp_event, cohort_size, cohort_size / num_clients, "replace_one")


def full_participation(num_clients: int, *, relation: str = "add_or_remove_one") -> Sampler:
    """Every client in every round: no amplification, and the event is the release's own.

    Args:
      num_clients: clients in the population.
      relation: "add_or_remove_one", or "replace_one", for reports that are always sent, such as locally noised ones.
    """
    if num_clients < 1:
        raise ValueError("There are no clients: the population is empty.")
    if relation not in ("add_or_remove_one", "replace_one"):
        raise ValueError(f'The relation must be "add_or_remove_one" or "replace_one"; got {relation!r}.')
    return Sampler(
        name="all",
        draw=lambda key, round_index: jnp.ones(num_clients, bool),
        dp_event=lambda release: release,
        expected_size=num_clients,
        sampling_prob=1.0,
        relation=relation,
    )


def in_turn(num_clients: int, *, num_groups: int, sampling_prob: float = 1.0) -> Sampler:
    """Fixed groups that take turns: round t is for the clients whose id is t modulo ``num_groups``.

    Who takes part depends on no data and, with ``sampling_prob`` 1, on no secret: nothing is assumed about sampling. A
    client takes part at most once in ``num_groups`` rounds, so T rounds cost it ceil(T / num_groups) releases, and the
    noise of the rounds between may be correlated (Choquette-Choo et al., 2023, "Multi-Epoch Matrix Factorization
    Mechanisms for Private Machine Learning"). Below 1, each client of the group takes part independently with that
    probability, which amplifies each of these releases (Choquette-Choo et al., 2023, "(Amplified) Banded Matrix
    Factorization: A unified approach to private training").

    Args:
      num_clients: clients in the population.
      num_groups: groups, at most ``num_clients``.
      sampling_prob: with which a client of the group takes part, in (0, 1]; secret coins if below 1.

    Raises:
      ValueError: for numbers out of range.
    """
    if not 1 <= num_groups <= num_clients or num_groups != int(num_groups):
        raise ValueError(f"num_groups must be a whole number from 1 to {num_clients} clients; got {num_groups}.")
    if not 0 < sampling_prob <= 1:
        raise ValueError(f"sampling_prob must be above 0 and at most 1; got {sampling_prob}.")
    amplified = sampling_prob < 1

    def draw(key, round_index):
        group = jnp.arange(num_clients, dtype=jnp.int32) % num_groups
        coins = _coins(jax.random.fold_in(key, round_index), sampling_prob, num_clients)
        return coins & (group == round_index % num_groups)

    return Sampler(
        name="poisson_in_turn" if amplified else "in_turn",
        draw=draw,
        dp_event=lambda r: dp_accounting.PoissonSampledDpEvent(sampling_prob, r) if amplified else r,
        expected_size=sampling_prob * num_clients / num_groups,
        sampling_prob=sampling_prob / num_groups,
        relation="add_or_remove_one",
        num_groups=int(num_groups),
    )

"""What rounds release: the chain's events on the sampler's cohorts, and the pairs of them that have no valid event."""

import itertools
import math

from dp_accounting import NonPrivateDpEvent, NoOpDpEvent
from dp_accounting.dp_event import DpEvent

from fedjax_rec.federated.cohort import Sampler
from fedjax_rec.federated.transforms import UNBOUNDED, UpdateTransform
from fedjax_rec.privacy.accounting import check_supported

# Minus the logarithm of a chance, 1e-12 a round, that no delta has room to notice.
_LOG_NEVER = 12 * math.log(10)

Releases = tuple[tuple[DpEvent, int], ...]
"""Events of rounds in a row, each with how many equal ones there are."""


def releases(transforms: UpdateTransform, sampler: Sampler, first_round: int, num_rounds: int) -> Releases:
    """What rounds ``first_round .. first_round + num_rounds - 1`` release about one unit, sampling included.

    Where groups take turns, a client is in one round of each turn, so the first round of a turn is charged and the
    others are free. That needs the same noise in all rounds of a turn.

    Args:
      transforms: the chain that runs.
      sampler: of the cohorts.
      first_round: 0 is the first round of a run.
      num_rounds: how many.

    Raises:
      ValueError: if the noise differs within a turn.
    """
    events = []
    for index in range(first_round, first_round + num_rounds):
        event = transforms.dp_event(UNBOUNDED, index)
        if event is None:
            return ()
        turn = index - index % sampler.num_groups
        if turn == index:
            events.append(sampler.dp_event(event))
        elif event != transforms.dp_event(UNBOUNDED, turn):
            raise ValueError(
                f"Groups take turns of {sampler.num_groups} rounds, and the noise changes within a turn, at round "
                f"{index}: a client's cost would depend on its group. Change the noise between turns only."
            )
        elif not events:
            events.append(NoOpDpEvent())
    return tuple((event, len(list(same))) for event, same in itertools.groupby(events))


def local_releases(transforms: UpdateTransform, first_round: int, num_rounds: int) -> Releases:
    """What one client sends in those rounds, if it takes part in all of them: valid for whoever takes part in fewer."""
    events = [transforms.local_dp_event(UNBOUNDED, i) for i in range(first_round, first_round + num_rounds)]
    if None in events:
        return ()
    return tuple((event, len(list(same))) for event, same in itertools.groupby(events))


def check_pair(transforms: UpdateTransform, sampler: Sampler) -> None:
    """Refuses a chain and a sampler for which no accountant has a bound, or whose claims exclude each other.

    Raises:
      ValueError: a sentence with the reason and the way out.
    """
    event, bound = transforms.dp_event(UNBOUNDED, 0), transforms.sensitivity(UNBOUNDED)
    if event is None or isinstance(event, NonPrivateDpEvent):
        return
    if bound.noised and sampler.relation != "replace_one":
        raise ValueError(
            "Clients add noise of their own, which leaves the sum with whoever is removed, so the server's noise has "
            "no add-or-remove guarantee on top of it. Use full_participation(n, relation='replace_one') or fixed_size, "
            "or clip the noised update again before the server's noise."
        )
    _check_shares(transforms)
    _check_refusals(transforms, sampler)
    if transforms.min_separation > sampler.num_groups:
        raise ValueError(
            f"This noise is correlated over {transforms.min_separation} rounds, and its bound is for clients that take "
            f"part at most once in them; cohorts drawn as {sampler.name} promise no such thing. Use "
            f"in_turn(num_clients, num_groups={transforms.min_separation})."
        )
    check_supported(sampler.dp_event(event), relation=sampler.relation)


def _check_shares(transforms: UpdateTransform) -> None:
    """Refuses noise in shares whose number nothing guarantees."""
    needed, summation = transforms.min_clients, transforms.summation
    given = summation.min_clients if summation else 0
    if needed and not given:
        raise ValueError(
            "The noise comes in shares, and who sees uploads one by one sees each with a share only, which is too "
            f"little. Put a secure sum of min_clients={needed} last: simulated_secure_sum, crypto_secure_sum or "
            "encrypted_sum."
        )
    if needed > given:
        raise ValueError(
            f"The noise comes in shares, of which the bound needs {needed}, and a sum of {given} clients would be let "
            f"through. Give the secure sum min_clients={needed}."
        )


def _check_refusals(transforms: UpdateTransform, sampler: Sampler) -> None:
    """Refuses sums that may fail for lack of one client, where that client's presence is what is to be hidden.

    A round without a sum releases noise alone, which no clip norm bounds against the noised sum. Under replace-one
    the same clients are there in either case.
    """
    summation = transforms.summation
    if not summation or not summation.min_clients or sampler.relation != "add_or_remove_one":
        return
    if summation.dropout_prob:
        raise ValueError(
            "Clients may drop out, and whether enough are left for a sum then depends on each one's presence, which "
            "add-or-remove-one has to hide. Use full_participation(n, relation='replace_one') or fixed_size."
        )
    expected, least = sampler.expected_size, summation.min_clients
    if not surely_more(sampler, least):
        raise ValueError(
            f"Sums of fewer than {least} clients are refused, and a cohort of {expected:g} in expectation may be short "
            "of one: whether there is a sum would then tell that one's presence. Lower min_clients, or use larger "
            "cohorts or fixed_size ones."
        )


def surely_more(sampler: Sampler, least: int) -> bool:
    """Whether cohorts have more than ``least`` clients: always, or where coins decide, but for a chance of 1e-12."""
    expected = sampler.expected_size
    if "poisson" not in sampler.name:
        return math.floor(expected) > least
    # Chernoff's bound on a sum of coins of that mean.
    return least < expected and least * math.log(least / expected) + expected - least >= _LOG_NEVER

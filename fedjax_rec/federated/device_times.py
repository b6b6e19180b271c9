"""How long devices take, and which updates the server has when: a simulated clock, of public numbers only."""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtr

from fedjax_rec.federated.cohort import Sampler


@dataclass(frozen=True)
class DeviceTimes:
    """Seconds from a client's call to its update: ``medians[tier] * exp(spread * N(0, 1))``, whatever its data.

    Attributes:
      medians: seconds of each tier, positive.
      spread: standard deviation of the logarithm.
    """

    medians: Sequence[float]
    spread: float = 0.0

    def __post_init__(self):
        if not self.medians or not min(self.medians) > 0 or not self.spread >= 0:
            raise ValueError(f"Medians must be positive and spread not negative; got {self.medians}, {self.spread}.")

    def draw(self, tiers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Seconds of one update by devices of these tiers, float64 of the same shape."""
        return np.asarray(self.medians)[tiers] * np.exp(self.spread * rng.standard_normal(np.shape(tiers)))

    def survival(self, deadline: float) -> np.ndarray:
        """For each tier the chance to be done within ``deadline`` seconds, float64 ``[tiers]``."""
        if not deadline > 0:
            raise ValueError(f"A deadline is a positive number of seconds; got {deadline}.")
        log_room = np.log(deadline / np.asarray(self.medians))
        return ndtr(log_room / self.spread) if self.spread else (log_room >= 0).astype(np.float64)

    def lateness(self, tier_of: np.ndarray, *, tick: float, key: jax.Array) -> Callable[[jax.Array], jax.Array]:
        """``round -> int32 [clients]``, rounds that each client's update is late where a round takes ``tick`` seconds.

        An update that is done within the tick in which it was begun is not late. ``key`` is public.
        """
        medians = jnp.asarray(np.asarray(self.medians)[np.asarray(tier_of)], jnp.float32)

        def late(round_index):
            normal = jax.random.normal(jax.random.fold_in(key, round_index), medians.shape)
            ticks = jnp.ceil(medians * jnp.exp(self.spread * normal) / tick)
            return jnp.clip(ticks - 1, 0, 2**24).astype(jnp.int32)

        return late


def synchronous_seconds(
    cohorts: np.ndarray, times: DeviceTimes, tier_of: np.ndarray, *, seed: int, deadline: float = math.inf
) -> np.ndarray:
    """When each synchronous round ends, seconds, float64 ``[rounds]``: it waits for its slowest client.

    Args:
      cohorts: bool ``[rounds, clients]``, whom the server calls.
      times: of devices.
      tier_of: int ``[clients]``.
      seed: of their times.
      deadline: seconds after which a round waits no longer.
    """
    taken = times.draw(np.broadcast_to(tier_of, cohorts.shape), np.random.default_rng([seed, 0]))
    return np.cumsum(np.minimum(np.where(cohorts, taken, 0.0).max(axis=1), deadline))


class Arrivals(NamedTuple):
    """Which updates fill which buffer.

    Attributes:
      who: bool ``[rounds, clients]``, whose updates are in the buffer of a server step.
      late: int32 ``[rounds, clients]``, server steps between the parameters that such a client received and the newest.
      seconds: float64 ``[rounds]``, when each buffer was full.
      rest: no client is in two buffers fewer than so many steps apart.
    """

    who: np.ndarray
    late: np.ndarray
    seconds: np.ndarray
    rest: int

    def lateness(self, round_index: jax.Array) -> jax.Array:
        """``round -> int32 [clients]``, for `with_staleness`."""
        return jnp.asarray(self.late).at[round_index].get(mode="clip")


def simulate_arrivals(
    times: DeviceTimes,
    tier_of: np.ndarray,
    *,
    num_rounds: int,
    buffer_size: int,
    concurrency: int,
    max_staleness: int,
    rest: int = 1,
    seed: int,
) -> Arrivals:
    """FedBuff's clock: ``concurrency`` devices train at any time, and the server steps when ``buffer_size`` are done.

    Whenever an update comes in, a client drawn from those that are idle and have rested is called with the newest
    parameters. Updates older than ``max_staleness`` steps are thrown away. Slow devices are busy for longer, and so
    come less often.

    Nguyen et al., 2022, "Federated Learning with Buffered Asynchronous Aggregation" (AISTATS).

    Args:
      times: of devices; nothing here reads any client's data.
      tier_of: int ``[clients]``.
      num_rounds: server steps.
      buffer_size: K, updates in each of them.
      concurrency: clients that train at the same time.
      max_staleness: S.
      rest: server steps before a client may be called again.
      seed: of times and calls.

    Raises:
      ValueError: for numbers out of range, or if too few clients are rested to go on.
    """
    num_clients = len(tier_of)
    if not 1 <= buffer_size <= num_clients or not 1 <= concurrency <= num_clients or rest < 1 or max_staleness < 0:
        raise ValueError(
            f"buffer_size and concurrency must be between 1 and the {num_clients} clients, rest at least 1 and "
            f"max_staleness at least 0; got {buffer_size}, {concurrency}, {rest} and {max_staleness}."
        )
    rng = np.random.default_rng([seed, 1])
    who, late = np.zeros((num_rounds, num_clients), bool), np.zeros((num_rounds, num_clients), np.int32)
    seconds, last_in = np.zeros(num_rounds), np.full(num_clients, -rest)
    training, busy, now, in_buffer, step = [], np.zeros(num_clients, bool), 0.0, 0, 0
    while step < num_rounds:
        ready = np.flatnonzero(~busy & (step - last_in >= rest))
        called = rng.choice(ready, min(concurrency - len(training), len(ready)), replace=False)
        for client, seconds_taken in zip(called, times.draw(np.asarray(tier_of)[called], rng), strict=True):
            heapq.heappush(training, (now + seconds_taken, int(client), step))
        busy[called] = True
        if not training:
            raise ValueError(
                f"All clients rest at step {step}: {num_clients} clients cannot fill buffers of {buffer_size} with a "
                f"rest of {rest} steps. Lower buffer_size or rest."
            )
        now, client, begun = heapq.heappop(training)
        busy[client] = False
        if step - begun > max_staleness:
            continue
        who[step, client], late[step, client], last_in[client] = True, step - begun, step
        in_buffer += 1
        if in_buffer == buffer_size:
            seconds[step], in_buffer, step = now, 0, step + 1
    return Arrivals(who, late, seconds, rest)


def arrival_sampler(arrivals: Arrivals, *, relation: str = "replace_one") -> Sampler:
    """Cohorts as they arrive; nobody after the last simulated step.

    Guarantee: no amplification by sampling is claimed, for who arrives first is no secret coin. It holds for arrival
    times that no data move. A client is in at most one of any ``rest`` buffers in a row, so T rounds cost it at most
    ceil(T / rest) releases: the first round of each ``rest`` is charged, as for `in_turn`.

    Args:
      arrivals: public.
      relation: "replace_one": who takes part is public, and what is hidden is all of a client's data. Or
        "add_or_remove_one", which is right only where buffers close by a clock: then an absent client leaves its place
        empty. Where a buffer closes at the K-th update, another client takes the place, and every later buffer differs.
    """
    if relation not in ("add_or_remove_one", "replace_one"):
        raise ValueError(f'The relation must be "add_or_remove_one" or "replace_one"; got {relation!r}.')
    buffer_size, num_clients = int(arrivals.who[0].sum()), arrivals.who.shape[1]
    who = jnp.asarray(arrivals.who)
    return Sampler(
        name="arrivals",
        draw=lambda key, round_index: who.at[round_index].get(mode="fill", fill_value=False),
        dp_event=lambda release: release,
        expected_size=buffer_size,
        sampling_prob=buffer_size / num_clients,
        relation=relation,
        num_groups=arrivals.rest,
    )

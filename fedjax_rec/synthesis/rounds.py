"""The federated rounds that fit a generator: the one place where a neural generator's noise is added and charged."""

from typing import Any

import jax
import numpy as np

from fedjax_rec.data.clients import client_data
from fedjax_rec.data.interactions import Interactions
from fedjax_rec.data.split import Split
from fedjax_rec.federated.algorithm import Algorithm, ServerState
from fedjax_rec.federated.cohort import Sampler, full_participation, poisson
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.privacy.ledger import Entry, Ledger
from fedjax_rec.privacy.mechanisms import clip_by_global_norm
from fedjax_rec.privacy.schedule import scheduled_gaussian
from fedjax_rec.synthesis.methods import Report

TRAINING = "training"


def training_sampler(num_users: int, sampling_prob: float) -> Sampler:
    """Poisson cohorts, or everybody where the probability is 1."""
    if sampling_prob == 1:
        return full_participation(num_users)
    return poisson(num_users, cohort_size=sampling_prob * num_users)


def run_rounds(
    algorithm: Algorithm,
    users: Interactions,
    noise: np.ndarray,
    *,
    l2_clip_norm: float,
    sampling_prob: float,
    key: jax.Array,
    report: Report,
    said: str,
    span_size: int,
    num_buckets: int,
) -> tuple[ServerState, tuple[Entry, ...]]:
    """Runs the rounds of a generator's training.

    Guarantee: user-level, adding or removing one user with all of its rows. One noised sum of updates clipped to
    ``l2_clip_norm`` a round, over a secret cohort that every user joins with ``sampling_prob``; the entries state it.
    With zero noise nothing is clipped, nothing is promised, and there are no entries.

    Args:
      algorithm: `fedvae` or `fedgan`.
      users: rows; every user has some, as their number is what cohorts are drawn from.
      noise: float ``[rounds]``, noise multipliers.
      l2_clip_norm: of one user's whole update.
      sampling_prob: of a user in a round; 1 = everybody in every round.
      key: seeds the parameters, the cohorts, the clients and the noise; secret, used for nothing else.
      report: progress, after every span.
      said: what it says.
      span_size: rounds between two reports.
      num_buckets: of clients by length.

    Returns:
      The server's state after the last round, and what was released.
    """
    nothing = users.take(np.zeros(users.num_interactions, bool))
    clients = client_data(Split(users, nothing, nothing, nothing, rule="all users"), num_buckets=num_buckets)
    private = bool(np.any(noise > 0))
    links: Any = chain()
    if private:
        # The line that adds the noise; each user's whole update is clipped before.
        links = chain(clip_by_global_norm(l2_clip_norm), scheduled_gaussian(l2_clip_norm * noise))
    sampler = training_sampler(clients.num_clients, sampling_prob)
    training = make_rounds(algorithm, links, sampler, clients, span_size=span_size)
    init_key, *run_keys = jax.random.split(key, 4)
    state, kept = training.init(init_key)
    for done in range(0, len(noise), span_size):
        num_rounds = min(span_size, len(noise) - done)
        state, kept, _ = training.run(state, kept, RoundKeys(*run_keys), num_rounds)
        jax.block_until_ready(state.round)
        report(done + num_rounds, len(noise), said)
    if not private:
        return state, ()
    return state, training.charge(Ledger(), first_round=0, num_rounds=len(noise), phase=TRAINING).entries

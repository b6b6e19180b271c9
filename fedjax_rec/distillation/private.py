"""Distillation with a ledger: what it releases, and what it does not.

A student of a private teacher is a function of the teacher and of the histories that both are asked about. If these are
public, or virtual, this is post-processing: nothing further is released, however long the student trains. If they are
histories of real users, the student's parameters are a new release about them, which needs noise and is charged.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import numpy as np
import optax
from dp_accounting.dp_event import DpEvent, GaussianDpEvent, SelfComposedDpEvent

from fedjax_rec.algorithms.fedsequence import fedsequence
from fedjax_rec.data.interactions import Interactions
from fedjax_rec.distillation.losses import ScoreLoss
from fedjax_rec.distillation.student import distilled
from fedjax_rec.distillation.teacher import Teacher
from fedjax_rec.models.base import Shared
from fedjax_rec.models.sequence import SequenceModel
from fedjax_rec.models.sequence_losses import SequenceLoss
from fedjax_rec.models.sequence_training import train_sequence
from fedjax_rec.privacy.ledger import Budget, Ledger
from fedjax_rec.synthesis.methods import quiet
from fedjax_rec.synthesis.rounds import run_rounds, training_sampler

PHASE = "distillation"
RELEASED = "noised sum of clipped updates of a student by private histories"


@dataclass(frozen=True)
class NoisyRounds:
    """How a student is trained on private histories.

    Attributes:
      num_rounds: releases.
      sampling_prob: of a user in a round, in (0, 1]; 1 = everybody in every round.
      l2_clip_norm: of a user's whole update.
      noise_multiplier: noise standard deviation over the clip norm, > 0.
      client_lr: the step on a client whose change of the student is its update.
      server_lr: of Adam.
    """

    num_rounds: int
    sampling_prob: float
    l2_clip_norm: float
    noise_multiplier: float
    client_lr: float = 1.0
    server_lr: float = 1e-3

    def __post_init__(self):
        if self.num_rounds < 1 or not 0 < self.sampling_prob <= 1 or not self.l2_clip_norm > 0:
            raise ValueError(
                f"NoisyRounds needs num_rounds >= 1, sampling_prob in (0, 1] and l2_clip_norm > 0; got "
                f"{self.num_rounds}, {self.sampling_prob} and {self.l2_clip_norm}."
            )
        if not 0 < self.noise_multiplier < math.inf:
            raise ValueError(
                f"noise_multiplier must be positive and finite; got {self.noise_multiplier}. Without noise, training "
                "on private histories has no epsilon: use train_sequence, and promise nothing."
            )

    def event(self, num_users: int) -> DpEvent:
        """All the releases together, about a population of so many users."""
        one = training_sampler(num_users, self.sampling_prob).dp_event(GaussianDpEvent(self.noise_multiplier))
        return SelfComposedDpEvent(one, self.num_rounds)


class Distilled(NamedTuple):
    """A student and the ledger of everything behind it.

    Attributes:
      model: the student.
      params: trained.
      ledger: the teacher's, and what distillation itself released.
    """

    model: SequenceModel
    params: Shared
    ledger: Ledger


def distill_private(
    teacher: Teacher,
    student: Callable[[SequenceLoss], SequenceModel],
    histories: Interactions,
    loss: ScoreLoss,
    *,
    private_histories: bool,
    key: jax.Array,
    weight: float = 0.9,
    num_epochs: int = 50,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    rounds: NoisyRounds | None = None,
    budget: Budget | None = None,
) -> Distilled:
    """Trains a student of a private teacher, and says what that costs.

    Guarantee: user-level, adding or removing one user with all of its rows, as far as the teacher's ledger goes. On
    public or virtual histories the student is post-processing of the teacher: the ledger comes back as it was. Virtual
    histories must come from releases that the teacher's ledger holds (draw them from the teacher's own generator, or
    record the generator's releases in it first). On private histories every round releases the sum of the users'
    updates, clipped to ``l2_clip_norm`` together, plus Gaussian noise, over a secret cohort that each user joins with
    ``sampling_prob``: these releases are recorded, and the teacher hears nothing of them.

    Args:
      teacher: with a ledger.
      student: makes the student from its loss, such as ``lambda loss: sasrec(items, loss=loss)``.
      histories: that teacher and student are asked about, in time order.
      loss: of scores, from `losses`.
      private_histories: whether they are of real users who are promised something. Nothing but the caller can know.
      key: seeds everything; secret where the histories are private, and used for nothing else.
      weight: of the teacher beside what came next; see `distilled`.
      num_epochs: passes over public or virtual histories.
      batch_size: of these.
      learning_rate: of Adam, on these.
      rounds: noise and clip, needed for private histories and for no others.
      budget: checked before anything is released.

    Raises:
      ValueError: for a teacher without a ledger, private histories without noise, or noise without private histories.
      BudgetExceeded: before any release, if the rounds would pass the budget.
    """
    if teacher.ledger is None:
        raise ValueError(
            "This teacher has no ledger, so nothing can be said about its student: give the teacher the ledger of its "
            "releases, or train the student with train_sequence and promise nothing."
        )
    if private_histories and rounds is None:
        raise ValueError(
            f"A student that learns from private histories ({histories.name}) is a new release about their users: give "
            "noise and clip (rounds=NoisyRounds(...)), or distil on public or virtual histories, which costs nothing."
        )
    if not private_histories and rounds is not None:
        raise ValueError(
            "rounds=NoisyRounds(...) is for private histories; public or virtual ones need no noise. Leave it out, or "
            "say private_histories=True."
        )
    model = student(distilled(teacher, loss, weight=weight))
    if not private_histories:
        seed = int(jax.random.randint(key, (), 0, np.iinfo(np.int32).max))
        steps = {"num_epochs": num_epochs, "batch_size": batch_size, "learning_rate": learning_rate}
        return Distilled(model, train_sequence(model, histories, seed=seed, **steps), teacher.ledger)
    histories = _users_with_rows(histories)
    if budget is not None:
        budget.require(teacher.ledger, rounds.event(histories.num_users))
    algorithm = fedsequence(model, client_lr=rounds.client_lr, server_optimizer=optax.adam(rounds.server_lr))
    state, entries = run_rounds(  # clips, adds the noise and says what was released
        algorithm,
        histories,
        np.full(rounds.num_rounds, rounds.noise_multiplier),
        l2_clip_norm=rounds.l2_clip_norm,
        sampling_prob=rounds.sampling_prob,
        key=key,
        report=quiet,
        said="",
        span_size=min(rounds.num_rounds, 50),
        num_buckets=2,
    )
    ledger = teacher.ledger
    for entry in entries:
        ledger = ledger.record(entry.event, phase=PHASE, released=RELEASED, sampler=entry.sampler, count=entry.count)
    return Distilled(model, state.shared, ledger)


def _users_with_rows(histories: Interactions) -> Interactions:
    """Without users who have no rows: rounds draw cohorts from those who take part."""
    users = np.flatnonzero(histories.counts_per_user)
    counts = histories.counts_per_user[users]
    return replace(
        histories,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        user_labels=histories.user_labels[users],
        user_attributes={name: values[users] for name, values in histories.user_attributes.items()},
    )

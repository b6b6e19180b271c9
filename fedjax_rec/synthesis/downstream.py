"""Recommenders that are trained on any users, virtual or real, and asked about real users that no training saw.

    for setting, scorer_of in ease().train(users, 0):
        evaluate(scorer_of(split.history), cases(split))

Each comes with a fixed grid of settings; which is used is decided on the real validation users. That is one more look
at real users: who trains on virtual users alone would have no such users, and would use a default.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.evaluation.exact import Evaluation, evaluate
from fedjax_rec.evaluation.heldout import Cases
from fedjax_rec.evaluation.scorers import Scorer, factor_scorer, history_scorer
from fedjax_rec.models.ease import item_gram, weights_from_gram
from fedjax_rec.models.ials import fold_in, train_ials
from fedjax_rec.models.markov import markov_scorer
from fedjax_rec.models.mult_vae import mult_vae_scorer
from fedjax_rec.models.vae_training import train_mult_vae

METRIC, CUT_OFF = "ndcg@20", 20

Trained = Callable[[Interactions], Scorer]
"""A trained recommender: from what users show to their scores."""


class Downstream(NamedTuple):
    """A recommender as the evaluator of virtual users sees it.

    Attributes:
      name: "ease", "mf", ...
      train: ``(users, seed)`` -> pairs of a setting (JSON values) and the recommender trained with it, one by one.
      ordered: whether it needs users' rows in time order.
    """

    name: str
    train: Callable[[Interactions, int], Iterator[tuple[dict[str, float], Trained]]]
    ordered: bool = False


class Chosen(NamedTuple):
    """A recommender with the setting that did best on validation users.

    Attributes:
      setting: of the grid.
      validation: its metric there.
      scorer_of: the recommender.
    """

    setting: dict[str, float]
    validation: float
    scorer_of: Trained


def ease(*, l2: Sequence[float] = (30.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0)) -> Downstream:
    """EASE (`models.ease`), over a grid of its penalty; one Gram matrix serves the grid."""

    def train(users: Interactions, seed: int):
        del seed  # a closed form
        gram = item_gram(users)
        for value in l2:
            weights = weights_from_gram(gram, l2=value)
            yield {"l2": value}, lambda history, weights=weights: history_scorer(weights, history)

    return Downstream("ease", train)


def mf(
    *,
    dim: int = 32,
    num_sweeps: int = 8,
    unobserved_weight: float = 0.3,
    l2: Sequence[float] = (0.003, 0.01, 0.03, 0.1),
) -> Downstream:
    """Matrix factorisation by alternating least squares (`models.ials`); real users' vectors are folded in."""

    def train(users: Interactions, seed: int):
        users = _padded(users)
        for value in l2:
            weights = {"l2": value, "unobserved_weight": unobserved_weight}
            items = train_ials(users, dim=dim, num_sweeps=num_sweeps, seed=seed, **weights).item_vectors

            def scorer_of(history, items=items, weights=weights):
                return factor_scorer(fold_in(items, history, **weights), items)

            yield {"dim": dim, **weights}, scorer_of

    return Downstream("mf", train)


def mult_vae(**settings) -> Downstream:
    """A variational autoencoder (`models.mult_vae`) with one setting; ``settings`` are those of its training."""

    def train(users: Interactions, seed: int):
        params = train_mult_vae(users, seed=seed, **settings)
        yield dict(settings), lambda history: mult_vae_scorer(params, history)

    return Downstream("mult_vae", train)


def markov(**settings) -> Downstream:
    """A first-order chain over items (`models.markov`); only for users with time order."""

    def train(users: Interactions, seed: int):
        del seed
        yield dict(settings), lambda history: markov_scorer(users, history=history, **settings)

    return Downstream("markov", train, ordered=True)


RECOMMENDERS = {"ease": ease, "mf": mf, "mult_vae": mult_vae, "markov": markov}
"""The recommenders by name, as the command line says it; each with its default grid."""


def as_downstream(names: Sequence[str | Downstream]) -> tuple[Downstream, ...]:
    """Recommenders by name or given.

    Raises:
      ValueError: for an unknown name, or none.
    """
    unknown = [name for name in names if isinstance(name, str) and name not in RECOMMENDERS]
    if unknown or not names:
        raise ValueError(f"Name at least one recommender of {', '.join(RECOMMENDERS)}; got {list(names)}.")
    return tuple(RECOMMENDERS[name]() if isinstance(name, str) else name for name in names)


def choose(
    downstream: Downstream, users: Interactions, history: Interactions, validation: Cases, *, seed: int
) -> Chosen:
    """Trains with every setting of the grid and keeps the best on real validation users.

    Args:
      downstream: the recommender.
      users: whom it is trained on, virtual or real.
      history: what held-out users show.
      validation: cases of validation users.
      seed: of training.

    Raises:
      ValueError: for a recommender that needs time order, and users without.
    """
    if downstream.ordered and users.timestamps is None:
        raise ValueError(
            f"{downstream.name} learns from the order of items, and {users.name} have none: leave it out, or draw "
            "virtual users from a generator of sequences."
        )
    best = Chosen({}, -math.inf, lambda _: None)
    for setting, scorer_of in downstream.train(users, seed):
        value = evaluate(scorer_of(history), validation, ks=(CUT_OFF,)).values[METRIC]
        if value > best.validation:
            best = Chosen(setting, value, scorer_of)
    return best


def tested(chosen: Chosen, history: Interactions, asked: Cases) -> Evaluation:
    """Metrics on real users."""
    return evaluate(chosen.scorer_of(history), asked, ks=(CUT_OFF,))


def _padded(users: Interactions) -> Interactions:
    """Users without rows added up to a power of two: training sets of about one size then share compiled code."""
    missing = (1 << max(users.num_users - 1, 0).bit_length()) - users.num_users
    return dataclasses.replace(
        users,
        offsets=np.concatenate([users.offsets, np.full(missing, users.offsets[-1])]),
        user_labels=np.arange(users.num_users + missing),
        user_attributes={},
    )

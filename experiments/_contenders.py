"""Private recommenders with one signature, for studies that compare them: a split, settings, epsilon and a seed."""

import dataclasses
import math
from typing import Any, NamedTuple

import dp_accounting
import jax
from dp_accounting.dp_event import DpEvent

from fedjax_rec.data.clients import client_data
from fedjax_rec.data.split import Split
from fedjax_rec.evaluation import cases, constant_scorer, evaluate
from fedjax_rec.models.popularity import dp_popularity
from fedjax_rec.privacy import calibrate_noise_multiplier
from fedjax_rec.runs.config import ClientConfig, ModelConfig, PrivacyConfig, ServerConfig, TrainConfig
from fedjax_rec.runs.experiment import Data, prepare
from fedjax_rec.runs.privacy_plan import run_event
from fedjax_rec.runs.training import evaluate_part, train

POPULARITY = "DP popularity"


class Found(NamedTuple):
    """What one run gives.

    Attributes:
      values: metrics of the test items.
      event: everything that it released, or None without privacy.
      relation: that the event is for.
      sampler: name of who drew the cohorts.
    """

    values: dict[str, float]
    event: DpEvent | None
    relation: str
    sampler: str


def popularity(split: Split, settings: dict[str, Any], *, epsilon: float, delta: float, seed: int) -> Found:
    """Item counts, each user's history of norm 1, released once."""
    noise = gaussian_noise_for(epsilon, delta=delta)
    released = dp_popularity(split.train, noise_multiplier=noise, key=jax.random.key(seed), **settings)
    values = evaluate(constant_scorer(released.counts), cases(split), ks=(10,)).values
    return Found(values, None if noise == 0 else released.dp_event, "add_or_remove_one", "all")


def gaussian_noise_for(epsilon: float, *, delta: float, releases: int = 1) -> float:
    """The noise multiplier of Gaussian releases that all clients are in; 0 without privacy."""
    if math.isinf(epsilon):
        return 0.0
    return calibrate_noise_multiplier(
        lambda z: dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(z), releases),
        target_epsilon=epsilon,
        delta=delta,
    ).noise_multiplier


def factorisation(split: Split, settings: dict[str, Any], *, epsilon: float, delta: float, seed: int) -> Found:
    """Federated matrix factorisation as `fedjax-rec train` runs it; settings are those of its flags."""
    parts = {"model": ModelConfig, "client": ClientConfig, "server": ServerConfig, "privacy": PrivacyConfig}
    values = {name: parts[name](**value) if name in parts else value for name, value in settings.items()}
    config = TrainConfig(**values, seed=seed, epsilon=epsilon, delta=delta, eval_every=settings["rounds"])
    if math.isinf(epsilon):
        config = dataclasses.replace(config, epsilon=None, delta=None, privacy=PrivacyConfig())
    data = Data(split.train, split, client_data(split), ())
    experiment = prepare(config, data=data)
    outcome = train(experiment, folder=None)
    found = evaluate_part(experiment, outcome.state, outcome.private, "test").values
    plan, sampler = experiment.privacy, experiment.sampler
    event = None if plan is None else run_event(plan.ledger, plan.transforms, sampler, outcome.rounds)
    return Found(found, event, sampler.relation, sampler.name)

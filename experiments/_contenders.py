"""Private recommenders with one signature, for studies that compare them: a split, settings, epsilon and a seed."""

import dataclasses
import math
from typing import Any, NamedTuple

import dp_accounting
import jax
from dp_accounting.dp_event import DpEvent

from experiments._private_baselines import released_dp_ease, released_dpals
from experiments._private_settings import DP_EASE, DPALS
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


_RELEASED: dict[tuple, Any] = {}  # one release has two rows: how a client weighs its history costs nothing


def baseline(release, recent: bool):
    """A run of `experiments._private_baselines`, scored with all of a history alike, or with its newest items first."""

    def run(split: Split, settings: dict[str, Any], *, epsilon: float, delta: float, seed: int) -> Found:
        # Seeds of their own: seed 0 drew the noise that the settings were chosen on.
        key = (release.__name__, split.fingerprint, str(settings), epsilon, delta, seed)
        if key not in _RELEASED:
            _RELEASED[key] = release(split, settings, epsilon=epsilon, delta=delta, seed=seed + 1)
        released = _RELEASED[key]
        scorer = released.scorers[settings["recency"] if recent else math.inf]
        values = evaluate(scorer, cases(split), ks=(10,)).values
        event = None if math.isinf(epsilon) else released.ledger.event
        return Found(values, event, released.ledger.relation, "all")

    return run


METHODS = {
    "DP-FedAvg MF": factorisation,
    "DP-FTRL MF": factorisation,
    "DPALS": baseline(released_dpals, recent=False),
    "DPALS, recent": baseline(released_dpals, recent=True),
    "DP-EASE": baseline(released_dp_ease, recent=False),
    "DP-EASE, recent": baseline(released_dp_ease, recent=True),
    POPULARITY: popularity,
}
"""By name; DP-FedAvg and DP-FTRL differ in their settings."""

_MF_1M = {
    "rounds": 100,
    "cohort_size": 2048,
    "model": {"dim": 8},
    "server": {"lr": 0.04},
    "client": {"num_negatives": 2},
    "privacy": {"l2_clip_norm": 0.01},
}
_FTRL_1M = _MF_1M | {
    "cohort_size": 1500,
    "sampler": "in_turn",
    "num_groups": 4,
    "privacy": {"l2_clip_norm": 0.01, "mechanism": "banded"},
}
_MF_100K = {"rounds": 200, "model": {"dim": 32}, "privacy": {"l2_clip_norm": 0.02}}
_FTRL_100K = _MF_100K | {
    "sampler": "in_turn",
    "num_groups": 2,
    "privacy": {"l2_clip_norm": 0.02, "mechanism": "banded"},
}
FACTORISATION = {
    ("DP-FedAvg MF", "ml-1m"): _MF_1M,
    ("DP-FTRL MF", "ml-1m"): _FTRL_1M,
    ("DP-FedAvg MF", "ml-100k"): _MF_100K,
    ("DP-FTRL MF", "ml-100k"): _FTRL_100K,
}
"""Flags of `fedjax-rec train`, the same for every epsilon. Chosen by hand: those of MovieLens 100K are the command's
defaults; of five settings for MovieLens 1M at epsilon 8, seed 0, these had the highest ndcg@10 of validation items."""
BASELINES = {"DPALS": DPALS, "DP-EASE": DP_EASE}


def settings(method: str, dataset: str, epsilon: float, *, smoke: bool = False) -> dict[str, Any]:
    """What a method is run with; without noise, what it is run with at the largest epsilon."""
    if method == POPULARITY:
        return {}
    if (method, dataset) in FACTORISATION:
        chosen = FACTORISATION[method, dataset]
        return chosen | {"rounds": 4, "cohort_size": None, "num_groups": chosen.get("num_groups")} if smoke else chosen
    by_epsilon = BASELINES[method.removesuffix(", recent")][dataset.replace("ml-", "movielens/")]
    chosen = by_epsilon[min(by_epsilon, key=lambda known: abs(math.log2(known) - math.log2(min(epsilon, 1e6))))]
    return chosen | {"num_head": 40} if smoke else chosen

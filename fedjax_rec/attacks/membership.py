"""Membership inference: was this user, or this interaction, in training?

Several models are trained on their own fair coins (`shadow_models`); `signals` says what is measured of each, `scores`
what attacks make of it. Each model is the target once, with all others as its shadows.

    design = toss_coins(train, num_models=16, seed=0)
    measured = train_models(rounds, clients, train, design, ...)
    curves = attack_levels(measured, design, train)
    print(verdict(curves, privacy))

`attack_config` does that for the configuration of a run.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from dp_accounting import GaussianDpEvent

from fedjax_rec.attacks.roc import (
    LOW_RATES,
    Ceiling,
    Roc,
    excess,
    gaussian_ceiling,
    gaussian_dp_mu,
    guarantee_ceiling,
    roc,
)
from fedjax_rec.attacks.scores import ATTACKS, Evidence, target_scores
from fedjax_rec.attacks.shadow_models import MEMBER_SHARE, Design, only_train, toss_coins, train_models
from fedjax_rec.attacks.signals import Signals, factor_scores, measured
from fedjax_rec.data.clients import client_data
from fedjax_rec.data.interactions import Interactions
from fedjax_rec.privacy.events import flatten
from fedjax_rec.runs import config as configs
from fedjax_rec.runs import directory
from fedjax_rec.runs.config import TrainConfig
from fedjax_rec.runs.experiment import Data, prepare, prepare_data

LEVELS = ("user", "interaction")
MEMBERSHIP = "membership.json"


def user_evidence(signals: Signals, design: Design) -> Evidence:
    """Candidates are users; the population is the reserved ones."""
    some = ~design.reserved_users
    everywhere = np.ones_like(design.users)
    return Evidence(
        signals.users[:, some],
        design.users[:, some],
        everywhere[:, some],
        signals.users[:, ~some],
        everywhere[:, ~some],
    )


def interaction_evidence(signals: Signals, design: Design, train: Interactions, *, max_samples: int = 2000) -> Evidence:
    """Candidates are the tossed interactions of users who are in, and the attacker knows the user's core."""
    eligible = ~design.reserved_users[train.user_ids]
    present = design.users[:, train.user_ids]
    candidates = design.tossed & eligible
    samples = np.flatnonzero(design.reserved & eligible)
    samples = samples[:: max(len(samples) // max_samples, 1)]
    return Evidence(
        signals.rows[:, candidates],
        design.rows[:, candidates],
        present[:, candidates],
        signals.rows[:, samples],
        present[:, samples],
    )


def attack(evidence: Evidence, *, gamma: float = 1.0, offline_a: float = 1.0) -> dict[str, Roc]:
    """The curve of every attack, over all models as targets.

    Args:
      evidence: of 4 models or more.
      gamma: of RMIA.
      offline_a: of RMIA's offline p(x), in [0, 1].
    """
    scores = {name: [] for name in ATTACKS}
    members = []
    for target in range(len(evidence.signals)):
        valid = evidence.valid[target]
        for name, values in target_scores(evidence, target, gamma=gamma, offline_a=offline_a).items():
            scores[name].append(values[valid])
        members.append(evidence.members[target][valid])
    return {name: roc(values, members) for name, values in scores.items()}


def attack_levels(signals: Signals, design: Design, train: Interactions) -> dict[str, dict[str, Roc]]:
    """Curves by level and attack, from the signals of all models of a design."""
    return {
        "user": attack(user_evidence(signals, design)),
        "interaction": attack(interaction_evidence(signals, design, train)),
    }


def ceiling_for(privacy: dict | None, level: str) -> Ceiling | None:
    """What a run's guarantee leaves to an attack.

    A user-level guarantee for adding or removing a user is about a user who is in or out. An interaction is in or out
    while its user is in: that replaces the user's record by another one, which is two such steps, 2 mu. For a guarantee
    under replace-one it is one step.

    Args:
      privacy: epsilon, delta, relation, and "gaussian", True if all releases are Gaussians that are not amplified by
        sampling: the ceiling is then exact. Otherwise it is the one of (epsilon, delta) alone, which holds always.
      level: "user" or "interaction".
    """
    if privacy is None:
        return None
    epsilon, delta = privacy["epsilon"], privacy["delta"]
    steps = 2 if level == "interaction" and privacy["relation"] == "add_or_remove_one" else 1
    if privacy["gaussian"]:
        return gaussian_ceiling(steps * gaussian_dp_mu(epsilon, delta=delta))
    if steps == 2:
        epsilon, delta = 2 * epsilon, min(delta * (1 + np.exp(epsilon)), 1.0)
    return guarantee_ceiling(epsilon, delta=delta)


def strongest(curves: dict[str, Roc]) -> str:
    """The attack with the largest area."""
    return max(curves, key=lambda name: curves[name].auc)


def verdict(curves: dict[str, dict[str, Roc]], privacy: dict | None) -> str:
    """A sentence or two: whether an attack passes what the claimed guarantee leaves to it.

    Args:
      curves: by level and attack.
      privacy: as for `ceiling_for`.
    """
    if privacy is None:
        best = {level: strongest(found) for level, found in curves.items()}
        reached = " and ".join(f"{curves[level][name].auc:.3f} ({level}-level, {name})" for level, name in best.items())
        return f"No guarantee to compare with: the strongest attacks reach AUC {reached}."
    broken = [
        f"{level}-level {name}: {phrase}"
        for level, found in curves.items()
        for name, curve in found.items()
        for phrase in excess(curve, ceiling_for(privacy, level))
    ]
    if broken:
        return (
            "BUG: an attack passes the ceiling of the claimed guarantee by more than two standard errors, so the run "
            f"is less private than it says: {'; '.join(broken)}."
        )
    return "Every attack stays below what the claimed guarantee leaves to it, within two standard errors."


def summary(curves: dict[str, dict[str, Roc]], privacy: dict | None) -> dict[str, Any]:
    """The curves' figures as JSON values: areas, low false positive rates, ceilings, verdict.

    ``auc``, ``auc_error``, ``attack`` and ``auc_ceiling`` at the top are those of the strongest user-level attack.
    """
    levels = {}
    for level, found in curves.items():
        ceiling = ceiling_for(privacy, level)
        levels[level] = {
            "attacks": {
                name: {"auc": curve.auc, "auc_error": curve.auc_error}
                | {f"tpr@{fpr:g}": curve.tpr_at(fpr) for fpr in LOW_RATES}
                for name, curve in found.items()
            },
            "strongest": strongest(found),
            "ceiling": None
            if ceiling is None
            else {"label": ceiling.label, "auc": ceiling.auc}
            | {f"tpr@{fpr:g}": float(ceiling.tpr(fpr)) for fpr in LOW_RATES},
            "num_members": next(iter(found.values())).num_members,
            "num_others": next(iter(found.values())).num_others,
        }
    best = levels["user"]["attacks"][levels["user"]["strongest"]]
    return {
        "auc": best["auc"],
        "auc_error": best["auc_error"],
        "attack": levels["user"]["strongest"],
        "auc_ceiling": levels["user"]["ceiling"]["auc"] if levels["user"]["ceiling"] else None,
        "bug": any(excess(c, ceiling_for(privacy, lv)) for lv, f in curves.items() for c in f.values())
        if privacy
        else False,
        "verdict": verdict(curves, privacy),
        "privacy": privacy,
        "levels": levels,
    }


def record_of(train: Interactions, design: Design) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the attacker holds of all candidates: core bool ``[users, items]``, user and item ids of all rows."""
    core = np.zeros((train.num_users, train.num_items), bool)
    core[train.user_ids[design.core], train.item_ids[design.core]] = True
    return jnp.asarray(core), jnp.asarray(train.user_ids), jnp.asarray(train.item_ids)


def measure_factors(shared: Any, record: tuple[jax.Array, jax.Array, jax.Array]) -> Signals:
    """Signals of a released matrix factorisation, for `train_models` with `record_of`."""
    core, user_ids, item_ids = record
    return measured(factor_scores(shared, core), core, user_ids, item_ids)


def run_privacy(experiment: Any) -> dict | None:
    """The guarantee of a prepared run, as `ceiling_for` takes it; None without privacy."""
    plan = experiment.privacy
    if plan is None:
        return None
    ledger = experiment.rounds.charge(plan.ledger, first_round=0, num_rounds=experiment.num_rounds)
    return {
        "epsilon": float(ledger.spent(plan.delta).epsilon),
        "delta": plan.delta,
        "unit": "user",
        "relation": experiment.rounds.relation,
        "sampler": experiment.rounds.sampler,
        "gaussian": all(isinstance(event, GaussianDpEvent) for event, _ in flatten(ledger.event)),
    }


def attack_config(config: TrainConfig, *, num_shadows: int = 15, key: jax.Array | None = None) -> dict[str, Any]:
    """Attacks the training of a configuration: the same rounds, noise and cohorts, on random halves of its users.

    What is attacked is the shared parameters after the last round. The models are new ones: the run's own model was
    trained on everyone, so there is nobody to tell its members from. Item counts for popularity negatives, where they
    are released, are the run's, and not attacked.

    Args:
      config: checked; of a model that ranks.
      num_shadows: beside each target; one more model is trained, and each is the target once.
      key: of coins and training, in place of one from the configuration's seed.

    Returns:
      `summary`, with ``num_models`` and ``rounds``.

    Raises:
      ValueError: for a configuration that trains on ratings.
    """
    if config.data.use_ratings:
        raise ValueError("The attack measures how a model ranks items; it has no measure for ratings (use_ratings).")
    config = dataclasses.replace(config, devices=1, server=_for_fewer(config.server))
    key = jax.random.key(config.seed) if key is None else key
    data = prepare_data(config)
    train = data.split.train
    seed = int(jax.random.randint(jax.random.fold_in(key, 0), (), 0, 2**31 - 1))
    design = toss_coins(train, num_models=num_shadows + 1, seed=seed)
    clients = client_data(only_train(train))
    experiment = prepare(config, data=Data(data.interactions, data.split, clients, data.notes))
    found = train_models(
        experiment.rounds,
        clients,
        train,
        design,
        measure=measure_factors,
        record=record_of(train, design),
        num_rounds=(experiment.num_rounds,),
        span_size=config.eval_every,
        key=jax.random.fold_in(key, 1),
    )[experiment.num_rounds]
    curves = attack_levels(found, design, train)
    extent = {"num_models": len(design.users), "rounds": experiment.num_rounds}
    return summary(curves, run_privacy(experiment)) | extent


def _for_fewer(server: configs.ServerConfig) -> configs.ServerConfig:
    """Sums are divided by the run's cohorts and hold fewer clients; steps that depend on their scale make up for it."""
    if server.optimizer in ("adam", "yogi"):
        return server
    return dataclasses.replace(server, lr=server.lr / MEMBER_SHARE)


def attack_run(folder: str | Path, *, num_shadows: int = 15, key: jax.Array | None = None) -> dict[str, Any]:
    """`attack_config` for a finished run; writes RUN/membership.json, which its report shows.

    Args:
      folder: run directory with a config.json.
      num_shadows, key: as for `attack_config`.
    """
    values = attack_config(configs.load(folder), num_shadows=num_shadows, key=key)
    directory.write_json(Path(folder) / MEMBERSHIP, values)
    return values

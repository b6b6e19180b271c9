"""The result of a run: its test metrics beside baselines, what it spent, what it cost, and where it came from."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dp_accounting
import jax
import numpy as np

from fedjax_rec.evaluation.exact import Evaluation, evaluate
from fedjax_rec.evaluation.heldout import cases
from fedjax_rec.evaluation.ratings import rating_errors
from fedjax_rec.evaluation.sampled import expect_sampled
from fedjax_rec.evaluation.scorers import constant_scorer
from fedjax_rec.evaluation.statistics import activity_quartiles, bootstrap_interval, group_means, spread
from fedjax_rec.models.popularity import dp_popularity, popularity_scorer
from fedjax_rec.privacy.calibration import calibrate_noise_multiplier
from fedjax_rec.privacy.ledger import spent_to_dict
from fedjax_rec.runs import directory
from fedjax_rec.runs.config import PrivacyConfig, TrainConfig, to_dict
from fedjax_rec.runs.experiment import BASELINE_NOISE, KS, METRIC, Data, Experiment, prepare
from fedjax_rec.runs.stamp import stamp
from fedjax_rec.runs.training import Outcome, evaluate_part, selects_best, train


def privacy_statement(experiment: Experiment, outcome: Outcome) -> dict[str, Any] | None:
    """Everything that must stand beside an epsilon, or None without privacy."""
    plan = experiment.privacy
    if plan is None:
        return None
    spent = outcome.ledger.spent(plan.delta)
    return spent_to_dict(spent) | {
        "sampler": experiment.sampler.name,
        "trust_model": outcome.ledger.trust_model,
        "noise_multiplier": plan.noise_multiplier,
        "l2_clip_norm": plan.l2_clip_norm,
        "sampling_prob": experiment.sampler.sampling_prob,
        "expected_cohort_size": experiment.sampler.expected_size,
        "rounds": outcome.rounds,
        "budget": None if plan.budget is None else plan.budget.epsilon,
    }


def baselines(
    experiment: Experiment, *, data: Data, part: str = "test", report: Callable[[dict[str, Any]], None] = lambda r: None
) -> dict[str, dict[str, Any]]:
    """Popularity; and, for a private run, popularity at the same epsilon and the same model without privacy.

    Each private row is a release of its own: their epsilons are alternatives and do not share a ledger. The row without
    privacy is left out where the same learning rates diverge without clipping.
    """
    asked = cases(experiment.split, part)
    rows = {"popularity": evaluate(popularity_scorer(experiment.split.train), asked, ks=KS).values}
    plan = experiment.privacy
    if plan is None:
        return rows
    if plan.budget is not None:
        rows["dp_popularity"] = _dp_popularity_row(experiment, asked)
    if experiment.config.non_private_row:
        config = without_privacy(experiment.config)
        other = prepare(config, data=data)
        with contextlib.suppress(FloatingPointError):
            outcome = train(other, folder=None, report=report)
            rows["non_private"] = evaluate_part(other, outcome.state, outcome.private, part).values
    return rows


def without_privacy(config: TrainConfig) -> TrainConfig:
    """The same run without clipping and noise, and so without secrets and sums that hide anything."""
    upload = dataclasses.replace(config.upload, sum="float", dropout_prob=0.0)
    privacy = PrivacyConfig()
    return dataclasses.replace(config, epsilon=None, delta=None, secret_noise=False, privacy=privacy, upload=upload)


def _dp_popularity_row(experiment: Experiment, asked) -> dict[str, Any]:
    plan = experiment.privacy
    found = calibrate_noise_multiplier(
        dp_accounting.GaussianDpEvent, target_epsilon=plan.budget.epsilon, delta=plan.delta
    )
    key = jax.random.fold_in(experiment.keys.noise, BASELINE_NOISE)
    released = dp_popularity(experiment.split.train, noise_multiplier=found.noise_multiplier, key=key)
    privacy = {
        "epsilon": found.epsilon,
        "delta": plan.delta,
        "unit": "user",
        "relation": "add_or_remove_one",
        "sampler": "all",
    }
    return evaluate(constant_scorer(released.counts), asked, ks=KS).values | {"privacy": privacy}


def rating_metrics(experiment: Experiment, state: Any, private: Any, part: str) -> dict[str, float]:
    """rmse and mae of the held-out ratings, for a model trained on ratings; nothing for other models."""
    rows = getattr(experiment.split, part)
    if not experiment.config.data.use_ratings or rows.ratings is None:
        return {}
    known = ~np.isnan(rows.ratings)
    users, items = rows.user_ids[known], rows.item_ids[known]
    if not len(users):
        return {}

    @jax.jit
    def predict(shared, private, users, items):
        def one(pair):
            own = jax.tree.map(lambda x: x[pair[0]], private)
            return experiment.method.score(shared, own)[pair[1]]

        return jax.lax.map(one, (users, items), batch_size=64)

    errors = rating_errors(predict(state.shared, private, users, items), rows.ratings[known], user_ids=users)
    return {"rmse": errors.rmse, "mae": errors.mae}


def per_user(evaluation: Evaluation, metric: str) -> dict[str, Any]:
    """Spread and histogram of one metric over users."""
    values = np.asarray(evaluation.per_user[metric], np.float64)
    found = spread(values)
    counts, edges = np.histogram(values, bins=20, range=(0.0, 1.0))
    return {"mean": float(values.mean()), **dataclasses.asdict(found)} | {
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()}
    }


def lorenz(counts: np.ndarray, order: np.ndarray) -> list[float]:
    """Cumulative share of ``counts`` over items in ``order``, at 101 equally spaced shares of the catalogue."""
    cumulative = np.concatenate([[0.0], np.cumsum(np.asarray(counts, np.float64)[order])])
    if cumulative[-1] > 0:
        cumulative /= cumulative[-1]
    return np.interp(np.linspace(0, len(order), 101), np.arange(len(order) + 1), cumulative).tolist()


def _groups(experiment: Experiment, evaluation: Evaluation) -> dict[str, dict[str, float]]:
    train_rows = experiment.split.train
    values = evaluation.per_user[METRIC]
    words = {"q1": "1 (fewest)", "q2": "2", "q3": "3", "q4": "4 (most)"}
    quartile = activity_quartiles(train_rows.counts_per_user[evaluation.user_ids])
    groups = {"activity quartile": np.array([words[q] for q in quartile])}
    if "gender" in train_rows.user_attributes:
        groups["gender"] = np.asarray(train_rows.user_attributes["gender"])[evaluation.user_ids]
    out = {}
    for name, labels in groups.items():
        found = group_means(values, labels)
        out[name] = {str(label): float(mean) for label, mean in found.means.items()}
    return out


def cost(experiment: Experiment, outcome: Outcome) -> dict[str, float | None]:
    """Traffic in bytes and speed; None for what this session did not measure."""
    rounds = experiment.rounds
    clients = outcome.mean_cohort_size * outcome.rounds
    values = {
        "uplink_bytes_per_client_round": rounds.upload_bits / 8,
        "downlink_bytes_per_client_round": rounds.download_bits / 8,
        "plain_bytes_per_client_round": rounds.plain_bits / 8,
        "uplink_bytes_total": rounds.upload_bits / 8 * clients,
        "downlink_bytes_total": rounds.download_bits / 8 * clients,
        "plain_bytes_total": rounds.plain_bits / 8 * clients,
        "clients_per_s": outcome.mean_cohort_size / outcome.round_s,
        "rounds_per_s": 1 / outcome.round_s,
        "padding_waste": experiment.clients.padding_waste,
        "compile_s": outcome.compile_s,
    }
    return {name: float(value) if math.isfinite(value) else None for name, value in values.items()}


def result(experiment: Experiment, outcome: Outcome, rows: dict[str, dict[str, Any]], *, seconds: float) -> dict:
    """Everything that result.json holds, as JSON values."""
    evaluation = evaluate_part(experiment, outcome.state, outcome.private, "test")
    split, interactions, train_rows = experiment.split, experiment.interactions, experiment.split.train
    order = np.argsort(-train_rows.item_counts, kind="stable")
    interval = bootstrap_interval(evaluation.per_user[METRIC])
    smallest = int(np.min(evaluation.ranks.num_candidates))
    sampled = expect_sampled(evaluation, num_negatives=99, ks=(10,)).values if smallest > 100 else {}
    popularity = evaluate(popularity_scorer(train_rows), cases(split, "validation"), ks=KS).values
    return {
        "algorithm": experiment.method.title,
        "test": evaluation.values | sampled | rating_metrics(experiment, outcome.state, outcome.private, "test"),
        "interval": {METRIC: [float(interval.low), float(interval.high)]},
        "baselines": rows,
        "validation_baselines": {"popularity": popularity},
        "privacy": privacy_statement(experiment, outcome),
        "per_user": {METRIC: per_user(evaluation, METRIC)},
        "groups": _groups(experiment, evaluation),
        "exposure": {
            "cumulative_share": lorenz(evaluation.exposure[10], order),
            "interactions_cumulative_share": lorenz(train_rows.item_counts, order),
            "coverage@10": evaluation.values["coverage@10"],
        },
        "cost": cost(experiment, outcome),
        "warnings": list(experiment.warnings),
        "dataset": {
            "name": interactions.name,
            "num_users": interactions.num_users,
            "num_items": interactions.num_items,
            "num_interactions": interactions.num_interactions,
            "fingerprint": interactions.fingerprint,
        },
        "split": {
            "rule": split.rule,
            "tie_rule": split.tie_rule,
            "seed": split.seed,
            "fingerprint": split.fingerprint,
            "negatives": experiment.clients.exclusion,
        },
        "best_round": outcome.selected_round if selects_best(experiment.config) else None,
        "tested_round": outcome.selected_round,
        "rounds": outcome.rounds,
        "seconds": seconds,
        "stamp": stamp(
            seed=experiment.config.seed,
            data_fingerprint=interactions.fingerprint,
            split_fingerprint=split.fingerprint,
        ),
    }


def run(
    config: TrainConfig,
    *,
    data: Data,
    experiment: Experiment,
    folder: Path,
    report: Callable[[str, dict[str, Any]], None] = lambda phase, record: None,
) -> dict[str, Any]:
    """Trains, compares and writes a whole run directory but for its HTML report.

    Args:
      config: checked.
      data: from `prepare_data`.
      experiment: from `prepare`.
      folder: run directory, see `directory.check`.
      report: called with the phase (``"training"`` or ``"non-private"``) and each log record.

    Returns:
      The content of result.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / directory.CONFIG).is_file():
        directory.write_json(folder / directory.CONFIG, to_dict(dataclasses.replace(config, resume=False)))
    outcome = train(experiment, folder=folder, report=lambda record: report("training", record))
    start = time.perf_counter()
    rows = baselines(experiment, data=data, report=lambda record: report("non-private", record))
    if outcome.ledger is not None:
        outcome.ledger.save(folder / directory.LEDGER, delta=experiment.privacy.delta)
    values = result(experiment, outcome, rows, seconds=outcome.seconds + time.perf_counter() - start)
    if experiment.privacy is not None and config.non_private_row and "non_private" not in rows:
        values["warnings"].append(
            "The same configuration without privacy diverged, so its row is missing: without clipping it needs lower "
            "learning rates."
        )
    directory.write_json(folder / directory.RESULT, values)
    return values

"""The training loop of a run: spans of rounds, with validation, a log line and a checkpoint after each."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.evaluation.exact import Evaluation, evaluate
from fedjax_rec.evaluation.heldout import cases
from fedjax_rec.federated.round import RoundKeys
from fedjax_rec.privacy.curve import epsilon_after
from fedjax_rec.privacy.ledger import Ledger
from fedjax_rec.runs import checkpoint, directory
from fedjax_rec.runs.config import TrainConfig, differences, from_dict, to_dict
from fedjax_rec.runs.experiment import KS, METRIC, Experiment


class Outcome(NamedTuple):
    """What training leaves.

    Attributes:
      state: the ServerState of the selected round.
      private: private parameters of the selected round.
      ledger: everything released, or None.
      selected_round: the round that is tested.
      rounds: rounds done.
      seconds: training time over all sessions, validation and checkpoints included.
      compile_s: seconds that the first span took beyond a later one of the same length (or nan).
      round_s: median seconds a round, after compilation (or nan).
      mean_cohort_size: realised clients a round.
    """

    state: Any
    private: Any
    ledger: Ledger | None
    selected_round: int
    rounds: int
    seconds: float
    compile_s: float
    round_s: float
    mean_cohort_size: float


def evaluate_part(experiment: Experiment, state: Any, private: Any, part: str) -> Evaluation:
    """Exact full-ranking metrics of the clients' own models on one part of the split."""
    scorer = experiment.method.scorer(state.shared, private, part)
    return evaluate(scorer, cases(experiment.split, part), ks=KS)


def selects_best(config: TrainConfig) -> bool:
    """Whether the best validated round is tested, instead of the last one."""
    return config.select == "best" or (config.select == "auto" and not config.private)


def train(
    experiment: Experiment, *, folder: Path | None, report: Callable[[dict[str, Any]], None] = lambda record: None
) -> Outcome:
    """Runs the rounds that the configuration and the budget allow, from the last checkpoint if there is one.

    Args:
      experiment: from `prepare`.
      folder: run directory to log and checkpoint in, or None to keep nothing.
      report: called with each log record.

    Raises:
      ValueError: if the directory's checkpoint is damaged, or of another configuration or other data.
      OSError: if the disk is full; the last checkpoint is then still there.
      FloatingPointError: if the loss or the parameters are no longer finite.
    """
    state, private = experiment.rounds.init(jax.random.fold_in(jax.random.key(experiment.config.seed), 0))
    plan = experiment.privacy
    ledger = None if plan is None else plan.ledger
    progress = {"round": 0, "seconds": 0.0, "clients": 0.0, "best_round": 0, "best": -1.0}
    keep_best = selects_best(experiment.config)
    if folder is not None:
        found = _resume(folder, experiment, state, private)
        if found is not None:
            state, private, ledger, progress = found.state, found.private, found.ledger, found.progress
        # Round 0 too: a run that is killed early goes on with its keys, and a disk too small is found out at once.
        _save(folder, experiment, state, private, ledger, progress)
        directory.keep_records(folder, up_to_round=progress["round"])
    epsilons = _epsilons(experiment)
    best = None
    span_seconds = []
    while progress["round"] < experiment.num_rounds:
        span = min(experiment.config.eval_every, experiment.num_rounds - progress["round"])
        start = time.perf_counter()
        state, private, history = experiment.rounds.run(state, private, experiment.keys, span)
        means = _means(history, span)
        _check_finite(means["loss"], (state.shared, private))
        span_seconds.append((time.perf_counter() - start) / span)
        number = progress["round"] + span
        if plan is not None:
            ledger = experiment.rounds.charge(ledger, first_round=number - span, num_rounds=span)
        validation = evaluate_part(experiment, state, private, "validation").values
        improved = validation[METRIC] > progress["best"]
        progress = {
            "round": number,
            "seconds": progress["seconds"] + time.perf_counter() - start,
            "clients": progress["clients"] + means["cohort_size"] * span,
            "best_round": number if improved else progress["best_round"],
            "best": validation[METRIC] if improved else progress["best"],
        }
        record = {
            "round": number,
            "seconds": progress["seconds"],
            "rounds_per_s": 1.0 / span_seconds[-1],
            "epsilon": epsilons.get(number),
            "validation": validation,
            **means,
        }
        if improved and keep_best and folder is None:
            best = jax.tree.map(np.asarray, (state, private))  # a copy: the next span is given these buffers
        if folder is not None:
            directory.append_record(folder, record)
            _save(folder, experiment, state, private, ledger, progress)
            if ledger is not None:
                ledger.save(folder / directory.LEDGER)
        report(record)
    if keep_best:
        state, private = best or _best(folder, state, private, progress["best_round"])
    later = span_seconds[1:]
    return Outcome(
        state=state,
        private=private,
        ledger=ledger,
        selected_round=progress["best_round"] if keep_best else progress["round"],
        rounds=progress["round"],
        seconds=progress["seconds"],
        compile_s=max(span_seconds[0] - float(np.median(later)), 0.0) * experiment.config.eval_every
        if later
        else math.nan,
        round_s=float(np.median(later)) if later else math.nan,
        mean_cohort_size=progress["clients"] / max(progress["round"], 1),
    )


def _means(history: dict[str, jax.Array], span: int) -> dict[str, float | None]:
    """Means over the rounds of a span; those of client metrics weigh each round by its cohort, and are None without."""
    values = {name: np.asarray(rows, np.float64)[:span] for name, rows in history.items()}
    sizes = values.pop("cohort_size")
    means = {name: float(np.average(rows, weights=sizes)) if sizes.any() else None for name, rows in values.items()}
    return {"cohort_size": float(sizes.mean()), **means}


def _check_finite(loss: float | None, parameters: Any) -> None:
    finite = loss is None or math.isfinite(loss)
    if not finite or not all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(parameters)):
        raise FloatingPointError(
            "Training diverged: its loss or its parameters are no longer finite. Lower --server.lr, --client.lr or "
            "--client.private-lr; the checkpoints and logs before that are intact."
        )


def _epsilons(experiment: Experiment) -> dict[int, float | None]:
    """Epsilon after every round that is logged."""
    plan, config = experiment.privacy, experiment.config
    if plan is None:
        return {}
    points = sorted({*range(config.eval_every, experiment.num_rounds + 1, config.eval_every), experiment.num_rounds})
    epsilons = epsilon_after(
        experiment.rounds.releases,
        points,
        delta=plan.delta,
        relation=experiment.rounds.relation,
        prior=plan.ledger.event if plan.ledger.entries else None,
    )
    return {point: float(e) if math.isfinite(e) else None for point, e in zip(points, epsilons, strict=True)}


def _save(
    folder: Path, experiment: Experiment, state: Any, private: Any, ledger: Ledger | None, progress: dict[str, Any]
) -> None:
    """Saves the last checkpoint and then, if it is that, the best: what a kill between them leaves out is made up for
    by the same call on resuming."""
    saved = checkpoint.Checkpoint(
        state, private, experiment.keys, ledger, progress, to_dict(experiment.config), experiment.split.fingerprint
    )
    checkpoint.save(folder / directory.LAST, saved)
    if selects_best(experiment.config) and progress["best_round"] == progress["round"]:
        checkpoint.save(folder / directory.BEST, saved)


def _best(folder: Path, state: Any, private: Any, best_round: int) -> tuple[Any, Any]:
    found = checkpoint.restore(folder / directory.BEST, state=state, private=private)
    if found is None or found.progress["round"] != best_round:
        raise ValueError(
            f"The checkpoint of the best round, {best_round}, is no longer in {folder / directory.BEST}. Put it back, "
            "or train again with another --out."
        )
    return found.state, found.private


def _resume(folder: Path, experiment: Experiment, state: Any, private: Any) -> checkpoint.Checkpoint | None:
    found = checkpoint.describe(folder / directory.LAST)
    if found is None:
        return None
    other = differences(experiment.config, from_dict(found.config))
    if other:
        raise ValueError(
            f"The checkpoint in {folder} was made with another configuration ({'; '.join(other)}). "
            "Resume it with its own, or start a new run with another --out."
        )
    if found.split != experiment.split.fingerprint:
        raise ValueError(
            f"The data changed since the checkpoint in {folder} was made: its split had fingerprint "
            f"{found.split[:12]}, and now it is {experiment.split.fingerprint[:12]}. Restore the data, or start a new "
            "run with another --out."
        )
    if not _same_keys(found.keys, experiment.keys):
        raise ValueError(
            f"The checkpoint in {folder} was made with other secret keys; give `prepare` the `saved_keys` of it."
        )
    return checkpoint.restore(folder / directory.LAST, state=state, private=private)


def _same_keys(first: RoundKeys, second: RoundKeys) -> bool:
    return np.array_equal(*(np.stack([jax.random.key_data(key) for key in keys]) for keys in (first, second)))


def saved_keys(folder: Path) -> RoundKeys | None:
    """The keys of the run in a directory, for `prepare`; None if it has no checkpoint yet."""
    found = checkpoint.describe(folder / directory.LAST)
    return None if found is None else found.keys

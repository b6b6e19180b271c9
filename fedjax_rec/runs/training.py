"""The training loop of a run: spans of rounds, with validation, a log line and a checkpoint after each."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_rec.evaluation.exact import Evaluation, evaluate
from fedjax_rec.evaluation.heldout import cases
from fedjax_rec.evaluation.scorers import client_scorer
from fedjax_rec.privacy.curve import epsilon_curve
from fedjax_rec.privacy.ledger import Ledger
from fedjax_rec.runs import checkpoint, directory
from fedjax_rec.runs.config import differences, from_dict, to_dict
from fedjax_rec.runs.experiment import Experiment

KS = (5, 10, 20)
METRIC = "ndcg@10"


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
    scorer = client_scorer(experiment.model.score, shared=state.shared, private=private)
    return evaluate(scorer, cases(experiment.split, part), ks=KS)


def selects_best(experiment: Experiment) -> bool:
    """Whether the best validated round is tested, instead of the last one."""
    select = experiment.config.select
    return select == "best" or (select == "auto" and experiment.privacy is None)


def train(
    experiment: Experiment, *, folder: Path | None, report: Callable[[dict[str, Any]], None] = lambda record: None
) -> Outcome:
    """Runs the rounds that the configuration and the budget allow, from the last checkpoint if there is one.

    Args:
      experiment: from `prepare`.
      folder: run directory to log and checkpoint in, or None to keep nothing.
      report: called with each log record.

    Raises:
      ValueError: if the directory's checkpoint is of another configuration.
      FloatingPointError: if the loss is no longer finite.
    """
    state, private = experiment.rounds.init(jax.random.fold_in(jax.random.key(experiment.config.seed), 0))
    keys, plan = experiment.keys, experiment.privacy
    ledger = None if plan is None else plan.ledger
    progress = {"round": 0, "seconds": 0.0, "clients": 0.0, "best_round": 0, "best": -1.0}
    if folder is not None:
        found = _resume(folder, experiment, state, private)
        if found is not None:
            state, private, keys, ledger, progress, _ = found
        directory.keep_records(folder, up_to_round=progress["round"])
    epsilons = _epsilons(experiment)
    best = (state, private)
    keep_best = selects_best(experiment)
    if keep_best and folder is None:
        best = jax.tree.map(np.asarray, best)
    span_seconds = []
    while progress["round"] < experiment.num_rounds:
        span = min(experiment.config.eval_every, experiment.num_rounds - progress["round"])
        start = time.perf_counter()
        state, private, history = experiment.rounds.run(state, private, keys, span)
        history = {name: np.asarray(values)[:span] for name, values in history.items()}
        span_seconds.append((time.perf_counter() - start) / span)
        if not np.isfinite(history["loss"]).all():
            raise FloatingPointError(
                f"The training loss is not finite after round {progress['round'] + span}: training diverged. "
                "Lower --server.lr, --client.lr or --client.private-lr; the last checkpoint is intact."
            )
        if plan is not None:
            ledger = _charge(ledger, experiment, span)
        validation = evaluate_part(experiment, state, private, "validation").values
        number = progress["round"] + span
        improved = validation[METRIC] > progress["best"]
        progress = {
            "round": number,
            "seconds": progress["seconds"] + time.perf_counter() - start,
            "clients": progress["clients"] + float(history["cohort_size"].sum()),
            "best_round": number if improved else progress["best_round"],
            "best": validation[METRIC] if improved else progress["best"],
        }
        record = {
            "round": number,
            "seconds": progress["seconds"],
            "rounds_per_s": 1.0 / span_seconds[-1],
            "epsilon": epsilons.get(number),
            "validation": validation,
            **{name: float(values.mean()) for name, values in history.items()},
        }
        if improved and keep_best and folder is None:
            best = jax.tree.map(np.asarray, (state, private))
        if folder is not None:
            directory.append_record(folder, record)
            saved = checkpoint.Checkpoint(state, private, keys, ledger, progress, to_dict(experiment.config))
            if improved and keep_best:
                checkpoint.save(folder / directory.BEST, saved)
            checkpoint.save(folder / directory.LAST, saved)
            if ledger is not None:
                ledger.save(folder / directory.LEDGER)
        report(record)
    selected = progress["round"]
    if keep_best and progress["round"]:
        selected = progress["best_round"]
        if folder is not None:
            found = checkpoint.restore(folder / directory.BEST, state=state, private=private, keys=keys)
            best = (found.state, found.private)
        state, private = best
    later = span_seconds[1:]
    return Outcome(
        state=state,
        private=private,
        ledger=ledger,
        selected_round=selected,
        rounds=progress["round"],
        seconds=progress["seconds"],
        compile_s=max(span_seconds[0] - float(np.median(later)), 0.0) * experiment.config.eval_every
        if later
        else math.nan,
        round_s=float(np.median(later)) if later else math.nan,
        mean_cohort_size=progress["clients"] / max(progress["round"], 1),
    )


def _charge(ledger: Ledger, experiment: Experiment, rounds: int) -> Ledger:
    return ledger.record(
        experiment.rounds.dp_event,
        phase="training",
        released="noised sum of clipped client updates",
        sampler=experiment.sampler.name,
        count=rounds,
        unit="user",
        relation=experiment.rounds.relation,
    )


def _epsilons(experiment: Experiment) -> dict[int, float | None]:
    """Epsilon after every round that is logged."""
    plan, config = experiment.privacy, experiment.config
    if plan is None:
        return {}
    points = sorted({*range(config.eval_every, experiment.num_rounds + 1, config.eval_every), experiment.num_rounds})
    epsilons = epsilon_curve(
        experiment.rounds.dp_event,
        points,
        delta=plan.delta,
        relation=experiment.rounds.relation,
        prior=plan.ledger.event if plan.ledger.entries else None,
    )
    return {point: float(e) if math.isfinite(e) else None for point, e in zip(points, epsilons, strict=True)}


def _resume(folder: Path, experiment: Experiment, state: Any, private: Any) -> checkpoint.Checkpoint | None:
    found = checkpoint.restore(folder / directory.LAST, state=state, private=private, keys=experiment.keys)
    if found is None:
        return None
    other = differences(experiment.config, from_dict(found.config))
    if other:
        raise ValueError(
            f"The checkpoint in {folder} was made with another configuration ({'; '.join(other)}). "
            "Resume it with its own, or start a new run with another --out."
        )
    return found

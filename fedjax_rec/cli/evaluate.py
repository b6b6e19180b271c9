"""`fedjax-rec evaluate RUN`: test metrics of a saved run, at other cut-offs or on its validation part."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluate the checkpoint of a run on the full catalogue, and with 99 sampled negatives in expectation.

    fedjax-rec evaluate runs/mine
    fedjax-rec evaluate runs/mine --ks 1 10 100 --json
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    part: Literal["test", "validation"] = "test"
    """Which held-out interactions to rank."""
    ks: tuple[int, ...] = (5, 10, 20, 50)
    """Cut-offs."""
    ties: Literal["expected", "pessimistic", "optimistic"] = "expected"
    """How equal scores are ranked."""
    checkpoint: Literal["auto", "best", "last"] = "auto"
    """Which checkpoint; auto is the one the run itself tested."""
    data_dir: Path | None = None
    """Folder of the data set, if it has moved since the run."""
    json: bool = False
    """Print one JSON object and nothing else."""


def run(config: EvaluateConfig) -> int:
    """Prints the metrics and writes evaluation-PART.json into the run directory."""
    from rich.console import Console

    from fedjax_rec.evaluation import cases, client_scorer, evaluate, expect_sampled
    from fedjax_rec.reporting import Table, to_rich
    from fedjax_rec.runs import checkpoint, directory
    from fedjax_rec.runs import config as configs
    from fedjax_rec.runs.experiment import prepare
    from fedjax_rec.runs.results import without_privacy

    if not config.run.is_dir():
        raise FileNotFoundError(f"There is no run directory {config.run}.")
    saved = configs.load(config.run)
    saved = dataclasses.replace(saved, data_dir=config.data_dir or saved.data_dir)
    experiment = prepare(without_privacy(saved))  # the chain keeps no state, so the parameters have the same shapes
    which = config.checkpoint
    if which == "auto":
        which = "best" if saved.select == "best" or (saved.select == "auto" and not saved.private) else "last"
    folder = config.run / (directory.BEST if which == "best" else directory.LAST)
    found = checkpoint.restore_parameters(folder, rounds=experiment.rounds, keys=experiment.keys)
    evaluation = evaluate(
        client_scorer(experiment.model.score, shared=found.shared, private=found.private),
        cases(experiment.split, config.part),
        ks=config.ks,
        ties=config.ties,
    )
    values = dict(evaluation.values)
    if int(evaluation.ranks.num_candidates.min()) > 100:
        values |= expect_sampled(evaluation, num_negatives=99, ks=(10,)).values
    answer = {
        "part": config.part,
        "round": found.round,
        "users": evaluation.num_users,
        "metrics": values,
        "split": evaluation.fingerprint,
    }
    directory.write_json(config.run / f"evaluation-{config.part}.json", answer)
    if config.json:
        print(json.dumps(answer))
        return 0
    table = Table(
        columns=("metric", "value"),
        rows=tuple(values.items()),
        caption=f"{config.run}, round {found.round}, {config.part}: {evaluation.num_users:,} users, full catalogue",
    )
    Console().print(to_rich(table))
    return 0

"""`fedjax-rec evaluate RUN`: test metrics of a saved run, at other cut-offs or on its validation part."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from fedjax_rec.runs.checkpoint import Checkpoint
    from fedjax_rec.runs.experiment import Experiment


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

    from fedjax_rec.evaluation import cases, evaluate, expect_sampled
    from fedjax_rec.reporting import Table, to_rich
    from fedjax_rec.runs import directory
    from fedjax_rec.runs.results import rating_metrics

    experiment, found = load_trained(config.run, data_dir=config.data_dir, checkpoint=config.checkpoint)
    evaluation = evaluate(
        experiment.method.scorer(found.state.shared, found.private, config.part),
        cases(experiment.split, config.part),
        ks=config.ks,
        ties=config.ties,
    )
    values = dict(evaluation.values)
    if int(evaluation.ranks.num_candidates.min()) > 100:
        values |= expect_sampled(evaluation, num_negatives=99, ks=(10,)).values
    values |= rating_metrics(experiment, found.state, found.private, config.part)
    answer = {
        "part": config.part,
        "round": found.progress["round"],
        "users": evaluation.num_users,
        "metrics": values,
        "split": evaluation.fingerprint,
    }
    directory.write_json(config.run / f"evaluation-{config.part}.json", answer)
    if config.json:
        print(json.dumps(answer))
        return 0
    caption = f"{config.run}, round {answer['round']}, {config.part}: {evaluation.num_users:,} users, full catalogue"
    table = Table(columns=("metric", "value"), rows=tuple(values.items()), caption=caption)
    Console().print(to_rich(table))
    return 0


def load_trained(run: Path, *, data_dir: Path | None, checkpoint: str) -> "tuple[Experiment, Checkpoint]":
    """What a run trained on, and what it learned, on one device.

    Args:
      run: run directory.
      data_dir: folder of the data set, if it has moved since the run.
      checkpoint: "best", "last", or "auto" for the one that the run itself tested.

    Raises:
      FileNotFoundError: if there is no such run, or it was stopped before its first checkpoint.
      ValueError: if the data changed since the run.
    """
    from fedjax_rec.runs import config as configs
    from fedjax_rec.runs import directory
    from fedjax_rec.runs.experiment import prepare
    from fedjax_rec.runs.results import without_privacy
    from fedjax_rec.runs.training import selects_best

    if not run.is_dir():
        raise FileNotFoundError(f"There is no run directory {run}.")
    saved = configs.load(run)
    saved = dataclasses.replace(saved, data_dir=data_dir or saved.data_dir)
    # No link of the chain keeps state, so a run without privacy has parameters of the same shapes.
    experiment = prepare(dataclasses.replace(without_privacy(saved), devices=1))
    best = selects_best(saved) if checkpoint == "auto" else checkpoint == "best"
    return experiment, _parameters(
        experiment, run / (directory.BEST if best else directory.LAST), devices=saved.devices
    )


def _parameters(experiment: "Experiment", folder: Path, *, devices: int) -> "Checkpoint":
    """The checkpoint in a folder, brought onto one device from the number of devices that the run had."""
    import jax

    from fedjax_rec.runs import checkpoint

    found = checkpoint.describe(folder)
    if found is None:
        raise FileNotFoundError(f"There is no complete checkpoint in {folder}; the run was stopped before its first.")
    if found.split != experiment.split.fingerprint:
        raise ValueError(
            f"The data changed since the run: its split had fingerprint {found.split[:12]}, and now it is "
            f"{experiment.split.fingerprint[:12]}. Restore the data, or name its folder with --data-dir."
        )
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    num_private = -(-experiment.clients.num_clients // devices) * devices
    state, private = jax.eval_shape(experiment.rounds.init, jax.random.key(0))
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state)
    private = jax.tree.map(lambda x: jax.ShapeDtypeStruct((num_private, *x.shape[1:]), x.dtype, sharding=here), private)
    return checkpoint.restore(folder, state=state, private=private)

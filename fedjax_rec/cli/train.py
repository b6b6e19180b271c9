"""`fedjax-rec train`: one private recommender, a table, and a run directory with a report."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedjax_rec.reporting import epsilon_label, result_table, to_rich
from fedjax_rec.reporting.formatting import format_bytes
from fedjax_rec.reporting.html import write_report
from fedjax_rec.runs import config as configs
from fedjax_rec.runs import directory
from fedjax_rec.runs.config import TrainConfig
from fedjax_rec.runs.config_checks import check
from fedjax_rec.runs.experiment import Experiment, prepare, prepare_data
from fedjax_rec.runs.results import run as run_experiment
from fedjax_rec.runs.training import saved_keys
from fedjax_rec.runs.uploads import describe_uploads


def run(config: TrainConfig) -> int:
    """Runs the whole job and prints where its files are.

    Returns:
      0. Errors are raised as sentences, for `main` to print.
    """
    console = Console()
    check(config)
    folder = config.out or _new_folder(config)
    directory.check(folder, resume=config.resume)
    if config.resume:
        _check_same(config, folder)
    console.print(_headline(config, folder), soft_wrap=True)
    data = prepare_data(config)
    experiment = prepare(config, data=data, keys=saved_keys(folder) if config.resume else None)
    console.print(_plan(experiment), soft_wrap=True)
    for warning in experiment.warnings:
        console.print(f"[yellow]note[/] {escape(warning)}", highlight=False, soft_wrap=True)
    with _progress(console, experiment) as report:
        result = run_experiment(config, data=data, experiment=experiment, folder=folder, report=report)
    page = write_report(folder)
    for warning in result["warnings"][len(experiment.warnings) :]:
        console.print(f"[yellow]note[/] {escape(warning)}", highlight=False, soft_wrap=True)
    console.print()
    console.print(to_rich(result_table(result), max_width=console.width))
    console.print(f"\nEpsilon: {epsilon_label(result['privacy'])}", highlight=False)
    console.print(f"Run directory: {folder}\nReport: {page}", highlight=False, soft_wrap=True)
    return 0


def _new_folder(config: TrainConfig) -> Path:
    name = Path(config.dataset).stem if "." in config.dataset else config.dataset.replace("/", "-")
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _check_same(config: TrainConfig, folder: Path) -> None:
    other = configs.differences(config, configs.load(folder))
    if other:
        raise ValueError(
            f"The run in {folder} has another configuration ({'; '.join(other)}). "
            "Resume it without those flags, or start a new run with another --out."
        )


def _headline(config: TrainConfig, folder: Path) -> str:
    verb = "Resuming" if config.resume else "Training"
    return f"[bold]{verb}[/] on {escape(config.dataset)} for {config.rounds} rounds, into {escape(str(folder))}"


def _plan(experiment: Experiment) -> str:
    clients, sampler, plan = experiment.clients, experiment.sampler, experiment.privacy
    lines = [
        f"  data     {clients.num_clients:,} clients, {clients.num_items:,} items, "
        f"{clients.num_interactions:,} training interactions, split {experiment.split.rule}"
        f" ({experiment.split.tie_rule} ties, {experiment.split.fingerprint[:12]}), negatives {clients.exclusion}",
        f"  cohort   {sampler.name}, {sampler.expected_size:g} clients a round expected",
    ]
    if plan is None:
        lines.append("  privacy  none; add --epsilon 8 for user-level differential privacy")
    else:
        target = "given noise" if plan.budget is None else f"budget epsilon {plan.budget.epsilon:g}"
        lines.append(
            f"  privacy  user-level, {experiment.rounds.relation.replace('_', ' ')}, delta {plan.delta:g}, {target}: "
            f"noise multiplier {plan.noise_multiplier:.4g}, clip norm {plan.l2_clip_norm:g}"
        )
    rounds = experiment.rounds
    up, down, plain = (format_bytes(x / 8) for x in (rounds.upload_bits, rounds.download_bits, rounds.plain_bits))
    how = describe_uploads(experiment.config, sampler)
    lines.append(f"  uploads  {how}: {up} up and {down} down a client and round; plain float32 takes {plain} each way")
    return "\n".join(lines)


@contextlib.contextmanager
def _progress(console: Console, experiment: Experiment) -> Iterator:
    """A progress bar per phase on a terminal, and a line now and then where there is none."""
    totals = {"training": experiment.num_rounds, "non-private": experiment.config.rounds}
    columns = (
        TextColumn("{task.description:11}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks = {"training": bar.add_task("training", total=totals["training"], said="compiling")}

        def report(phase, record):
            total = totals[phase]
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total, said="compiling")
            said = f"{record['rounds_per_s']:.1f} rounds/s  "
            said += "no clients  " if record["loss"] is None else f"loss {record['loss']:.4f}  "
            said += f"ndcg@10 {record['validation']['ndcg@10']:.4f}"
            if record["epsilon"] is not None:
                said += f"  ε {record['epsilon']:.3f}"
            bar.update(tasks[phase], completed=record["round"], said=said)
            step = experiment.config.eval_every * max(total // experiment.config.eval_every // 5, 1)
            if not console.is_terminal and (record["round"] % step == 0 or record["round"] == total):
                console.print(f"{phase:11} round {record['round']:>5}/{total}  {said}", highlight=False, soft_wrap=True)

        yield report


def default_for(resume_folder: Path | None, config_file: Path | None) -> TrainConfig:
    """The defaults that flags override: a saved configuration, where one is named."""
    if config_file is not None:
        return dataclasses.replace(configs.load(config_file), out=None, resume=False)
    if resume_folder is not None:
        directory.check(resume_folder, resume=True)
        return dataclasses.replace(configs.load(resume_folder), out=resume_folder)
    return TrainConfig()

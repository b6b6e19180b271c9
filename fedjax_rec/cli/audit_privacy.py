"""`fedjax-rec audit privacy`: does a run's own chain of clip and noise leak more than its ledger says?"""

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from rich.console import Console

    from fedjax_rec.privacy.audit import AuditResult
    from fedjax_rec.privacy.canaries import Layout
    from fedjax_rec.reporting import Table
    from fedjax_rec.runs.config import TrainConfig
    from fedjax_rec.runs.experiment import Experiment

AUDIT = "audit.json"
# Canaries see best where epsilon is about this; a stream of so many rounds is enough.
VISIBLE_EPSILON, MOST_ROUNDS = 2.0, 256
# A delta that is not small against one canary of thousands would hide what they show.
MOST_DELTA = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditPrivacyConfig:
    """Audit a run's differential privacy: stream canary clients through its chain, and count who can be told apart.

    Thousands of canaries (some with huge updates, some with NaN, some with many or repeated rows) are each put into a
    run or left out by a fair coin, and go through the clip, the noise and the sampler that the run used. How well the
    coins can be guessed from the released sums bounds epsilon from below. A bound above the claim is a bug; a bound
    below it is no proof that there is none. No data and no model of yours is looked at, beyond the number of users.

        fedjax-rec audit privacy runs/mine

    Prints the bound beside the claim and writes runs/mine/audit.json. The same before a run, from its configuration:

        fedjax-rec audit privacy config.json --num-canaries 20000

    Canaries see best where epsilon is about 2, so by default as many of the run's rounds are audited as cost that. The
    exit code is 1 if a bound is above the claim, 2 if there is nothing to audit.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory, or a config.json that one holds."""
    num_canaries: int = 5000
    """Coins for each kind of canary. 5000 see a third of the right noise at epsilon 2; half of it takes 20000."""
    num_rounds: int | None = None
    """Rounds of each stream; by default as many as cost an epsilon of 2, at most those of the run."""
    seeds: int = 1
    """Audits, each of new coins and noise; together they fail a right implementation with a probability of 5 %."""
    seed: int = 0
    """Of the first."""
    data_dir: Path | None = None
    """Folder of the data set, if it moved since."""
    membership: bool = False
    """Also attack a run's training: train shadow models with and without each user, and tell members from others by
    what is released. Minutes, on the run's own data; writes membership.json."""
    num_shadows: int = 15
    """Shadow models of that attack."""
    json: bool = False
    """Print one JSON object and nothing else."""


def run(config: AuditPrivacyConfig) -> int:
    """Audits, prints, and writes audit.json into a run directory.

    Returns:
      0 if no bound is above the claim, else 1.
    """
    import jax
    from rich.console import Console

    from fedjax_rec.privacy.audit import NUM_CROWD_RUNS, make_audit
    from fedjax_rec.reporting import to_rich
    from fedjax_rec.reporting.html import write_report
    from fedjax_rec.runs import directory

    _check(config)
    train_config = _private_config(config)
    console = Console(highlight=False, markup=False, quiet=config.json)
    experiment = _prepare(train_config)
    mismatch = _ledger_mismatch(config.run, experiment)
    if mismatch:
        print(json.dumps({"passed": False, "sentence": mismatch}) if config.json else mismatch)
        return 1
    num_rounds = config.num_rounds or rounds_to_audit(experiment)
    audit = make_audit(
        experiment.privacy.transforms,
        experiment.sampler,
        num_rounds=num_rounds,
        num_canaries=config.num_canaries,
        delta=min(experiment.privacy.delta, MOST_DELTA),
        confidence=1 - 0.05 / config.seeds,
        num_crowd_runs=NUM_CROWD_RUNS,
        layout=_layout(experiment),
    )
    results = [audit(jax.random.key(config.seed + index)) for index in range(config.seeds)]
    worst = max(results, key=lambda result: (not result.passed, result.lower_bound, result.lower_bound_fdp))
    answer = as_json(worst, experiment, results)
    if config.run.is_dir():
        directory.write_json(config.run / AUDIT, answer)
    console.print(to_rich(_table(worst, experiment, config), max_width=console.width))
    console.print(answer["sentence"])
    attack = _attack(config, console) if config.membership else None
    if (config.run / directory.RESULT).is_file():
        console.print(f"Report: {write_report(config.run)}", soft_wrap=True)
    if config.json:
        print(json.dumps(answer | ({} if attack is None else {"membership": attack}), allow_nan=False))
    return 0 if answer["passed"] and not (attack or {}).get("bug") else 1


def _attack(config: AuditPrivacyConfig, console: "Console") -> dict[str, Any]:
    """Membership inference on a run directory: prints its verdict, and leaves membership.json there."""
    from fedjax_rec.attacks.membership import attack_run

    console.print(f"Training {config.num_shadows} shadow models ...")
    found = attack_run(config.run, num_shadows=config.num_shadows)
    console.print(
        f"Membership AUC {found['auc']:.3f} ± {found['auc_error']:.3f} ({found['attack']}). {found['verdict']}"
    )
    return found


def rounds_to_audit(experiment: "Experiment") -> int:
    """As many of the run's rounds, in whole turns, as cost an epsilon of about 2; at least one turn."""
    from fedjax_rec.privacy.curve import epsilon_after

    turn, most = experiment.sampler.num_groups, min(experiment.num_rounds, MOST_ROUNDS)
    choices = [1]
    while turn * 2 * choices[-1] <= most:
        choices.append(2 * choices[-1])
    rounds = [min(turn * count, experiment.num_rounds) for count in choices]
    delta = min(experiment.privacy.delta, MOST_DELTA)
    spent = epsilon_after(experiment.rounds.releases, rounds, delta=delta, relation=experiment.sampler.relation)
    return max((n for n, epsilon in zip(rounds, spent, strict=True) if epsilon <= VISIBLE_EPSILON), default=rounds[0])


def as_json(worst: "AuditResult", experiment: "Experiment", results: list["AuditResult"]) -> dict[str, Any]:
    """What audit.json holds: the worst of the audits, what it was an audit of, and all of them in short."""

    def number(value: float) -> float | str:
        return value if math.isfinite(value) else "inf"

    def short(result):
        return {
            "lower_bound": number(result.lower_bound),
            # Where no Gaussian curve covers the claim, this bound would be compared with nothing.
            "lower_bound_fdp": number(result.lower_bound_fdp) if math.isfinite(result.gaussian_epsilon) else None,
            "passed": result.passed,
        }

    sampler, plan = experiment.sampler, experiment.privacy
    return short(worst) | {
        "sentence": worst.sentence,
        "claimed_epsilon": worst.claimed_epsilon,
        "gaussian_epsilon": number(worst.gaussian_epsilon),
        "delta": worst.delta,
        "unit": "user",
        "relation": sampler.relation,
        "sampler": sampler.name,
        "confidence": 1 - len(results) * (1 - worst.confidence),
        "num_canaries": worst.num_canaries,
        "num_rounds": worst.num_rounds,
        "run_rounds": experiment.num_rounds,
        "noise_multiplier": plan.noise_multiplier,
        "most_visible": worst.most_visible,
        "findings": [f._asdict() | {"lower_bound": number(f.lower_bound)} for f in worst.findings],
        "audits": [short(result) for result in results],
    }


def _check(config: AuditPrivacyConfig) -> None:
    if config.membership and not config.run.is_dir():
        raise ValueError(f"--membership leaves its answer in a run directory, and {config.run} is none; give a run.")
    for flag in ("num_canaries", "num_rounds", "seeds", "num_shadows"):
        value = getattr(config, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} must be a positive number; got {value}.")


def _private_config(config: AuditPrivacyConfig) -> "TrainConfig":
    from fedjax_rec.runs import directory
    from fedjax_rec.runs.config import load
    from fedjax_rec.runs.config_checks import check

    if not config.run.exists():
        raise FileNotFoundError(
            f"There is no run and no configuration at {config.run}: give the folder that `fedjax-rec train` printed, "
            "or a config.json."
        )
    found = load(config.run)
    if not found.private:
        raise ValueError(
            f"{config.run} trains without privacy, so it claims nothing that could be audited; train with --epsilon."
        )
    if config.run.is_dir() and not (config.run / directory.LEDGER).is_file():
        raise FileNotFoundError(
            f"{config.run} has no {directory.LEDGER}: it was stopped before its first checkpoint, and has released "
            f"nothing. Continue it with --resume, or audit {config.run / directory.CONFIG} itself."
        )
    found = dataclasses.replace(found, devices=1, data_dir=config.data_dir or found.data_dir)
    check(found)
    return found


def _prepare(train_config: "TrainConfig") -> "Experiment":
    """The run's experiment; its keys are not the run's, which an audit has no use for."""
    from fedjax_rec.runs.experiment import prepare

    return prepare(dataclasses.replace(train_config, secret_noise=False))


def _ledger_mismatch(folder: Path, experiment: "Experiment") -> str:
    """A sentence if the ledger charges other rounds than the configuration makes, else nothing."""
    from dp_accounting import NoOpDpEvent

    from fedjax_rec.privacy.events import describe
    from fedjax_rec.privacy.ledger import Ledger
    from fedjax_rec.runs import directory

    if not folder.is_dir():
        return ""
    entries = Ledger.load(folder / directory.LEDGER).phase("training").entries
    if not entries:
        return ""
    made = [event for event, _ in experiment.rounds.releases(0, experiment.num_rounds)]
    made = [describe(event) for event in made if not isinstance(event, NoOpDpEvent)]
    charged = [describe(entry.event) for entry in entries]
    if set(charged) <= set(made):
        return ""
    return (
        f"A bug: {folder / directory.LEDGER} charges rounds of {charged[0]}, and the configuration beside it makes "
        f"rounds of {made[0]}. One of the two files is not of this run, or this version of fedjax_rec plans otherwise."
    )


def _layout(experiment: "Experiment") -> "Layout":
    """Canaries with the tables of the run's model, and no more numbers than its longest client sends."""
    import jax

    from fedjax_rec.privacy.canaries import Layout

    tables = tuple(jax.eval_shape(experiment.method.algorithm.init, jax.random.key(0)).shared.tables)
    longest = max(int(bucket.item_ids.shape[-1]) for bucket in experiment.clients.buckets)
    numbers = longest * (experiment.config.model.dim + 1)
    return Layout(tables=tables, rows=min(max(numbers // len(tables), 2), Layout.rows), dense=0)


def _table(worst: "AuditResult", experiment: "Experiment", config: AuditPrivacyConfig) -> "Table":
    from fedjax_rec.reporting import Table
    from fedjax_rec.reporting.statements import statement_parts

    parts = statement_parts(
        {
            "epsilon": worst.claimed_epsilon,
            "delta": worst.delta,
            "unit": "user",
            "relation": experiment.sampler.relation,
            "sampler": experiment.sampler.name,
        }
    )
    rows = [(f.score, f.num_canaries, f.num_guesses, f.num_correct, f.lower_bound) for f in worst.findings]
    rows.append(("claimed", None, None, None, worst.claimed_epsilon))
    return Table(
        columns=("canaries told apart by", "canaries", "guessed in", "right", "ε at least"),
        rows=rows,
        caption=f"{config.run}: {worst.num_rounds} of {experiment.num_rounds} rounds, {', '.join(parts)}",
    )

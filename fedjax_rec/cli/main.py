"""The command line: `fedjax-rec VERB`: train, evaluate, explain, synthesize, anonymize, epsilon, budget, data, ..."""

import errno
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from fedjax_rec.cli.anonymize import AnonymizeConfig
from fedjax_rec.cli.audit import AuditConfig
from fedjax_rec.cli.audit_privacy import AuditPrivacyConfig
from fedjax_rec.cli.budget import BudgetConfig
from fedjax_rec.cli.data import DataConfig
from fedjax_rec.cli.epsilon import EpsilonConfig
from fedjax_rec.cli.evaluate import EvaluateConfig
from fedjax_rec.cli.explain import ExplainConfig
from fedjax_rec.cli.secagg import SecAggDemoConfig
from fedjax_rec.cli.synthesize import SynthesizeConfig
from fedjax_rec.runs.config import TrainConfig

DESCRIPTION = """Federated recommenders with honest differential privacy, at accelerator speed.

Start with `fedjax-rec train --epsilon 8`: it needs no data and no network, and prints what privacy costs."""

RESUME = "`fedjax-rec train --resume --out RUN` continues a run from its last checkpoint"


def main(args: Sequence[str] | None = None) -> int:
    """Parses the command line and runs one verb.

    Returns:
      The exit code: 0; 2 for a request that cannot be met as asked, with one sentence on standard error; 130 if
      interrupted.
    """
    args = list(sys.argv[1:] if args is None else args)
    try:
        config = _parse(args)
        return _run(config)
    except (ValueError, OSError, FloatingPointError, ImportError, RuntimeError) as error:
        if os.environ.get("FEDJAX_REC_TRACEBACK"):
            raise
        print(f"fedjax-rec: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        way_on = f"; {RESUME}" if args and args[0] == "train" else ""
        print(f"\nfedjax-rec: interrupted{way_on}.", file=sys.stderr)
        return 130


def _sentence(error: Exception) -> str:
    """The error's own sentence, or one for what the operating system reports in a word."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    if error.errno == errno.ENOSPC:
        return f"the disk is full. Free some space; {RESUME}."
    where = "" if error.filename is None else f" at {error.filename}"
    return f"{error.strerror}{where}; check the path and its permissions."


def entry() -> None:
    """The console script."""
    if not os.environ.get("FEDJAX_REC_TRACEBACK"):
        # Threads of the storage libraries outlive a save that failed: what they say would follow our sentence.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        sys.unraisablehook = lambda unraisable: None
    sys.exit(main())


def _parse(args: list[str]):
    if args[:2] == ["audit", "privacy"]:
        return tyro.cli(AuditPrivacyConfig, args=args[2:], prog="fedjax-rec audit privacy")
    default, args = _train_default(args)
    verbs = (
        Annotated[TrainConfig, tyro.conf.subcommand("train", default=default)]
        | Annotated[EvaluateConfig, tyro.conf.subcommand("evaluate")]
        | Annotated[ExplainConfig, tyro.conf.subcommand("explain")]
        | Annotated[SynthesizeConfig, tyro.conf.subcommand("synthesize")]
        | Annotated[AnonymizeConfig, tyro.conf.subcommand("anonymize")]
        | Annotated[EpsilonConfig, tyro.conf.subcommand("epsilon")]
        | Annotated[BudgetConfig, tyro.conf.subcommand("budget")]
        | Annotated[DataConfig, tyro.conf.subcommand("data")]
        | Annotated[AuditConfig, tyro.conf.subcommand("audit")]
        | Annotated[SecAggDemoConfig, tyro.conf.subcommand("secagg")]
    )
    return tyro.cli(
        verbs, args=args, prog="fedjax-rec", description=DESCRIPTION, config=(tyro.conf.OmitSubcommandPrefixes,)
    )


def _train_default(args: list[str]) -> tuple[TrainConfig, list[str]]:
    """The configuration whose values flags override: `--config FILE`, or the run that `--resume` continues."""
    from fedjax_rec.cli.train import default_for

    if not args or args[0] != "train":
        return TrainConfig(), args
    config_file, args = _take(args, "--config")
    out, _ = _take(args, "--out")
    resume_folder = Path(out) if out and "--resume" in args else None
    if "--resume" in args and out is None:
        raise ValueError("--resume needs --out, the run directory to continue.")
    return default_for(resume_folder, None if config_file is None else Path(config_file)), args


def _take(args: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of a flag, and the arguments without it."""
    for index, arg in enumerate(args):
        if arg == flag:
            if index + 1 == len(args):
                raise ValueError(f"{flag} needs a value.")
            return args[index + 1], [*args[:index], *args[index + 2 :]]
        if arg.startswith(flag + "="):
            return arg[len(flag) + 1 :], [*args[:index], *args[index + 1 :]]
    return None, args


def _run(config) -> int:
    # Imported here so that `--help` and the calculator do not wait for what they do not use.
    if isinstance(config, EpsilonConfig):
        from fedjax_rec.cli.epsilon import run
    elif isinstance(config, BudgetConfig):
        from fedjax_rec.cli.budget import run
    elif isinstance(config, DataConfig):
        from fedjax_rec.cli.data import run
    elif isinstance(config, SecAggDemoConfig):
        from fedjax_rec.cli.secagg import run
    else:
        _set_up_jax(config)
        if isinstance(config, EvaluateConfig):
            from fedjax_rec.cli.evaluate import run
        elif isinstance(config, ExplainConfig):
            from fedjax_rec.cli.explain import run
        elif isinstance(config, SynthesizeConfig):
            from fedjax_rec.cli.synthesize import run
        elif isinstance(config, AnonymizeConfig):
            from fedjax_rec.cli.anonymize import run
        elif isinstance(config, AuditConfig):
            from fedjax_rec.cli.audit import run
        elif isinstance(config, AuditPrivacyConfig):
            from fedjax_rec.cli.audit_privacy import run
        else:
            from fedjax_rec.cli.train import run
    return run(config)


def _set_up_jax(config) -> None:
    """Virtual CPU devices if asked for, and a compilation cache on disk, so that the next run starts at once."""
    import jax

    from fedjax_rec.data.cache import default_cache_dir

    devices = getattr(config, "devices", 1)
    if devices > 1:
        jax.config.update("jax_num_cpu_devices", devices)
        if jax.device_count() < devices:
            raise ValueError(f"--devices {devices} is more than the {jax.device_count()} devices here.")
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(default_cache_dir() / "xla"))

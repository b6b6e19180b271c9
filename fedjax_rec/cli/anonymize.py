"""`fedjax-rec anonymize`: a data set changed by a policy so that it may be handed out, with the risk measured."""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from fedjax_rec.anonymization.apply import Anonymized
    from fedjax_rec.anonymization.policy import Policy
    from fedjax_rec.data.interactions import Interactions


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnonymizeConfig:
    """Changes a data set by a policy file, so that it may be handed out, and measures the risk before and after.

    A policy is a short TOML file: pseudonyms, attributes generalised to k-anonymity, coarser times and ratings, and
    what changes item sets. The report says who can still be found in the release, and what it is still good for.

    fedjax-rec anonymize --print-policy > policy.toml

    fedjax-rec anonymize --dataset movielens/100k --policy policy.toml --out release --key-file secret/release.key
    """

    policy: Path | None = None
    """Policy file (TOML)."""
    dataset: str = "synthetic"
    """Data set or file, as for train --dataset."""
    data_dir: Path | None = None
    """Folder of the unpacked data set or its zip."""
    out: Path | None = None
    """Where to write the release: a .parquet or .csv file, or a folder, which gets interactions.parquet. The risk
    report gets names beside it, and is for the owner of the data."""
    key_file: Path | None = None
    """Where to keep the key that links pseudonyms with users: a new file in another folder than the release, which
    only its owner can read. Without it nobody keeps the key, and no pseudonym can be traced back."""
    evaluate: bool = True
    """Measure the risk before and after. --no-evaluate writes the data and what was done."""
    downstream: bool = True
    """Measure also what EASE loses when it is trained on anonymised users; takes minutes for large catalogues."""
    targets: int = 500
    """Random users that the re-identification attacks."""
    known: int = 8
    """Items that it knows of each."""
    seed: int | None = None
    """Makes a rehearsal that can be repeated. Without it what is random comes from the operating system, as it must
    for data that are handed out. Measurements have a fixed seed of their own."""
    print_policy: bool = False
    """Print an example policy with its explanation, and do nothing else."""


def run(config: AnonymizeConfig) -> int:
    """Anonymises, measures and writes; prints the report.

    Returns:
      0. Errors are raised as sentences, for `main` to print; then nothing is written.
    """
    from fedjax_rec.anonymization.policy import EXAMPLE, VIRTUAL, read_policy

    if config.print_policy:
        print(EXAMPLE, end="")
        return 0
    _check(config)
    policy = read_policy(config.policy)
    if config.key_file is not None and policy.pseudonyms is None:
        raise ValueError("--key-file keeps the key of pseudonyms, and the policy has no section [pseudonyms]; add it.")

    from rich.console import Console

    from fedjax_rec.anonymization.apply import anonymize, check_policy
    from fedjax_rec.anonymization.pseudonyms import new_key
    from fedjax_rec.anonymization.risk import risk_report
    from fedjax_rec.anonymization.utility import L2S
    from fedjax_rec.data import load

    console = Console(highlight=False, soft_wrap=True)
    data = load(config.dataset, data_dir=config.data_dir)
    check_policy(data, policy)
    virtual = None
    if policy.replacement is not None and policy.replacement.virtual != VIRTUAL:
        virtual = load(policy.replacement.virtual, data_dir=config.data_dir)
    key = new_key()
    with _progress(console) as show:
        show("anonymising")
        made = anonymize(data, policy, key=key, virtual=virtual, seed=config.seed)
        report = None
        if config.evaluate:
            report = risk_report(
                data,
                made,
                policy,
                num_known=config.known,
                num_targets=config.targets,
                l2s=L2S if config.downstream else None,
                virtual=virtual,
                report=show,
            )
    document = _document(config, policy, data, made, report)
    paths = _write(config, made.interactions, document, key if policy.pseudonyms else None)
    _print(console, document, paths)
    return 0


def beside(out: Path) -> dict[str, Path]:
    """The files of one release, by what they are."""
    if out.suffix:
        report = {"report": out.with_name(f"{out.stem}.risk.json"), "page": out.with_name(f"{out.stem}.risk.html")}
        return {"data": out, **report}
    return {"data": out / "interactions.parquet", "report": out / "risk.json", "page": out / "risk.html"}


def _check(config: AnonymizeConfig) -> None:
    """Everything that can be refused before any work."""
    from fedjax_rec.data.parquet import check_writable

    if config.policy is None or config.out is None:
        missing = "--policy" if config.policy is None else "--out"
        raise ValueError(f"{missing} is needed; --print-policy prints an example of a policy.")
    if config.targets < 1 or config.known < 1:
        raise ValueError(f"--targets and --known are numbers from 1 on; got {config.targets} and {config.known}.")
    paths = beside(config.out)
    if not config.out.suffix and config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise FileExistsError(f"{config.out} is there already and not an empty folder; choose another --out.")
    for path in paths.values():
        if path.exists():
            raise FileExistsError(f"{path} is there already; choose another --out. A release is never overwritten.")
    check_writable(paths["data"])
    if config.key_file is None:
        return
    folder, key_file = paths["data"].parent.resolve(), config.key_file.resolve()
    if folder == key_file.parent or (not config.out.suffix and folder in key_file.parents):
        raise ValueError(
            f"The key {config.key_file} would lie beside the release in {folder}, and whoever gets one would get both; "
            "name a --key-file in another folder."
        )
    if key_file.exists():
        raise FileExistsError(f"{config.key_file} is there and may be the key of another release; name a new file.")
    if not key_file.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {key_file.parent} for the key; make it, readable by you alone.")


def _document(
    config: AnonymizeConfig, policy: "Policy", data: "Interactions", made: "Anonymized", report: dict | None
) -> dict[str, Any]:
    """What was done and what was measured, as JSON values; the owner's."""
    from fedjax_rec.anonymization.policy import describe
    from fedjax_rec.anonymization.risk import SETTINGS, without_nan
    from fedjax_rec.runs.stamp import stamp

    released = made.interactions
    settings = {"known_items": config.known, "attacks": SETTINGS, "measured_with_seed": 0}
    return without_nan(
        {
            "schema": "fedjax_rec.anonymized/1",
            "source": {
                "name": data.name,
                "num_users": data.num_users,
                "num_items": data.num_items,
                "num_interactions": data.num_interactions,
            },
            "release": {
                "num_users": int((released.counts_per_user > 0).sum()),
                "num_interactions": released.num_interactions,
                "attributes": list(released.user_attributes),
                "key_kept": config.key_file is not None,
            },
            "policy": describe(policy),
            "steps": list(made.steps),
            "seeded": config.seed is not None,
            "settings": settings,
            "report": report,
            "stamp": stamp(seed=config.seed or 0, data_fingerprint=data.fingerprint),
        }
    )


def _write(
    config: AnonymizeConfig, released: "Interactions", document: dict[str, Any], key: bytes | None
) -> dict[str, Path]:
    """Writes everything beside its place first, and moves it there when all of it is whole."""
    from fedjax_rec.anonymization.pseudonyms import save_key
    from fedjax_rec.data import write_interactions
    from fedjax_rec.reporting.risk_page import write_risk_page

    paths = beside(config.out)
    if document["report"] is None:
        del paths["page"]
    folder = paths["data"].parent
    made_folders = _missing_folders(folder)
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / f".{config.out.name}.{os.getpid()}.unfinished"
    done: list[Path] = []
    try:
        staging.mkdir()
        write_interactions(staging / paths["data"].name, released)
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
        (staging / paths["report"].name).write_text(text + "\n", encoding="utf-8")
        if "page" in paths:
            write_risk_page(staging / paths["page"].name, document)
        if key is not None and config.key_file is not None:
            save_key(config.key_file, key)
            done.append(config.key_file)
        for path in paths.values():
            done.append(path)
            os.replace(staging / path.name, path)
        shutil.rmtree(staging)
    except BaseException:
        for path in done:
            path.unlink(missing_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        for made in made_folders:
            with contextlib.suppress(OSError):
                made.rmdir()
        raise
    return paths | ({} if config.key_file is None else {"key": config.key_file})


def _missing_folders(folder: Path) -> list[Path]:
    """The folders that making this one makes, the innermost first."""
    return [part for part in (folder, *folder.parents) if not part.exists()]


def _print(console: "Console", document: dict[str, Any], paths: dict[str, Path]) -> None:
    from fedjax_rec.reporting import to_rich
    from fedjax_rec.reporting.risk_page import cost_table, notices, risk_table

    source, release = document["source"], document["release"]
    console.print(
        f"[bold]{source['name']}[/]: {release['num_users']:,} of {source['num_users']:,} users, "
        f"{release['num_interactions']:,} interactions ({source['num_interactions']:,} before)"
    )
    for step in document["steps"]:
        rest = ", ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in step.items() if key != "step")
        console.print(f"  {step['step'].replace('_', ' '):20}{rest}")
    if document["report"] is not None:
        for table in (risk_table(document["report"]), cost_table(document["report"])):
            console.print(to_rich(table, max_width=console.width))
    for sentence in notices(document)[1:]:
        console.print(f"[yellow]note[/] {sentence}")
    for what, path in paths.items():
        console.print(f"{what:12} {path}")


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {one}" for key, one in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextlib.contextmanager
def _progress(console: "Console") -> Iterator[Callable[[str], None]]:
    """A spinner with what is done now, and how long it has taken."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("loading")
        yield lambda what: progress.update(task, description=what)

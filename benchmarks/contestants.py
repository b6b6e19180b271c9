"""The programs that are timed side by side: what each is called, what it needs installed, how it is started."""

import os
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Contestant:
    """One row of the table.

    Attributes:
      name: names the row in the results.
      family: what `--only` calls it.
      label: names the row for people.
      privacy: what is done to updates, in words.
      module: the program, run by `python -m`.
      flags: its own flags.
      requirements: what pip installs into its own environment; empty = the environment of this process.
      note: how its work differs from the workload, if it does.
    """

    name: str
    family: str
    label: str
    privacy: str
    module: str
    flags: tuple[str, ...] = ()
    requirements: tuple[str, ...] = ()
    note: str = ""


OURS = "fedjax_rec-dp"  # every ratio is against this row

CONTESTANTS = (
    Contestant(OURS, "fedjax_rec", "fedjax_rec, private", "user-level: clip + noise", "benchmarks.round", ("--dp",)),
    Contestant("fedjax_rec", "fedjax_rec", "fedjax_rec", "none", "benchmarks.round", ("--no-dp",)),
    Contestant(
        name="fedjax",
        family="fedjax",
        label="fedjax",
        privacy="none",
        module="benchmarks.peer_programs.fedjax_round",
        requirements=("fedjax==0.0.17",),
        note="jit backend, with the `jax.tree_map` that it needs put back; it fills the last batch of a client up with that "
        "client's first examples and weights clients by their number of examples (and is checked against just that).",
    ),
    Contestant(
        name="pfl",
        family="pfl",
        label="pfl",
        privacy="user-level: clip + noise",
        module="benchmarks.peer_programs.pfl_round",
        requirements=("torch==2.13.0", "pfl[pytorch]==0.6.0"),
        note="PyTorch; central Gaussian mechanism; the check is made without it.",
    ),
    Contestant(
        name="naive",
        family="naive",
        label="plain JAX loop",
        privacy="none",
        module="benchmarks.peer_programs.naive_jax_round",
        note="a Python loop over clients around one jitted update, whole item tables as updates.",
    ),
)


class ProgramFailedError(RuntimeError):
    """A program, or the installation of its environment, ended with an error."""


def environment(contestant: Contestant, venv_dir: Path, *, say: Callable[[str], None]) -> Path:
    """Returns the Python that runs a contestant, making its virtual environment if it is not there yet.

    A file `requirements.txt` inside marks an environment as complete; one with other contents is made anew.

    Raises:
      ProgramFailedError: pip could not install the requirements.
    """
    if not contestant.requirements:
        return Path(sys.executable)
    folder = venv_dir.resolve() / contestant.name
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted, mark = "\n".join(contestant.requirements), folder / "requirements.txt"
    if python.exists() and mark.is_file() and mark.read_text() == wanted:
        return python
    say(f"{contestant.name}: installing {', '.join(contestant.requirements)} into {folder} (once; minutes)")
    venv.create(folder, clear=True, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", *contestant.requirements]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        raise ProgramFailedError(
            f"pip could not install {', '.join(contestant.requirements)} into {folder}: {_last_line(done.stderr)}. The first "
            "run needs a package index; without a network, use --only fedjax_rec naive, or point --venv-dir to environments "
            "made elsewhere."
        )
    mark.write_text(wanted)
    return python


def command(
    contestant: Contestant, python: Path, u_data: Path, *, items: int, config: Config, check: bool
) -> list[str]:
    """The command line of one turn, to be run from the repository root."""
    start = [str(python), "-m", contestant.module]
    if contestant.family == "fedjax_rec":
        folder = ["--data-dir", str(u_data.parent), "--repeats", str(config.rounds)]
        return [*start, "--json", "--items", str(items), *contestant.flags, *folder]
    rounds = ["--rounds", str(config.rounds), "--warmup", str(config.warmup), *(["--check"] if check else [])]
    return [*start, str(u_data), "--items", str(items), *contestant.flags, *rounds]



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
      environ: environment variables that it is run with.
      note: how it works, where that differs from the workload.
    """

    name: str
    family: str
    label: str
    privacy: str
    module: str
    flags: tuple[str, ...] = ()
    requirements: tuple[str, ...] = ()
    environ: tuple[tuple[str, str], ...] = ()
    note: str = ""


OURS = "fedjax_rec-dp"  # every ratio is against this row

CONTESTANTS = (
    Contestant(
        name=OURS,
        family="fedjax_rec",
        label="fedjax_rec, private",
        privacy="user-level: clip + noise",
        module="benchmarks.round",
        flags=("--dp",),
    ),
    Contestant(
        name="fedjax_rec",
        family="fedjax_rec",
        label="fedjax_rec",
        privacy="none",
        module="benchmarks.round",
        flags=("--no-dp",),
    ),
    Contestant(
        name="fedjax_rec-dp-cores",
        family="fedjax_rec",
        label="fedjax_rec, private, all cores",
        privacy="user-level: clip + noise",
        module="benchmarks.round",
        flags=("--dp", "--devices", "0"),
        note="one virtual device a core; the other rows of fedjax_rec use one device and one thread",
    ),
    Contestant(
        name="fedjax",
        family="fedjax",
        label="fedjax",
        privacy="none",
        module="benchmarks.peer_programs.fedjax_round",
        requirements=("fedjax==0.0.17",),
        note="its jit backend, with the `jax.tree_map` that it looks up put back; it fills a client's last batch up "
        "with that client's first examples and weights clients by their number of examples, and is checked against "
        "just that",
    ),
    Contestant(
        name="fedjax-thread",
        family="fedjax",
        label="fedjax, one thread",
        privacy="none",
        module="benchmarks.peer_programs.fedjax_round",
        requirements=("fedjax==0.0.17",),
        environ=(("NPROC", "1"),),
        note="the same with one of XLA's worker threads, as our rows on one device have it",
    ),
    Contestant(
        name="pfl",
        family="pfl",
        label="pfl",
        privacy="user-level: clip + noise",
        module="benchmarks.peer_programs.pfl_round",
        requirements=("torch==2.13.0", "pfl[pytorch]==0.6.0"),
        note="its PyTorch backend and central Gaussian mechanism, which is left out of the check",
    ),
    Contestant(
        name="naive",
        family="naive",
        label="plain JAX loop",
        privacy="none",
        module="benchmarks.peer_programs.naive_jax_round",
        note="a Python loop over clients around one jitted update; updates are whole item tables",
    ),
)


class ProgramFailedError(RuntimeError):
    """A program, or the installation of its environment, ended with an error."""


def environment(contestant: Contestant, venv_dir: Path, *, say: Callable[[str], None]) -> Path:
    """Returns the Python that runs a contestant, and makes its virtual environment if it is not there yet.

    A file `installed.txt` inside marks an environment as complete; one that holds other requirements is made anew.

    Args:
      contestant: whose environment.
      venv_dir: the folder of all environments; this one is the folder inside it that has the family's name.
      say: gets a line of progress before something is installed.

    Raises:
      ProgramFailedError: pip could not install the requirements.
    """
    if not contestant.requirements:
        return Path(sys.executable)
    folder = venv_dir.resolve() / contestant.family
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    mark, wanted = folder / "installed.txt", "\n".join(contestant.requirements)
    if python.exists() and mark.is_file() and mark.read_text() == wanted:
        return python
    say(f"{contestant.label}: installing {', '.join(contestant.requirements)} into {folder}, once")
    venv.create(folder, clear=True, with_pip=True, symlinks=os.name != "nt")
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *contestant.requirements]
    pip = subprocess.run(install, capture_output=True, text=True)
    if pip.returncode:
        raise ProgramFailedError(
            f"pip could not install {', '.join(contestant.requirements)} into {folder} ({last_line(pip.stderr)}); "
            "connect to a package index for the first run, point --venv-dir to environments that are ready, or do "
            "without by --only fedjax_rec naive."
        )
    mark.write_text(wanted)
    return python


def command(
    contestant: Contestant, u_data: Path, *, python: Path, items: int, rounds: int, warmup: int, check: bool
) -> list[str]:
    """The command line of one turn, for the root of the repository.

    Args:
      contestant: whose turn it is.
      u_data: a GroupLens u.data file.
      python: the interpreter of the contestant's environment.
      items: rows of the item table.
      rounds: how many rounds to run.
      warmup: first rounds that a peer marks as warm-up; our own program drops its first call itself.
      check: compare a round to the NumPy reference first; our own program always does.
    """
    start = [str(python), "-m", contestant.module, *contestant.flags, "--items", str(items)]
    if contestant.family == "fedjax_rec":
        return [*start, "--json", "--data-dir", str(u_data.parent), "--repeats", str(rounds)]
    return [*start, "--rounds", str(rounds), "--warmup", str(warmup), *["--check"] * check, str(u_data)]


def last_line(text: str) -> str:
    """The last line that is not empty: where a program says why it ended."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")

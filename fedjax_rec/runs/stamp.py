"""The reproducibility stamp of a run: which code, which versions, which device, which seed and which data."""

import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

PACKAGE_DIR = Path(__file__).resolve().parents[1]
DISTRIBUTIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "dp-accounting", "numpy")
GIT_TIMEOUT_S = 5.0


def stamp(*, seed: int, data_fingerprint: str | None, split_fingerprint: str | None = None) -> dict[str, Any]:
    """Everything needed to say what produced a number, as plain JSON values.

    Never raises for what the machine lacks: without git, outside a checkout, or without a usable device, the
    entries concerned are None.

    Args:
      seed: the seed of the run.
      data_fingerprint: sha256 of the interactions (`Interactions.fingerprint`), or None if there are none.
      split_fingerprint: sha256 of the split (`Split.fingerprint`).

    Returns:
      `commit` (40 hex digits or None), `dirty` (True if the package's files differ from that commit; None without
      a commit), `package_version`, `versions` {name: version or None}, `backend`, `device_kind`, `device_count`,
      `platform`, `cpu_count` (CPUs this process may use), `seed`, `data_fingerprint`, `split_fingerprint` and
      `utc_time` (ISO 8601, seconds).
    """
    return {
        **source_commit(PACKAGE_DIR),
        "package_version": _version("fedjax-rec"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in DISTRIBUTIONS}},
        **_device(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_count": _cpu_count(),
        "seed": int(seed),
        "data_fingerprint": data_fingerprint,
        "split_fingerprint": split_fingerprint,
        "utc_time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def source_commit(source_dir: Path) -> dict[str, Any]:
    """The git commit that a Python package's folder was checked out at.

    A package installed in a virtual environment may lie inside somebody else's repository; its commit would say
    nothing about this code, so the commit counts only if git tracks the folder's own `__init__.py`.

    Args:
      source_dir: the folder of the package.

    Returns:
      {"commit": 40 hex digits or None, "dirty": bool or None}; dirty = tracked files changed or new files that git
      does not ignore, within `source_dir`.
    """
    tracked = _git("ls-files", "--error-unmatch", "__init__.py", cwd=source_dir)
    commit = _git("rev-parse", "--verify", "HEAD", cwd=source_dir) if tracked is not None else None
    if commit is None:
        return {"commit": None, "dirty": None}
    changes = _git("status", "--porcelain", "--", ".", cwd=source_dir)
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(*arguments: str, cwd: Path) -> str | None:
    """Standard output of one git command, stripped; None if git is missing, slow, or refuses."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=cwd,
            env=_clean_environment(os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without GIT_DIR and its kin (set inside hooks: they would point git at another repository)."""
    kept = {name: value for name, value in environment.items() if not name.startswith("GIT_")}
    return {**kept, "GIT_OPTIONAL_LOCKS": "0"}  # `git status` must not lock an index that a user is working with


def _version(distribution: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _device() -> dict[str, Any]:
    """Backend name, kind of the first device and number of devices; Nones if JAX finds no usable backend."""
    try:
        devices = jax.devices()
    except RuntimeError:
        return {"backend": None, "device_kind": None, "device_count": None}
    return {"backend": devices[0].platform, "device_kind": devices[0].device_kind, "device_count": len(devices)}


def _cpu_count() -> int | None:
    """CPUs this process may use (its affinity mask where the system has one)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()

"""The stamp must name the code that ran, never somebody else's commit, and must never stop a run."""

import json
import subprocess
import time
from pathlib import Path

import jax
import pytest

from fedjax_rec.runs.stamp import DISTRIBUTIONS, source_commit, stamp


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A package folder, committed to a fresh repository."""
    package = tmp_path / "repo" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    git(tmp_path / "repo", "init", "-q")
    commit_all(tmp_path / "repo")
    return package


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit_all(folder: Path) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "state")


def test_stamp_is_plain_json_with_everything_in_it():
    made = stamp(seed=7, data_fingerprint="d" * 64, split_fingerprint="s" * 64)
    assert json.loads(json.dumps(made)) == made
    assert made["seed"] == 7
    assert (made["data_fingerprint"], made["split_fingerprint"]) == ("d" * 64, "s" * 64)
    assert made["versions"]["jax"] == jax.__version__
    assert set(made["versions"]) == {"python", *DISTRIBUTIONS}
    assert all(made["versions"].values()), "every one of them is a requirement of the package"
    assert made["package_version"]
    assert (made["backend"], made["device_count"]) == (jax.default_backend(), jax.device_count())
    assert made["cpu_count"] >= 1
    assert made["utc_time"].endswith("+00:00")


def test_stamp_is_fast():
    stamp(seed=0, data_fingerprint=None)  # starts the backend
    start = time.perf_counter()
    stamp(seed=0, data_fingerprint=None)
    assert time.perf_counter() - start < 2.0


def test_commit_of_a_clean_checkout(checkout: Path):
    assert source_commit(checkout) == {"commit": git(checkout, "rev-parse", "HEAD"), "dirty": False}


def test_a_changed_file_is_dirty(checkout: Path):
    (checkout / "__init__.py").write_text("changed = True\n")
    assert source_commit(checkout)["dirty"] is True


def test_a_new_module_is_dirty(checkout: Path):
    (checkout / "new.py").write_text("")
    assert source_commit(checkout)["dirty"] is True


def test_changes_outside_the_package_are_not_dirty(checkout: Path):
    (checkout.parent / "notes.txt").write_text("not code that ran")
    assert source_commit(checkout)["dirty"] is False


def test_a_package_installed_inside_another_repository_has_no_commit(checkout: Path):
    installed = checkout.parent / "venv" / "site-packages" / "fedjax_rec"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert source_commit(installed) == {"commit": None, "dirty": None}


def test_git_variables_of_a_hook_do_not_redirect_the_stamp(checkout: Path, tmp_path: Path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    (other / "__init__.py").write_text("other = True\n")
    git(other, "init", "-q")
    commit_all(other)
    expected = git(checkout, "rev-parse", "HEAD")
    assert git(other, "rev-parse", "HEAD") != expected
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert source_commit(checkout)["commit"] == expected


def test_without_git_there_is_no_commit_and_no_error(checkout: Path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert source_commit(checkout) == {"commit": None, "dirty": None}
    assert stamp(seed=0, data_fingerprint=None)["commit"] is None


def test_outside_a_repository_there_is_no_commit(tmp_path: Path):
    (tmp_path / "__init__.py").write_text("")
    assert source_commit(tmp_path) == {"commit": None, "dirty": None}


def test_a_checkout_without_commits_has_no_commit(tmp_path: Path):
    (tmp_path / "__init__.py").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    assert source_commit(tmp_path) == {"commit": None, "dirty": None}

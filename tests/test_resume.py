"""A resumed run is the uninterrupted one, bit for bit, wherever it was stopped."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from small_runs import flags, metrics, result, share_compilations, write_csv

from fedjax_rec.cli.main import main
from fedjax_rec.runs import checkpoint, directory, results, training
from fedjax_rec.runs.config import ClientConfig, ModelConfig, PrivacyConfig, TrainConfig, load
from fedjax_rec.runs.experiment import Experiment, prepare
from fedjax_rec.runs.training import Outcome, saved_keys, train


class Killed(BaseException):
    """Stops a run at a chosen place."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    share_compilations(tmp_path_factory.getbasetemp() / "compiled")
    return write_csv(tmp_path_factory.mktemp("data") / "small.csv")


def make(dataset: Path, **changes) -> Experiment:
    config = TrainConfig(dataset=str(dataset), rounds=8, eval_every=2, cohort_size=20, model=ModelConfig(dim=4))
    return prepare(TrainConfig(**{**vars(config), **changes}))


@pytest.fixture(scope="module", params=["private", "private, best round", "not private"])
def experiment(dataset, request) -> Experiment:
    if request.param == "not private":
        return make(dataset)
    return make(dataset, epsilon=8.0, select="best" if "best" in request.param else "auto")


def same_outcome(first: Outcome, second: Outcome) -> bool:
    leaves = zip(
        jax.tree.leaves((first.state, first.private)), jax.tree.leaves((second.state, second.private)), strict=True
    )
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in leaves) and (
        (first.ledger, first.selected_round, first.rounds, first.mean_cohort_size)
        == (second.ledger, second.selected_round, second.rounds, second.mean_cohort_size)
    )


def files(folder: Path) -> dict:
    """All that a run leaves, but for what a clock wrote."""
    ledger = folder / directory.LEDGER
    left = {"metrics": metrics(folder), "ledger": ledger.read_text() if ledger.exists() else None}
    for name in (directory.LAST, directory.BEST):
        found = checkpoint.describe(folder / name)
        left[name] = None if found is None else {**found.progress, "seconds": None}
    return left


@pytest.fixture(scope="module")
def uninterrupted(experiment, tmp_path_factory) -> tuple[Outcome, dict]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    outcome = train(experiment, folder=folder)
    return outcome, files(folder)


class Watch:
    """Copies a folder before each change that Python makes in it: what a kill at that moment would leave."""

    def __init__(self):
        self.folder, self.copies, self.seen, self.lock = None, None, set(), threading.RLock()
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple) -> None:
        if self.folder is None or event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            return
        if event == "open" and (args[1] is None or not set(args[1]) & set("wax+")):
            return
        if not str(args[0]).startswith(str(self.folder)):
            return
        with self.lock:
            state = tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in walk(self.folder))
            if state not in self.seen:
                self.seen.add(state)
                watched, self.folder = self.folder, None
                shutil.copytree(watched, self.copies / f"{len(self.seen):03}")
                self.folder = watched


def walk(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


def test_every_moment_of_a_save_can_be_resumed(experiment, uninterrupted, watch, tmp_path):
    folder = tmp_path / "run"
    watch.copies = tmp_path / "moments"

    def report(record):
        # From the end of the first span to the end of the second: a log line, checkpoints, a ledger.
        watch.folder = folder if record["round"] == 2 else None

    train(experiment, folder=folder, report=report)
    moments = sorted(watch.copies.iterdir())
    print(len(moments))
    assert len(moments) >= 20
    for moment in moments:
        outcome = train(experiment, folder=moment)
        assert same_outcome(outcome, uninterrupted[0]), moment
        assert files(moment) == uninterrupted[1], moment

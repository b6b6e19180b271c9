"""A resumed run is the uninterrupted one, bit for bit, wherever it was stopped."""

import contextlib
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
from fedjax_rec.runs.config import ClientConfig, ModelConfig, PrivacyConfig, TrainConfig
from fedjax_rec.runs.experiment import Experiment, prepare
from fedjax_rec.runs.training import Outcome, saved_keys, train


class Killed(BaseException):
    """Stops a run at a chosen place."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    share_compilations(tmp_path_factory.getbasetemp() / "compiled")
    return write_csv(tmp_path_factory.mktemp("data") / "small.csv")


def make(dataset: Path, **changes) -> Experiment:
    config = TrainConfig(dataset=str(dataset), rounds=5, eval_every=2, cohort_size=20, model=ModelConfig(dim=4))
    return prepare(TrainConfig(**{**vars(config), **changes}))


@pytest.fixture(scope="module", params=["private", "not private"])
def experiment(dataset, request) -> Experiment:
    if request.param == "not private":
        return make(dataset)
    return make(dataset, epsilon=8.0, select="best")


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
        deletes_a_tree = event in ("os.remove", "os.rmdir") and args[1] != -1  # then names are relative
        if deletes_a_tree or str(args[0]).startswith(str(self.folder)):
            with self.lock:
                self.copy()

    def copy(self) -> None:
        before = listing(self.folder)
        if self.folder is None or before in self.seen:
            return
        watched, self.folder = self.folder, None  # what copying does is not watched
        copied = self.copies / f"{len(self.seen):03}"
        with contextlib.suppress(OSError, shutil.Error):
            shutil.copytree(watched, copied)
        if listing(watched) != before:  # other threads write too: then this is no moment that ever was
            shutil.rmtree(copied, ignore_errors=True)
        self.seen.add(before)
        self.folder = watched


def listing(folder: Path) -> tuple:
    found = []
    for path in sorted(folder.rglob("*")):
        with contextlib.suppress(OSError):
            found.append((str(path), path.stat().st_mtime_ns, path.stat().st_size))
    return tuple(found)


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
    assert len(moments) >= 30
    for moment in moments[:: len(moments) // 20]:
        outcome = train(experiment, folder=moment)
        assert same_outcome(outcome, uninterrupted[0]), moment
        assert files(moment) == uninterrupted[1], moment


def test_a_log_ahead_of_its_checkpoint_is_cut_back(experiment, uninterrupted, tmp_path):
    ahead = '{"round": 99, "loss": 0.0}\n{"round": 100, "lo'

    def report(record):
        if record["round"] == 2:
            with open(tmp_path / directory.METRICS, "a", encoding="utf-8") as file:
                file.write(ahead)
            raise Killed

    with pytest.raises(Killed):
        train(experiment, folder=tmp_path, report=report)
    outcome = train(experiment, folder=tmp_path)
    assert same_outcome(outcome, uninterrupted[0])
    assert files(tmp_path) == uninterrupted[1]


def test_a_finished_run_resumes_to_itself(experiment, uninterrupted, tmp_path):
    train(experiment, folder=tmp_path)
    assert same_outcome(train(experiment, folder=tmp_path), uninterrupted[0])
    assert files(tmp_path) == uninterrupted[1]


def test_the_folder_changes_nothing(experiment, uninterrupted):
    """Without a folder the best round is kept in memory, past the donation of its buffers to the next span."""
    assert same_outcome(train(experiment, folder=None), uninterrupted[0])


def stop_after(number: int):
    def report(record):
        if record["round"] == number:
            raise Killed

    return report


@pytest.fixture
def stopped(experiment, tmp_path) -> Path:
    with pytest.raises(Killed):
        train(experiment, folder=tmp_path, report=stop_after(4))
    return tmp_path


def test_another_configuration_is_refused_by_name(dataset, experiment, stopped):
    other = make(dataset, epsilon=experiment.config.epsilon, select=experiment.config.select, seed=7, rounds=12)
    with pytest.raises(ValueError, match=r"another configuration \(rounds: 12, not 5; seed: 7, not 0\)"):
        train(other, folder=stopped)


def test_another_shape_is_refused_by_name(dataset, stopped):
    with pytest.raises(ValueError, match=r"model\.dim: 8, not 4"):
        train(make(dataset, model=ModelConfig(dim=8)), folder=stopped)


def test_changed_data_are_refused(dataset, stopped, tmp_path_factory):
    saved = checkpoint.describe(stopped / directory.LAST).config
    lines = dataset.read_text().splitlines()
    (stopped / "data").mkdir()
    changed = write_csv(stopped / "data" / dataset.name, lines[:-1])
    other = make(changed, **{name: saved[name] for name in ("epsilon", "select")})
    same_name = Experiment(**{**vars(other), "config": TrainConfig(**{**vars(other.config), "dataset": str(dataset)})})
    with pytest.raises(ValueError, match=r"The data changed since the checkpoint .* was made"):
        train(same_name, folder=stopped)


def test_a_damaged_checkpoint_is_a_sentence(experiment, stopped):
    largest = max((stopped / directory.LAST).rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    largest.write_bytes(largest.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"round 4 in .* is damaged .* start a new run with another --out"):
        train(experiment, folder=stopped)


def test_a_best_checkpoint_that_is_gone_is_a_sentence(experiment, stopped):
    state, private = experiment.rounds.init(jax.random.key(0))
    shutil.rmtree(stopped / directory.BEST)
    with pytest.raises(ValueError, match="checkpoint of the best round, 2, is no longer in"):
        training._best(stopped, state, private, 2)


def test_secret_keys_come_from_the_checkpoint(dataset, tmp_path):
    """Also those of the released popularity: drawn anew on resuming, they would be a second release."""
    changes = {
        "privacy": PrivacyConfig(noise_multiplier=1.0),
        "secret_noise": True,
        "client": ClientConfig(negative_distribution="popularity"),
        "non_private_row": False,
    }
    first = make(dataset, **changes)
    assert not training._same_keys(first.keys, make(dataset, **changes).keys)

    def copy(record):
        if record["round"] == 2:
            shutil.copytree(tmp_path / "run", tmp_path / "stopped")

    expected = train(first, folder=tmp_path / "run", report=copy)
    with pytest.raises(ValueError, match="made with other secret keys"):
        train(make(dataset, **changes), folder=tmp_path / "stopped")
    resumed = make(dataset, **changes)
    resumed = prepare(resumed.config, keys=saved_keys(tmp_path / "stopped"))
    assert same_outcome(train(resumed, folder=tmp_path / "stopped"), expected)
    assert files(tmp_path / "stopped") == files(tmp_path / "run")


def test_a_run_stopped_before_its_first_round_keeps_its_keys(dataset, tmp_path, monkeypatch):
    secret = make(dataset, secret_noise=True)
    monkeypatch.setattr(directory, "append_record", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        train(secret, folder=tmp_path)
    assert training._same_keys(saved_keys(tmp_path), secret.keys)


def test_no_checkpoint_no_keys(tmp_path):
    assert saved_keys(tmp_path) is None


# Through the command line: the whole run directory, result.json included.

SLOW_ROUNDS = 30
SLOW_RUN = (
    "--rounds",
    f"{SLOW_ROUNDS}",
    "--eval-every",
    "1",
    "--epsilon",
    "8",
    "--cohort-size",
    "20",
    "--select",
    "best",
)


@pytest.fixture(scope="module")
def whole_run(dataset, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(flags(dataset, folder, *SLOW_RUN)) == 0
    return folder


def same_run(first: Path, second: Path) -> bool:
    assert metrics(first) == metrics(second)
    assert result(first) == result(second)
    assert (first / directory.LEDGER).read_text() == (second / directory.LEDGER).read_text()
    assert (first / "report.html").stat().st_size > 10_000
    assert not list(first.rglob("*tmp*"))
    assert not list(first.rglob("*unfinished*"))
    return True


def test_sigkill_at_any_moment_several_times_in_a_row(dataset, whole_run, tmp_path):
    """A span of one round takes milliseconds here and its checkpoints far longer, so most kills fall into a save.

    When to kill is a part of the time between two lines of the metrics, as this machine takes it: a number of
    seconds would be a round on one machine and the rest of the run on another.
    """
    folder = tmp_path / "run"
    command = [sys.executable, "-c", "from fedjax_rec.cli.main import entry; entry()"]
    args, lines = flags(dataset, folder, *SLOW_RUN), 0
    for part in (0.1, 0.5, 0.9):
        child = subprocess.Popen([*command, *args], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_for_lines(child, folder, lines + 1)
        first = time.monotonic()
        wait_for_lines(child, folder, lines + 2)
        time.sleep(part * (time.monotonic() - first))
        child.kill()
        _, said = child.communicate()
        assert child.returncode == -signal.SIGKILL, said
        lines = count_lines(folder)
        args = ["train", "--resume", "--out", str(folder)]
    assert lines < SLOW_ROUNDS
    assert not (folder / directory.RESULT).exists()
    assert main(args) == 0
    assert same_run(folder, whole_run)


def wait_for_lines(child: subprocess.Popen, folder: Path, lines: int) -> None:
    while child.poll() is None and count_lines(folder) < lines:
        time.sleep(0.002)


def count_lines(folder: Path) -> int:
    path = folder / directory.METRICS
    return path.read_text(encoding="utf-8").count("\n") if path.exists() else 0


def test_stopped_after_training(whole_run, tmp_path, monkeypatch, capsys):
    from fedjax_rec.cli import train as cli_train

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    (folder / "report.html").unlink()
    (folder / directory.RESULT).unlink()
    ledger = checkpoint.describe(folder / directory.LAST).ledger
    ledger.save(folder / directory.LEDGER)  # what training leaves: without what it spent
    for place in ((results, "baselines"), (directory, "write_json"), (cli_train, "write_report")):
        with monkeypatch.context() as patched:
            patched.setattr(*place, interrupt)
            assert main(["train", "--resume", "--out", str(folder)]) == 130
        assert "`fedjax-rec train --resume --out RUN` continues" in capsys.readouterr().err
        assert not (folder / "report.html").exists()
    assert main(["train", "--resume", "--out", str(folder)]) == 0
    assert same_run(folder, whole_run)

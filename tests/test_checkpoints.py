"""A checkpoint is whole or not there: kills, full disks, damage, and values that must come back bit for bit."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from fedjax_rec.federated.round import RoundKeys
from fedjax_rec.privacy.ledger import Ledger
from fedjax_rec.runs import checkpoint
from fedjax_rec.runs.checkpoint import Checkpoint, describe, restore, save

SHAPES = {
    "state": {"table": jax.ShapeDtypeStruct((50, 4), jnp.float32), "round": jax.ShapeDtypeStruct((), jnp.int32)},
    "private": {"user": jax.ShapeDtypeStruct((7, 3), jnp.float32), "none": ()},
}


def made(round_number: int) -> Checkpoint:
    rng = np.random.default_rng(round_number)
    event = dp_accounting.PoissonSampledDpEvent(0.25, dp_accounting.GaussianDpEvent(1.5))
    return Checkpoint(
        state={"table": jnp.asarray(rng.normal(size=(50, 4)), jnp.float32), "round": jnp.int32(round_number)},
        private={"user": jnp.asarray(rng.normal(size=(7, 3)), jnp.float32), "none": ()},
        keys=RoundKeys(*(jax.random.key(seed) for seed in (1, 2, 3))),
        ledger=Ledger().record(event, phase="training", released="sums", sampler="poisson", count=round_number),
        progress={"round": round_number, "best": 0.1 + 0.2, "seconds": 1.5},
        config={"seed": 0, "out": None, "data": {"split": "ratio"}},
        split="f" * 64,
    )


def same(found: Checkpoint, expected: Checkpoint) -> bool:
    arrays = zip(jax.tree.leaves(found[:2]), jax.tree.leaves(expected[:2]), strict=True)
    keys = zip(found.keys, expected.keys, strict=True)
    return (
        all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in arrays)
        and all(np.array_equal(jax.random.key_data(a), jax.random.key_data(b)) for a, b in keys)
        and found[3:] == expected[3:]
    )


def test_everything_comes_back_bit_for_bit(tmp_path):
    save(tmp_path / "last", made(5))
    found = restore(tmp_path / "last", **SHAPES)
    assert same(found, made(5))
    assert jax.tree.structure(found.private) == jax.tree.structure(made(5).private)
    assert jax.dtypes.issubdtype(found.keys.noise.dtype, jax.dtypes.prng_key)


def test_a_run_without_privacy_has_no_ledger(tmp_path):
    save(tmp_path / "last", made(5)._replace(ledger=None))
    assert describe(tmp_path / "last").ledger is None


def test_the_newer_replaces_the_older(tmp_path):
    for number in (5, 10, 15):
        save(tmp_path / "last", made(number))
    assert same(restore(tmp_path / "last", **SHAPES), made(15))
    assert [path.name for path in (tmp_path / "last").iterdir()] == ["15"]


def test_the_same_round_is_saved_once(tmp_path):
    save(tmp_path / "last", made(5))
    save(tmp_path / "last", made(5)._replace(split="another"))
    assert same(restore(tmp_path / "last", **SHAPES), made(5))


def test_no_checkpoint_is_none(tmp_path):
    assert restore(tmp_path / "nothing", **SHAPES) is None
    assert describe(tmp_path / "nothing") is None
    (tmp_path / "empty").mkdir()
    assert restore(tmp_path / "empty", **SHAPES) is None
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_description_needs_no_shapes(tmp_path):
    save(tmp_path / "last", made(5))
    found = describe(tmp_path / "last")
    assert found.state is None
    assert found.private is None
    assert found[3:] == made(5)[3:]


def test_another_shape_is_a_sentence(tmp_path):
    save(tmp_path / "last", made(5))
    wider = {**SHAPES["state"], "table": jax.ShapeDtypeStruct((50, 8), jnp.float32)}
    with pytest.raises(ValueError, match=r"round 5 in .* is damaged or does not fit this configuration"):
        restore(tmp_path / "last", state=wider, private=SHAPES["private"])


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    else:
        place = len(data) // 2
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])


@pytest.mark.parametrize("how", ["deleted", "truncated", "emptied", "one bit flipped"])
def test_no_damage_goes_unnoticed(tmp_path, how):
    folder = tmp_path / "last"
    save(folder, made(5))
    refusals = []
    for path in sorted(path for path in (folder / "5").rglob("*") if path.is_file()):
        whole = path.read_bytes()
        damage(path, how)
        try:
            assert same(restore(folder, **SHAPES), made(5)), f"{path} was {how}, and other values were restored"
        except ValueError as error:
            refusals.append(str(error))
        path.write_bytes(whole)
    assert len(refusals) >= 5
    for sentence in refusals:
        assert "is damaged" in sentence
        assert "\n" not in sentence
        assert len(sentence) < 700
    assert same(restore(folder, **SHAPES), made(5))


def test_a_kill_before_the_checksums_leaves_a_checkpoint_in_force(tmp_path):
    save(tmp_path / "last", made(5))
    (tmp_path / "last" / "5" / checkpoint.CHECKSUMS).unlink()
    assert same(restore(tmp_path / "last", **SHAPES), made(5))


def test_a_kill_while_the_older_one_is_deleted_leaves_the_newer(tmp_path):
    folder = tmp_path / "last"
    save(folder, made(5))
    (folder / "5").rename(tmp_path / "older")
    save(folder, made(10))
    (tmp_path / "older" / "arrays" / "_METADATA").unlink()
    (tmp_path / "older").rename(folder / "5")
    assert same(restore(folder, **SHAPES), made(10))
    save(folder, made(15))
    assert [path.name for path in folder.iterdir()] == ["15"]
    assert same(restore(folder, **SHAPES), made(15))


def half_written(folder: Path, number: int) -> Path:
    """What a kill in the middle of a save leaves: Orbax's temporary folder with cut-off files in it."""
    unfinished = folder / f"{number}.orbax-checkpoint-tmp"
    save(folder.parent / "elsewhere", made(number))
    (folder.parent / "elsewhere" / str(number)).rename(unfinished)
    for path in unfinished.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:20])
    return unfinished


def test_a_half_written_checkpoint_does_not_count_and_is_swept(tmp_path):
    folder = tmp_path / "last"
    save(folder, made(5))
    unfinished = half_written(folder, 10)
    assert same(restore(folder, **SHAPES), made(5))
    save(folder, made(10))
    assert same(restore(folder, **SHAPES), made(10))
    assert not unfinished.exists()


def test_a_failed_save_keeps_the_older_and_says_so(tmp_path, monkeypatch):
    folder = tmp_path / "last"
    save(folder, made(5))

    def full(self, step, **kwargs):
        half_written(folder, step)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real_save = ocp.CheckpointManager.save
    monkeypatch.setattr(
        ocp.CheckpointManager,
        "save",
        lambda self, step, **kwargs: (full if self.directory == folder else real_save)(self, step, **kwargs),
    )
    with pytest.raises(OSError, match=r"round 10 could not be saved in .*the disk is full.*--resume") as caught:
        save(folder, made(10))
    assert "\n" not in str(caught.value)
    assert [path.name for path in folder.iterdir()] == ["5"], "the half-written one still takes space"
    assert same(restore(folder, **SHAPES), made(5))
    monkeypatch.undo()
    save(folder, made(10))
    assert same(restore(folder, **SHAPES), made(10))


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="could not be saved"):
        save(tmp_path / "file" / "last", made(5))


@pytest.fixture
def one_megabyte(tmp_path):
    """A real disk of one megabyte; only root may mount it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def large(number: int, kilobytes: int) -> Checkpoint:
    noise = np.random.default_rng(number).normal(size=(kilobytes * 256,))  # does not compress
    return made(number)._replace(state={"table": jnp.asarray(noise, jnp.float32)})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # threads that outlive the failed save
@pytest.mark.parametrize("kilobytes", [490, 600, 800])
def test_a_full_disk_leaves_the_older_checkpoint(one_megabyte, kilobytes):
    shapes = {
        "state": {"table": jax.ShapeDtypeStruct((kilobytes * 256,), jnp.float32)},
        "private": SHAPES["private"],
    }
    save(one_megabyte / "last", large(5, kilobytes))
    with pytest.raises(OSError, match=r"the disk is full\. Earlier ones are intact; free some space"):
        save(one_megabyte / "last", large(10, kilobytes))
    assert same(restore(one_megabyte / "last", **shapes), large(5, kilobytes))
    assert [path.name for path in (one_megabyte / "last").iterdir()] == ["5"]


SAVER = """
import sys
from pathlib import Path
import jax, numpy as np
from fedjax_rec.federated.round import RoundKeys
from fedjax_rec.runs.checkpoint import Checkpoint, save
keys = RoundKeys(*(jax.random.key(seed) for seed in (1, 2, 3)))
noise = np.random.default_rng(0).normal(size=2_000_000).astype(np.float32)
for number in range(1, 1000):
    save(Path(sys.argv[1]), Checkpoint({"table": noise + number}, (), keys, None, {"round": number}, {}, ""))
    print(number, flush=True)
"""


def test_sigkill_in_the_middle_of_a_large_save(tmp_path):
    """Saves of 8 MB take nearly all of the child's time, so a kill at any moment falls into one."""
    noise = np.random.default_rng(0).normal(size=2_000_000).astype(np.float32)
    shape = {"table": jax.ShapeDtypeStruct(noise.shape, noise.dtype)}
    for delay in (0.013, 0.071):
        folder = tmp_path / f"{delay}"
        child = subprocess.Popen([sys.executable, "-c", SAVER, str(folder)], stdout=subprocess.PIPE, text=True)
        announced = [int(child.stdout.readline()) for _ in range(3)][-1]
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
        announced = max([announced, *(int(line) for line in child.stdout if line.endswith("\n"))])
        assert child.wait() == -signal.SIGKILL
        child.stdout.close()
        found = restore(folder, state=shape, private=())
        assert found.progress["round"] in (announced, announced + 1)
        np.testing.assert_array_equal(found.state["table"], noise + found.progress["round"])

"""Checkpoints: server state, private state, keys, ledger and progress, saved as one; the last and the best.

Orbax writes into a temporary folder and renames it when all is there, and the older checkpoint goes only after that:
a kill or a full disk in the middle of a save leaves the older one in force. Checksums tell a damaged one from a whole.
"""

import contextlib
import json
import shutil
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from fedjax_rec.federated.round import RoundKeys
from fedjax_rec.privacy.ledger import Ledger
from fedjax_rec.runs.directory import write_json

CHECKSUMS = "crc32.json"


class Checkpoint(NamedTuple):
    """All that a run needs to go on as if it had never stopped.

    Attributes:
      state: the ServerState.
      private: private parameters, leaves ``[clients, ...]``.
      keys: the run's keys.
      ledger: what has been released, or None.
      progress: JSON values: round, seconds, best round and metric.
      config: the configuration as JSON values.
      split: fingerprint of the data split that was trained on.
    """

    state: Any
    private: Any
    keys: RoundKeys
    ledger: Ledger | None
    progress: dict[str, Any]
    config: dict[str, Any]
    split: str


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Saves under ``folder`` and drops the older one after that; does nothing if that round is already there.

    Raises:
      OSError: if the disk is full or not writable; the older checkpoint is still there.
    """
    step = int(checkpoint.progress["round"])
    words = {
        "keys": {name: jax.random.key_data(key).tolist() for name, key in checkpoint.keys._asdict().items()},
        "ledger": None if checkpoint.ledger is None else checkpoint.ledger.to_json(),
        "progress": checkpoint.progress,
        "config": checkpoint.config,
        "split": checkpoint.split,
    }
    args = ocp.args.Composite(
        arrays=ocp.args.StandardSave(_leaves(checkpoint.state, checkpoint.private)), words=ocp.args.JsonSave(words)
    )
    _sweep(folder)
    try:
        with _manager(folder, create=True) as manager:
            if step in manager.all_steps():
                return
            manager.save(step, args=args, force=True)
        place = folder / str(step)
        write_json(place / CHECKSUMS, {item: _checksums(place / item) for item in ("arrays", "words")})
    except (OSError, ValueError) as error:
        _sweep(folder)
        raise OSError(
            f"The checkpoint of round {step} could not be saved in {folder}: {_short(error)}. Earlier ones are intact; "
            "free some space and continue with --resume."
        ) from error


def describe(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint in ``folder`` without its arrays (``state`` and ``private`` are None), or None.

    Raises:
      ValueError: if it is damaged.
    """
    words = _read(folder, words=ocp.args.JsonRestore())
    if words is None:
        return None
    words = words["words"]
    return Checkpoint(
        state=None,
        private=None,
        keys=RoundKeys(
            **{name: jax.random.wrap_key_data(jnp.asarray(data, jnp.uint32)) for name, data in words["keys"].items()}
        ),
        ledger=None if words["ledger"] is None else Ledger.from_json(words["ledger"]),
        progress=words["progress"],
        config=words["config"],
        split=words["split"],
    )


def restore(folder: Path, *, state: Any, private: Any) -> Checkpoint | None:
    """Loads the newest complete checkpoint in ``folder``, or None if there is none.

    Args:
      folder: as given to `save`.
      state: the expected ServerState (arrays or ``ShapeDtypeStruct``), with the sharding wanted.
      private: the expected private parameters.

    Raises:
      ValueError: if what is there does not have these shapes, or is damaged.
    """
    found = describe(folder)
    if found is None:
        return None
    arrays = _read(folder, arrays=ocp.args.StandardRestore(_leaves(state, private)))["arrays"]
    return found._replace(state=_like(state, arrays["state"]), private=_like(private, arrays["private"]))


def _read(folder: Path, **args: Any) -> Any:
    """The items named, of the newest complete checkpoint, after a look at its checksums; None if there is none."""
    if not folder.is_dir():
        return None
    with _manager(folder, create=False) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        try:
            for item in args:
                _check_sums(folder / str(step), item)
            return manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:  # Orbax raises a dozen types, bare Exception among them
            raise ValueError(
                f"The checkpoint of round {step} in {folder} is damaged or does not fit this configuration: "
                f"{_short(error)}. Restore that folder from a copy, or start a new run with another --out."
            ) from error


def _manager(folder: Path, *, create: bool) -> contextlib.closing[ocp.CheckpointManager]:
    options = ocp.CheckpointManagerOptions(max_to_keep=1, create=create, enable_async_checkpointing=False)
    return contextlib.closing(ocp.CheckpointManager(folder.resolve(), options=options))


def _leaves(state: Any, private: Any) -> dict[str, dict[str, jax.Array]]:
    """Arrays by name: the format then depends on no container type (Orbax has no empty tuples)."""
    return {
        name: {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
        for name, tree in {"state": state, "private": private}.items()
    }


def _like(tree: Any, leaves: dict[str, jax.Array]) -> Any:
    return jax.tree.map_with_path(lambda path, _: leaves[jax.tree_util.keystr(path)], tree)


def _checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of every file under a folder, by path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): zlib.crc32(path.read_bytes()) for path in files}


def _check_sums(step: Path, item: str) -> None:
    """Compares with what `save` noted; a kill between the save and the note leaves none, and nothing to compare."""
    if not (step / CHECKSUMS).is_file():
        return
    noted, found = json.loads((step / CHECKSUMS).read_text(encoding="utf-8"))[item], _checksums(step / item)
    changed = sorted(name for name in noted.keys() | found.keys() if noted.get(name) != found.get(name))
    if changed:
        raise ValueError(f"{item}/{changed[0]} is missing or changed")


def _short(error: Exception) -> str:
    """The first line of an error, without the pages that storage libraries add."""
    if "No space left" in str(error):
        return "the disk is full"
    line = (str(error) or type(error).__name__).splitlines()[0]
    return (line if len(line) <= 200 else line[:200] + " ...").rstrip(".")


def _sweep(folder: Path) -> None:
    """Removes half-written checkpoints, so that the space they take is free for the next try."""
    for path in folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(path, ignore_errors=True)

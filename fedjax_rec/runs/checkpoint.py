"""Checkpoints: server state, private state, keys, ledger and progress, saved as one; the last and the best.

Orbax writes into a temporary folder and renames it when all is there, and the older checkpoint goes only after that:
a kill or a full disk in the middle of a save leaves the older one in force.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from fedjax_rec.federated.round import RoundKeys, Rounds
from fedjax_rec.privacy.ledger import Ledger


class Checkpoint(NamedTuple):
    """All that a run needs to go on as if it had never stopped.

    Attributes:
      state: the ServerState.
      private: private parameters, leaves ``[clients, ...]``.
      keys: the run's keys.
      ledger: what has been released, or None.
      progress: JSON values: round, seconds, best round and metric.
      config: the configuration as JSON values.
    """

    state: Any
    private: Any
    keys: RoundKeys
    ledger: Ledger | None
    progress: dict[str, Any]
    config: dict[str, Any]


@contextlib.contextmanager
def _manager(folder: Path, *, create: bool) -> Iterator[ocp.CheckpointManager]:
    options = ocp.CheckpointManagerOptions(max_to_keep=1, create=create, enable_async_checkpointing=False)
    manager = ocp.CheckpointManager(folder.resolve(), options=options)
    try:
        yield manager
    finally:
        manager.close()


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Saves under ``folder`` and drops the older one after that.

    Raises:
      OSError: if the disk is full or not writable; the older checkpoint is still there.
    """
    step = int(checkpoint.progress["round"])
    arrays = _leaves(checkpoint.state, checkpoint.private, checkpoint.keys)
    words = {
        "ledger": None if checkpoint.ledger is None else checkpoint.ledger.to_json(),
        "progress": checkpoint.progress,
        "config": checkpoint.config,
    }
    try:
        with _manager(folder, create=True) as manager:
            args = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), words=ocp.args.JsonSave(words))
            manager.save(step, args=args, force=True)
    except (OSError, ValueError) as error:
        _sweep(folder)
        raise OSError(
            f"The checkpoint of round {step} could not be saved in {folder}: {error}. The one before it is intact; "
            "free some space and continue with --resume."
        ) from error


def restore(folder: Path, *, state: Any, private: Any, keys: RoundKeys) -> Checkpoint | None:
    """Loads the newest complete checkpoint in ``folder``, or None if there is none.

    Args:
      folder: as given to `save`.
      state: the expected ServerState (arrays or ``ShapeDtypeStruct``), with the sharding wanted.
      private: the expected private parameters.
      keys: any keys, for their type.

    Raises:
      ValueError: if what is there does not have these shapes.
    """
    if not folder.is_dir():
        return None
    with _manager(folder, create=False) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        args = ocp.args.Composite(
            arrays=ocp.args.StandardRestore(_leaves(state, private, keys)), words=ocp.args.JsonRestore()
        )
        try:
            loaded = manager.restore(step, args=args)
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise ValueError(
                f"The checkpoint of round {step} in {folder} does not fit this configuration, or is damaged: {error}"
            ) from error
    arrays, words = loaded["arrays"], loaded["words"]
    return Checkpoint(
        state=_like(state, arrays["state"]),
        private=_like(private, arrays["private"]),
        keys=jax.tree.map(lambda data: jax.random.wrap_key_data(data), _like(keys, arrays["keys"])),
        ledger=None if words["ledger"] is None else Ledger.from_json(words["ledger"]),
        progress=words["progress"],
        config=words["config"],
    )


def _leaves(state: Any, private: Any, keys: RoundKeys) -> dict[str, dict[str, jax.Array]]:
    """Arrays by name: the format then depends on no container type (Orbax has no empty tuples)."""
    trees = {"state": state, "private": private, "keys": jax.tree.map(jax.random.key_data, keys)}
    return {
        name: {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
        for name, tree in trees.items()
    }


def _like(tree: Any, leaves: dict[str, jax.Array]) -> Any:
    return jax.tree.map_with_path(lambda path, _: leaves[jax.tree_util.keystr(path)], tree)


class Parameters(NamedTuple):
    """What evaluation needs of a checkpoint: the round, shared parameters, private parameters."""

    round: int
    shared: Any
    private: Any


def restore_parameters(folder: Path, *, rounds: Rounds, keys: RoundKeys) -> Parameters:
    """Loads a checkpoint for evaluation.

    Raises:
      FileNotFoundError: if there is none.
    """
    state, private = jax.eval_shape(rounds.init, jax.random.key(0))
    found = restore(folder, state=state, private=private, keys=keys)
    if found is None:
        raise FileNotFoundError(f"There is no complete checkpoint in {folder}; the run was stopped before its first.")
    return Parameters(int(found.state.round), found.state.shared, found.private)


def _sweep(folder: Path) -> None:
    """Removes half-written checkpoints, so that the space they take is free for the next try."""
    for path in folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(path, ignore_errors=True)

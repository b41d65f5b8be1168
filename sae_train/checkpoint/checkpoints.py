"""The checkpoints of a run: saved in the background, listed, checked and restored.

Layout: `<run>/checkpoints/<step>/{state,meta}`. `state` holds the arrays of a
`sae_train.step.state.TrainState`, `meta` the JSON that says which run they belong to. On a disk
Orbax writes a checkpoint under a temporary name and renames it when it is whole (`orbax_files`). In
a bucket, which can't rename a folder, and on a disk that can't lock files, the meta is written last
(`arrays`). So a checkpoint that can be seen was complete when it was written. What happens to it
later is found out by checksums (`checksum`): the meta holds one of itself and one of each array.

Saved by any number of processes on any mesh, a checkpoint restores on any other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from activation_cache.runtime import exchange
from activation_cache.runtime.closing import Closing
from activation_cache.runtime.errors import StorageError, UserError
from activation_cache.storage.bucket import BucketPath
from activation_cache.storage.files import AnyPath, StoragePath, make_folder, storage_path
from activation_cache.storage.locks import locks_files
from sae_train.checkpoint import arrays, orbax_files
from sae_train.checkpoint.arrays import ARRAYS, META, ArrayCheckpoints
from sae_train.checkpoint.checksum import DamagedCheckpoint, seal_meta, state_checksums, unseal_meta
from sae_train.checkpoint.orbax_files import OrbaxCheckpoints
from sae_train.checkpoint.same_run import FORMAT_VERSION
from sae_train.runs.folder import CHECKPOINTS, checkpoint_steps
from sae_train.step.state import TrainState

logger = logging.getLogger(__name__)

Loaded = TypeVar("Loaded")


class StoredCheckpoints:
    """The checkpoints of one run folder, for reading: disturbs nobody who writes there."""

    def __init__(self, run_folder: AnyPath) -> None:
        self.run_folder = storage_path(run_folder)
        self.folder = (self.run_folder / CHECKPOINTS).absolute()

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, rising."""
        return sorted(checkpoint_steps(self.run_folder))

    def read_meta(self, step: int) -> dict[str, Any]:
        """The JSON of one checkpoint.

        Raises:
            DamagedCheckpoint: it isn't what was written.
            UserError: another version of this software wrote it, in another format.
        """
        file = self.folder / str(step) / META
        try:
            meta = unseal_meta(file.read_bytes())
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"{file} is missing") from error
        # Not a DamagedCheckpoint, which a run skips and deletes: this one is whole.
        if meta["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{file} has checkpoint format {meta['format_version']}, and this version of the "
                f"software reads {FORMAT_VERSION}: go on with the version that wrote it, or start "
                "the run anew with --fresh (nothing was changed)"
            )
        return meta

    def restore(self, abstract: TrainState, *, step: int) -> TrainState:
        """The state of one checkpoint, placed as `abstract` says, and checked.

        Each process reads what its devices hold; none waits for another while it reads.

        Raises:
            DamagedCheckpoint: it can't be read, or isn't what was written.
        """
        meta = self.read_meta(step)
        expected = meta["checksums"]
        problem: str | None = None
        state: Any = None
        try:
            state = _read(self.folder / str(step), abstract, meta)
        except (PermissionError, MemoryError, StorageError):
            raise
        except Exception as error:  # Orbax has no error of its own for missing and torn files
            problem = f"it can't be read ({_innermost(error)})"
        # All processes go on or none does: they compute the checksums together.
        problem = next(filter(None, exchange.gathered("restored", problem)), None)
        if problem is None:
            found = state_checksums(state)
            wrong = [name for name in expected if found.get(name) != expected[name]]
            problem = f"{', '.join(wrong)} failed the checksum" if wrong else None
        if problem is not None:
            raise DamagedCheckpoint(f"{self.folder / str(step)}: {problem}")
        return state

    def newest(self, load: Callable[[int], Loaded]) -> tuple[int, Loaded] | None:
        """The step of the newest checkpoint that isn't damaged, and what `load` makes of it.

        One that is damaged (`load` raises `DamagedCheckpoint`) is skipped with a warning.

        Returns:
            None if there is no checkpoint.

        Raises:
            UserError: there are checkpoints, and all are damaged.
        """
        damaged: list[str] = []
        for step in reversed(self.steps()):
            try:
                return step, load(step)
            except DamagedCheckpoint as error:
                damaged.append(str(error))
                logger.warning("skipping the damaged checkpoint at step %d: %s", step, error)
        if damaged:
            raise UserError(
                f"every checkpoint of {self.folder.parent} is damaged: {'; '.join(damaged)}. "
                "Restore one from a copy, or give --fresh to delete them and start anew."
            )
        return None


class Checkpoints(StoredCheckpoints, Closing):
    """The checkpoints of one run folder, for the run that writes them.

    A context manager. With several processes, all call everything that writes, in the same order.
    """

    def __init__(self, run_folder: AnyPath, *, keep: int | None = None) -> None:
        """Clear away what a kill left half written; `keep` newest stay (None: all)."""
        super().__init__(run_folder)
        self._files: ArrayCheckpoints | OrbaxCheckpoints
        folder = make_folder(self.folder)
        if isinstance(folder, Path) and exchange.run_on_main_and_broadcast(
            "locks", lambda: locks_files(folder)
        ):
            self._files = OrbaxCheckpoints(folder, keep=keep)
        else:
            self._files = ArrayCheckpoints(folder, keep=keep)

    def close(self) -> None:
        """Return when the save under way is over; raises `UserError` if it failed."""
        try:
            self.wait()
        finally:
            self._files.close()

    def wait(self) -> None:
        """Return when every save has reached the disk under its final name."""
        self._files.wait()

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, rising: the same in all processes, in the same call."""
        return sorted(self._files.steps())

    def save(self, state: TrainState, *, step: int, meta: Mapping[str, Any]) -> None:
        """Copy the state off the devices and write it in the background."""
        if isinstance(self._files, ArrayCheckpoints):
            meta = {**meta, ARRAYS: arrays.cutting_of(state)}
        self._files.save(step, state, seal_meta(meta, checksums=state_checksums(state)))

    def newest(self, load: Callable[[int], Loaded]) -> tuple[int, Loaded] | None:
        """As of `StoredCheckpoints`; deletes the damaged ones, so that they can be saved again."""
        steps, found = self.steps(), super().newest(load)
        if found is not None:
            for step in [one for one in steps if one > found[0]]:
                self._files.delete(step)
        return found

    def delete_all(self) -> None:
        """Delete every checkpoint: for a run that the user starts anew."""
        for step in self.steps():
            self._files.delete(step)


def _read(folder: StoragePath, abstract: TrainState, meta: Mapping[str, Any]) -> TrainState:
    if ARRAYS in meta:
        return arrays.read_state(folder, abstract, meta)
    if isinstance(folder, BucketPath):
        raise UserError("it was saved on a disk: copy the run's folder to a disk to read it")
    return orbax_files.read_state(folder, abstract)


def _innermost(error: BaseException) -> str:
    """The message of the error that the others were raised from, in one line."""
    while inner := (error.exceptions[0] if isinstance(error, ExceptionGroup) else error.__cause__):
        error = inner
    return (str(error).splitlines() or [type(error).__name__])[0][:300]

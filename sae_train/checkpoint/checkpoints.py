"""Checkpoints: Orbax, asynchronous, atomic, kept to a policy; and reading a trained SAE back.

Layout: `<run>/checkpoints/<step>/{state,meta}`, `state` being the training state of
`state.TrainState` and `meta` the JSON that says what it belongs to. Orbax writes a checkpoint
under a temporary name and renames it when it is whole, so one that has its name was complete; in
a bucket `checkpoint_arrays` writes the meta last, so one that has its meta was complete. What
happens to it later is found out by checksums: `meta` has one of itself and one of each array.

Saved by any number of processes on any mesh, a checkpoint restores on any other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TypeVar

import orbax.checkpoint as ocp

from activation_cache.runtime import exchange
from activation_cache.runtime.errors import StorageError, UserError
from activation_cache.storage.bucket import BucketPath
from activation_cache.storage.files import AnyPath, StoragePath, storage_path
from sae_train.checkpoint.arrays import ARRAYS, META, BucketCheckpoints, cutting_of, read_state
from sae_train.checkpoint.checksum import DamagedCheckpoint, seal_meta, state_checksums, unseal_meta
from sae_train.checkpoint.orbax_files import OrbaxCheckpoints
from sae_train.checkpoint.same_run import FORMAT_VERSION
from sae_train.step.state import TrainState

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"

Loaded = TypeVar("Loaded")


class Checkpoints:
    """The checkpoints of one run folder; a context manager that waits for writes on leaving.

    With several processes, all call everything that writes, in the same order.
    """

    def __init__(
        self, run_folder: AnyPath, *, keep: int | None = None, read_only: bool = False
    ) -> None:
        """Open them; `read_only` disturbs nobody who may be writing there."""
        self.folder = (storage_path(run_folder) / FOLDER).absolute()
        self._files: BucketCheckpoints | OrbaxCheckpoints
        if isinstance(self.folder, BucketPath):
            self._files = BucketCheckpoints(self.folder, keep=keep, read_only=read_only)
        else:
            self._files = OrbaxCheckpoints(self.folder, keep=keep, read_only=read_only)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        finally:
            self._files.close()

    def wait(self) -> None:
        """Return when every save has reached the disk under its final name."""
        self._files.wait()

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, rising."""
        return sorted(self._files.steps())

    def save(self, state: TrainState, *, step: int, meta: Mapping[str, Any]) -> None:
        """Copy the state off the devices and write it in the background."""
        if isinstance(self.folder, BucketPath):
            meta = {**meta, ARRAYS: cutting_of(state)}
        self._files.save(step, state, seal_meta(meta, checksums=state_checksums(state)))

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
        # No damage, which a run passes over and deletes: what is there is whole.
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
        except Exception as error:  # whatever Orbax makes of missing and torn files
            problem = f"it can't be read ({_innermost(error)})"
        # All or none: the checksums of arrays that lie on all processes need all of them.
        problem = next(filter(None, exchange.gathered("restored", problem)), None)
        if problem is None:
            found = state_checksums(state)
            wrong = [name for name in expected if found.get(name) != expected[name]]
            problem = f"{', '.join(wrong)} failed the checksum" if wrong else None
        if problem is not None:
            raise DamagedCheckpoint(f"{self.folder / str(step)}: {problem}")
        return state

    def newest(
        self, load: Callable[[int], Loaded], *, drop_damaged: bool = False
    ) -> tuple[int, Loaded] | None:
        """What `load` makes of the newest checkpoint that isn't damaged, and its step.

        Those that `load` finds damaged are told of in a warning and passed over;
        `drop_damaged` deletes them, so that the same step can be saved again.

        Raises:
            UserError: there are checkpoints, and all are damaged.
        """
        steps = self.steps()
        damaged: list[str] = []
        for step in reversed(steps):
            try:
                loaded = load(step)
            except DamagedCheckpoint as error:
                damaged.append(str(error))
                logger.warning("skipping the damaged checkpoint at step %d: %s", step, error)
                continue
            for newer in [other for other in steps if other > step and drop_damaged]:
                self._files.delete(newer)
            return step, loaded
        if damaged:
            raise UserError(
                f"every checkpoint of {self.folder.parent} is damaged: {'; '.join(damaged)}. "
                "Restore one from a copy, or give --fresh to delete them and start anew."
            )
        return None

    def delete_all(self) -> None:
        """Forget every checkpoint: for a run the user wants to start anew."""
        for step in self.steps():
            self._files.delete(step)


def _read(folder: StoragePath, abstract: TrainState, meta: Mapping[str, Any]) -> TrainState:
    if ARRAYS in meta:
        return read_state(folder, abstract, meta)
    if isinstance(folder, BucketPath):
        raise UserError("it was saved on a disk: copy the run's folder to a disk to read it")
    arguments = ocp.args.StandardRestore(abstract)
    return ocp.StandardCheckpointHandler().restore(folder / "state", args=arguments)


def _innermost(error: BaseException) -> str:
    """The words of the error that others were wrapped around."""
    while inner := (error.exceptions[0] if isinstance(error, ExceptionGroup) else error.__cause__):
        error = inner
    return (str(error).splitlines() or [type(error).__name__])[0][:300]

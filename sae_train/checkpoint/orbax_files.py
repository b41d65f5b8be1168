"""Checkpoints on a disk: every call into Orbax, which writes and reads them.

Orbax narrates through absl's logger, a hundred lines a checkpoint, and a process that shows INFO
would drown in them. While we have a folder open or read from one, what Orbax logs below WARNING is
dropped; its warnings and errors pass, and at DEBUG (`sae -v`) so does everything.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import disk_errors, make_folder
from sae_train.step.state import TrainState

logger = logging.getLogger(__name__)

_ABSL = logging.getLogger("absl")
_ORBAX_FOLDER = str(Path(ocp.__file__).parent)


class OrbaxCheckpoints:
    """The checkpoints under one folder of a disk, saved in the background."""

    def __init__(self, folder: Path, *, keep: int | None) -> None:
        """Make the folder and clear away what a kill left half written there.

        Raises:
            UserError: the folder can't be made.
        """
        self.folder = make_folder(folder)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=True,
            # A kill in mid-write leaves a folder under a temporary name.
            cleanup_tmp_directories=True,
            # Processes meet under this name; they may write several folders at once.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                barrier_sync_key_prefix=hashlib.sha256(str(folder).encode()).hexdigest()
            ),
        )
        with ExitStack() as stack:
            stack.enter_context(_without_narration())  # the background threads' too
            self._manager = ocp.CheckpointManager(
                folder, options=options, item_names=("state", "meta")
            )
            stack.callback(self._manager.close)
            self._open = stack.pop_all()

    def close(self) -> None:
        """End the background threads."""
        self._open.close()

    def wait(self) -> None:
        """Return when the save under way has its final name; raises `UserError` if it failed."""
        with self._save_errors():
            self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, or will have when the save under way is over."""
        return list(self._manager.all_steps())

    def save(self, step: int, state: TrainState, sealed: Mapping[str, Any]) -> None:
        """Copy the state off the devices and begin to write it, with its sealed meta."""
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(dict(sealed))
        )
        with self._save_errors():
            self._manager.save(step, args=arguments)

    def delete(self, step: int) -> None:
        """Delete a checkpoint."""
        self._manager.delete(step)

    @contextmanager
    def _save_errors(self) -> Iterator[None]:
        """A disk that refuses, or that has gone away under a save, as a `UserError`."""
        try:
            with disk_errors(self.folder, doing="save a checkpoint in"):
                yield
        except UserError:
            raise
        except Exception as error:  # Orbax has no error of its own for files that vanish
            if self.folder.exists():
                raise
            raise UserError(
                f"cannot save a checkpoint in {self.folder}: that folder is gone. Bring it back "
                "(is its disk mounted?) and give the same command again: it goes on from what is "
                "in there."
            ) from error


def read_state(folder: Path, abstract: TrainState) -> TrainState:
    """The state under one checkpoint's folder, placed as `abstract` says.

    What it raises for missing or torn files is Orbax's affair: any exception.
    """
    with _without_narration():
        arguments = ocp.args.StandardRestore(abstract)
        return ocp.StandardCheckpointHandler().restore(folder / "state", args=arguments)


@contextmanager
def _without_narration() -> Iterator[None]:
    """Keep what Orbax's files log below WARNING out of the user's log, unless ours is at DEBUG."""

    def passes(record: logging.LogRecord) -> bool:
        narrated = record.levelno < logging.WARNING and record.pathname.startswith(_ORBAX_FOLDER)
        return not narrated or logger.isEnabledFor(logging.DEBUG)

    _ABSL.addFilter(passes)
    try:
        yield
    finally:
        _ABSL.removeFilter(passes)

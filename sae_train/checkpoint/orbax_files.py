"""Checkpoints on a disk: every call into Orbax, which writes and reads them.

Orbax narrates through absl's logger, a hundred lines a checkpoint, and a process that shows INFO
would drown in them. It also logs the tracebacks of errors that it raises to us afterwards. While we
have a folder open or read from one, such records are dropped; Orbax's other warnings and errors
pass, and at DEBUG (`sae -v`) so does everything.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import logging
import re
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from activation_cache.runtime.amounts import bytes_text
from activation_cache.runtime.errors import UserError
from activation_cache.storage.arrays import refused_number
from activation_cache.storage.files import disk_refusal
from sae_train.checkpoint.arrays import delete_checkpoint
from sae_train.step.state import TrainState

logger = logging.getLogger(__name__)

_ABSL = logging.getLogger("absl")
_OF_ARRAYS = re.compile("TensorStore|tensorstore|OCDBT|orbax")
_DESCRIPTION = "_CHECKPOINT_METADATA"
_ORBAX_FOLDER = str(Path(ocp.__file__).parent)


class OrbaxCheckpoints:
    """The checkpoints under one folder of a disk, saved in the background."""

    def __init__(self, folder: Path, *, keep: int | None) -> None:
        """Clear away what a kill left half written in the folder."""
        self.folder, self.keep = folder, keep
        self._saving: int | None = None  # the step that was last saved, and its state's size
        self._bytes = 0
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=True,
            # Else threads wait for folders that a disk refused, and the process can't end.
            async_options=ocp.options.AsyncOptions(
                create_directories_asynchronously=False, barrier_sync_fn=_meet
            ),
            # A kill in mid-write leaves a folder under a temporary name.
            cleanup_tmp_directories=True,
            # Processes meet under this name; they may write several folders at once.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                barrier_sync_key_prefix=hashlib.sha256(str(folder).encode()).hexdigest()
            ),
        )
        with ExitStack() as stack:
            stack.enter_context(_without_narration())  # the background threads' too
            with self._errors(), _odd_descriptions(folder):
                self._manager = ocp.CheckpointManager(
                    folder, options=options, item_names=("state", "meta")
                )
            stack.callback(self._manager.close)
            self._open = stack.pop_all()

    def close(self) -> None:
        """End the background threads."""
        with self._errors():
            self._open.close()

    def wait(self) -> None:
        """Return when the save under way has its final name; raises `UserError` if it failed."""
        with self._errors():
            try:
                self._manager.wait_until_finished()
            except OSError as error:
                # Orbax deletes the oldest when the newest has its name: then nothing is lost.
                if self._saving is None or not (self.folder / str(self._saving)).is_dir():
                    raise
                logger.debug("Orbax can't delete the oldest checkpoint: %s", error)
                self._delete_oldest()

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, or will have when the save under way is over."""
        return list(self._manager.all_steps())

    def save(self, step: int, state: TrainState, sealed: Mapping[str, Any]) -> None:
        """Copy the state off the devices and begin to write it, with its sealed meta."""
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(_parts(state)), meta=ocp.args.JsonSave(dict(sealed))
        )
        self.wait()
        self._saving = step
        self._bytes = sum(array.nbytes for array in jax.tree.leaves(state))
        with self._errors():
            self._manager.save(step, args=arguments)

    def delete(self, step: int) -> None:
        """Delete a checkpoint."""
        try:
            self._manager.delete(step)
        except OSError as error:  # Orbax can delete neither links nor what another process uses
            logger.debug("Orbax can't delete the checkpoint at step %d: %s", step, error)
            delete_checkpoint(self.folder / str(step))

    def _delete_oldest(self) -> None:
        assert self.keep is not None
        steps = sorted(int(one.name) for one in self.folder.iterdir() if one.name.isdecimal())
        for step in steps[: -self.keep]:
            delete_checkpoint(self.folder / str(step))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """A disk that refuses, or that has gone away under a save, as a `UserError`."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # Orbax has no error of its own for what a disk refuses
            if not self.folder.exists():
                raise UserError(
                    f"cannot save a checkpoint in {self.folder}: that folder is gone. Bring it "
                    "back (is its disk mounted?) and give the same command again: it goes on from "
                    "what is in there."
                ) from error
            doing, number = "save a checkpoint in", refused_number(error)
            told = disk_refusal(number, self.folder, doing=doing, note=self._room(number))
            if told is None:
                raise
            raise told from error

    def _room(self, number: int | None) -> str:
        """How much room the state needs, and how much there is, where that is the trouble."""
        if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return ""
        needed = f"A checkpoint takes up to {bytes_text(self._bytes)}"
        if number != errno.ENOSPC:
            return f"{needed}."
        return f"{needed}, and {bytes_text(shutil.disk_usage(self.folder).free)} are free."


def _meet(*, key: str, timeout_ms: int) -> None:
    """Orbax's barrier between processes; one whose save has failed waits for nobody.

    Orbax's background thread comes here with its error under way too, and the others, which wait
    for this process's part of the save, never come: it would keep the error for 20 minutes.
    """
    in_background = threading.current_thread() is not threading.main_thread()
    if not (in_background and sys.exc_info()[1]):
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


@contextmanager
def _odd_descriptions(folder: Path) -> Iterator[None]:
    """Orbax reads what describes each checkpoint when it opens their folder, and checks its types.

    Raises:
        UserError: they are others. Nothing needs that file.
    """
    try:
        yield
    except (ValueError, TypeError, AttributeError) as error:
        if refused_number(error) is not None:
            raise
        raise UserError(
            f"a file {_DESCRIPTION} in {folder} is not what was written ({error}): delete those "
            "files, which nothing needs, and give the same command again."
        ) from error


def read_state(folder: Path, abstract: TrainState) -> TrainState:
    """The state under one checkpoint's folder, placed as `abstract` says.

    What it raises for missing or torn files is Orbax's affair: any exception.
    """
    with _without_narration():
        arguments = ocp.args.StandardRestore(_parts(abstract))
        parts = ocp.StandardCheckpointHandler().restore(folder / "state", args=arguments)
    return dataclasses.replace(abstract, **parts)


def _parts(state: TrainState) -> dict[str, Any]:
    """Its fields by name, without those that hold nothing, for which Orbax would keep a leaf."""
    return {name: part for name, part in vars(state).items() if jax.tree.leaves(part)}


@contextmanager
def _without_narration() -> Iterator[None]:
    """Keep out of the user's log what Orbax tells us otherwise, unless ours is at DEBUG.

    That is what its files log below WARNING or with a traceback, and from now on what is left of
    several errors at once (`_drop_leftovers`).
    """
    _drop_leftovers()

    def passes(record: logging.LogRecord) -> bool:
        narrated = record.levelno < logging.WARNING and record.pathname.startswith(_ORBAX_FOLDER)
        return not narrated or logger.isEnabledFor(logging.DEBUG)

    _ABSL.addFilter(passes)
    try:
        yield
    finally:
        _ABSL.removeFilter(passes)


@functools.cache
def _drop_leftovers() -> None:
    """Drop what comes after the first of several errors of Orbax, which is the one it raises.

    Its event loop ends at the first. TensorStore's threads then complain about the loop, and its
    other tasks about nobody asking for their result: at once, or when Python frees them.
    """

    def complain(unraisable: sys.UnraisableHookArgs) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        of_orbax = code is not None and code.co_filename.startswith(_ORBAX_FOLDER)
        if not of_orbax and str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    def passes(record: logging.LogRecord) -> bool:
        # absl names the file that logs only if nobody asked for its logger before absl was there.
        trace = record.exc_info[2] if record.exc_info else None
        of_orbax = trace is not None and trace.tb_frame.f_code.co_filename.startswith(_ORBAX_FOLDER)
        of_task = record.name == "asyncio" and _OF_ARRAYS.search(record.getMessage()) is not None
        return not (of_orbax or of_task) or logger.isEnabledFor(logging.DEBUG)

    before, sys.unraisablehook = sys.unraisablehook, complain
    for own in (_ABSL, logging.getLogger("asyncio")):
        own.addFilter(passes)

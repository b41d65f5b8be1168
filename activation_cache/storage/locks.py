"""One writer per folder: the kernel's lock of a file, or a lease where there is none."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from activation_cache.runtime.errors import UserError
from activation_cache.storage.bucket import BucketPath
from activation_cache.storage.files import (
    NOT_OFFERED,
    AnyPath,
    StoragePath,
    disk_errors,
    make_folder,
)

logger = logging.getLogger(__name__)

LOCK = ".lock"


@contextlib.contextmanager
def folder_lock(path: AnyPath) -> Iterator[None]:
    """Hold `path` for this process alone; the kernel releases it when the process dies.

    In a bucket, and on a file system without locks, a lease takes the lock's part (`lease.held`).

    Raises:
        UserError: another process holds the folder, or it can't be written.
    """
    folder = make_folder(path)
    with contextlib.ExitStack() as held:
        if isinstance(folder, BucketPath) or not _locked(folder, held):
            # Imported here because it loads TensorStore, which takes a while.
            from activation_cache.storage import lease

            held.enter_context(lease.held(folder))
        yield


def _locked(folder: Path, held: contextlib.ExitStack) -> bool:
    """Lock a folder until `held` is closed; false if its file system has no locks."""
    with disk_errors(folder, doing="write in"):
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        held.callback(os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{folder} is in use by another process: one process writes a folder at a time. "
                "Wait for it to end, stop it, or choose another folder."
            ) from error
        except OSError as error:
            if error.errno not in NOT_OFFERED:
                raise
            logger.info(
                "the file system of %s has no locks (%s): taking a lease", folder, error.strerror
            )
            return False
    return True


def locks_files(folder: Path) -> bool:
    """Has a folder's file system the locks, and the syncs of folders, that Orbax counts on?"""
    with disk_errors(folder, doing="write in"), tempfile.TemporaryFile(dir=folder) as file:
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.fsync(handle)
        except OSError as error:
            if error.errno not in NOT_OFFERED:
                raise
            return False
        finally:
            os.close(handle)
    return True


def is_locked(folder: StoragePath) -> bool:
    """Does a process hold this folder (`folder_lock`)?

    It takes a shared lock for an instant. A writer that starts in that instant finds the folder in
    use, says so and can be started again. Of a lease the answer is as old as its last renewal.
    """
    if isinstance(folder, Path):
        try:
            handle = os.open(folder / LOCK, os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno not in NOT_OFFERED:
                return False
        finally:
            os.close(handle)
    from activation_cache.storage import lease

    return lease.is_held(folder)

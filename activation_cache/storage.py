"""Small files and folders: atomic writes, one writer per folder, disk errors put in words.

Arrays go through TensorStore (`layout.py`); everything else that touches a disk comes here, so
that object storage has one place to be added.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from activation_cache.errors import UserError

_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "it passes the limit on the size of files (ulimit -f)",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
}


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike[str], *, doing: str) -> Iterator[None]:
    """Turn the disk errors a user can mend into a `UserError` naming `path`.

    Raises:
        UserError: for a full disk, a used-up quota, a missing permission, a read-only file
            system or a file where a folder belongs. Other errors pass through.
    """
    try:
        yield
    except OSError as error:
        reason = _DISK_ERRORS.get(error.errno or 0)
        if reason is None:
            raise
        raise UserError(
            f"cannot {doing} {path}: {reason}. What was finished before is intact: free space or "
            "fix the permission and give the same command again."
        ) from error


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Create a folder and its parents; raises `UserError` where the disk refuses."""
    folder = Path(path)
    with disk_errors(folder, doing="create folder"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path` to write; when the block ends it takes `path`'s place.

    A reader sees the old file or the whole new one, never a part; an error leaves the old file.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    with disk_errors(target, doing="write"):
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a whole file atomically: a reader sees the old bytes or the new, never a part."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON atomically, indented, keys in the order given, NaN refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file; raises `UserError` naming the file when it isn't JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): the file is damaged") from error


@contextlib.contextmanager
def folder_lock(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold `path` for this process alone; the kernel lets go when the process dies.

    Raises:
        UserError: another process holds the folder, or it can't be written.
    """
    folder = make_folder(path)
    with disk_errors(folder, doing="write in"):
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{folder} is in use by another process: one process writes a folder at a time. "
                "Wait for it to end, stop it, or choose another folder."
            ) from error
        yield
    finally:
        os.close(handle)

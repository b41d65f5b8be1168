"""Small files and folders, on a disk or in a bucket: atomic writes, locks, messages for errors.

Arrays go through TensorStore (`arrays.py`), every other write through here. A `StoragePath` is a
`pathlib.Path` or a `BucketPath`, which has the same methods as far as buckets allow.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, overload

from activation_cache.runtime.addresses import is_url
from activation_cache.runtime.errors import UserError
from activation_cache.storage import bucket
from activation_cache.storage.bucket import BucketPath

StoragePath = Path | BucketPath
AnyPath = str | os.PathLike[str] | BucketPath

_DISK_ERRORS = {
    errno.ENOENT: "a folder above it is gone",
    errno.ESTALE: "the file system it is on has gone away",
    errno.ENOTCONN: "the file system it is on has gone away",
    errno.ENODEV: "the disk it is on has gone away",
    errno.EIO: "the disk fails (input/output error)",
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "it passes the limit on the size of files (ulimit -f)",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
}


def storage_path(path: AnyPath) -> StoragePath:
    """The folder or file that a text names: `gs://...` and `s3://...` are in a bucket.

    Raises:
        UserError: a URL of another kind, or one without a bucket.
    """
    if isinstance(path, BucketPath):
        return path
    text = os.fspath(path)
    return BucketPath.parse(text) if is_url(text) else Path(text)


def user_cache() -> Path:
    """This machine's folder for files that can be made again: `~/.cache/open-gemma-scope`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "open-gemma-scope"


@contextlib.contextmanager
def disk_errors(path: AnyPath, *, doing: str) -> Iterator[None]:
    """Turn the disk errors that a user can mend into a `UserError` naming `path`.

    Args:
        doing: a verb for the message, as in "cannot write /data/x".

    Raises:
        UserError: for a full or failing disk, one that has gone away, a used-up quota, a missing
            permission, a read-only file system or a file where a folder belongs. Other errors
            pass through.
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


@overload
def make_folder(path: Path) -> Path: ...
@overload
def make_folder(path: AnyPath) -> StoragePath: ...
def make_folder(path: AnyPath) -> StoragePath:
    """Create a folder and its parents; raises `UserError` where the disk refuses.

    A bucket has no folders to create.
    """
    folder = storage_path(path)
    if isinstance(folder, Path):
        with disk_errors(folder, doing="create folder"):
            folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def replacing(path: AnyPath) -> Iterator[Path]:
    """Write a file atomically: the block writes the path it is given, which then replaces `path`.

    A reader sees the old file or the whole new one, never a part; an error leaves the old file.
    The temporary file is in the same folder, or in the machine's folder for temporary files if
    `path` is in a bucket.
    """
    target = storage_path(path)
    if isinstance(target, BucketPath):
        with tempfile.TemporaryDirectory(prefix="sae-") as scratch:
            file = Path(scratch, target.name)
            with disk_errors(file, doing="write"):
                yield file
            bucket.upload(target, file)
        return
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    with disk_errors(target, doing="write"):
        try:
            yield temporary
            with open(temporary, "rb+") as written:
                os.fsync(written.fileno())
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def write_bytes(path: AnyPath, data: bytes) -> None:
    """Write a whole file atomically: a reader sees the old bytes or the new, never a part."""
    target = storage_path(path)
    if isinstance(target, BucketPath):
        bucket.write_object(target, data)
        return
    with replacing(target) as temporary:
        temporary.write_bytes(data)


def write_text(path: AnyPath, text: str) -> None:
    """Write a UTF-8 file atomically."""
    write_bytes(path, text.encode())


def write_json(path: AnyPath, value: Any) -> None:
    """Write JSON atomically, indented, keys in the order given, NaN refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def append_line(path: AnyPath, line: str) -> None:
    """Add a line to a small text file; in a bucket the whole object is written again."""
    target = storage_path(path)
    if isinstance(target, BucketPath):
        before = target.read_bytes() if target.is_file() else b""
        write_bytes(target, before + line.encode() + b"\n")
        return
    with disk_errors(target, doing="write"), target.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_json(path: AnyPath) -> Any:
    """Read a JSON file; raises `UserError` naming the file when it isn't JSON."""
    data = storage_path(path).read_bytes()
    refuse_lfs_pointer(path, data)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): the file is damaged") from error


def refuse_lfs_pointer(path: AnyPath, data: bytes) -> None:
    """Raises `UserError` if a file's first bytes say that Git LFS keeps its content elsewhere."""
    if data.startswith(b"version https://git-lfs.github.com/spec/") and b"\noid " in data[:200]:
        raise UserError(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder."
        )


def file_sizes(folder: StoragePath) -> dict[StoragePath, int]:
    """Every file below a folder, at any depth, with its size in bytes; in the order of names."""
    if isinstance(folder, BucketPath):
        return {**bucket.files_below(folder)}
    return {file: file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}


def remove_tree(folder: StoragePath) -> None:
    """Delete a folder with all that is in it; nothing if there is none."""
    if isinstance(folder, BucketPath):
        bucket.delete_below(folder)
    elif folder.exists():
        with disk_errors(folder, doing="delete"):
            shutil.rmtree(folder)


@contextlib.contextmanager
def on_disk(folder: StoragePath, names: tuple[str, ...]) -> Iterator[Path]:
    """A folder on this machine with a folder's files of these names, while the block lasts.

    It is `folder` itself, or a copy of those objects in a bucket that exist. The copy's path ends
    like the original's.
    """
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="sae-") as scratch:
        copy = Path(scratch, folder.bucket, *folder.key.split("/"))
        with disk_errors(copy, doing="copy files to"):
            copy.mkdir(parents=True)
            for name in names:
                if (folder / name).is_file():
                    bucket.download(folder / name, copy / name)
        yield copy


@contextlib.contextmanager
def folder_lock(path: AnyPath) -> Iterator[None]:
    """Hold `path` for this process alone; the kernel releases it when the process dies.

    In a bucket a lease takes the lock's part (`lease.held`).

    Raises:
        UserError: another process holds the folder, or it can't be written.
    """
    folder = make_folder(path)
    if isinstance(folder, BucketPath):
        # Imported here because it loads TensorStore, which takes a while.
        from activation_cache.storage import lease

        with lease.held(folder):
            yield
        return
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


def is_locked(folder: StoragePath) -> bool:
    """Does a process hold this folder (`folder_lock`)?

    It takes a shared lock for an instant. A writer that starts in that instant finds the folder in
    use, says so and can be started again. In a bucket the answer is as old as the last renewal of
    the lease.
    """
    if isinstance(folder, BucketPath):
        from activation_cache.storage import lease

        return lease.is_held(folder)
    try:
        handle = os.open(folder / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False

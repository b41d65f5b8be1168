"""Small files and folders, on a disk or in a bucket: atomic writes, messages for errors.

Arrays go through TensorStore (`arrays.py`), every other write through here. A `StoragePath` is a
`pathlib.Path` or a `BucketPath`, which has the same methods as far as buckets allow.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, overload

from activation_cache.runtime.addresses import is_url
from activation_cache.runtime.errors import UserError
from activation_cache.storage import bucket
from activation_cache.storage.bucket import BucketPath
from activation_cache.storage.guard import guard

StoragePath = Path | BucketPath
AnyPath = str | os.PathLike[str] | BucketPath

logger = logging.getLogger(__name__)

_ROOM, _ACCESS, _NAME = "free space", "fix the permission", "choose another path"
_BACK, _LATER = "bring the disk back", "wait until it is free"
_GONE = "the file system it is on has gone away"
_SILENT = "the file system's server doesn't answer"
# What a disk refuses, and what the user can do about it.
_DISK_ERRORS = {
    errno.ENOSPC: ("the disk is full", _ROOM),
    errno.EDQUOT: ("the disk quota is used up", _ROOM),
    errno.EFBIG: ("it passes the limit on the size of files (ulimit -f)", "raise the limit"),
    errno.EMFILE: ("this process has too many files open (ulimit -n)", "raise the limit"),
    errno.EACCES: ("permission is denied", _ACCESS),
    errno.EPERM: ("permission is denied", _ACCESS),
    errno.EKEYEXPIRED: ("the ticket for the file system has run out", "renew it (kinit)"),
    errno.ENOKEY: ("there is no ticket for the file system", "get one (kinit)"),
    errno.EROFS: ("the file system is read-only", _NAME),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", _NAME),
    errno.EEXIST: ("a file, or a link that leads nowhere, has that name", _NAME),
    errno.EISDIR: ("it is a folder, not a file", _NAME),
    errno.ENAMETOOLONG: ("the name is too long for the file system", _NAME),
    errno.ELOOP: ("its symbolic links go round in a circle", _NAME),
    errno.EINVAL: ("the file system can't do it (invalid argument)", _NAME),
    errno.ENOSYS: ("the file system can't do it", _NAME),
    errno.EOPNOTSUPP: ("the file system can't do it", _NAME),
    errno.ENOLCK: ("the file system has no locks", _NAME),
    errno.ENOENT: ("a folder above it is gone", _BACK),
    errno.ESTALE: (_GONE, _BACK),
    errno.ENOTCONN: (_GONE, _BACK),
    errno.ENODEV: ("the disk it is on has gone away", _BACK),
    errno.ENXIO: ("the disk it is on has gone away", _BACK),
    errno.EIO: ("the disk fails (input/output error)", "replace or mend the disk"),
    errno.ETIMEDOUT: (_SILENT, _BACK),
    errno.EHOSTDOWN: (_SILENT, _BACK),
    errno.EHOSTUNREACH: (_SILENT, _BACK),
    errno.EREMOTEIO: (_SILENT, _BACK),
    errno.EBUSY: ("another process uses it", _LATER),
    errno.ENOTEMPTY: ("another process uses what is in it", _LATER),
    errno.ETXTBSY: ("another process uses it", _LATER),
}
_IN_USE = (errno.EBUSY, errno.ENOTEMPTY)
NOT_OFFERED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def storage_path(path: AnyPath) -> StoragePath:
    """The folder or file that a text names: `gs://...` and `s3://...` are in a bucket.

    Raises:
        UserError: a URL of another kind, one without a bucket, or a NUL in the text.
    """
    if isinstance(path, BucketPath):
        return path
    text = os.fspath(path)
    if "\0" in text:
        raise UserError(f"{text!r} has the character NUL in it, which no path can have")
    return BucketPath.parse(text) if is_url(text) else Path(text)


def user_cache() -> Path | None:
    """This machine's folder for files that can be made again: `~/.cache/open-gemma-scope`.

    None for a user without a home folder: containers run with user numbers that nobody has.
    """
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except (RuntimeError, KeyError):
        return None
    return root / "open-gemma-scope"


def disk_refusal(
    number: int | None, path: object, *, doing: str, note: str = ""
) -> UserError | None:
    """The error for what a disk refused, by its `errno`; None if the user can't mend it.

    Args:
        doing: a verb for the message, as in "cannot write /data/x".
        note: a sentence more, such as how much room there is.
    """
    reason, remedy = _DISK_ERRORS.get(number or 0, (None, ""))
    if reason is None:
        return None
    return UserError(
        f"cannot {doing} {path}: {reason}.{f' {note}' if note else ''} What was finished before is "
        f"intact: {remedy} and give the same command again."
    )


@contextlib.contextmanager
def disk_errors(path: AnyPath, *, doing: str) -> Iterator[None]:
    """Turn the disk errors that a user can mend (`disk_refusal`) into a `UserError` naming `path`.

    Raises:
        UserError: for a full or failing disk, one that has gone away, a used-up quota, a missing
            permission, a file where a folder belongs, and their like. Other errors pass through.
    """
    try:
        yield
    except OSError as error:
        told = disk_refusal(error.errno, path, doing=doing)
        if told is None:
            raise
        raise told from error


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
            guard(target)
            sync(temporary)
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


def json_text(value: Any, *, indent: int | None = None) -> str:
    """The value as JSON, keys in the order given. JSON has no NaN and no infinity: null instead."""
    return json.dumps(_with_nulls(value), indent=indent, allow_nan=False)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nulls(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: AnyPath, value: Any) -> None:
    """Write `json_text` atomically, indented."""
    write_text(path, json_text(value, indent=2) + "\n")


def append_line(path: AnyPath, line: str) -> None:
    """Add a line to a small text file; in a bucket the whole object is written again."""
    target = storage_path(path)
    if isinstance(target, BucketPath):
        before = target.read_bytes() if target.is_file() else b""
        write_bytes(target, before + line.encode() + b"\n")
        return
    guard(target)
    with disk_errors(target, doing="write"), target.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk.

    Some file systems can't sync folders, and say so; what they keep they keep without.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
        logger.debug("%s can't be synced: %s", path, error)
    finally:
        os.close(handle)


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
        return dict(bucket.files_below(folder).items())
    return {file: file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}


def remove_tree(folder: StoragePath) -> None:
    """Delete a folder with all that is in it; nothing if there is none.

    A folder that is a symbolic link is emptied and stays; of the links in it only the links are
    deleted. What another process uses stays too, with a warning: NFS keeps a deleted file under
    another name until the last process has closed it.
    """
    if isinstance(folder, BucketPath):
        bucket.delete_below(folder)
        return
    guard(folder)
    left: list[OSError] = []

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    with disk_errors(folder, doing="delete"):
        for place, folders, files in os.walk(folder, topdown=False, onerror=refuse):
            left += filter(None, (_delete(Path(place, name)) for name in (*files, *folders)))
        if not folder.is_symlink():
            left += filter(None, [_delete(folder)])
    if left:
        logger.warning("%s isn't wholly deleted, as another process uses it: %s", folder, left[0])


def remove_file(path: Path) -> None:
    """Delete a file that nobody needs; one that another process uses stays, with a warning."""
    with disk_errors(path, doing="delete"):
        if error := _delete(path):
            logger.warning("%s isn't deleted, as another process uses it: %s", path, error)


def _delete(path: Path) -> OSError | None:
    """Delete a file, a link or an empty folder; returns the error if another process uses it."""
    try:
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno not in _IN_USE:
            raise
        return error
    return None


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

"""Paths in object storage, gs://bucket/key and s3://bucket/key, and what is done with objects.

A bucket has no folders, no renaming and no appending: an object appears whole under its name, or
not at all, and a "folder" exists as long as an object's name begins with it. `bucket_client` makes
the requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from activation_cache.runtime.addresses import Address, parse_address
from activation_cache.storage.bucket_client import check_bucket, file_system, plain, request
from activation_cache.storage.guard import guard


@dataclass(frozen=True)
class BucketStat:
    """Size in bytes and time of last change of an object, named as in `os.stat`."""

    st_size: int
    st_mtime: float


@dataclass(frozen=True, order=True)
class BucketPath(Address):
    """A path in a bucket, with those of `pathlib.Path`'s methods that make sense there.

    It is not an `os.PathLike`, so that code for files on a disk refuses it rather than make a
    folder called `gs:`.
    """

    @classmethod
    def parse(cls, text: str) -> BucketPath:
        """Read `gs://bucket/some/key`; raises `UserError` for anything else."""
        found = parse_address(text)
        return cls(found.scheme, found.bucket, found.key)

    def __truediv__(self, other: str | PurePath) -> BucketPath:
        return BucketPath.parse(f"{self}/{other}")

    def joinpath(self, *others: str) -> BucketPath:
        """The path of these names, one below the other."""
        return self / "/".join(others)

    def with_name(self, name: str) -> BucketPath:
        """The path of this name in the same folder."""
        return self.parent / name

    def absolute(self) -> BucketPath:
        """Itself: no path in a bucket is relative."""
        return self

    def as_posix(self) -> str:
        """Its address, scheme and bucket included."""
        return str(self)

    @property
    def name(self) -> str:
        """The key's last part; the bucket's name for the bucket itself."""
        return PurePosixPath(self.key).name or self.bucket

    @property
    def parts(self) -> tuple[str, ...]:
        """Scheme and bucket together, then each part of the key."""
        return (f"{self.scheme}://{self.bucket}", *filter(None, self.key.split("/")))

    @property
    def stem(self) -> str:
        """The name without its last suffix."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """The name's last suffix with its dot; empty if it has none."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> BucketPath:
        """The folder it is in; that of a bucket is the bucket itself."""
        return BucketPath(self.scheme, self.bucket, self.key.rpartition("/")[0])

    def relative_to(self, other: BucketPath) -> PurePosixPath:
        """This path seen from a folder above it; raises `ValueError` if it isn't below."""
        return PurePosixPath(str(self)).relative_to(str(other))

    def exists(self) -> bool:
        """Is there an object of this name, or any below it?"""
        return _kind(self) is not None

    def is_file(self) -> bool:
        """Is there an object of this very name?"""
        return _kind(self) == "file"

    def is_dir(self) -> bool:
        """Is there an object below it? Always true of a bucket itself."""
        return _kind(self) == "directory"

    def stat(self) -> BucketStat:
        """Size and time of an object; raises `FileNotFoundError` if there is none."""
        info = _info(self)
        if info is None or info["type"] != "file":
            raise FileNotFoundError(str(self))
        changed = info.get("mtime") or info.get("LastModified")
        assert changed is not None, info
        return BucketStat(int(info["size"]), changed.timestamp())

    def read_bytes(self) -> bytes:
        """The whole object; raises `FileNotFoundError` if there is none."""
        return request(self, lambda: file_system(self.scheme).cat_file(plain(self)), doing="read")

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete an object; if there is none, raise `FileNotFoundError` unless `missing_ok`."""
        try:
            request(self, lambda: file_system(self.scheme).rm_file(plain(self)), doing="delete")
        except FileNotFoundError:
            if not missing_ok:
                raise

    def iterdir(self) -> list[BucketPath]:
        """The objects and folders directly below; empty if there is nothing."""

        def listed() -> list[str]:
            return file_system(self.scheme).ls(plain(self), detail=False, refresh=True)

        try:
            names = request(self, listed, doing="list")
        except FileNotFoundError:
            return []
        return sorted(_from_plain(self, name) for name in names if name.strip("/") != plain(self))


def files_below(path: BucketPath) -> dict[BucketPath, int]:
    """Every object below a folder, at any depth, with its size in bytes; in the order of names."""

    def found() -> dict[str, Any]:
        return file_system(path.scheme).find(plain(path), detail=True)

    try:
        entries = request(path, found, doing="list")
    except FileNotFoundError:
        return {}
    sizes = {_from_plain(path, name): int(entry["size"]) for name, entry in entries.items()}
    return {file: sizes[file] for file in sorted(sizes) if file != path}


def write_object(path: BucketPath, data: bytes) -> None:
    """Write a whole object; a reader sees the old bytes or the new, never a part."""
    guard(path)
    request(path, lambda: file_system(path.scheme).pipe_file(plain(path), data), doing="write")


def upload(path: BucketPath, file: Path) -> None:
    """Write an object from a file on a disk; a reader sees it when all of it is uploaded."""
    guard(path)
    request(path, lambda: file_system(path.scheme).put_file(str(file), plain(path)), doing="write")


def download(path: BucketPath, file: Path) -> None:
    """Copy an object to a file on a disk; raises `FileNotFoundError` if there is none."""
    request(path, lambda: file_system(path.scheme).get_file(plain(path), str(file)), doing="read")


def delete_below(path: BucketPath) -> None:
    """Delete every object below a folder; nothing if there is none."""
    guard(path)
    names = [plain(file) for file in files_below(path)]
    if names:
        request(path, lambda: file_system(path.scheme).rm(names), doing="delete")


def _from_plain(like: BucketPath, name: str) -> BucketPath:
    bucket, _, key = name.partition("/")
    return BucketPath(like.scheme, bucket, key.strip("/"))


def _info(path: BucketPath) -> dict[str, Any] | None:
    def asked() -> dict[str, Any]:
        options = {"refresh": True} if path.scheme == "s3" else {}
        return file_system(path.scheme).info(plain(path), **options)

    try:
        return request(path, asked, doing="look at")
    except FileNotFoundError:
        return None


def _kind(path: BucketPath) -> str | None:
    if not path.key:
        check_bucket(path)
        return "directory"
    info = _info(path)
    return None if info is None else info["type"]

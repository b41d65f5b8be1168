"""Object storage: paths such as gs://bucket/key and s3://bucket/key, and all that is done there.

The one file that speaks gcsfs and s3fs, and that says where TensorStore finds a bucket. Both take
their credentials and endpoints from the environment, in the libraries' own variables
(docs/storage.md). A bucket has no folders, no renaming and no appending: an object appears whole
under its name, or not at all, and a "folder" is there as long as something lies in it.

What passes (a server that answers 503, a connection that breaks) is tried again for
`SAE_STORAGE_SECONDS`, by us and by TensorStore alike; then, and at once for what doesn't pass
(wrong credentials, no such bucket), a `UserError` says so.
"""

from __future__ import annotations

import functools
import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, TypeVar

from activation_cache.runtime.errors import UserError
from activation_cache.storage.bucket_errors import (
    denied,
    no_answer,
    no_bucket,
    passes,
    patience,
    refuses_credentials,
    words_of,
)

logger = logging.getLogger(__name__)

SCHEMES = ("gs", "s3")
_CONNECT_SECONDS, _READ_SECONDS = 20, 60

Result = TypeVar("Result")


@dataclass(frozen=True)
class BucketStat:
    """Size and time of last change of an object, under the names `os.stat` gives them."""

    st_size: int
    st_mtime: float


@dataclass(frozen=True, order=True)
class BucketPath:
    """A place in a bucket, with those of `pathlib.Path`'s methods that make sense there.

    It is no `os.PathLike`: whatever expects a file on a disk refuses it rather than make a folder
    called `gs:`.

    Attributes:
        key: without slashes at its ends; empty for the whole bucket.
    """

    scheme: str
    bucket: str
    key: str

    @classmethod
    def parse(cls, text: str) -> BucketPath:
        """Read `gs://bucket/some/key`; raises `UserError` for anything else."""
        scheme, separator, rest = text.partition("://")
        bucket, _, key = rest.partition("/")
        if not separator or scheme not in SCHEMES or not bucket:
            raise UserError(
                f"{text} is no place to write to: use a folder, gs://bucket/path or "
                "s3://bucket/path"
            )
        parts = [part for part in key.split("/") if part]
        if any(part in (".", "..") for part in parts):
            raise UserError(
                f"{text}: '.' and '..' have no meaning in a bucket: write the whole key"
            )
        return cls(scheme, bucket, "/".join(parts))

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, other: str | PurePath) -> BucketPath:
        return BucketPath.parse(f"{self}/{other}")

    def joinpath(self, *others: str) -> BucketPath:
        """The place at these names, one below the other."""
        return self / "/".join(others)

    def with_name(self, name: str) -> BucketPath:
        """The place of this name beside it."""
        return self.parent / name

    def absolute(self) -> BucketPath:
        """Itself: no place in a bucket is relative."""
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
        """Scheme and bucket as one, then each part of the key."""
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
        """The folder it is in; the bucket's is the bucket itself."""
        return BucketPath(self.scheme, self.bucket, self.key.rpartition("/")[0])

    def relative_to(self, other: BucketPath) -> PurePosixPath:
        """The way from a folder to here; raises `ValueError` if this isn't below it."""
        return PurePosixPath(str(self)).relative_to(str(other))

    def exists(self) -> bool:
        """Is there an object of this name, or any below it?"""
        return _kind(self) is not None

    def is_file(self) -> bool:
        """Is there an object of this very name?"""
        return _kind(self) == "file"

    def is_dir(self) -> bool:
        """Does anything lie below it? Of the bucket itself always so."""
        return _kind(self) == "directory"

    def stat(self) -> BucketStat:
        """Of an object; raises `FileNotFoundError` if there is none."""
        info = _info(self)
        if info is None or info["type"] != "file":
            raise FileNotFoundError(str(self))
        changed = info.get("mtime") or info.get("LastModified")
        assert changed is not None, info
        return BucketStat(int(info["size"]), changed.timestamp())

    def read_bytes(self) -> bytes:
        """The whole object; raises `FileNotFoundError` if there is none."""
        return request(self, lambda: _file_system(self.scheme).cat_file(_plain(self)), doing="read")

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete an object."""
        try:
            request(self, lambda: _file_system(self.scheme).rm_file(_plain(self)), doing="delete")
        except FileNotFoundError:
            if not missing_ok:
                raise

    def iterdir(self) -> list[BucketPath]:
        """What lies directly below, objects and folders."""

        def listed() -> list[str]:
            return _file_system(self.scheme).ls(_plain(self), detail=False, refresh=True)

        try:
            names = request(self, listed, doing="list")
        except FileNotFoundError:
            return []
        return sorted(_from_plain(self, name) for name in names if name.strip("/") != _plain(self))


def files_below(path: BucketPath) -> dict[BucketPath, int]:
    """Every object below a folder, at any depth, with its size in bytes."""

    def found() -> dict[str, Any]:
        return _file_system(path.scheme).find(_plain(path), detail=True)

    try:
        entries = request(path, found, doing="list")
    except FileNotFoundError:
        return {}
    sizes = {_from_plain(path, name): int(entry["size"]) for name, entry in entries.items()}
    return {file: sizes[file] for file in sorted(sizes) if file != path}


def write_object(path: BucketPath, data: bytes) -> None:
    """Write a whole object: a reader sees the old bytes or the new, never a part."""
    guard(path)
    request(path, lambda: _file_system(path.scheme).pipe_file(_plain(path), data), doing="write")


def upload(path: BucketPath, file: Path) -> None:
    """Write an object from a file on disk; it appears when all of it is there."""
    guard(path)
    request(
        path, lambda: _file_system(path.scheme).put_file(str(file), _plain(path)), doing="write"
    )


def download(path: BucketPath, file: Path) -> None:
    """Copy an object to a file on disk; raises `FileNotFoundError` if there is none."""
    request(path, lambda: _file_system(path.scheme).get_file(_plain(path), str(file)), doing="read")


def delete_below(path: BucketPath) -> None:
    """Delete every object below a folder; nothing if there is none."""
    guard(path)
    names = [_plain(file) for file in files_below(path)]
    if names:
        request(path, lambda: _file_system(path.scheme).rm(names), doing="delete")


_guards: dict[BucketPath, Callable[[], None]] = {}


def set_guard(folder: BucketPath, check: Callable[[], None] | None) -> None:
    """Have `check` called before each write in a folder: it raises once another has taken it."""
    if check is None:
        _guards.pop(folder, None)
    else:
        _guards[folder] = check


def guard(path: BucketPath) -> None:
    """Raises `UserError` when the folder that `path` is in was taken from this process."""
    for folder, check in list(_guards.items()):
        if path == folder or str(path).startswith(f"{folder}/"):
            check()


def key_value_spec(path: BucketPath) -> dict[str, Any]:
    """TensorStore's description of a folder in a bucket, retries included."""
    _check_bucket(path)
    spec: dict[str, Any] = {
        "driver": {"gs": "gcs", "s3": "s3"}[path.scheme],
        "bucket": path.bucket,
        "path": f"{path.key}/" if path.key else "",
    }
    # Pauses of p/64, p/32, ... p/4, p/4: together about the patience p.
    unit = patience() / 64
    retries = {
        "max_retries": 7,
        "initial_delay": f"{unit * 1e3:.0f}ms",
        "max_delay": f"{unit * 16e3:.0f}ms",
    }
    if path.scheme == "gs":
        _tell_tensorstore_of_google()
        return {**spec, "gcs_request_retries": retries}
    environment = os.environ
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    if endpoint:
        # Another server than Amazon's can't be asked for the bucket's region.
        spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    elif region:
        spec |= {"aws_region": region}
    if environment.get("AWS_ACCESS_KEY_ID"):
        spec |= {"aws_credentials": {"type": "environment"}}
    return {**spec, "s3_request_retries": retries}


def _tell_tensorstore_of_google() -> None:
    """An emulator has one variable for all of Google's libraries, and TensorStore its own."""
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    if emulator:
        address = emulator if "://" in emulator else f"http://{emulator}"
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", address)
        os.environ.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "emulator")


def _plain(path: BucketPath) -> str:
    return f"{path.bucket}/{path.key}".rstrip("/")


def _from_plain(like: BucketPath, name: str) -> BucketPath:
    bucket, _, key = name.partition("/")
    return BucketPath(like.scheme, bucket, key.strip("/"))


def _info(path: BucketPath) -> dict[str, Any] | None:
    def asked() -> dict[str, Any]:
        options = {"refresh": True} if path.scheme == "s3" else {}
        return _file_system(path.scheme).info(_plain(path), **options)

    try:
        return request(path, asked, doing="look at")
    except FileNotFoundError:
        return None


def _kind(path: BucketPath) -> str | None:
    if not path.key:
        _check_bucket(path)
        return "directory"
    info = _info(path)
    return None if info is None else info["type"]


@functools.cache
def _file_system(scheme: str) -> Any:
    """gcsfs or s3fs, nothing remembered of listings, and s3fs trying nothing twice: we do.

    gcsfs can't be kept from it: each of its calls takes half a minute to give up.
    """
    if scheme == "gs":
        # Else every new bucket is asked through gRPC whether it has real folders.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        import gcsfs

        # It logs what it gives up with a traceback; we say it in words.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
        token = "anon" if os.environ.get("STORAGE_EMULATOR_HOST") else None
        return gcsfs.GCSFileSystem(token=token, use_listings_cache=False, skip_instance_cache=True)
    import s3fs

    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    files = s3fs.S3FileSystem(
        use_listings_cache=False,
        skip_instance_cache=True,
        client_kwargs={"region_name": region} if region else {},
        config_kwargs={
            "retries": {"max_attempts": 0},
            "connect_timeout": _CONNECT_SECONDS,
            "read_timeout": _READ_SECONDS,
        },
    )
    files.retries = 1
    return files


_known_buckets: set[tuple[str, str]] = set()


def _check_bucket(path: BucketPath) -> None:
    """Once for each bucket: is it there? Otherwise a missing one looks like an empty one.

    Raises:
        UserError: it isn't, or can't be listed.
    """
    if (path.scheme, path.bucket) in _known_buckets:
        return
    files = _file_system(path.scheme)

    def listed() -> None:
        if path.scheme == "gs":
            files.call("GET", "b/{}/o", path.bucket, maxResults=1, json_out=True)
        else:
            files.call_s3("list_objects_v2", Bucket=path.bucket, MaxKeys=1)

    try:
        _patiently(path, listed, doing="look at")
    except FileNotFoundError as error:
        raise no_bucket(str(path), doing="use") from error
    _known_buckets.add((path.scheme, path.bucket))


def request(path: BucketPath, call: Callable[[], Result], *, doing: str) -> Result:
    """Make a request, again while it fails in passing.

    Raises:
        FileNotFoundError: there is no such object.
        UserError: no such bucket, no right to it, or no answer in all the time there is.
    """
    _check_bucket(path)
    return _patiently(path, call, doing=doing)


def _patiently(path: BucketPath, call: Callable[[], Result], *, doing: str) -> Result:
    deadline = time.monotonic() + patience()
    pause = min(0.25, patience() / 64)
    while True:
        try:
            return call()
        except FileNotFoundError:
            raise
        except Exception as error:
            reason = words_of(error)
            if refuses_credentials(error):
                raise denied(str(path), doing=doing, reason=reason) from error
            if not passes(error):
                raise
            if time.monotonic() + pause > deadline:
                raise no_answer(str(path), doing=doing, reason=reason) from error
            if pause > 2:
                logger.warning("cannot %s %s yet (%s): trying again", doing, path, reason)
        time.sleep(pause * random.uniform(0.75, 1.25))  # not all processes at the same instant
        pause = min(2 * pause, patience() / 4)

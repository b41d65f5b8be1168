"""Arrays on a disk or in a bucket: how rows are cut into files, and TensorStore to write and read.

Every array is zarr3 with the sharding codec: a file (shard) holds many chunks, each followed by
its crc32c, and an index with a crc32c of its own. A whole shard is written in one transaction, so
it appears under its name complete or not at all, and its bytes depend on its values alone.
docs/store.md is the specification. Legend: N rows, D width.
"""

from __future__ import annotations

import contextlib
import errno
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from activation_cache.runtime.errors import UserError
from activation_cache.storage.bucket import BucketPath
from activation_cache.storage.bucket_client import key_value_spec
from activation_cache.storage.bucket_errors import array_error
from activation_cache.storage.files import (
    StoragePath,
    disk_errors,
    disk_refusal,
    remove_file,
    sync,
)
from activation_cache.storage.guard import guard
from activation_cache.storage.row_range import Segment

SHARD_BYTES = 256 * 2**20  # no shard is larger, unless its bucket is few and wide blocks


def bucket_rows(*, shuffle_rows: int, block_rows: int) -> int:
    """Rows in a shuffle bucket: `shuffle_rows` rounded up so that it cuts into equal shards.

    The number of blocks is rounded up to six significant bits (at most 3 % more), so that it can
    be halved until a shard is small enough. It depends on nothing else, so that adding a site to a
    store doesn't move the rows of the others.
    """
    blocks = -(-shuffle_rows // block_rows)
    unit = 2 ** max(0, blocks.bit_length() - 6)
    return -(-blocks // unit) * unit * block_rows


def shard_rows(*, bucket: int, block_rows: int, row_bytes: int) -> int:
    """Rows in a shard: the bucket, halved into whole blocks until it is at most `SHARD_BYTES`."""
    rows = bucket
    while rows * row_bytes > SHARD_BYTES and rows % (2 * block_rows) == 0:
        rows //= 2
    return rows


@dataclass(frozen=True)
class ArrayLayout:
    """One array: its path, its shape, and how rows are cut into chunks and shards.

    Chunks and shards span whole rows: `shape[1:]` is never cut.

    Attributes:
        packs: how many rows of a tap one row of the array holds, more than 1 where it is a block.
    """

    path: StoragePath
    shape: tuple[int, ...]
    dtype: str
    chunk_rows: int
    shard_rows: int
    packs: int = 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * ts.dtype(self.dtype).numpy_dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        """Bytes of all shards once every row is written; `zarr.json`, under 2 kB, is not counted.

        Each chunk is whole (the last one is filled up) and followed by its crc32c; each shard ends
        in an index of 16 bytes for each chunk it has room for, and the index's crc32c.
        """
        chunks, shards = (-(-self.shape[0] // n) for n in (self.chunk_rows, self.shard_rows))
        index = 16 * (self.shard_rows // self.chunk_rows) + 4
        return chunks * (self.chunk_rows * self.row_bytes + 4) + shards * index

    def shard_file(self, row: int) -> StoragePath:
        """The file that holds `row`."""
        inner = ["0"] * (len(self.shape) - 1)
        return self.path.joinpath("c", str(row // self.shard_rows), *inner)

    def _metadata(self) -> dict[str, Any]:
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        checksum = {"name": "crc32c"}
        sharding = {
            "chunk_shape": [self.chunk_rows, *self.shape[1:]],
            "codecs": [little, checksum],
            "index_codecs": [little, checksum],
        }
        return {
            "shape": list(self.shape),
            "data_type": self.dtype,
            "fill_value": 0,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [self.shard_rows, *self.shape[1:]]},
            },
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        }

    def _key_value_spec(self) -> dict[str, Any]:
        if isinstance(self.path, BucketPath):
            return key_value_spec(self.path)
        # No shard has two writers, so TensorStore needs no locks, which some file systems lack. It
        # doesn't sync either (`_sync` does), because some can't sync a folder.
        locking = {"mode": "none"}
        # It refuses a path with `..` in it, which may lead from a link to another folder's parent.
        path = f"{self.path.resolve() if '..' in self.path.parts else self.path}/"
        return {"driver": "file", "path": path, "file_io_locking": locking, "file_io_sync": False}

    def open(
        self, *, create: bool = False, assume: bool = False, context: ts.Context | None = None
    ) -> ts.TensorStore:
        """Open the array, creating its metadata if asked to; `context` sets caching and threads.

        A chunk that isn't there is an error and not zeros, and chunks of zeros are written.

        Args:
            assume: neither read nor write its metadata, and take them to be this layout's.

        Raises:
            UserError: missing, damaged, or made with another shape or dtype.
        """
        spec = {
            "driver": "zarr3",
            "kvstore": self._key_value_spec(),
            "metadata": self._metadata(),
            "fill_missing_data_reads": False,
            "store_data_equal_to_fill_value": True,
        }
        with array_errors(self.path, doing="create" if create else "open"):
            array = ts.open(
                spec, open=True, create=create, assume_metadata=assume, context=context
            ).result()
        if create:
            _sync(self.path / "zarr.json")
        return array


def write_shards(
    array: ts.TensorStore, layout: ArrayLayout, *, start: int, rows: np.ndarray
) -> None:
    """Write `rows` at `start`, one transaction per shard: each becomes visible whole.

    `start` must be the first row of a shard. Returns when the shards are durable. Takes about
    twice the memory of one shard beside `rows`.

    Raises:
        UserError: the disk or the bucket refuses, or another process has taken the folder.
    """
    assert start % layout.shard_rows == 0, (start, layout.shard_rows)
    guard(layout.path)
    with array_errors(layout.path, doing="write"):
        for first in range(0, len(rows), layout.shard_rows):
            part = rows[first : first + layout.shard_rows]
            transaction = ts.Transaction()
            begin = start + first
            file = layout.shard_file(begin)
            if isinstance(file, Path):  # TensorStore would read the array's short last one first
                remove_file(file)
            array.with_transaction(transaction)[begin : begin + len(part)].write(part).result()
            transaction.commit_sync()
            _sync(file)


def _sync(file: StoragePath) -> None:
    """Return when a file, and its name in its folder, are on the disk."""
    if isinstance(file, Path):
        with disk_errors(file, doing="write"):
            sync(file)
            sync(file.parent)


def start_read(array: ts.TensorStore, segments: list[Segment]) -> ts.Future:
    """Begin reading segments, concurrently, into one new array [sum of their counts, ...]."""
    views = [array[s.start : s.start + s.count].translate_to[0] for s in segments]
    return ts.concat(views, axis=0).read()


def read_rows(array: ts.TensorStore, layout: ArrayLayout, segments: list[Segment]) -> np.ndarray:
    """Read segments; the result has them one after the other.

    Raises:
        UserError: a chunk is missing or fails its checksum; names the file.
    """
    with array_errors(layout.path, doing="read"):
        return start_read(array, segments).result()


def remove_stray_files(folder: StoragePath) -> None:
    """Delete what a killed writer leaves beside finished files: locks and temporary files.

    In a bucket it leaves none: an upload that was cut off makes no object.
    """
    if isinstance(folder, BucketPath):
        return
    for pattern in ("[!.]*.__lock", ".*.tmp"):  # a lease's file begins with a dot
        for stray in folder.rglob(pattern):
            remove_file(stray)


# FAILED_PRECONDITION: another shape or dtype; OUT_OF_RANGE: a file shorter than its index says.
_DAMAGE = ("DATA_LOSS", "NOT_FOUND", "FAILED_PRECONDITION", "OUT_OF_RANGE")
_ERRNO_BY_STATUS = {"RESOURCE_EXHAUSTED": errno.ENOSPC, "PERMISSION_DENIED": errno.EACCES}


@contextlib.contextmanager
def array_errors(path: StoragePath, *, doing: str) -> Iterator[None]:
    """Turn TensorStore's errors, whose text begins with a status, into a `UserError`.

    Raises:
        UserError: the disk or the bucket refused, or a shard is damaged; names the file. Other
            errors are bugs and pass through.
    """
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        if isinstance(error, UserError):
            raise
        text = str(error)
        status = text.split(":", 1)[0]
        named = re.search(r'(?:local file|at|key) "([^"]+)"', text)
        file = named.group(1) if named else str(path)
        reading = doing in ("read", "open", "create")
        if status in _DAMAGE and reading:
            found = text.split(" [", 1)[0]
            raise damaged_shard(file, found, missing=status == "NOT_FOUND") from error
        if isinstance(path, BucketPath):
            raise array_error(str(path), text, doing=doing) or error from error
        number = _os_error_code(text) or _ERRNO_BY_STATUS.get(status)
        told = disk_refusal(number, file, doing=doing)
        if told is None:
            raise
        raise told from error


def refused_number(error: BaseException | None) -> int | None:
    """The `errno` of a disk's refusal that an error of Orbax came from; None if none did.

    Orbax passes TensorStore's errors on, alone, as causes, or in a group.
    """
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            return error.errno
        if number := _os_error_code(str(error)):
            return number
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        else:
            error = error.__cause__ or error.__context__
    return None


def _os_error_code(text: str) -> int | None:
    code = re.search(r"os_error_code='(\d+)'", text)
    return int(code.group(1)) if code else None


def damaged_shard(file: StoragePath | str, found: str, *, missing: bool = False) -> UserError:
    """The error for a shard that isn't there or isn't as it was written."""
    reason = "is missing or incomplete" if missing else "is damaged"
    return UserError(
        f"{file} {reason}: every chunk must be there and match its checksum and its description "
        f"({found}). Restore the file from a copy, or delete the folder and make it again."
    )

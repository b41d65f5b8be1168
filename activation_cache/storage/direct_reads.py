"""Blocks of a store on a disk of this machine, read straight into a batch.

TensorStore reads into buffers of its own and copies from there. Here the kernel copies each block
to its position in the batch, and the checksum is computed there. Only so does the reader keep up
with a disk on two cores (docs/performance.md). Buckets, and machines without a compiled crc32c, are
read with TensorStore.

A shard, by zarr3's sharding codec (docs/store.md): chunks, each its rows in little-endian and their
crc32c; then for each chunk its offset and its size as two uint64, and the crc32c of these.

Legend: B rows of a batch, D width.
"""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import google_crc32c
import numpy as np
import tensorstore as ts
from jaxtyping import Float

from activation_cache.storage.arrays import ArrayLayout, damaged_shard
from activation_cache.storage.files import disk_errors
from activation_cache.storage.row_range import Segment

_THREADS = 16  # enough to hide the latency of a network disk
_CHECKSUM_BYTES = 4
_PIECE_BYTES = 2**18  # its checksum takes 30 microseconds, and it stays in the processor's cache
_ENTRY_BYTES = 16  # offset and size
_ABSENT = np.iinfo(np.uint64).max


def reads_blocks(layout: ArrayLayout) -> bool:
    """Can `BlockReads` read this array: files of this machine, and fast checksums?"""
    return (
        isinstance(layout.path, Path)
        and hasattr(os, "posix_fadvise")
        and sys.byteorder == "little"
        and google_crc32c.implementation == "c"
    )


@dataclass(frozen=True)
class PendingRows:
    """Rows that are being read; offers what the reader needs of a TensorStore future."""

    rows_BD: Float[np.ndarray, "B D"]
    reads: list[Future[None]]

    def done(self) -> bool:
        """Have all reads ended?"""
        return all(read.done() for read in self.reads)

    def cancel(self) -> None:
        """Drop the reads that haven't begun."""
        for read in self.reads:
            read.cancel()

    def result(self) -> Float[np.ndarray, "B D"]:
        """The rows, once all are read.

        Raises:
            UserError: a shard is missing or damaged; names the file.
        """
        for read in self.reads:
            read.result()
        return self.rows_BD


@runtime_checkable
class Packed(Protocol):
    """How blocks of rows are packed in an array each of whose rows, and chunks, is a block."""

    @property
    def block_rows(self) -> int:
        """Rows of a block."""
        ...

    @property
    def width(self) -> int:
        """Numbers of a row."""
        ...

    def unpack(self, block: np.ndarray, rows_ND: np.ndarray, *, first: int) -> None:
        """Fill `rows_ND`, float32, with the rows of a block from its row `first` on."""
        ...


class BlockReads:
    """Reads of one array, by threads of its own that end with `close`.

    Of an array that is `packed` the segments are of the rows in its blocks, which the same threads
    unpack.
    """

    def __init__(self, layout: ArrayLayout, *, packed: Packed | None = None) -> None:
        assert reads_blocks(layout), layout.path
        self._layout, self._packed = layout, packed
        self._dtype = ts.dtype(layout.dtype).numpy_dtype
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="block")
        self._indexes: dict[Path, np.ndarray] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """End the threads; reads that haven't begun are dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def start(self, segments: list[Segment]) -> PendingRows:
        """Begin reading segments, none of which crosses a chunk, into one new array."""
        count = sum(segment.count for segment in segments)
        rows_BD = np.empty((count, *self._layout.shape[1:]), self._dtype)
        if self._packed is not None:
            rows_BD = np.empty((count, self._packed.width), np.float32)
        read = self._read if self._packed is None else self._read_packed
        reads, first = [], 0
        for segment in segments:
            part = rows_BD[first : first + segment.count]
            reads.append(self._pool.submit(read, segment, part))
            first += segment.count
        return PendingRows(rows_BD, reads)

    def _read(self, segment: Segment, part: np.ndarray) -> None:
        layout = self._layout
        chunk, skipped = divmod(segment.start, layout.chunk_rows)
        assert skipped + segment.count <= layout.chunk_rows, segment
        shard = layout.shard_file(segment.start)
        assert isinstance(shard, Path)
        whole = segment.count == layout.chunk_rows
        shape = (layout.chunk_rows, *layout.shape[1:])
        chunk_rows = part if whole else np.empty(shape, self._dtype)
        with disk_errors(shard, doing="read"):
            self._read_chunk(shard, chunk, chunk_rows.view(np.uint8).reshape(-1))
        if not whole:
            part[:] = chunk_rows[skipped : skipped + segment.count]

    def _read_packed(self, segment: Segment, part: np.ndarray) -> None:
        assert self._packed is not None
        number, first = divmod(segment.start, self._packed.block_rows)
        shard = self._layout.shard_file(number)
        assert isinstance(shard, Path)
        block = np.empty(self._layout.row_bytes, np.uint8)
        with disk_errors(shard, doing="read"):
            self._read_chunk(shard, number, block)
        self._packed.unpack(block, part, first=first)

    def _read_chunk(self, shard: Path, chunk: int, target: np.ndarray) -> None:
        """Read one chunk's bytes into `target` and check their checksum."""
        try:
            file = os.open(shard, os.O_RDONLY)
        except FileNotFoundError as error:
            raise damaged_shard(shard, "it isn't there", missing=True) from error
        try:
            index = self._index(file, shard)
            number = chunk % (self._layout.shard_rows // self._layout.chunk_rows)
            offset, size = (int(value) for value in index[number])
            if offset == _ABSENT or size != target.nbytes + _CHECKSUM_BYTES:
                raise damaged_shard(shard, f"chunk {number} has {size} bytes")
            taken = _read_summed(file, target, offset, shard=shard)
            checksum = bytearray(_CHECKSUM_BYTES)
            _read_fully(file, [memoryview(checksum)], offset + target.nbytes, shard=shard)
        finally:
            os.close(file)
        if taken != int.from_bytes(checksum, "little"):
            raise damaged_shard(shard, f"the checksum of chunk {number} doesn't match its rows")

    def _index(self, file: int, shard: Path) -> np.ndarray:
        """Offset and size of each chunk, [chunks, 2], from the end of the shard; read once."""
        with self._lock:
            if shard in self._indexes:
                return self._indexes[shard]
        entries = self._layout.shard_rows // self._layout.chunk_rows
        end = bytearray(entries * _ENTRY_BYTES + _CHECKSUM_BYTES)
        start = os.fstat(file).st_size - len(end)
        if start < 0:
            raise damaged_shard(shard, "it is shorter than its index")
        _read_fully(file, [memoryview(end)], start, shard=shard)
        table, checksum = bytes(end[:-_CHECKSUM_BYTES]), end[-_CHECKSUM_BYTES:]
        if google_crc32c.value(table) != int.from_bytes(checksum, "little"):
            raise damaged_shard(shard, "the checksum of its index doesn't match")
        index = np.frombuffer(table, np.uint64).reshape(entries, 2)
        with self._lock:
            self._indexes[shard] = index
        return index


def _read_summed(file: int, target: np.ndarray, offset: int, *, shard: Path) -> int:
    """Fill `target` from an offset on; returns the crc32c of what was read.

    It reads piece by piece, because google_crc32c holds the interpreter's lock, for which the
    training loop waits. The kernel is told of the whole range first: small reads one after the
    other would leave a disk half idle.
    """
    os.posix_fadvise(file, offset, target.nbytes + _CHECKSUM_BYTES, os.POSIX_FADV_WILLNEED)
    checksum = 0
    for first in range(0, target.nbytes, _PIECE_BYTES):
        piece = target[first : first + _PIECE_BYTES]
        _read_fully(file, [piece.data], offset + first, shard=shard)
        checksum = google_crc32c.extend(checksum, piece)
    return int(checksum)


def _read_fully(file: int, views: list[memoryview], offset: int, *, shard: Path) -> None:
    """Fill the views, one after the other, from an offset on."""
    wanted = sum(len(view) for view in views)
    while wanted:
        count = os.preadv(file, views, offset)
        if count == 0:
            raise damaged_shard(shard, f"it ends {wanted} bytes early")
        wanted, offset = wanted - count, offset + count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]

"""`batch(step)`: rows of one tap in training order, read ahead while the caller computes.

A batch is a pure function of (store, tap, batch size, seed, step). There is no iterator state to
save, and any step can be read at any time. Reading ahead changes when bytes are read, never which.

One thread computes which blocks the batches ahead need. Those are read concurrently in other
threads: those of `direct_reads`, or TensorStore's for a store in a bucket. `batch` takes the oldest
batch from a queue and appends the next one to it. Legend: B batch, D width.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import tensorstore as ts
from jaxtyping import Float

from activation_cache.gemma.taps import Tap
from activation_cache.runtime.amounts import bytes_text
from activation_cache.runtime.closing import Closing
from activation_cache.storage.arrays import array_errors, start_read
from activation_cache.storage.direct_reads import BlockReads, PendingRows, reads_blocks
from activation_cache.storage.row_range import Segment
from activation_cache.store.store import Store

logger = logging.getLogger(__name__)

READ_AHEAD_BYTES = 512 * 2**20  # of the batches ahead: a third of a second at 1.5 GB/s
FEWEST_AHEAD, MOST_AHEAD = 4, 16

_CONCURRENT_FILE_READS = 32  # enough to hide the latency of a network disk
_UNPACKERS = 2  # batches of packed rows that are read from a bucket at once


def batches_ahead(batch_bytes: int) -> int:
    """How many batches to read ahead: as many as fit `READ_AHEAD_BYTES`, from 4 to 16.

    So many that training doesn't wait for a disk that stalls for a few steps.
    """
    return max(FEWEST_AHEAD, min(MOST_AHEAD, READ_AHEAD_BYTES // batch_bytes))


@dataclass(frozen=True)
class _Ahead:
    """A batch that is being read ahead: planned in one thread, then read in others."""

    begun: Future[ts.Future | PendingRows | Future[np.ndarray]]

    def done(self) -> bool:
        """Has its reading ended, well or in an error?"""
        return self.begun.done() and (
            self.begun.exception() is not None or self.begun.result().done()
        )

    def cancel(self) -> None:
        """Drop what hasn't begun."""
        if not self.begun.cancel() and self.begun.exception() is None:
            self.begun.result().cancel()

    def result(self) -> Float[np.ndarray, "B D"]:
        """Its rows, once all are read."""
        return self.begun.result().result()


class ActivationReader(Closing):
    """Batches of one tap of a store, read ahead from `start_step`.

    Its memory (`memory_bytes`, which the log gives) is that of `read_ahead` batches and the last
    one returned, twice as TensorStore has buffers too, and of a small cache if blocks straddle
    batches. Each batch is a new array that the reader never touches again, so that a device may
    still read from it.
    """

    def __init__(
        self,
        store: Store,
        tap: Tap,
        *,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        read_ahead: int | None = None,
        rows: slice | None = None,
        may_read: Callable[[int], bool] = lambda step: True,
    ) -> None:
        """Open the array and start reading.

        Args:
            read_ahead: number of batches; None is that of `batches_ahead`.
            rows: the part of each batch that this process reads; None is the whole.
            may_read: are a step's rows on the disk? Those of a rolling store come and go
                (`rolling.RollingWindow`), and `batch` is called once they are there.

        Raises:
            UserError: the store doesn't have the tap, or the array is missing or damaged.
        """
        assert batch_size >= 1, batch_size
        assert read_ahead is None or read_ahead >= 1, read_ahead
        self.batch_size = batch_size
        wanted = self._wanted = range(batch_size)[slice(None) if rows is None else rows]
        assert wanted, (rows, batch_size)
        assert wanted.step == 1, rows
        self._layout, self._packing = store.layout(tap), store.packing(tap)
        row_bytes = 4 * self._packing.width if self._packing else self._layout.row_bytes
        block_rows = store.manifest.shuffling.block_rows
        self._order, self._may_read = store.order(seed=seed), may_read
        block_bytes, batch_bytes = block_rows * row_bytes, len(wanted) * row_bytes
        self.read_ahead = read_ahead or batches_ahead(batch_bytes)
        # A block that straddles batches is needed by each of them: keep it for the next.
        aligned = all(row % block_rows == 0 for row in (batch_size, wanted.start, wanted.stop))
        cache_bytes = 0 if aligned else 2 * (batch_bytes + block_bytes)
        self.memory_bytes = 2 * (self.read_ahead + 1) * batch_bytes + cache_bytes
        limits = {
            "cache_pool": {"total_bytes_limit": cache_bytes},
            "file_io_concurrency": {"limit": _CONCURRENT_FILE_READS},
        }
        self._array = self._layout.open(context=ts.Context(limits))  # raises for a wrong array
        direct = reads_blocks(self._layout)
        self._blocks = BlockReads(self._layout, packed=self._packing) if direct else None
        self._unpackers = ThreadPoolExecutor(_UNPACKERS, thread_name_prefix="unpack")
        # In a thread of its own: planning a batch takes as long as a step of a fast device.
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="plan")
        self._queue: deque[_Ahead] = deque()
        self._first = start_step  # the step at the head of the queue
        self._read_ahead()
        logger.info(
            "reading %s: %d of %d rows of each batch, %d batches ahead, up to %s",
            tap.name,
            len(wanted),
            batch_size,
            self.read_ahead,
            bytes_text(self.memory_bytes),
        )

    def close(self) -> None:
        """Drop what is being read ahead and end the threads."""
        self.drop()
        self._planner.shutdown(wait=True)
        self._unpackers.shutdown(wait=True, cancel_futures=True)
        if self._blocks is not None:
            self._blocks.close()

    def batch(self, step: int) -> Float[np.ndarray, "B D"]:
        """Rows `[step * B, (step + 1) * B)` of the stream, or the part `rows` of them.

        In the store's dtype, or float32 where that is int8.

        The next step comes from memory, and the time spent here is the time waited for the disk.
        Any other step empties the queue and starts reading ahead from there. An error in reading
        ahead is raised when its batch is asked for.

        Raises:
            UserError: a shard is damaged or missing; names the file.
        """
        assert step >= 0, step
        if step != self._first:
            self.drop()
            self._first = step
        self._read_ahead()
        assert self._queue, f"the rows of step {step} aren't on the disk"
        ahead = self._queue.popleft()
        self._first += 1
        self._read_ahead()
        with array_errors(self._layout.path, doing="read"):
            return ahead.result()

    def _read_ahead(self) -> None:
        while len(self._queue) < self.read_ahead:
            step = self._first + len(self._queue)
            if not self._may_read(step):
                break
            self._queue.append(_Ahead(self._planner.submit(self._begin, step)))

    def _begin(self, step: int) -> ts.Future | PendingRows | Future[np.ndarray]:
        start, wanted = step * self.batch_size, self._wanted
        segments = self._order.segments(start + wanted.start, start + wanted.stop)
        if self._blocks is not None:
            return self._blocks.start(segments)
        if self._packing is not None:
            return self._unpackers.submit(self._packing.read, segments, self._packed_blocks)
        return start_read(self._array, segments)

    def _packed_blocks(self, segments: list[Segment]) -> np.ndarray:
        return start_read(self._array, segments).result()

    def drop(self) -> None:
        """Forget what was read ahead."""
        while self._queue:
            self._queue.pop().cancel()

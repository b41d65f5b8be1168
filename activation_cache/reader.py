"""`batch(step)`: rows of one tap in training order, read ahead while the caller computes.

A batch is a pure function of (store, tap, batch size, seed, step): there is no iterator state to
save, and any step can be asked for at any time. Reading ahead changes when bytes are read and
never which. All blocks of all batches ahead are read concurrently, in other threads (`block_reads`;
of a bucket TensorStore's); this class only keeps the queue. Legend: B batch, D width.
"""

from __future__ import annotations

import logging
from collections import deque
from types import TracebackType

import numpy as np
import tensorstore as ts
from jaxtyping import Float

from activation_cache.block_reads import BlockReads, PendingRows, reads_blocks
from activation_cache.layout import array_errors, start_read
from activation_cache.order import BlockOrder
from activation_cache.store import Store
from activation_cache.taps import Tap

logger = logging.getLogger(__name__)

_CONCURRENT_FILE_READS = 32  # enough to hide the latency of a network disk


class ActivationReader:
    """Batches of one tap of a store, read ahead from `start_step`.

    Memory (`memory_bytes`, said in the log) holds `read_ahead` batches and the one last handed
    out, as much again for blocks between disk and batch, and a small cache where blocks straddle
    batches. Each batch is a new array that the reader never touches again, so a device may keep
    reading it.
    """

    def __init__(
        self,
        store: Store,
        tap: Tap,
        *,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        read_ahead: int = 4,
        rows: slice | None = None,
    ) -> None:
        """Open the array and start reading.

        Args:
            rows: the part of each batch that is wanted, and all that is read; None for the whole.
                With several processes, each reads what its devices need.

        Raises:
            UserError: the store hasn't the tap, or the array is missing or damaged.
        """
        assert batch_size >= 1, batch_size
        assert read_ahead >= 1, read_ahead
        self.batch_size, self.read_ahead = batch_size, read_ahead
        wanted = range(batch_size)[slice(None) if rows is None else rows]
        assert wanted, (rows, batch_size)
        assert wanted.step == 1, rows
        self._wanted = wanted
        self._layout = store.layout(tap)
        block_rows = store.manifest.shuffling.block_rows
        self._order = BlockOrder(rows=store.rows, block_rows=block_rows, seed=seed)
        block_bytes = block_rows * self._layout.row_bytes
        batch_bytes = len(wanted) * self._layout.row_bytes
        # A block that straddles batches is needed by each of them: keep it for the next.
        aligned = all(place % block_rows == 0 for place in (batch_size, wanted.start, wanted.stop))
        cache_bytes = 0 if aligned else 2 * (batch_bytes + block_bytes)
        self.memory_bytes = 2 * (read_ahead + 1) * batch_bytes + cache_bytes
        context = ts.Context(
            {
                "cache_pool": {"total_bytes_limit": cache_bytes},
                "file_io_concurrency": {"limit": _CONCURRENT_FILE_READS},
            }
        )
        self._array = self._layout.open(context=context)  # to be told of a wrong description
        self._blocks = BlockReads(self._layout) if reads_blocks(self._layout) else None
        self._queue: deque[ts.Future | PendingRows] = deque()
        self._first = start_step  # the step at the head of the queue
        self._read_ahead()
        logger.info(
            "reading %s: %d of %d rows of each batch, %d batches ahead, up to %.0f MiB",
            tap.name,
            len(wanted),
            batch_size,
            read_ahead,
            self.memory_bytes / 2**20,
        )

    def __enter__(self) -> ActivationReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._drop()
        if self._blocks is not None:
            self._blocks.close()

    def batch(self, step: int) -> Float[np.ndarray, "B D"]:
        """Rows `[step * B, (step + 1) * B)` of the stream, or the wanted part of them.

        In the store's dtype.

        Steps in order come from memory, and the time spent here is the time waited for the
        disk. Any other step empties the queue and begins to read ahead from there.

        Raises:
            UserError: a shard is damaged or missing; names the file.
        """
        assert step >= 0, step
        if step != self._first:
            self._drop()
            self._first = step
        self._read_ahead()
        future = self._queue.popleft()
        self._first += 1
        self._read_ahead()
        with array_errors(self._layout.path, doing="read"):
            return future.result()

    def _read_ahead(self) -> None:
        with array_errors(self._layout.path, doing="read"):
            while len(self._queue) < self.read_ahead:
                start = (self._first + len(self._queue)) * self.batch_size
                wanted = self._wanted
                segments = self._order.segments(start + wanted.start, start + wanted.stop)
                if self._blocks is not None:
                    self._queue.append(self._blocks.start(segments))
                else:
                    self._queue.append(start_read(self._array, segments))

    def _drop(self) -> None:
        while self._queue:
            self._queue.pop().cancel()

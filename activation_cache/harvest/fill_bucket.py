"""Computes the buckets of a store: from the token table through the model to shuffled rows.

Each bucket is a pure function of the store's plan. Its batches start at its own first sequence,
wherever the run started, so that a bucket made after a restart has the bytes it would have had. A
sequence with rows in two buckets is computed for both. Replicas of the model take the batches in
turn, and the rows don't depend on which of them computes a batch (`gemma.replicas`).

Legend: B sequences per forward, S sequence length, N rows of a bucket, D width of a tap.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Int64

from activation_cache.gemma.taps import Tap
from activation_cache.language_model.model import LanguageModel
from activation_cache.store.manifest import Manifest
from activation_cache.store.order import bucket_order, sequence_order
from activation_cache.store.tap_array import host_dtype
from activation_cache.store.writer import Bucket
from activation_cache.text.token_table import TokenTable


@dataclass(frozen=True)
class _Batch:
    """One forward pass that was started: its sequences and their activations."""

    sequences: Int64[np.ndarray, " N"]
    tokens: Int32[np.ndarray, "N S"]
    activations: dict[Tap, Float[Array, "B S _"]]  # B >= N: a short batch is filled up


class BucketFiller:
    """Computes any bucket of a planned store."""

    def __init__(
        self, manifest: Manifest, table: TokenTable, replicas: Sequence[LanguageModel]
    ) -> None:
        self.manifest, self.table, self.replicas = manifest, table, replicas
        self.taps = {entry.tap: entry.width for entry in manifest.sites}
        order = sequence_order(sequences=table.num_harvestable, seed=manifest.shuffling.seed)
        self._sequences = order.forward(np.arange(table.num_harvestable))
        # Row of the harvest at which each sequence, in harvest order, ends.
        self._ends = np.cumsum(table.usable_counts()[self._sequences], dtype=np.int64)

    def fill(self, number: int, *, on_batch: Callable[[int], None]) -> Bucket:
        """Compute one bucket; `on_batch(rows so far)` is called before each forward pass."""
        span = self.manifest.bucket_span(number)
        rows = len(span)
        bucket = Bucket(
            number=number,
            activations={
                tap: np.empty((rows, width), jnp.dtype(host_dtype(self.manifest.dtype)))
                for tap, width in self.taps.items()
            },
            sequence=np.empty(rows, np.int32),
            position=np.empty(rows, np.int32),
        )
        order = bucket_order(rows=rows, seed=self.manifest.shuffling.seed, bucket=number)
        positions = order.forward(np.arange(rows))
        sequences = self._of(span)
        first = sequences.start
        row = int(self._ends[first - 1]) - span.start if first else -span.start
        done = 0

        def before_forward() -> None:
            on_batch(done)

        for batch in self._forward(self._sequences[sequences], before_forward):
            row = self._scatter(batch, bucket, positions, row)
            done = min(max(row, 0), rows)
        assert done == rows, (done, rows)
        return bucket

    def help_fill(self, number: int, *, on_batch: Callable[[int], None]) -> None:
        """Do this process's part of the forward passes for a bucket that another process fills."""
        span = self.manifest.bucket_span(number)
        for batch in self._forward(self._sequences[self._of(span)], lambda: on_batch(0)):
            jax.block_until_ready(batch.activations)  # so as not to run ahead without bound

    def _of(self, span: range) -> slice:
        """The positions in the harvest of the sequences that have rows in a bucket."""
        first = int(np.searchsorted(self._ends, span.start, side="right"))
        last = int(np.searchsorted(self._ends, span.stop - 1, side="right"))
        return slice(first, last + 1)

    def _forward(
        self, sequences: Int64[np.ndarray, " N"], before: Callable[[], None]
    ) -> Iterator[_Batch]:
        """Forward passes, each replica one ahead: the host copies rows while devices compute."""
        # One shape for all buckets, and none larger than all there is.
        size = min(self.manifest.sequences_per_batch, len(self._sequences))
        ahead: collections.deque[_Batch] = collections.deque()
        for start, replica in zip(
            range(0, len(sequences), size), itertools.cycle(self.replicas), strict=False
        ):
            before()
            chosen = sequences[start : start + size]
            tokens = self.table.read(chosen.tolist())
            # A short last batch repeats its last sequence: one shape, compiled once.
            full = tokens[np.minimum(np.arange(size), len(chosen) - 1)]
            ahead.append(_Batch(chosen, tokens, self._activations(replica, full)))
            if len(ahead) > len(self.replicas):
                yield ahead.popleft()
        yield from ahead

    def _activations(
        self, replica: LanguageModel, tokens: Int32[np.ndarray, "B S"]
    ) -> dict[Tap, Float[Array, "B S _"]]:
        found = replica.activations(tokens, tuple(self.taps))
        if self.manifest.dtype == "bfloat16":  # rounded on the device: half the bytes to copy
            found = {tap: values.astype(jnp.bfloat16) for tap, values in found.items()}
        return found

    def _scatter(
        self, batch: _Batch, bucket: Bucket, positions: Int64[np.ndarray, " N"], row: int
    ) -> int:
        """Copy a batch's usable rows, the first of which is `row`, to their shuffled positions.

        Rows before the bucket or past its end belong to other buckets. Returns the row after the
        batch's last.
        """
        usable = self.table.usable(batch.tokens, batch.sequences.tolist())
        used_sequence, used_position = np.nonzero(usable)
        rows = np.arange(row, row + len(used_sequence))
        inside = np.flatnonzero((rows >= 0) & (rows < len(positions)))
        target = positions[rows[inside]]
        used_sequence, used_position = used_sequence[inside], used_position[inside]
        bucket.sequence[target] = batch.sequences[used_sequence]
        bucket.position[target] = used_position
        for tap, values in batch.activations.items():
            host = np.asarray(jax.device_get(values))
            bucket.activations[tap][target] = host[used_sequence, used_position].astype(
                bucket.activations[tap].dtype, copy=False
            )
        return row + len(rows)

"""Fills the buckets of an imported store, in the order in which a harvest of the rows would.

Legend: N rows of a bucket, S rows of a sequence, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from jaxtyping import Bool, Float, Int32, Int64

from activation_cache.gemma.taps import Tap
from activation_cache.rows.source import RowSource
from activation_cache.runtime.errors import UserError
from activation_cache.store.manifest import Manifest
from activation_cache.store.order import ALGORITHM, bucket_order, sequence_order
from activation_cache.store.writer import Bucket
from activation_cache.text.token_table import TokenTable

_TOKENS_AT_ONCE = 256  # sequences
IN_ORDER = "none"  # `shuffling.algorithm` of held-out rows: they lie as they were given


@dataclass(frozen=True)
class Sequences:
    """The sequences that rows lie in, and which of their rows count.

    Attributes:
        table: their tokens, if known: BOS, EOS and padding make no rows.
    """

    rows: int
    length: int
    held_out: int
    table: TokenTable | None

    @property
    def number(self) -> int:
        """All sequences, the held-out ones included."""
        return -(-self.rows // self.length)

    @property
    def num_stored(self) -> int:
        """Those that are not held out: the first."""
        return self.number - self.held_out

    def counts(self) -> Int32[np.ndarray, " Q"]:
        """How many rows of each sequence count."""
        if self.table is not None:
            return self.table.usable_counts()
        counts = np.full(self.number, self.length, np.int32)
        counts[-1] = self.rows - (self.number - 1) * self.length
        return counts

    def usable(
        self, sequences: Int64[np.ndarray, " Q"]
    ) -> Iterator[tuple[int, Bool[np.ndarray, " S"]]]:
        """Sequences, each with which rows of it count."""
        for start in range(0, len(sequences), _TOKENS_AT_ONCE):
            chosen = sequences[start : start + _TOKENS_AT_ONCE].tolist()
            if self.table is not None:
                yield from zip(
                    chosen, self.table.usable(self.table.read(chosen), chosen), strict=True
                )
            else:
                for one in chosen:
                    yield one, np.ones(min(self.length, self.rows - one * self.length), bool)


class RowFiller:
    """Fills any bucket of a planned import."""

    def __init__(
        self, manifest: Manifest, sources: Mapping[Tap, RowSource], sequences: Sequences
    ) -> None:
        self.manifest, self.sources, self.sequences = manifest, sources, sequences
        stored = sequences.num_stored
        if manifest.shuffling.algorithm == ALGORITHM:
            order = sequence_order(sequences=stored, seed=manifest.shuffling.seed)
            self._order = order.forward(np.arange(stored))
        else:
            self._order = np.arange(stored, sequences.number)
        # Row at which each sequence, in this order, ends.
        self._ends = np.cumsum(sequences.counts()[self._order], dtype=np.int64)

    @property
    def rows(self) -> int:
        """All rows that can be filled in."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def fill(self, number: int, *, on_sequence: Callable[[int], None]) -> Bucket:
        """Read one bucket; `on_sequence(rows so far)` is called before each sequence.

        Raises:
            UserError: a row isn't finite, or a file can't be read; names file and row.
        """
        span = self.manifest.bucket_span(number)
        rows = len(span)
        dtype = np.dtype(ml_dtypes.bfloat16 if self.manifest.dtype == "bfloat16" else np.float32)
        bucket = Bucket(
            number=number,
            activations={
                entry.tap: np.empty((rows, entry.width), dtype) for entry in self.manifest.sites
            },
            sequence=np.empty(rows, np.int32),
            position=np.empty(rows, np.int32),
        )
        places = self._places(number, rows)
        first = int(np.searchsorted(self._ends, span.start, side="right"))
        last = int(np.searchsorted(self._ends, span.stop - 1, side="right"))
        row = int(self._ends[first - 1]) - span.start if first else -span.start
        for sequence, usable in self.sequences.usable(self._order[first : last + 1]):
            on_sequence(max(row, 0))
            row = self._put(sequence, usable, bucket, places, row)
        assert row >= rows, (row, rows)
        return bucket

    def _places(self, number: int, rows: int) -> Int64[np.ndarray, " N"]:
        shuffling = self.manifest.shuffling
        if shuffling.algorithm != ALGORITHM:
            return np.arange(rows)
        order = bucket_order(rows=rows, seed=shuffling.seed, bucket=number)
        return order.forward(np.arange(rows))

    def _put(
        self,
        sequence: int,
        usable: Bool[np.ndarray, " S"],
        bucket: Bucket,
        places: Int64[np.ndarray, " N"],
        row: int,
    ) -> int:
        """Copy a sequence's rows, the first of which is `row`; returns the row after the last."""
        positions = np.flatnonzero(usable)
        rows = np.arange(row, row + len(positions))
        inside = np.flatnonzero((rows >= 0) & (rows < len(places)))
        target, positions = places[rows[inside]], positions[inside]
        bucket.sequence[target] = sequence
        bucket.position[target] = positions
        for tap, source in self.sources.items():
            read = source.sequence(sequence)[positions]
            with np.errstate(over="ignore"):  # what becomes infinite is told below
                own = read.astype(bucket.activations[tap].dtype)
            self._check(own, source, sequence, positions)
            bucket.activations[tap][target] = own
        return row + len(rows)

    def _check(
        self,
        rows: Float[np.ndarray, "N D"],
        source: RowSource,
        sequence: int,
        positions: Int64[np.ndarray, " N"],
    ) -> None:
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(bad):
            raise UserError(
                f"{source.place(sequence, int(positions[bad[0]]))} holds NaN or infinity (or a "
                f"number that {rows.dtype} can't hold): activations must be finite. Mend the file "
                "and import it anew"
            )

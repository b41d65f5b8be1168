"""How well training's order mixes the rows of a sequence, for windows of a rolling store.

    python -m benchmarks.rolling.mixing

counts, from the orders alone, where the rows of whole sequences come: those of one bucket, in the
middle of the text or at its beginning. Nothing is estimated. docs/results.md has what it printed.

Legend: N rows of a bucket.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from activation_cache.storage.arrays import bucket_rows
from activation_cache.store.order import (
    BLOCKS,
    Permutation,
    RollingOrder,
    bucket_order,
    derive_key,
)

# Gemma Scope's text, buckets, blocks and batches; a sequence has a BOS, which makes no row.
ROWS, BLOCK_ROWS, BATCH, SEQUENCE = 4_000_000_000, 256, 4096, 1023
BUCKET_ROWS = bucket_rows(shuffle_rows=1_000_000, block_rows=BLOCK_ROWS)
WINDOWS = (4, 16, 64, 256)


@dataclass(frozen=True)
class Mixing:
    """Where the rows of a bucket's sequences come.

    Attributes:
        companions: other rows of its sequence that a row meets in its batch, on average.
        alone: the share of rows that meet none.
        apart: steps between two rows of a sequence, on average.
        span: steps from a sequence's first row to its last, on average.
    """

    companions: float
    alone: float
    apart: float
    span: float


def mixing(steps_N: Int64[np.ndarray, " N"], sequences_N: Int64[np.ndarray, " N"]) -> Mixing:
    """The statistics of rows of these sequences that come at these steps."""
    order = np.lexsort((steps_N, sequences_N))
    steps, sequences = steps_N[order], sequences_N[order]
    _, counts = np.unique(np.stack([sequences, steps]), axis=1, return_counts=True)
    _, first, sizes = np.unique(sequences, return_index=True, return_counts=True)
    apart, span = [], []
    for start, size in zip(first, sizes, strict=True):
        own = steps[start : start + size].astype(np.float64)
        # Σ over pairs of |a - b|, from the sorted values.
        weights = 2 * np.arange(size) - size + 1
        apart.append(2 * float(weights @ own) / (size * (size - 1)))
        span.append(own[-1] - own[0])
    return Mixing(
        companions=float((counts * (counts - 1)).sum() / len(steps)),
        alone=float(counts[counts == 1].sum() / len(steps)),
        apart=float(np.mean(apart)),
        span=float(np.mean(span)),
    )


def sequences_of(bucket: int) -> Int64[np.ndarray, " N"]:
    """The sequence of each row of a bucket in stored order; -1 if it lies in two buckets."""
    harvested = np.arange(bucket * BUCKET_ROWS, (bucket + 1) * BUCKET_ROWS)
    sequences = harvested // SEQUENCE
    inside = (sequences * SEQUENCE >= harvested[0]) & (
        (sequences + 1) * SEQUENCE <= harvested[-1] + 1
    )
    positions = bucket_order(rows=BUCKET_ROWS, seed=0, bucket=bucket).forward(
        np.arange(BUCKET_ROWS)
    )
    stored = np.empty(BUCKET_ROWS, np.int64)
    stored[positions] = np.where(inside, sequences, -1)
    return stored


def rolling_steps(window: int, bucket: int) -> Int64[np.ndarray, " N"]:
    """The step at which each stored row of a bucket comes."""
    order = RollingOrder(ROWS, BLOCK_ROWS, BUCKET_ROWS, window, seed=0)
    blocks = BUCKET_ROWS // BLOCK_ROWS
    starts = np.full(blocks, -1)
    for stretch in order.stretches_of(bucket):
        begin = order.start_of(stretch)
        own = order.blocks(stretch) - bucket * blocks
        mine = np.flatnonzero((own >= 0) & (own < blocks))
        starts[own[mine]] = begin + mine * BLOCK_ROWS
    assert (starts >= 0).all()
    return (starts[:, None] + np.arange(BLOCK_ROWS)).reshape(-1) // BATCH


def whole_steps(bucket: int) -> Int64[np.ndarray, " N"]:
    """The same in the order of a whole store, but for the rows that its short last block lacks."""
    blocks = BUCKET_ROWS // BLOCK_ROWS
    order = Permutation(-(-ROWS // BLOCK_ROWS), derive_key(0, BLOCKS, 0))
    places = order.inverse(np.arange(bucket * blocks, (bucket + 1) * blocks))
    return (places[:, None] * BLOCK_ROWS + np.arange(BLOCK_ROWS)).reshape(-1) // BATCH


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, nargs="+", default=WINDOWS)
    arguments = parser.parse_args()
    buckets = -(-ROWS // BUCKET_ROWS)
    sys.stdout.write("| window | bucket | companions | rows without any | apart | span |\n")
    sys.stdout.write("| --- | --- | --- | --- | --- | --- |\n")
    for window in [*arguments.windows, None]:
        for name, bucket in (("in the middle", buckets // 2), ("the first", 0)):
            sequences = sequences_of(bucket)
            steps = whole_steps(bucket) if window is None else rolling_steps(window, bucket)
            inside = sequences >= 0
            found = mixing(steps[inside], sequences[inside])
            sys.stdout.write(
                f"| {window or 'whole store'} | {name} | {found.companions:.3f} | "
                f"{found.alone:.1%} | {found.apart:,.0f} | {found.span:,.0f} |\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()

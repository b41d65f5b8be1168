"""Writes shuffle buckets in the background: one is written while the next is filled.

A bucket is committed in two phases. First its shards are written, each in one transaction; then a
record in `commits/` names the bucket. A bucket without a record doesn't count and is made again,
under the same names and with the same bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Float, Int32
from pydantic import Field

from activation_cache.config import Count, NonNegative, PositiveCount, Section
from activation_cache.gemma.taps import Tap
from activation_cache.runtime.closing import Closing
from activation_cache.runtime.errors import UserError
from activation_cache.storage.arrays import write_shards
from activation_cache.storage.files import StoragePath, make_folder
from activation_cache.storage.records import FORMAT_VERSION, read_record, write_record
from activation_cache.store.dropped_rows import replaced_rows
from activation_cache.store.manifest import Manifest
from activation_cache.store.store import PROVENANCE, provenance_layout, tap_layout
from activation_cache.store.tap_array import Packing, packing_of

BUCKETS_IN_MEMORY = 2  # one being filled, one being written
_CONCURRENT_RECORDS = 16
_SUM_ROWS = 4096  # rows squared at once, to bound the float64 copy of them


@dataclass(frozen=True)
class Bucket:
    """The rows of one bucket in stored order; the writer may change them. Legend: N rows, D width.

    With `cache.max_norm_over_median` it replaces those that are too long (`dropped_rows`).
    """

    number: int
    activations: dict[Tap, Float[np.ndarray, "N _"]]
    sequence: Int32[np.ndarray, " N"]
    position: Int32[np.ndarray, " N"]


class Commit(Section):
    """`commits/bucket-000000.json`: a bucket is durable, and its share of the norms.

    `dropped` counts the outlying rows whose places others have taken.
    """

    format_version: int
    bucket: Count
    rows: PositiveCount
    sum_of_squares: dict[str, NonNegative]
    dropped: Annotated[Count, Field(exclude_if=lambda own: own == 0)] = 0


_COMMIT_NAME = re.compile(r"bucket-(\d{6,})\.json")


def commit_file(path: StoragePath, bucket: int) -> StoragePath:
    """The record that commits a bucket."""
    return path / "commits" / f"bucket-{bucket:06d}.json"


def read_commits(path: StoragePath, manifest: Manifest) -> dict[int, Commit]:
    """The records of durable buckets, by number; raises `UserError` if one is damaged."""
    folder = commit_file(path, 0).parent
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    numbers = sorted(int(found[1]) for found in map(_COMMIT_NAME.fullmatch, names) if found)
    present = {
        bucket: commit_file(path, bucket) for bucket in numbers if bucket < manifest.num_buckets
    }
    with ThreadPoolExecutor(_CONCURRENT_RECORDS) as pool:  # a bucket's latency, not its rate
        records = pool.map(lambda file: read_record(file, Commit), present.values())
        return dict(zip(present, records, strict=True))


def sum_of_squares(rows: Float[np.ndarray, "N D"]) -> float:
    """Sum of all squared entries, in float64 and in a fixed order."""
    parts = (rows[i : i + _SUM_ROWS].astype(np.float64) for i in range(0, len(rows), _SUM_ROWS))
    return math.fsum(float(np.square(part).sum()) for part in parts)


def _packed_squares(packing: Packing, packed: np.ndarray, count: int) -> Iterator[float]:
    """The sum of squares of each block's rows as they are read."""
    rows_ND = np.empty((packing.block_rows, packing.width), np.float32)
    for number, block in enumerate(packed):
        part = rows_ND[: count - number * packing.block_rows]
        packing.unpack(block, part, first=0)
        yield sum_of_squares(part)


class BucketWriter(Closing):
    """Writes buckets of one store, one at a time, in a thread.

    A context manager: the bucket being written is committed even if the block fails.
    """

    def __init__(self, path: StoragePath, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        make_folder(path / "commits")
        layouts = {e.tap.name: tap_layout(path, manifest, e.tap) for e in manifest.sites}
        layouts |= {name: provenance_layout(path, manifest, name) for name in PROVENANCE}
        self._layouts = layouts
        block_rows = manifest.shuffling.block_rows
        self._packings = {
            entry.tap.name: packing_of(manifest.dtype, block_rows=block_rows, width=entry.width)
            for entry in manifest.sites
        }
        self._arrays = {name: layout.open(create=True) for name, layout in layouts.items()}
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="bucket-writer")
        self._pending: Future[None] | None = None

    def close(self) -> None:
        """Return when the last bucket is committed; raises `UserError` if it can't be."""
        try:
            self._wait()
        finally:
            self._pool.shutdown()

    def submit(self, bucket: Bucket) -> None:
        """Have a bucket written, after waiting until the one before is committed.

        Raises:
            UserError: the one before could not be written, or is not finite.
        """
        self._wait()
        self._pending = self._pool.submit(self._write, bucket)

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, bucket: Bucket) -> None:
        start = self.manifest.bucket_span(bucket.number).start
        columns: dict[str, np.ndarray] = {
            "sequence": bucket.sequence,
            "position": bucket.position,
            **{tap.name: rows for tap, rows in bucket.activations.items()},
        }
        places, instead = replaced_rows(
            bucket.activations, bucket=bucket.number, manifest=self.manifest
        )
        for column in columns.values():
            column[places] = column[instead]
        sums = {tap.name: sum_of_squares(rows) for tap, rows in bucket.activations.items()}
        for name, total in sums.items():
            if not math.isfinite(total):
                raise UserError(
                    f"bucket {bucket.number} of {name} holds NaN or infinity (its sum of squares "
                    f"is {total}): activations must be finite. Check the weights, or set "
                    "model.dtype to float32."
                )
        for name, rows in columns.items():
            packing = self._packings.get(name)
            if packing is None:
                write_shards(self._arrays[name], self._layouts[name], start=start, rows=rows)
                continue
            layout, packed = self._layouts[name], packing.pack(rows)
            write_shards(self._arrays[name], layout, start=start // layout.packs, rows=packed)
            sums[name] = math.fsum(_packed_squares(packing, packed, len(rows)))
        commit = Commit(
            format_version=FORMAT_VERSION,
            bucket=bucket.number,
            rows=len(bucket.sequence),
            sum_of_squares=sums,
            dropped=len(places),
        )
        write_record(commit_file(self.path, bucket.number), commit)

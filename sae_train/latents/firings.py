"""Where an SAE's latents fire, on disk: one file for each shard of the walk.

A firing is a token and a latent that is active on it. A shard's file is an Arrow file with two
columns, the token's row in the shard and the latent's value there, sorted by latent, then by row.
Where each latent's firings begin is kept beside them, so that a reader takes the latents it wants.

Legend: F latents, R rows of a shard, P firings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import scipy.sparse
from jaxtyping import Float32, Int, Int64

from activation_cache.storage.files import StoragePath, replacing

_STARTS = b"starts"
_SCHEMA = pa.schema([("row", pa.uint32()), ("value", pa.float32())])


@dataclass(frozen=True)
class Firings:
    """Firings of some latents, sorted by latent, then by row.

    Attributes:
        starts: where the firings of each latent begin; the last entry is how many there are.
        rows: the token of each, counted over the whole walk.
        values: above 0.
    """

    starts: Int64[np.ndarray, " starts"]
    rows: Int64[np.ndarray, " P"]
    values: Float32[np.ndarray, " P"]

    @cached_property
    def latents(self) -> Int64[np.ndarray, " P"]:
        """The latent of each firing, from 0 for the first of these."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))


def shard_file(scratch: StoragePath, shard: int) -> StoragePath:
    """The file of a shard."""
    return scratch / f"firings-{shard:06d}.arrow"


def write_shard(
    path: StoragePath,
    *,
    rows: Int[np.ndarray, " P"],
    latents: Int[np.ndarray, " P"],
    values: Float32[np.ndarray, " P"],
    num_rows: int,
    width: int,
) -> None:
    """Write one shard's firings, atomically; `rows` must rise."""
    starts_R = np.searchsorted(rows, np.arange(num_rows + 1))
    by_row = scipy.sparse.csr_matrix((values, latents, starts_R), shape=(num_rows, width))
    by_latent = by_row.tocsc()  # a counting sort: rows still rise within each latent
    starts = {_STARTS: by_latent.indptr.astype(np.int64).tobytes()}
    schema = _SCHEMA.with_metadata(starts)
    columns = [pa.array(by_latent.indices.astype(np.uint32)), pa.array(by_latent.data)]
    with replacing(path) as temporary, pa.ipc.new_file(str(temporary), schema) as file:
        file.write_batch(pa.record_batch(columns, schema=schema))


class Shards:
    """The files of all shards, mapped into memory.

    Args:
        folder: on a disk.
        first_rows: the first row of each shard in the walk.
    """

    def __init__(self, folder: Path, first_rows: Sequence[int], *, width: int) -> None:
        self.first_rows, self.width = first_rows, width
        self._maps = [
            pa.memory_map(str(shard_file(folder, number))) for number in range(len(first_rows))
        ]
        batches = [pa.ipc.open_file(one).get_batch(0) for one in self._maps]
        self._rows = [batch.column(0).to_numpy() for batch in batches]
        self._values = [batch.column(1).to_numpy() for batch in batches]
        self._starts = [
            np.frombuffer(batch.schema.metadata[_STARTS], np.int64) for batch in batches
        ]

    @cached_property
    def counts(self) -> Int64[np.ndarray, " F"]:
        """How often each latent fires."""
        return np.sum([np.diff(starts) for starts in self._starts], axis=0)

    def read(self, latents: range) -> Firings:
        """The firings of neighbouring latents."""
        begin, end = latents.start, latents.stop
        counts = [np.diff(starts[begin : end + 1]) for starts in self._starts]
        starts = np.concatenate([[0], np.cumsum(np.sum(counts, axis=0))])
        rows = np.empty(starts[-1], np.int64)
        values = np.empty(starts[-1], np.float32)
        filled = starts[:-1].copy()
        for shard, count in enumerate(counts):
            piece = slice(self._starts[shard][begin], self._starts[shard][end])
            # Of each latent the firings of this shard follow those of the shards before.
            offset = filled - np.concatenate([[0], np.cumsum(count)[:-1]])
            place = np.arange(count.sum()) + np.repeat(offset, count)
            rows[place] = self._rows[shard][piece] + np.int64(self.first_rows[shard])
            values[place] = self._values[shard][piece]
            filled += count
        return Firings(starts, rows, values)

    def by_row(self, shards: range, *, num_rows: int) -> scipy.sparse.csr_matrix:
        """Which latents fire on each row of the first shards, as ones."""
        parts = []
        for shard in shards:
            last = shard + 1 == len(self.first_rows)
            end = num_rows if last else self.first_rows[shard + 1]
            shape = (end - self.first_rows[shard], self.width)
            ones = np.ones(len(self._rows[shard]), np.int32)
            rows = self._rows[shard].astype(np.int32)
            fires = scipy.sparse.csc_matrix((ones, rows, self._starts[shard]), shape=shape)
            parts.append(fires.tocsr())
        return scipy.sparse.vstack(parts, format="csr")

    def latents_in(self, piece_of_row_N: Int[np.ndarray, " N"]) -> list[Int64[np.ndarray, " L"]]:
        """Of each piece of the text the latents that fire in it, rising.

        Args:
            piece_of_row_N: the piece each row of the walk is in, or -1; pieces rise with rows.
        """
        keys = [np.zeros(0, np.int64)]
        for shard, first in enumerate(self.first_rows):
            pieces = piece_of_row_N[self._rows[shard] + np.int64(first)]
            inside = np.flatnonzero(pieces >= 0)
            latents = np.searchsorted(self._starts[shard], inside, side="right") - 1
            keys.append(np.unique(pieces[inside] * np.int64(self.width) + latents))
        pieces, latents = np.divmod(np.concatenate(keys), self.width)
        return np.split(latents, np.searchsorted(pieces, np.arange(1, piece_of_row_N.max() + 1)))

    def firings_of(self, shard: int) -> int:
        """How many firings a shard has."""
        return len(self._rows[shard])

"""The array of one tap: its rows as they are, or packed as int8 block by block.

A block packed as int8 is one row of the array, a string of bytes (little-endian):

    mean       float32 [D]       of the block's rows, dim by dim
    scale      float32 [D]       mean |x - mean| of the block's rows, dim by dim
    row scale  float32 [b]       max over dims of |x - mean| / scale, over 127
    q          int8 [b, D]       (x - mean) / (scale * row scale), rounded half to even

    x is read as q * scale * row scale + mean

A scale per row alone would be set by a few giant coordinates: it costs 1 to 2 % of the variance of
a Gemma 3 residual stream, and of many dims more than all (docs/results.md, "int8 rows"). Every
number is made of its own block, so the bytes of a bucket depend on nothing else.

Legend: N rows, D width, b rows of a block, P bytes of a packed block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from activation_cache.config import Dtype, RowDtype
from activation_cache.storage.arrays import ArrayLayout, shard_rows
from activation_cache.storage.files import StoragePath
from activation_cache.storage.row_range import Segment

_LARGEST = 127
_FLOAT = np.dtype("<f4")


@dataclass(frozen=True)
class Packing:
    """Packs blocks of `block_rows` rows of `width` as int8, and unpacks them."""

    block_rows: int
    width: int

    @property
    def block_bytes(self) -> int:
        """P, the bytes of a packed block."""
        return _FLOAT.itemsize * (2 * self.width + self.block_rows) + self.block_rows * self.width

    def pack(self, rows_ND: Float[np.ndarray, "N D"]) -> UInt8[np.ndarray, "_ P"]:
        """Whole blocks, the last filled up with zeros if it is short; rows must be finite."""
        count = -(-len(rows_ND) // self.block_rows)
        packed = np.zeros((count, self.block_bytes), np.uint8)
        for number, block in enumerate(packed):
            first = number * self.block_rows
            self._pack(rows_ND[first : first + self.block_rows], block)
        return packed

    def _pack(self, rows_ND: np.ndarray, block: UInt8[np.ndarray, " P"]) -> None:
        mean_D, scale_D, row_scale, q = self._parts(block)
        count = len(rows_ND)
        x_ND = rows_ND.astype(np.float32)
        mean_D[:] = x_ND.mean(axis=0, dtype=np.float64)
        x_ND -= mean_D
        scale_D[:] = np.abs(x_ND).mean(axis=0, dtype=np.float64)
        np.divide(x_ND, scale_D, out=x_ND, where=scale_D > 0)
        row_scale[:count] = np.abs(x_ND).max(axis=1) / np.float32(_LARGEST)
        scale_N1 = row_scale[:count, None]
        np.divide(x_ND, scale_N1, out=x_ND, where=scale_N1 > 0)
        q[:count] = np.clip(np.rint(x_ND, out=x_ND), -_LARGEST, _LARGEST)

    def unpack(
        self, block: UInt8[np.ndarray, " P"], rows_ND: Float[np.ndarray, "N D"], *, first: int
    ) -> None:
        """Fill `rows_ND`, float32, with the rows of a block from its row `first` on."""
        mean_D, scale_D, row_scale, q = self._parts(block)
        span = slice(first, first + len(rows_ND))
        np.multiply(q[span], scale_D, out=rows_ND)
        rows_ND *= row_scale[span, None]
        rows_ND += mean_D

    def read(
        self, segments: list[Segment], blocks_of: Callable[[list[Segment]], np.ndarray]
    ) -> Float[np.ndarray, "N D"]:
        """The rows of segments, one after the other.

        Args:
            blocks_of: reads segments of the packed array.
        """
        b = self.block_rows
        spans = [range(s.start // b, (s.start + s.count - 1) // b + 1) for s in segments]
        packed = blocks_of([Segment(span.start, len(span)) for span in spans])
        rows_ND = np.empty((sum(s.count for s in segments), self.width), np.float32)
        done, number = 0, 0
        for segment, span in zip(segments, spans, strict=True):
            begin = segment.start
            for block in span:
                stop = min((block + 1) * b, segment.start + segment.count)
                part = rows_ND[done : done + stop - begin]
                self.unpack(packed[number], part, first=begin - block * b)
                done, number, begin = done + len(part), number + 1, stop
        return rows_ND

    def _parts(self, block: UInt8[np.ndarray, " P"]) -> tuple[np.ndarray, ...]:
        """Views of a block's mean, scale, row scales and q."""
        ends = np.cumsum([self.width, self.width, self.block_rows]) * _FLOAT.itemsize
        mean, scale, row_scale, q = np.split(block, ends)
        shaped = q.view(np.int8).reshape(self.block_rows, self.width)
        return mean.view(_FLOAT), scale.view(_FLOAT), row_scale.view(_FLOAT), shaped


def packing_of(dtype: RowDtype, *, block_rows: int, width: int) -> Packing | None:
    """How rows of a dtype are packed; None if they are stored as they are."""
    return Packing(block_rows, width) if dtype == "int8" else None


def host_dtype(dtype: RowDtype) -> Dtype:
    """The dtype of rows in memory: as stored, or float32 where they are packed."""
    return "float32" if dtype == "int8" else dtype


def stored_row_bytes(dtype: RowDtype, *, width: int, block_rows: int) -> int:
    """Bytes that a row takes in a store, its part of its block's numbers included."""
    packing = packing_of(dtype, block_rows=block_rows, width=width)
    if packing is not None:
        return -(-packing.block_bytes // block_rows)
    return (2 if dtype == "bfloat16" else 4) * width


def array_layout(
    path: StoragePath, *, rows: int, width: int, dtype: RowDtype, block_rows: int, bucket_rows: int
) -> ArrayLayout:
    """The array of a tap: [N, D], or of packed blocks [blocks, P]; a chunk is a block in both."""
    packing = packing_of(dtype, block_rows=block_rows, width=width)
    if packing is None:
        row_bytes = stored_row_bytes(dtype, width=width, block_rows=block_rows)
        shard = shard_rows(bucket=bucket_rows, block_rows=block_rows, row_bytes=row_bytes)
        return ArrayLayout(path, (rows, width), dtype, chunk_rows=block_rows, shard_rows=shard)
    shard = shard_rows(
        bucket=bucket_rows // block_rows, block_rows=1, row_bytes=packing.block_bytes
    )
    shape = (-(-rows // block_rows), packing.block_bytes)
    return ArrayLayout(path, shape, "uint8", chunk_rows=1, shard_rows=shard, packs=block_rows)

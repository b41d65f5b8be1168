"""Every order the pipeline uses, as pure integer functions: no state, no generator streams.

Three shuffles are needed: sequences before they are harvested, rows inside a bucket before they
are written, and blocks before they are read. Each is a `Permutation`: a keyed bijection of
`range(size)` that maps each index by itself. A row's position is thus known without walking to it
(resuming needs the step number alone), and nothing of the store's size is ever in memory.

The permutation is a balanced Feistel network over the smallest domain of 2^(2h) >= size, with
cycle walking: a value outside `range(size)` is put through the network again until it falls
inside (Black & Rogaway, "Ciphers with arbitrary finite domains", 2002). The round function is the
finaliser of splitmix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number generators",
2014). `numpy.random` is avoided: its streams may change between versions, and a store would then be
read in another order. docs/store.md specifies the algorithm; any change to it needs a new
`ALGORITHM`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt64

from activation_cache.storage.row_range import Segment

ALGORITHM = "feistel8-splitmix64-v1"

_GAMMA = 0x9E3779B97F4A7C15  # splitmix64's increment: 2^64 over the golden ratio
_WORD = 2**64 - 1
_ROUNDS = 8

# The first word after the seed in every key: one stream per purpose.
SEQUENCES, BUCKET, BLOCKS = 1, 2, 3

_STRETCH = 1024  # positions of an epoch whose blocks are computed together


def mix(x: UInt64[np.ndarray, " N"]) -> UInt64[np.ndarray, " N"]:
    """Scramble 64-bit words: the finaliser of splitmix64, a bijection on 64 bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive_key(seed: int, *path: int) -> int:
    """Fold `seed` and the words of `path` into one 64-bit key: k <- mix(k + gamma + word)."""
    key = 0
    for word in (seed, *path):
        key = int(mix(np.array([(key + _GAMMA + word) & _WORD], np.uint64))[0])
    return key


@dataclass(frozen=True)
class Permutation:
    """A bijection of `range(size)` chosen by a 64-bit `key`."""

    size: int
    key: int

    def forward(self, index: Int64[np.ndarray, " N"]) -> Int64[np.ndarray, " N"]:
        """The image of every index; each must lie in `range(size)`."""
        return self._walk(index, self._round_keys)

    def inverse(self, image: Int64[np.ndarray, " N"]) -> Int64[np.ndarray, " N"]:
        """The index that `forward` sends to `image`."""
        return self._walk(image, self._round_keys[::-1], swapped=True)

    @functools.cached_property
    def _half_bits(self) -> int:
        return max(1, ((self.size - 1).bit_length() + 1) // 2)

    @functools.cached_property
    def _round_keys(self) -> list[np.uint64]:
        return [np.uint64(derive_key(self.key, number)) for number in range(_ROUNDS)]

    def _walk(
        self, index: Int64[np.ndarray, " N"], keys: list[np.uint64], *, swapped: bool = False
    ) -> Int64[np.ndarray, " N"]:
        assert index.size == 0 or (index.min() >= 0 and index.max() < self.size)
        value = self._network(index.astype(np.uint64), keys, swapped=swapped)
        while (outside := np.flatnonzero(value >= np.uint64(self.size))).size:
            value[outside] = self._network(value[outside], keys, swapped=swapped)
        return value.astype(np.int64)

    def _network(
        self, value: UInt64[np.ndarray, " N"], keys: list[np.uint64], *, swapped: bool
    ) -> UInt64[np.ndarray, " N"]:
        """The Feistel rounds; with the keys reversed and the halves swapped, their inverse."""
        half = np.uint64(self._half_bits)
        mask = np.uint64(2**self._half_bits - 1)
        left, right = value >> half, value & mask
        if swapped:
            left, right = right, left
        for key in keys:
            left, right = right, left ^ (mix(right + key) & mask)
        if swapped:
            left, right = right, left
        return (left << half) | right


def sequence_order(*, sequences: int, seed: int) -> Permutation:
    """Position in the harvest -> sequence: the order in which sequences are harvested."""
    return Permutation(sequences, derive_key(seed, SEQUENCES))


def bucket_order(*, rows: int, seed: int, bucket: int) -> Permutation:
    """Row of a bucket as harvested -> its position in the bucket as written."""
    return Permutation(rows, derive_key(seed, BUCKET, bucket))


@dataclass(frozen=True)
class BlockOrder:
    """The endless stream of rows that a reader returns: in each epoch all blocks in a new order.

    Epoch e takes the blocks in the permutation keyed by (seed, e), and the rows of each block in
    stored order. Every row comes exactly once an epoch, those of a short last block included.
    """

    rows: int
    block_rows: int
    seed: int

    @property
    def num_blocks(self) -> int:
        """Blocks in the store; the last may be short."""
        return -(-self.rows // self.block_rows)

    def segments(self, start: int, stop: int) -> list[Segment]:
        """Rows `[start, stop)` of the stream as segments of stored rows, in order."""
        found: list[Segment] = []
        while start < stop:
            epoch, offset = divmod(start, self.rows)
            count = min(stop - start, self.rows - offset)
            found += self._within(epoch, offset, offset + count)
            start += count
        return found

    def _within(self, epoch: int, start: int, stop: int) -> list[Segment]:
        _, short = _epoch_order(self, epoch)
        missing = self.num_blocks * self.block_rows - self.rows
        short_stop = (short + 1) * self.block_rows - missing

        def position(row: int) -> int:
            return (row if row < short_stop else row + missing) // self.block_rows

        positions = np.arange(position(start), position(stop - 1) + 1)
        begins = positions * self.block_rows - np.where(positions > short, missing, 0)
        sizes = np.where(positions == short, self.block_rows - missing, self.block_rows)
        first = np.maximum(start - begins, 0)
        counts = np.minimum(stop - begins, sizes) - first
        starts = _blocks_at(self, epoch, positions) * self.block_rows + first
        return [Segment(int(s), int(c)) for s, c in zip(starts, counts, strict=True)]


def _blocks_at(
    blocks: BlockOrder, epoch: int, positions: Int64[np.ndarray, " N"]
) -> Int64[np.ndarray, " N"]:
    """The blocks at consecutive positions of an epoch's order."""
    first, last = int(positions[0]) // _STRETCH, int(positions[-1]) // _STRETCH
    known = [_stretch(blocks, epoch, number) for number in range(first, last + 1)]
    return np.concatenate(known)[positions - first * _STRETCH]


# Cached: the permutation takes a millisecond, for one block as for a thousand.
@functools.lru_cache(maxsize=16)
def _stretch(blocks: BlockOrder, epoch: int, number: int) -> Int64[np.ndarray, " N"]:
    order, _ = _epoch_order(blocks, epoch)
    stop = min((number + 1) * _STRETCH, blocks.num_blocks)
    return order.forward(np.arange(number * _STRETCH, stop))


@functools.lru_cache(maxsize=16)
def _epoch_order(blocks: BlockOrder, epoch: int) -> tuple[Permutation, int]:
    """The permutation of an epoch's blocks, and the position of the short last block in it.

    Every block after that position begins earlier by the rows that the short block lacks.
    """
    order = Permutation(blocks.num_blocks, derive_key(blocks.seed, BLOCKS, epoch))
    return order, int(order.inverse(np.array([blocks.num_blocks - 1]))[0])

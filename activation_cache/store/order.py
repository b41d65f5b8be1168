"""Every order the pipeline uses, as pure integer functions: no state, no generator streams.

Sequences are shuffled before they are harvested, rows inside a bucket before they are written, and
blocks before they are read. Each shuffle is a `Permutation`: a keyed bijection of
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
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt64

from activation_cache.storage.row_range import Segment

ALGORITHM = "feistel8-splitmix64-v1"

_GAMMA = 0x9E3779B97F4A7C15  # splitmix64's increment: 2^64 over the golden ratio
_WORD = 2**64 - 1
_ROUNDS = 8

# The first word after the seed in every key: one stream per purpose. `dropped_rows` has the 6.
SEQUENCES, BUCKET, BLOCKS, DEAL, STRETCH = 1, 2, 3, 4, 5

_TOGETHER = 1024  # positions of an epoch whose blocks are computed together


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
        return _cut(
            start,
            stop,
            block_rows=self.block_rows,
            missing=self.num_blocks * self.block_rows - self.rows,
            short=short,
            blocks_at=lambda positions: _blocks_at(self, epoch, positions),
        )


def _cut(
    start: int,
    stop: int,
    *,
    block_rows: int,
    missing: int,
    short: int,
    blocks_at: Callable[[Int64[np.ndarray, " N"]], Int64[np.ndarray, " N"]],
) -> list[Segment]:
    """Rows `[start, stop)` of a sequence of blocks as segments of stored rows.

    Args:
        missing: rows that the block at position `short` lacks. Every block after it begins
            earlier by so many.
        blocks_at: the blocks at consecutive positions.
    """
    short_stop = (short + 1) * block_rows - missing

    def position(row: int) -> int:
        return (row if row < short_stop else row + missing) // block_rows

    positions = np.arange(position(start), position(stop - 1) + 1)
    begins = positions * block_rows - np.where(positions > short, missing, 0)
    sizes = np.where(positions == short, block_rows - missing, block_rows)
    first = np.maximum(start - begins, 0)
    counts = np.minimum(stop - begins, sizes) - first
    starts = blocks_at(positions) * block_rows + first
    return [Segment(int(s), int(c)) for s, c in zip(starts, counts, strict=True)]


def _blocks_at(
    blocks: BlockOrder, epoch: int, positions: Int64[np.ndarray, " N"]
) -> Int64[np.ndarray, " N"]:
    """The blocks at consecutive positions of an epoch's order."""
    first, last = int(positions[0]) // _TOGETHER, int(positions[-1]) // _TOGETHER
    known = [_block_run(blocks, epoch, number) for number in range(first, last + 1)]
    return np.concatenate(known)[positions - first * _TOGETHER]


# Cached: the permutation takes a millisecond, for one block as for a thousand.
@functools.lru_cache(maxsize=16)
def _block_run(blocks: BlockOrder, epoch: int, number: int) -> Int64[np.ndarray, " N"]:
    order, _ = _epoch_order(blocks, epoch)
    stop = min((number + 1) * _TOGETHER, blocks.num_blocks)
    return order.forward(np.arange(number * _TOGETHER, stop))


@functools.lru_cache(maxsize=16)
def _epoch_order(blocks: BlockOrder, epoch: int) -> tuple[Permutation, int]:
    """The permutation of an epoch's blocks, and the position of the short last block in it."""
    order = Permutation(blocks.num_blocks, derive_key(blocks.seed, BLOCKS, epoch))
    return order, int(order.inverse(np.array([blocks.num_blocks - 1]))[0])


@dataclass(frozen=True)
class RollingOrder:
    """The stream of rows of a rolling store: mixed over a window of buckets that moves on.

    The stream is cut into stretches. Stretch s reads from the buckets s to s + `window` - 1, and
    the last one from all that are left. So bucket s is finished when stretch s ends, and bucket
    s + `window` is needed when the next begins. The blocks of a bucket, permuted, are dealt in
    equal parts to the stretches that it is in the window of; the blocks of a stretch are permuted.
    Every row comes exactly once. With a window of all buckets there is a single stretch.
    """

    rows: int
    block_rows: int
    bucket_rows: int
    window: int
    seed: int

    @property
    def num_buckets(self) -> int:
        """Buckets of the whole text; the last may be short."""
        return -(-self.rows // self.bucket_rows)

    @property
    def num_stretches(self) -> int:
        """Stretches of the stream."""
        return max(1, self.num_buckets - self.window + 1)

    def stretch_of(self, row: int) -> int:
        """The stretch that a row of the stream lies in."""
        assert 0 <= row < self.rows, (row, self.rows)
        return int(np.searchsorted(_stretch_ends(self), row, side="right"))

    def last_bucket(self, stretch: int) -> int:
        """The last bucket that a stretch reads from; the first is the stretch's own number."""
        return min(stretch + self.window, self.num_buckets) - 1

    def start_of(self, stretch: int) -> int:
        """The row of the stream at which a stretch begins."""
        return int(_stretch_ends(self)[stretch - 1]) if stretch else 0

    def blocks(self, stretch: int) -> Int64[np.ndarray, " N"]:
        """The blocks of a stretch, in order."""
        return _stretch_blocks(self, stretch)[0]

    def segments(self, start: int, stop: int) -> list[Segment]:
        """Rows `[start, stop)` of the stream as segments of stored rows, in order."""
        assert stop <= self.rows, (stop, self.rows)
        ends = _stretch_ends(self)
        found: list[Segment] = []
        while start < stop:
            stretch = self.stretch_of(start)
            begin = self.start_of(stretch)
            count = min(stop, int(ends[stretch])) - start
            blocks, short = _stretch_blocks(self, stretch)
            found += _cut(
                start - begin,
                start - begin + count,
                block_rows=self.block_rows,
                missing=-self.rows % self.block_rows,
                short=short,
                blocks_at=blocks.__getitem__,
            )
            start += count
        return found

    def blocks_of(self, bucket: int) -> int:
        """The number of blocks in a bucket."""
        full = self.bucket_rows // self.block_rows
        return min(full, -(-self.rows // self.block_rows) - bucket * full)

    def stretches_of(self, bucket: int) -> range:
        """The stretches that read from a bucket."""
        return range(max(0, bucket - self.window + 1), min(bucket + 1, self.num_stretches))

    def part(self, bucket: int, stretch: int) -> range:
        """The positions in a bucket's permutation that a stretch is dealt."""
        size, dealt = self.blocks_of(bucket), self.stretches_of(bucket)
        index = stretch - dealt.start
        return range(size * index // len(dealt), size * (index + 1) // len(dealt))

    def dealing(self, bucket: int) -> Permutation:
        """The order in which a bucket's blocks are dealt."""
        return Permutation(self.blocks_of(bucket), derive_key(self.seed, DEAL, bucket))


@functools.lru_cache(maxsize=4)
def _stretch_ends(order: RollingOrder) -> Int64[np.ndarray, " N"]:
    """The row of the stream at which each stretch ends."""
    blocks = np.zeros(order.num_stretches, np.int64)
    for bucket in range(order.num_buckets):
        dealt, size = order.stretches_of(bucket), order.blocks_of(bucket)
        blocks[dealt.start : dealt.stop] += np.diff(size * np.arange(len(dealt) + 1) // len(dealt))
    ends = np.cumsum(blocks) * order.block_rows
    ends[_short_stretch(order) :] -= -order.rows % order.block_rows
    return ends


def _short_stretch(order: RollingOrder) -> int:
    """The stretch that the text's last block, which may be short, is dealt to."""
    bucket = order.num_buckets - 1
    last = np.array([order.blocks_of(bucket) - 1])
    position = int(order.dealing(bucket).inverse(last)[0])
    return next(s for s in order.stretches_of(bucket) if position in order.part(bucket, s))


# A batch that crosses from one stretch into the next needs both, and is read by several taps.
@functools.lru_cache(maxsize=4)
def _stretch_blocks(order: RollingOrder, stretch: int) -> tuple[Int64[np.ndarray, " N"], int]:
    """The blocks of a stretch in order, and the position of a short one, or one past the last."""
    full = order.bucket_rows // order.block_rows
    parts = []
    for bucket in range(stretch, order.last_bucket(stretch) + 1):
        part = order.part(bucket, stretch)
        if part:
            own = order.dealing(bucket).forward(np.arange(part.start, part.stop))
            parts.append(own + bucket * full)
    dealt = np.concatenate(parts)
    key = derive_key(order.seed, STRETCH, stretch)
    blocks = dealt[Permutation(len(dealt), key).forward(np.arange(len(dealt)))]
    last = -(-order.rows // order.block_rows) - 1
    short = np.flatnonzero(blocks == last)
    is_short = order.rows % order.block_rows and short.size
    return blocks, int(short[0]) if is_short else len(blocks)

"""Orders: bijections, pure in their index, the same for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_cache.storage.row_range import Segment
from activation_cache.store.order import (
    BLOCKS,
    BlockOrder,
    Permutation,
    RollingOrder,
    bucket_order,
    derive_key,
    sequence_order,
)

sizes = st.integers(1, 700)
keys = st.integers(0, 2**64 - 1)
WORD = 2**64 - 1


def plain_mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def plain_key(*words: int) -> int:
    key = 0
    for word in words:
        key = plain_mix((key + 0x9E3779B97F4A7C15 + word) & WORD)
    return key


def plain_permutation(index: int, *, size: int, key: int) -> int:
    """docs/store.md in Python integers, one index at a time."""
    half = 1
    while 4**half < size:
        half += 1
    while True:
        left, right = index >> half, index % 2**half
        for number in range(8):
            mixed = plain_mix((right + plain_key(key, number)) & WORD)
            left, right = right, left ^ (mixed % 2**half)
        index = (left << half) | right
        if index < size:
            return index


@settings(deadline=None)
@given(size=sizes, key=keys)
def test_a_permutation_is_a_bijection_and_inverse_undoes_it(size, key):
    order, index = Permutation(size, key), np.arange(size)
    image = order.forward(index)
    assert sorted(image) == list(index)
    np.testing.assert_array_equal(order.inverse(image), index)


@settings(deadline=None)
@given(size=st.integers(1, 10**12), key=keys, fraction=st.floats(0, 1, exclude_max=True))
def test_it_is_the_documented_algorithm_at_any_size(size, key, fraction):
    index = int(size * fraction)
    found = Permutation(size, key).forward(np.array([index]))
    assert found.tolist() == [plain_permutation(index, size=size, key=key)]


@settings(deadline=None)
@given(size=sizes, key=keys, data=st.data())
def test_an_image_depends_on_its_index_alone(size, key, data):
    chosen = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=9)))
    whole = Permutation(size, key).forward(np.arange(size))
    np.testing.assert_array_equal(Permutation(size, key).forward(chosen), whole[chosen])


def test_orders_on_disk_never_change():
    index = np.arange(10)
    assert derive_key(0, 1) == 0x2A98F501AF37E97F
    sequences = sequence_order(sequences=10, seed=0).forward(index)
    assert sequences.tolist() == [5, 8, 6, 0, 1, 9, 4, 2, 7, 3]
    bucket = bucket_order(rows=10, seed=7, bucket=3).forward(index)
    assert bucket.tolist() == [8, 2, 9, 6, 7, 4, 0, 5, 3, 1]
    blocks = [segment.start // 4 for segment in BlockOrder(40, 4, seed=5).segments(0, 40)]
    assert blocks == [6, 7, 0, 4, 2, 1, 8, 9, 3, 5]


def test_every_position_is_as_likely_for_every_index():
    size, trials = 10, 800
    counts = np.zeros((size, size))
    for seed in range(trials):
        image = bucket_order(rows=size, seed=seed, bucket=0).forward(np.arange(size))
        counts[np.arange(size), image] += 1
    expected = trials / size
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert 45 < chi_square < 125  # 81 degrees of freedom: 81 +- 12.7, within 3.5 sigma


def test_seeds_buckets_and_purposes_give_different_orders():
    index = np.arange(64)
    orders = [
        sequence_order(sequences=64, seed=0),
        sequence_order(sequences=64, seed=1),
        bucket_order(rows=64, seed=0, bucket=0),
        bucket_order(rows=64, seed=0, bucket=1),
        bucket_order(rows=64, seed=1, bucket=0),
        Permutation(64, derive_key(0, BLOCKS, 0)),
    ]
    assert len({tuple(order.forward(index)) for order in orders}) == len(orders)


def rows_of(segments: list[Segment]) -> list[int]:
    return [row for s in segments for row in range(s.start, s.start + s.count)]


stores = st.tuples(st.integers(1, 90), st.integers(1, 12), st.integers(0, 2**40))


@settings(deadline=None)
@given(store=stores, epoch=st.integers(0, 3))
def test_an_epoch_visits_every_row_once(store, epoch):
    rows, block_rows, seed = store
    order = BlockOrder(rows, block_rows, seed)
    segments = order.segments(epoch * rows, (epoch + 1) * rows)
    assert sorted(rows_of(segments)) == list(range(rows))
    for segment in segments:  # a whole block each, so never across two
        assert segment.start % block_rows == 0
        assert segment.count == min(block_rows, rows - segment.start)


@pytest.mark.slow
@settings(deadline=None)
@given(store=stores, start=st.integers(0, 60), count=st.integers(1, 40))
def test_any_slice_of_the_stream_can_be_asked_for(store, start, count):
    order = BlockOrder(*store)
    whole = rows_of(order.segments(0, start + count))
    found = order.segments(start, start + count)
    assert rows_of(found) == whole[start:]
    assert all(s.start // store[1] == (s.start + s.count - 1) // store[1] for s in found)


def test_epochs_walk_the_blocks_in_different_orders():
    order = BlockOrder(rows=320, block_rows=8, seed=0)
    epochs = [tuple(rows_of(order.segments(e * 320, (e + 1) * 320))) for e in range(4)]
    assert len(set(epochs)) == 4


def test_an_epoch_longer_than_a_stretch_is_its_permutation():
    order = BlockOrder(rows=5000, block_rows=2, seed=7)
    for epoch in (0, 1):
        blocks = Permutation(2500, derive_key(7, BLOCKS, epoch)).forward(np.arange(2500))
        expected = [Segment(2 * int(block), 2) for block in blocks]
        first = 5000 * epoch
        assert order.segments(first, first + 5000) == expected
        for start, stop in ((0, 2048), (2046, 2050), (2048, 2052), (4094, 4100), (4998, 5000)):
            found = order.segments(first + start, first + stop)
            assert found == expected[start // 2 : stop // 2]


# Blocks in the text, blocks in a bucket, rows in a block, rows that the last block lacks, window.
texts = st.tuples(
    st.integers(1, 60), st.integers(1, 9), st.integers(1, 4), st.integers(0, 3), st.integers(1, 9)
)


def rolling_order(text: tuple[int, ...], seed: int) -> RollingOrder:
    blocks, in_bucket, block_rows, missing, window = text
    rows = blocks * block_rows - min(missing, block_rows - 1)
    return RollingOrder(rows, block_rows, in_bucket * block_rows, window, seed)


@settings(deadline=None, max_examples=40)
@given(text=texts, seed=st.integers(0, 2**40), data=st.data())
def test_a_rolling_order_reads_every_row_once_from_its_window(text, seed, data):
    order = rolling_order(text, seed)
    whole = rows_of(order.segments(0, order.rows))
    assert sorted(whole) == list(range(order.rows))
    for index, row in enumerate(whole):
        stretch = order.stretch_of(index)
        assert stretch <= row // order.bucket_rows <= order.last_bucket(stretch)
        assert order.last_bucket(stretch) < stretch + order.window
        # A batch, of at most a bucket's rows, needs the window and one bucket at the most.
        last = min(index + order.bucket_rows, order.rows) - 1
        assert order.stretch_of(last) <= stretch + 1
    start = data.draw(st.integers(0, order.rows - 1))
    stop = data.draw(st.integers(start + 1, order.rows))
    found = order.segments(start, stop)
    assert rows_of(found) == whole[start:stop]
    size = order.block_rows
    assert all(s.start // size == (s.start + s.count - 1) // size for s in found)


def plain_rolling(text: tuple[int, ...], seed: int) -> list[int]:
    """docs/store.md, "Rolling order", in Python integers: the blocks of the stream."""
    blocks, full, _, _, window = text
    buckets = -(-blocks // full)
    stretches = max(1, buckets - window + 1)
    stream = []
    for s in range(stretches):
        dealt = []
        for b in range(s, min(s + window, buckets)):
            n = min(full, blocks - b * full)
            first, last = max(0, b - window + 1), min(b, stretches - 1)
            parts = last - first + 1
            for i in range(n * (s - first) // parts, n * (s - first + 1) // parts):
                dealt.append(b * full + plain_permutation(i, size=n, key=plain_key(seed, 4, b)))
        key = plain_key(seed, 5, s)
        stream += [dealt[plain_permutation(i, size=len(dealt), key=key)] for i in range(len(dealt))]
    return stream


@pytest.mark.parametrize("text", [(60, 7, 2, 1, 3), (23, 4, 1, 0, 9), (12, 1, 3, 2, 2)])
def test_the_rolling_order_is_the_documented_one(text):
    order = rolling_order(text, 11)
    blocks = [segment.start // order.block_rows for segment in order.segments(0, order.rows)]
    assert blocks == plain_rolling(text, 11)


def test_a_stretch_mixes_evenly_over_its_window():
    order = RollingOrder(rows=64 * 64, block_rows=1, bucket_rows=64, window=8, seed=0)
    rows = np.array(rows_of(order.segments(0, order.rows)))
    stretches = np.array([order.stretch_of(index) for index in range(order.rows)])
    counts = np.bincount(rows[stretches == 30] // 64)
    assert counts[30:].tolist() == [8] * 8
    spread = np.diff(np.flatnonzero(np.isin(rows // 64, [30])))
    assert spread.mean() == pytest.approx(8, rel=0.2)  # not a bucket's rows one after the other

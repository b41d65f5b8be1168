"""Rows packed as int8: what they are read as, by every way of reading, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from activation_cache.config import RowDtype
from activation_cache.runtime.errors import UserError
from activation_cache.storage.arrays import ArrayLayout
from activation_cache.store import reader as reader_module
from activation_cache.store import rolling
from activation_cache.store.manifest import Manifest
from activation_cache.store.reader import ActivationReader
from activation_cache.store.store import Store, tap_layout
from activation_cache.store.tap_array import Packing
from activation_cache.store.writer import Bucket, BucketWriter, read_commits
from tests.support.stores import TAP, file_hashes, make_manifest, write_store

ROWS, WIDTH, BLOCK = 150, 6, 8


def uneven_rows(start: int, stop: int, width: int, _dtype: str = "") -> np.ndarray:
    """As a residual stream's: a dim a thousand times the others, one off zero, one constant."""
    each = [np.random.default_rng(row).standard_normal(width) for row in range(start, stop)]
    rows = np.stack(each) * np.array([1000.0, 1.0, 0.01, 1.0, 3.0, 0.0])
    return (rows + np.array([500.0, 0.0, 0.0, 40.0, 0.0, 7.0])).astype(np.float32)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("store")
    return write_store(folder, manifest(), make_rows=uneven_rows)


def manifest() -> Manifest:
    return make_manifest(rows=ROWS, width=WIDTH, block_rows=BLOCK, dtype="int8")


def expected(rows: np.ndarray) -> np.ndarray:
    """What one block is read as, by the formulas of docs/store.md in float64."""
    rows = rows.astype(np.float64)
    mean = rows.mean(axis=0).astype(np.float32)
    scale = np.abs(rows - mean).mean(axis=0)
    z = np.divide(rows - mean, scale, out=np.zeros_like(rows), where=scale > 0)
    row_scale = np.abs(z).max(axis=1, keepdims=True) / 127
    q = np.divide(z, row_scale, out=np.zeros_like(z), where=row_scale > 0)
    return np.rint(q) * row_scale * scale + mean


@pytest.mark.parametrize("count", [BLOCK, 3, 1])
def test_a_block_is_read_as_the_formulas_say(count: int):
    rows = uneven_rows(0, count, WIDTH)
    packing = Packing(BLOCK, WIDTH)
    (block,) = packing.pack(rows)
    assert len(block) == 4 * (2 * WIDTH + BLOCK) + BLOCK * WIDTH
    read = np.empty_like(rows)
    packing.unpack(block, read, first=0)
    spread = np.abs(rows - rows.mean(axis=0)).mean(axis=0) + 1e-9
    # No quotient of these rows lies so near to a half that float32 rounds it to the other side.
    assert (np.abs(read - expected(rows)) / spread).max() < 1e-5
    assert (np.abs(read - rows) / spread).max() < 0.02
    assert (read[:, 5] == 7.0).all()
    if count == 1:
        assert np.array_equal(read, rows)


def test_halves_are_rounded_to_even():
    """Numbers of few bits: both dims have mean 0 and scale 1, and the first row's scale is 1/32."""
    rows = np.zeros((BLOCK, 2), np.float32)
    rows[:6, 0] = [127 / 32, -127 / 32, 1 / 64, -1 / 64, 1 / 64, -1 / 64]
    rows[:4, 1] = [2.5 / 32, -3.5 / 32, 3.921875, -3.890625]
    packing = Packing(BLOCK, 2)
    *_, row_scale, q = packing._parts(packing.pack(rows)[0])
    assert row_scale[:2].tolist() == [1 / 32, 1 / 32]
    assert q[:2].tolist() == [[127, 2], [-127, -4]]


def test_every_way_of_reading_gives_the_same_rows(store: Store, monkeypatch: pytest.MonkeyPatch):
    whole = store.read(TAP, start=0, stop=ROWS)
    assert whole.dtype == np.float32
    blocks = [whole[i : i + BLOCK] for i in range(0, ROWS, BLOCK)]
    for number, block in enumerate(blocks):
        first = number * BLOCK
        exact = uneven_rows(first, first + len(block), WIDTH)
        assert (np.abs(block - expected(exact)) / (exact.std(axis=0) + 1e-9)).max() < 1e-5
    np.testing.assert_array_equal(store.read(TAP, start=13, stop=59), whole[13:59])

    def batches() -> list[np.ndarray]:
        with ActivationReader(store, TAP, batch_size=20, seed=0, read_ahead=2) as reader:
            assert reader.memory_bytes >= 2 * 3 * 20 * 4 * WIDTH
            found = [reader.batch(step) for step in range(9)]
            for batch, step in zip(found, range(9), strict=True):
                segments = reader._order.segments(20 * step, 20 * step + 20)
                rows = [whole[one.start : one.start + one.count] for one in segments]
                np.testing.assert_array_equal(batch, np.concatenate(rows))
            return found

    direct = batches()
    monkeypatch.setattr(reader_module, "reads_blocks", lambda _: False)  # as in a bucket
    np.testing.assert_array_equal(batches(), direct)


def test_the_same_rows_make_the_same_bytes_in_any_order(store: Store, tmp_path: Path):
    plan = manifest()
    with BucketWriter(tmp_path, plan) as writer:
        for number in reversed(range(plan.num_buckets)):
            span = plan.bucket_span(number)
            numbers = np.arange(span.start, span.stop, dtype=np.int32)
            rows = uneven_rows(span.start, span.stop, WIDTH)
            writer.submit(Bucket(number, {TAP: rows}, numbers, numbers))
    made, first = file_hashes(tmp_path), file_hashes(store.path)
    del first["manifest.json"]
    assert made == first
    commits = read_commits(tmp_path, plan).values()
    total = math.fsum(one.sum_of_squares[TAP.name] for one in commits)
    read = store.read(TAP, start=0, stop=ROWS).astype(np.float64)
    assert total == pytest.approx(np.square(read).sum(), rel=1e-12), "of the rows as they are read"


def test_rows_take_a_quarter_of_float32_s_bytes():
    for width, most in ((640, 0.2595), (2304, 0.2585)):
        int8, float32 = (layout_of(width, dtype).stored_bytes for dtype in ("int8", "float32"))
        assert int8 < most * float32


def layout_of(width: int, dtype: RowDtype) -> ArrayLayout:
    plan = make_manifest(rows=2**16, width=width, dtype=dtype, shuffle_rows=2**14, block_rows=256)
    return tap_layout(Path(), plan, TAP)


def test_a_rolling_window_deletes_the_bucket_that_is_meant(tmp_path: Path):
    plan = write_store(tmp_path, manifest(), make_rows=uneven_rows).manifest
    rolling.delete_bucket(tmp_path, plan, 1)
    assert rolling.buckets_on_disk(tmp_path, plan) == [0, 2]
    assert rolling.buckets_there(tmp_path) == [0, 2]


@pytest.mark.parametrize("direct", [True, False])
def test_a_flipped_byte_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool):
    store = write_store(tmp_path, manifest(), make_rows=uneven_rows)
    shard = tmp_path / TAP.name / "c" / "1" / "0"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    monkeypatch.setattr(reader_module, "reads_blocks", lambda _: direct)
    with (
        pytest.raises(UserError, match=f"{shard} is damaged"),
        ActivationReader(store, TAP, batch_size=ROWS, seed=0) as reader,
    ):
        reader.batch(0)


def test_rows_that_are_not_finite_are_refused(tmp_path: Path):
    def poisoned(start: int, stop: int, width: int, dtype: str) -> np.ndarray:
        rows = uneven_rows(start, stop, width)
        rows[3, 2] = np.inf
        return rows

    with pytest.raises(UserError, match=r"bucket 0 of resid_post\.1 holds NaN or infinity"):
        write_store(tmp_path, manifest(), make_rows=poisoned)

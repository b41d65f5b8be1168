"""The reader: a pure function of the step, read ahead, loud about damage."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from activation_cache.gemma.taps import Tap
from activation_cache.runtime.errors import UserError
from activation_cache.storage.direct_reads import BlockReads
from activation_cache.store.order import BlockOrder
from activation_cache.store.reader import ActivationReader, batches_ahead
from activation_cache.store.store import Store
from tests.support.stores import TAP, make_manifest, numbered_rows, write_store

ROWS, WIDTH = 203, 8  # three full buckets and a short one, the last block short


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_store(tmp_path_factory.mktemp("store"), make_manifest(rows=ROWS, width=WIDTH))


def read(store: Store, steps: list[int], **options) -> list[np.ndarray]:
    with ActivationReader(store, TAP, **options) as reader:
        return [reader.batch(step) for step in steps]


def row_numbers(batch: np.ndarray) -> list[int]:
    return [round(float(value)) for value in batch[:, 0]]


@pytest.mark.parametrize("batch_size", [1, 8, 20, 64, 500])
def test_batches_are_the_documented_stream(store: Store, batch_size: int):
    steps = list(range(6))
    batches = read(store, steps, batch_size=batch_size, seed=3)
    order = BlockOrder(rows=ROWS, block_rows=8, seed=3)
    for step, batch in zip(steps, batches, strict=True):
        segments = order.segments(step * batch_size, (step + 1) * batch_size)
        expected = [numbered_rows(s.start, s.start + s.count, WIDTH) for s in segments]
        np.testing.assert_array_equal(batch, np.concatenate(expected))


def test_each_epoch_reads_each_row_once(store: Store):
    batches = read(store, list(range(ROWS)), batch_size=2, seed=0)
    numbers = row_numbers(np.concatenate(batches))
    for epoch in (0, 1):
        assert sorted(numbers[epoch * ROWS : (epoch + 1) * ROWS]) == list(range(ROWS))


def test_starting_at_any_step_gives_the_same_batches(store: Store):
    last, options = 22, {"batch_size": 20, "seed": 1}  # past two epochs
    sequential = read(store, list(range(last)), **options)
    for start in range(last):
        resumed = read(store, list(range(start, last)), **options, start_step=start)
        np.testing.assert_array_equal(np.stack(resumed), np.stack(sequential[start:]))


def test_steps_may_come_in_any_order(store: Store):
    options = {"batch_size": 20, "seed": 1}
    sequential = read(store, list(range(12)), **options)
    steps = [5, 6, 0, 11, 11, 3, 4, 5]
    for step, batch in zip(steps, read(store, steps, **options, read_ahead=2), strict=True):
        np.testing.assert_array_equal(batch, sequential[step])


def test_seeds_differ(store: Store):
    assert not np.array_equal(
        read(store, [0], batch_size=64, seed=0), read(store, [0], batch_size=64, seed=1)
    )


def test_a_batch_is_never_overwritten(store: Store):
    with ActivationReader(store, TAP, batch_size=16, seed=0, read_ahead=1) as reader:
        batches = [reader.batch(step) for step in range(8)]
        copies = [batch.copy() for batch in batches]
        for step in range(8, 40):
            reader.batch(step)
    np.testing.assert_array_equal(batches, copies)


def test_bfloat16_rows_come_as_stored(tmp_path: Path):
    store = write_store(tmp_path, make_manifest(rows=100, width=5, dtype="bfloat16"))
    (batch,) = read(store, [0], batch_size=100, seed=0)
    assert batch.dtype == ml_dtypes.bfloat16
    stored = store.read(TAP, start=0, stop=100)
    np.testing.assert_array_equal(np.sort(batch[:, 0]), np.sort(stored[:, 0]))
    np.testing.assert_array_equal(stored, numbered_rows(0, 100, 5, "bfloat16"))


def test_reading_ahead_is_done_before_it_is_asked_for_and_no_further(tmp_path: Path):
    store = write_store(tmp_path / "store", make_manifest(rows=ROWS, width=WIDTH))
    with ActivationReader(store, TAP, batch_size=8, seed=0, read_ahead=3) as reader:
        while not all(future.done() for future in reader._queue):
            time.sleep(0.01)
        (tmp_path / "store" / TAP.name / "c").rename(tmp_path / "gone")
        for step in range(3):
            assert reader.batch(step).shape == (8, WIDTH)
        with pytest.raises(UserError, match="missing"):
            reader.batch(3)
        (tmp_path / "gone").rename(tmp_path / "store" / TAP.name / "c")
        assert reader.batch(3).shape == (8, WIDTH)  # asked again, it is read again


def test_memory_is_bounded_and_stated(store: Store):
    row = WIDTH * 4
    with ActivationReader(store, TAP, batch_size=64, seed=0, read_ahead=2) as reader:
        assert reader.memory_bytes == 2 * 3 * 64 * row
        for step in range(5):
            reader.batch(step)
            assert len(reader._queue) == 2


@pytest.mark.parametrize("place", ["data", "index", "cut", "gone"])
def test_a_damaged_shard_is_named(tmp_path: Path, place: str):
    store = write_store(tmp_path, make_manifest(rows=ROWS, width=WIDTH))
    shard = tmp_path / TAP.name / "c" / "1" / "0"
    content = bytearray(shard.read_bytes())
    if place == "gone":
        shard.unlink()
    else:
        content[100 if place == "data" else -20] ^= 1
        shard.write_bytes(content[:-50] if place == "cut" else content)
    with pytest.raises(UserError, match=f"{shard} is"):
        read(store, list(range(4)), batch_size=64, seed=0)


def test_a_damaged_array_description_is_named(tmp_path: Path):
    store = write_store(tmp_path, make_manifest(rows=ROWS, width=WIDTH))
    description = tmp_path / TAP.name / "zarr.json"
    description.write_text(description.read_text().replace(str(ROWS), str(ROWS - 1)))
    with pytest.raises(UserError, match=r"resid_post\.1"):
        read(store, [0], batch_size=8, seed=0)


def test_a_tap_that_was_not_harvested_is_refused(store: Store):
    with pytest.raises(UserError, match=r"no mlp_out\.2: it has resid_post\.1"):
        ActivationReader(store, Tap("mlp_out", 2), batch_size=8, seed=0)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
def test_processes_read_their_parts_of_the_same_batches(store: Store, parts: int):
    options = {"batch_size": 20, "seed": 1}
    sequential = read(store, list(range(12)), **options)
    edges = np.linspace(0, 20, parts + 1).astype(int)
    pieces = [
        read(store, list(range(12)), **options, rows=slice(int(start), int(stop)))
        for start, stop in itertools.pairwise(edges)
    ]
    for step, batch in enumerate(sequential):
        np.testing.assert_array_equal(np.concatenate([piece[step] for piece in pieces]), batch)


def test_a_part_of_each_batch_takes_a_part_of_the_memory(store: Store):
    row = WIDTH * 4
    part = {"rows": slice(16, 32), "read_ahead": 4}
    with ActivationReader(store, TAP, batch_size=64, seed=0, **part) as reader:
        assert reader.memory_bytes == 2 * 5 * 16 * row
        assert reader.batch(0).shape == (16, WIDTH)


@pytest.mark.parametrize(
    ("batch_bytes", "batches"),
    [(2**10, 16), (32 * 2**20, 16), (50 * 2**20, 10), (128 * 2**20, 4), (2**31, 4)],
)
def test_the_depth_is_as_many_batches_as_fit(batch_bytes: int, batches: int):
    assert batches_ahead(batch_bytes) == batches


def test_without_a_depth_given_it_follows_from_what_is_read(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("activation_cache.store.reader.READ_AHEAD_BYTES", 6 * 16 * WIDTH * 4)
    part = {"rows": slice(16, 32)}
    with ActivationReader(store, TAP, batch_size=64, seed=0, **part) as reader:
        assert reader.read_ahead == 6
        assert reader.memory_bytes == 2 * 7 * 16 * WIDTH * 4


def test_who_asks_for_a_batch_neither_works_it_out_nor_reads(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    threads: set[str] = set()
    segments, read_chunk = BlockOrder.segments, BlockReads._read_chunk

    def noted(work):
        def call(*arguments):
            threads.add(threading.current_thread().name.split("_")[0])
            return work(*arguments)

        return call

    monkeypatch.setattr(BlockOrder, "segments", noted(segments))
    monkeypatch.setattr(BlockReads, "_read_chunk", noted(read_chunk))
    assert len(read(store, [0, 1, 2, 9], batch_size=20, seed=0)) == 4
    assert threads == {"plan", "block"}


@pytest.mark.parametrize("where", ["worked out", "begun", "read"])
def test_an_error_comes_with_its_batch_and_the_next_one_is_read(
    store: Store, monkeypatch: pytest.MonkeyPatch, where: str
):
    owner, name = {
        "worked out": (BlockOrder, "segments"),
        "begun": (BlockReads, "start"),
        "read": (BlockReads, "_read"),
    }[where]
    work, calls = getattr(owner, name), itertools.count()
    lock = threading.Lock()

    def failing(*arguments):
        with lock:
            number = next(calls)
        if number == 2:
            raise RuntimeError("the third call fails")
        return work(*arguments)

    expected = read(store, list(range(5)), batch_size=8, seed=0)
    monkeypatch.setattr(owner, name, failing)
    steps = iter(range(5))
    with ActivationReader(store, TAP, batch_size=8, seed=0, read_ahead=3) as reader:
        for step in itertools.islice(steps, 2):
            np.testing.assert_array_equal(reader.batch(step), expected[step])
        with pytest.raises(RuntimeError, match="the third call fails"):
            reader.batch(next(steps))
        for step in steps:
            np.testing.assert_array_equal(reader.batch(step), expected[step])


def test_closing_waits_for_reads_begun_and_begins_no_more(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    began, go_on, finished = threading.Semaphore(0), threading.Event(), []
    read_block, drop = BlockReads._read, ActivationReader.drop

    def held(*arguments):
        began.release()
        assert go_on.wait(timeout=60)
        time.sleep(0.05)  # who doesn't wait for it has gone on by then
        read_block(*arguments)
        finished.append(arguments)

    def dropped(reader):
        drop(reader)
        go_on.set()

    monkeypatch.setattr(ActivationReader, "drop", dropped)
    monkeypatch.setattr(BlockReads, "_read", held)
    monkeypatch.setattr("activation_cache.storage.direct_reads._THREADS", 2)
    before = set(threading.enumerate())
    with ActivationReader(store, TAP, batch_size=64, seed=0, read_ahead=8):
        assert all(began.acquire(timeout=60) for _ in range(2))  # and 62 blocks wait
    assert len(finished) == 2
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not [name for name in left if name.startswith(("plan", "block"))]


def test_another_step_drops_what_was_to_be_read(store: Store, monkeypatch: pytest.MonkeyPatch):
    began, planned, go_on = threading.Semaphore(0), threading.Semaphore(0), threading.Event()
    read_block, start = BlockReads._read, BlockReads.start
    batches: list[np.ndarray] = []
    blocks: list[np.ndarray] = []

    def held(reads, segment, part):
        blocks.append(part)
        began.release()
        assert go_on.wait(timeout=60)
        read_block(reads, segment, part)

    def noted(reads, segments):
        pending = start(reads, segments)
        batches.append(pending.rows_BD)
        if len(batches) > 8:  # of the batches asked for later, after the earlier ones were dropped
            go_on.set()
        planned.release()
        return pending

    expected = read(store, [50], batch_size=64, seed=0)
    monkeypatch.setattr(BlockReads, "_read", held)
    monkeypatch.setattr(BlockReads, "start", noted)
    monkeypatch.setattr("activation_cache.storage.direct_reads._THREADS", 2)
    with ActivationReader(store, TAP, batch_size=64, seed=0, read_ahead=8) as reader:
        for happened, times in ((began, 2), (planned, 8)):
            assert all(happened.acquire(timeout=60) for _ in range(times))
        np.testing.assert_array_equal(reader.batch(50), expected[0])
    of_dropped = [part for part in blocks if any(part.base is rows for rows in batches[:8])]
    assert len(of_dropped) == 2


@pytest.mark.parametrize("place", [0, 15, 16, 100, 255, 256, 259])
def test_every_byte_of_a_block_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int):
    """256 bytes of rows, summed in pieces of 16, and the 4 of their checksum."""
    monkeypatch.setattr("activation_cache.storage.direct_reads._PIECE_BYTES", 16)
    store = write_store(tmp_path, make_manifest(rows=ROWS, width=WIDTH))
    np.testing.assert_array_equal(
        np.sort(row_numbers(read(store, [0], batch_size=ROWS, seed=0)[0])), np.arange(ROWS)
    )
    shard = tmp_path / TAP.name / "c" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[place] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=f"{shard} is damaged.*checksum of chunk 0"):
        read(store, [0], batch_size=ROWS, seed=0)

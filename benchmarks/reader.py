"""The reader with full shuffling against the disk's own sequential rate.

    python -m benchmarks.reader [--gigabytes 4] [--folder .]

Three ways take turns over the same store, whose pages the kernel is asked to forget before each:
its files one after the other in 8 MiB reads, by as many threads as the reader has; batches in
training order; and the same with a step's worth of waiting between them, whose time spent waiting
for a batch is what `input_wait_fraction` is made of.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from activation_cache.layout import bucket_rows
from activation_cache.manifest import Manifest
from activation_cache.reader import ActivationReader
from activation_cache.store import Store
from benchmarks.measure import interleaved, prepare
from tests.stores import TAP, make_manifest, write_store

logger = logging.getLogger("reader")

WIDTH, BATCH = 2304, 4096  # Gemma 2 2B's residual stream, Gemma Scope's batch
PIECE = 8 * 2**20
THREADS = 8


def _rows(start: int, stop: int, width: int, dtype: str = "float32") -> np.ndarray:
    """Noise that doesn't compress, made as fast as the disk takes it."""
    rng = np.random.default_rng(start)
    return rng.standard_normal((stop - start, width), dtype=np.float32)


def _manifest(rows: int) -> Manifest:
    manifest = make_manifest(rows=rows, width=WIDTH, shuffle_rows=65_536, block_rows=256)
    assert manifest.shuffling.bucket_rows == bucket_rows(shuffle_rows=65_536, block_rows=256)
    return manifest


def _files(folder: Path) -> list[Path]:
    """The shards of the store's tap."""
    return sorted(path for path in (folder / TAP.name).rglob("*") if path.stat().st_size > 2**20)


def _forget(folder: Path) -> None:
    """Ask the kernel to drop what it keeps of the files, so that they come from the disk."""
    for path in _files(folder):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _sequential(path: Path) -> int:
    buffer, total = bytearray(PIECE), 0
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return total


def measure(folder: Path, *, gigabytes: float, rounds: int) -> dict[str, Any]:
    """Write a store of that size below `folder`, and time the ways to read it."""
    rows = max(BATCH * 8, int(gigabytes * 1e9) // (4 * WIDTH) // BATCH * BATCH)
    store = write_store(folder, _manifest(rows), make_rows=_rows)
    files, step_bytes = _files(folder), 4 * WIDTH * BATCH
    size = sum(path.stat().st_size for path in files)

    def sequential() -> None:
        _forget(folder)
        with ThreadPoolExecutor(THREADS) as pool:
            assert sum(pool.map(_sequential, files)) == size

    times = interleaved(
        {"files in order": sequential, "batches, shuffled": lambda: _batches(store, rows, folder)},
        rounds=rounds,
    )
    disk = size / times["files in order"].median
    reader = step_bytes * (rows // BATCH) / times["batches, shuffled"].median
    # Where steps take 1.25 times what the disk needs for a batch, the disk can keep up.
    waited = _wait_fraction(store, rows, folder, seconds=1.25 * step_bytes / disk)
    return {
        "bytes": size,
        "times": times,
        "disk_gb_per_s": disk / 1e9,
        "reader_gb_per_s": reader / 1e9,
        "ratio": reader / disk,
        "input_wait_fraction": waited,
    }


def _batches(store: Store, rows: int, folder: Path) -> None:
    _forget(folder)
    with ActivationReader(store, TAP, batch_size=BATCH, seed=0) as reader:
        for step in range(rows // BATCH):
            reader.batch(step)


def _wait_fraction(store: Store, rows: int, folder: Path, *, seconds: float) -> float:
    """The share of a run's time spent waiting for batches, its steps taking so many seconds."""
    _forget(folder)
    waited, start = 0.0, 0.0
    with ActivationReader(store, TAP, batch_size=BATCH, seed=1) as reader:
        for step in range(rows // BATCH):
            asked = time.perf_counter()
            reader.batch(step)
            if step == 0:  # a run's first batch is waited for whatever the disk
                start = time.perf_counter()
            else:
                waited += time.perf_counter() - asked
            time.sleep(seconds)
    return waited / (time.perf_counter() - start)


def main() -> None:
    """Log the rates and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure")
    sizes = parser.parse_args()
    prepare()
    logger.setLevel(logging.INFO)
    with tempfile.TemporaryDirectory(dir=sizes.folder) as scratch:
        found = measure(Path(scratch), gigabytes=sizes.gigabytes, rounds=sizes.rounds)
    for name, times in found.pop("times").items():
        logger.info("%-20s %s", name, times)
    for name, value in found.items():
        logger.info("%-20s %.4g", name, value)


if __name__ == "__main__":
    main()

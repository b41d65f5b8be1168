"""The reader with full shuffling against the disk's own sequential rate.

    python -m benchmarks.reader [--gigabytes 4] [--rounds 5] [--folder .] [--width 64]
        [--dtype int8]

Two ways take turns over the same store, whose pages the kernel is asked to forget before each: its
files one after the other in 8 MiB reads, by as many threads as the reader has, and batches in
training order. Then the share of its time that a run waits for batches, what `input_wait_fraction`
says of its steps: with pauses for steps, of 1.25 times what the disk needs for a batch, as often as
there are rounds; and of a training run on the store, whose SAE of `--width` latents takes as long
for a step as it takes here. A run's first batch is waited for whatever the disk, so both begin with
the second. `--dtype` is of the store; the reader's rate and processor seconds are of rows in
float32, whatever they take on the disk.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np

from activation_cache.config import RowDtype
from activation_cache.storage.arrays import bucket_rows
from activation_cache.store.manifest import Manifest
from activation_cache.store.reader import ActivationReader
from activation_cache.store.store import Store
from activation_cache.store.tap_array import host_dtype
from benchmarks.support.measure import interleaved, prepare
from sae_train.runs.metrics_file import read_metrics
from sae_train.train.loop import train
from tests.support.configs import make_config
from tests.support.stores import TAP, make_manifest, write_store

logger = logging.getLogger("reader")

WIDTH, BATCH = 2304, 4096  # Gemma 2 2B's residual stream, Gemma Scope's batch
PIECE = 8 * 2**20
THREADS = 8
SHUFFLE_ROWS, BLOCK_ROWS = 65_536, 256
PACE = 1.25  # of the disk's own: it can keep up


def _rows(start: int, stop: int, width: int, dtype: RowDtype = "float32") -> np.ndarray:
    """Noise that doesn't compress, made as fast as the disk takes it."""
    rng = np.random.default_rng(start)
    rows = rng.standard_normal((stop - start, width), dtype=np.float32)
    return rows.astype(jnp.dtype(host_dtype(dtype)), copy=False)


def _manifest(rows: int, dtype: RowDtype) -> Manifest:
    cut = {"shuffle_rows": SHUFFLE_ROWS, "block_rows": BLOCK_ROWS}
    manifest = make_manifest(rows=rows, width=WIDTH, dtype=dtype, **cut)
    assert manifest.shuffling.bucket_rows == bucket_rows(**cut)
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


def measure(
    folder: Path, *, gigabytes: float, rounds: int, width: int = 64, dtype: RowDtype = "float32"
) -> dict[str, Any]:
    """Write a store of so many rows below `folder`, and time the ways to read it.

    Args:
        gigabytes: of the rows in float32.
        width: latents of the SAE that is trained.
        dtype: of the store.
    """
    rows = max(BATCH * 8, int(gigabytes * 1e9) // (4 * WIDTH) // BATCH * BATCH)
    store = write_store(folder, _manifest(rows, dtype), make_rows=_rows)
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
    began = time.process_time()
    _batches(store, rows, folder)
    processor = time.process_time() - began
    disk = size / times["files in order"].median
    reader = step_bytes * (rows // BATCH) / times["batches, shuffled"].median
    seconds = size / rows * BATCH / disk
    paced = [_waited(store, rows, folder, seconds=PACE * seconds) for _ in range(rounds)]
    low, median, high = np.quantile(paced, [0.25, 0.5, 0.75])
    waited, step = _trained(store, folder, width=width)
    return {
        "bytes": size,
        "times": times,
        "disk_gb_per_s": disk / 1e9,
        "reader_gb_per_s": reader / 1e9,
        "ratio": reader / disk,
        "processor_seconds_per_gb": processor / (4e-9 * WIDTH * rows),
        "input_wait_fraction": float(median),
        "input_wait_fraction_quartiles": [float(low), float(high)],
        "trained_input_wait_fraction": waited,
        "trained_step_over_disk": step / seconds,
    }


def _batches(store: Store, rows: int, folder: Path) -> None:
    _forget(folder)
    with ActivationReader(store, TAP, batch_size=BATCH, seed=0) as reader:
        for step in range(rows // BATCH):
            reader.batch(step)


def _waited(store: Store, rows: int, folder: Path, *, seconds: float) -> float:
    """The share of a run's time spent waiting for batches, its steps taking so many seconds."""
    _forget(folder)
    waited = 0.0
    with ActivationReader(store, TAP, batch_size=BATCH, seed=1) as reader:
        reader.batch(0)
        start = time.perf_counter()
        for step in range(1, rows // BATCH):
            time.sleep(seconds)
            asked = time.perf_counter()
            reader.batch(step)
            waited += time.perf_counter() - asked
        return waited / (time.perf_counter() - start)


def _trained(store: Store, folder: Path, *, width: int) -> tuple[float, float]:
    """The same share as metrics.jsonl has it, of a run of one epoch, and the seconds of a step."""
    every, found = 5, store.manifest.dtype
    with tempfile.TemporaryDirectory(dir=folder.parent) as output:
        config = make_config(
            rows=store.rows,
            cache_path=str(folder),
            output=output,
            width=width,
            checkpoint={"every_steps": 10**9},
            batch_size=BATCH,
            tokens=store.rows,
            log_every_steps=every,
        )
        cut = {"shuffle_rows": SHUFFLE_ROWS, "block_rows": BLOCK_ROWS, "dtype": found}
        config = config.model_copy(update={"cache": config.cache.model_copy(update=cut)})
        _forget(folder)
        train(config)
        lines = read_metrics(Path(output))
    # The first five steps' time is that of compiling, the last line's steps may be fewer.
    lines = [line for line in lines if line["step"] % every == 0][1:]
    seconds = [every * BATCH / line["tokens_per_second"] for line in lines]
    waited = np.dot(seconds, [line["input_wait_fraction"] for line in lines]) / sum(seconds)
    return float(waited), sum(seconds) / (every * len(lines))


def main() -> None:
    """Log the rates and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure")
    parser.add_argument("--width", type=int, default=64, help="latents of the SAE trained")
    parser.add_argument("--dtype", choices=get_args(RowDtype), default="float32")
    sizes = parser.parse_args()
    prepare()
    logger.setLevel(logging.INFO)
    with tempfile.TemporaryDirectory(dir=sizes.folder) as scratch:
        found = measure(
            Path(scratch) / "store",
            gigabytes=sizes.gigabytes,
            rounds=sizes.rounds,
            width=sizes.width,
            dtype=sizes.dtype,
        )
    for name, times in found.pop("times").items():
        logger.info("%-32s %s", name, times)
    for name, value in found.items():
        logger.info("%-32s %s", name, f"{value:.4g}" if isinstance(value, float) else value)


if __name__ == "__main__":
    main()

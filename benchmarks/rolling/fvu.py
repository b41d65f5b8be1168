"""What the window of a rolling store does to an SAE: FVU and L0 for several windows and seeds.

    python -m benchmarks.rolling.fvu CONFIG STORE FOLDER --windows 4 16 --bucket-rows 4096

STORE is a finished store of CONFIG. Its rows are written again in FOLDER in buckets and blocks of
the sizes asked for, as a harvest with these sizes would have written them. On that store one SAE
is trained for each seed and window, and for the order of a whole store, on every row once; FVU
and L0 are those over a sample of all rows. docs/results.md has what it printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np

from activation_cache.storage.arrays import bucket_rows
from activation_cache.storage.records import write_record
from activation_cache.store.manifest import Manifest
from activation_cache.store.order import bucket_order, sequence_order
from activation_cache.store.rolling import RollingWindow
from activation_cache.store.store import MANIFEST_FILE, Store, open_store
from activation_cache.store.writer import Bucket, BucketWriter
from sae_train.checkpoint.trained import load_trained
from sae_train.config.file import load_config, with_values
from sae_train.config.run import Config
from sae_train.inference.fold import fold
from sae_train.train import loop
from sae_train.train.opened_store import OpenedStore

_SAMPLE = 8  # FVU is of every so many-th row
_ROWS = 8192  # of them at a time


def rebucketed(store: Store, folder: Path, *, rows_in_bucket: int, block_rows: int) -> Store:
    """A store of the same rows in buckets and blocks of other sizes."""
    if (folder / MANIFEST_FILE).exists():
        return open_store(folder)
    old = store.manifest
    shuffling = old.shuffling.model_copy(
        update={
            "shuffle_rows": rows_in_bucket,
            "bucket_rows": bucket_rows(shuffle_rows=rows_in_bucket, block_rows=block_rows),
            "block_rows": block_rows,
        }
    )
    manifest = old.model_copy(update={"shuffling": shuffling})
    found = store.provenance(start=0, stop=store.rows)
    order = sequence_order(sequences=store.tokens.num_harvestable, seed=shuffling.seed)
    places = order.inverse(found.sequence.astype(np.int64))
    harvested = np.lexsort((found.position, places))  # stored rows, as they were harvested
    taps = {tap: store.read(tap, start=0, stop=store.rows) for tap in store.taps}
    with BucketWriter(folder, manifest) as writer:
        for number in range(manifest.num_buckets):
            span = manifest.bucket_span(number)
            shuffle = bucket_order(rows=len(span), seed=shuffling.seed, bucket=number)
            chosen = harvested[span.start + shuffle.inverse(np.arange(len(span)))]
            rows = {tap: values[chosen] for tap, values in taps.items()}
            where = found.sequence[chosen], found.position[chosen]
            writer.submit(Bucket(number, rows, *where))
    (folder / "tokens").symlink_to((store.path / "tokens").resolve())
    write_record(folder / MANIFEST_FILE, manifest)
    return open_store(folder)


def windowed(store: Store, window: int) -> Store:
    """The same store, to be read in the order of a rolling one."""
    manifest: Manifest = store.manifest.model_copy(update={"window": window})
    return dataclasses.replace(store, manifest=manifest)


def opening(store: Store) -> Callable[..., object]:
    """What the loop opens instead of the config's store: this one, whose buckets are all there."""

    @contextmanager
    def opened(configs: Sequence[Config], *, stop: Callable[[], bool]) -> Iterator[OpenedStore]:
        train, window = configs[0].train, None
        if store.manifest.window is not None:
            window = RollingWindow(
                store,
                seed=train.order_seed,
                batch_size=train.batch_size,
                steps=train.steps,
                supply=lambda reading, stop: None,
            )
        yield OpenedStore(store, window, stop)

    return opened


def measured(folder: Path, store: Store, config: Config) -> tuple[float, float]:
    """FVU and L0 of a trained SAE over a sample of the store's rows."""
    sae, rows = (
        fold(load_trained(folder)),
        store.read(config.sae.tap, start=0, stop=store.rows)[::_SAMPLE],
    )
    rows = rows.astype(np.float32)
    error = active = 0.0
    for start in range(0, len(rows), _ROWS):
        x = rows[start : start + _ROWS]
        latents = sae.encode(x)
        error += float(np.square(x - np.asarray(sae.decode(latents)), dtype=np.float64).sum())
        active += float((np.asarray(latents) > 0).sum())
    total = np.square(rows - rows.mean(axis=0), dtype=np.float64).sum()
    return error / float(total), active / len(rows)


def main() -> None:
    """Train all, print a row for each and then the means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("store", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--windows", type=int, nargs="+", default=(4, 16))
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--bucket-rows", type=int, default=4096)
    parser.add_argument("--block-rows", type=int, default=64)
    parser.add_argument("--width", type=int, default=512)
    arguments = parser.parse_args()
    store = rebucketed(
        open_store(arguments.store),
        arguments.folder / "store",
        rows_in_bucket=arguments.bucket_rows,
        block_rows=arguments.block_rows,
    )
    base = load_config(arguments.config)
    sys.stdout.write("| window | seed | FVU | L0 |\n| --- | --- | --- | --- |\n")
    for seed in arguments.seeds:
        for window in (None, *arguments.windows):
            output = arguments.folder / f"{window or 'whole'}_{seed}"
            values = {
                "output": str(output),
                "sae.width": arguments.width,
                "train.seed": seed,
                "train.tokens": store.rows // base.train.batch_size * base.train.batch_size,
            }
            config = with_values(base, values, source="benchmark")
            read = store if window is None else windowed(store, window)
            with mock.patch.object(loop, "opened_store", opening(read)):
                loop.train(config)
            fvu, l0 = measured(output, store, config)
            sys.stdout.write(f"| {window or 'whole store'} | {seed} | {fvu:.5f} | {l0:.2f} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

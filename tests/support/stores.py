"""Finished stores without a model, and fingerprints of folders."""

from __future__ import annotations

import hashlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from activation_cache.config import RowDtype, TextConfig
from activation_cache.gemma.taps import Tap
from activation_cache.storage.arrays import bucket_rows
from activation_cache.storage.records import FORMAT_VERSION, write_record
from activation_cache.store.manifest import Manifest, ModelEntry, ShufflingEntry, SiteEntry
from activation_cache.store.order import ALGORITHM
from activation_cache.store.store import MANIFEST_FILE, Store, open_store
from activation_cache.store.tap_array import host_dtype
from activation_cache.store.writer import Bucket, BucketWriter

TAP = Tap("resid_post", 1)


def make_manifest(
    *,
    rows: int,
    width: int = 8,
    dtype: RowDtype = "float32",
    shuffle_rows: int = 64,
    block_rows: int = 8,
    mean_squared_norm: float | None = 1.0,
) -> Manifest:
    """The manifest of a store with one tap, `TAP`, made of nothing in particular."""
    return Manifest(
        format_version=FORMAT_VERSION,
        model=ModelEntry(
            weights="tiny", revision=None, fingerprint="f" * 64, dtype="float32", num_layers=4
        ),
        text=TextConfig(source=["*.txt"], sequence_length=16, held_out_sequences=1),
        tokenizer_hash="0" * 64,
        token_hash="1" * 64,
        num_sequences=100,
        sites=[
            SiteEntry(
                site=TAP.site, layer=TAP.layer, width=width, mean_squared_norm=mean_squared_norm
            )
        ],
        rows=rows,
        dtype=dtype,
        sequences_per_batch=4,
        shuffling=ShufflingEntry(
            algorithm=ALGORITHM,
            seed=0,
            shuffle_rows=shuffle_rows,
            bucket_rows=bucket_rows(shuffle_rows=shuffle_rows, block_rows=block_rows),
            block_rows=block_rows,
        ),
    )


def numbered_rows(start: int, stop: int, width: int, dtype: RowDtype = "float32") -> np.ndarray:
    """Rows that say which they are: entry j of row i is i + j / 1000 (in float32, exact enough)."""
    rows = np.arange(start, stop, dtype=np.float32)[:, None]
    return (rows + np.arange(width, dtype=np.float32) / 1000).astype(jnp.dtype(host_dtype(dtype)))


def random_rows(start: int, stop: int, width: int, dtype: RowDtype = "float32") -> np.ndarray:
    """Rows to train on: Gaussian with an offset, mean squared norm about 2."""
    rows = [np.random.default_rng(row).standard_normal(width) for row in range(start, stop)]
    return ((np.stack(rows) + 1.0) / np.sqrt(width)).astype(jnp.dtype(host_dtype(dtype)))


def write_store(folder: Path, manifest: Manifest, *, make_rows=numbered_rows) -> Store:
    """Write a finished store with the rows that `make_rows` makes."""
    width = manifest.sites[0].width
    with BucketWriter(folder, manifest) as writer:
        for number in range(manifest.num_buckets):
            span = manifest.bucket_span(number)
            numbers = np.arange(span.start, span.stop, dtype=np.int32)
            rows = make_rows(span.start, span.stop, width, manifest.dtype)
            writer.submit(Bucket(number, {TAP: rows}, numbers, numbers))
    write_record(folder / MANIFEST_FILE, manifest)
    return open_store(folder)


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under a folder, by its path there."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }

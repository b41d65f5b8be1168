"""The manifest of a store, and how it is compared with a config.

The manifest is planned before the first row is harvested (`plan.json`) and written under its own
name when the last row is durable: a folder with a `manifest.json` is finished. It holds no time and
no path of the store, so that the same harvest into two folders gives the same bytes.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from activation_cache.config import (
    CacheConfig,
    Count,
    Dtype,
    MaxNormOverMedian,
    ModelConfig,
    NonNegative,
    PositiveCount,
    RollingConfig,
    RowDtype,
    Section,
    Seed,
    Site,
    SiteConfig,
    TextConfig,
)
from activation_cache.gemma.taps import Tap
from activation_cache.precision import Precision
from activation_cache.runtime.amounts import bytes_text
from activation_cache.runtime.errors import UserError
from activation_cache.store.tap_array import stored_row_bytes

_PROVENANCE_BYTES = 8  # a sequence and a position, each int32


class ModelEntry(Section):
    """The language model: its name, its fingerprint, the dtype it computed in.

    `precision` is that of its products: float32 where nothing is written.
    """

    weights: str
    revision: str | None
    fingerprint: str
    dtype: Dtype
    num_layers: PositiveCount
    precision: Annotated[Precision, Field(exclude_if=lambda own: own == "float32")] = "float32"


class SiteEntry(Section):
    """One tap; `mean_squared_norm` is that of the stored rows, None until all are written."""

    site: Site
    layer: Count
    width: PositiveCount
    mean_squared_norm: NonNegative | None = None

    @property
    def tap(self) -> Tap:
        """The tap of this entry."""
        return Tap(self.site, self.layer)


class ShufflingEntry(Section):
    """What the order of rows depends on; `bucket_rows` is `shuffle_rows` rounded up."""

    algorithm: str
    seed: Seed
    shuffle_rows: PositiveCount
    bucket_rows: PositiveCount
    block_rows: PositiveCount


class ImportedSource(Section):
    """Rows that were imported: a file's name, what of it was taken, how much, its sampled hash."""

    name: str
    column: str | None = None  # a tensor or a column of the file
    tap: str
    shape: list[Count]
    sha256: str


class ImportedEntry(Section):
    """Where the rows of an imported store are from.

    Source row `sequence * sequence_length + position` is the row with this provenance, counted
    through all files of a tap. The last `held_out_sequences` are in the store `held_out`.
    """

    sources: list[ImportedSource]
    sequence_length: PositiveCount
    held_out_sequences: Count
    in_sequences: bool  # were they given as sequences? Else they were cut into such


class OutlyingEntry(Section):
    """Rows that were dropped for their norm; `dropped` is None until all are written."""

    max_norm_over_median: MaxNormOverMedian
    dropped: Count | None = None


def _left_out(value: Any) -> bool:
    return value is None


class Manifest(Section):
    """Everything that a store's rows depend on.

    Of an imported store `model` and `text` are None, and the hashes empty without token ids.
    """

    format_version: int
    model: ModelEntry | None
    text: TextConfig | None
    imported: Annotated[ImportedEntry | None, Field(exclude_if=_left_out)] = None
    outlying: Annotated[OutlyingEntry | None, Field(exclude_if=_left_out)] = None
    tokenizer_hash: str
    token_hash: str
    num_sequences: PositiveCount
    sites: list[SiteEntry]
    rows: PositiveCount
    dtype: RowDtype
    sequences_per_batch: PositiveCount
    shuffling: ShufflingEntry
    # Buckets in a rolling store's window; `mean_squared_norm` is then that of the first window.
    window: Annotated[PositiveCount | None, Field(exclude_if=lambda own: own is None)] = None

    @property
    def num_buckets(self) -> int:
        """Shuffle buckets; the last may be short."""
        return -(-self.rows // self.shuffling.bucket_rows)

    def bucket_span(self, bucket: int) -> range:
        """The rows of one bucket."""
        size = self.shuffling.bucket_rows
        return range(bucket * size, min((bucket + 1) * size, self.rows))

    @property
    def first_window(self) -> range:
        """The buckets that the norms are of: the first window's, or all."""
        return range(min(self.window or self.num_buckets, self.num_buckets))

    @property
    def bucket_bytes(self) -> int:
        """Bytes of a whole bucket in the store: all taps, and where the rows came from."""
        block_rows = self.shuffling.block_rows
        row_bytes = sum(
            stored_row_bytes(self.dtype, width=entry.width, block_rows=block_rows)
            for entry in self.sites
        )
        return self.shuffling.bucket_rows * (row_bytes + _PROVENANCE_BYTES)


def window_buckets(rolling: RollingConfig, *, bucket_bytes: int) -> int:
    """The buckets in a rolling store's window.

    Raises:
        UserError: `rolling.bytes` doesn't hold a window of one bucket and the bucket after it.
    """
    if rolling.buckets is not None:
        return rolling.buckets
    assert rolling.bytes is not None
    window = rolling.bytes // bucket_bytes - 1
    if window < 1:
        raise UserError(
            f"cache.rolling.bytes is {bytes_text(rolling.bytes)}, and the smallest window and the "
            f"bucket after it take {bytes_text(2 * bucket_bytes)}: raise it, or lower "
            "cache.shuffle_rows"
        )
    return window


_HARVEST_OF_IMPORTED = (
    "cache.sites: the store was imported, and the config has sites to harvest. Leave out the "
    "section text and all of cache but path"
)
_NO_SITES = (
    "cache.sites: the store was harvested, and the config has none. Copy the sections model, text "
    "and cache from config.yaml of the store"
)


def first_difference(
    manifest: Manifest,
    *,
    model: ModelConfig | None = None,
    text: TextConfig | None = None,
    cache: CacheConfig | None = None,
    fingerprint: str | None = None,
) -> str | None:
    """The first config field that a store was not made with, in words; None if there is none.

    Weights are compared by `fingerprint` and not by name: a folder may have been moved since. An
    imported store has no field to compare; whether its rows are a model's, only its owner knows.
    """
    if manifest.imported is not None:
        return None if cache is None or cache.is_imported else _HARVEST_OF_IMPORTED
    if cache is not None and cache.is_imported:
        return _NO_SITES
    assert manifest.model is not None
    assert manifest.text is not None
    pairs: list[tuple[str, Any, Any]] = []
    if model is not None:
        pairs += [("model.dtype", manifest.model.dtype, model.dtype)]
        if model.dtype == "float32" and model.precision != "auto":
            pairs += [("model.precision", manifest.model.precision, model.precision)]
    if text is not None:
        stored, asked = manifest.text.model_dump(), text.model_dump()
        pairs += [(f"text.{name}", stored[name], asked[name]) for name in stored]
    if cache is not None:
        shuffling = manifest.shuffling
        taps = sorted(entry.tap.name for entry in manifest.sites)
        pairs += [
            ("cache.sites", taps, _tap_names(cache.sites, manifest.model.num_layers)),
            ("cache.tokens", manifest.rows, cache.tokens),
            ("cache.dtype", manifest.dtype, cache.dtype),
            ("cache.shuffle_rows", shuffling.shuffle_rows, cache.shuffle_rows),
            ("cache.block_rows", shuffling.block_rows, cache.block_rows),
            ("cache.seed", shuffling.seed, cache.seed),
            ("cache.rolling, its window in buckets", manifest.window, _window(manifest, cache)),
            (
                "cache.sequences_per_batch",
                manifest.sequences_per_batch,
                cache.sequences_per_batch,
            ),
            (
                "cache.max_norm_over_median",
                manifest.outlying and manifest.outlying.max_norm_over_median,
                cache.max_norm_over_median,
            ),
        ]
    for name, stored_value, asked_value in pairs:
        if stored_value != asked_value:
            return f"{name}: the store has {stored_value!r}, the config says {asked_value!r}"
    if fingerprint not in (None, manifest.model.fingerprint):
        return (
            f"model.weights: the store was made from {manifest.model.weights} with fingerprint "
            f"{manifest.model.fingerprint[:16]}, the config's weights have {str(fingerprint)[:16]}"
        )
    return None


def _window(manifest: Manifest, cache: CacheConfig) -> int | None:
    if cache.rolling is None:
        return None
    return window_buckets(cache.rolling, bucket_bytes=manifest.bucket_bytes)


def _tap_names(sites: list[SiteConfig], num_layers: int) -> list[str]:
    return sorted(
        Tap(entry.site, layer).name
        for entry in sites
        for layer in (range(num_layers) if entry.layers == "all" else entry.layers)
    )

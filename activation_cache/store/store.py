"""A finished activation store: opening it, what it holds, reading rows by number.

Training reads through `reader.ActivationReader`. Legend: N rows, D width of a tap.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int32

from activation_cache.config import CacheConfig, ModelConfig, RowDtype, TextConfig
from activation_cache.gemma.taps import Tap
from activation_cache.runtime.errors import UserError
from activation_cache.storage.arrays import ArrayLayout, read_rows
from activation_cache.storage.files import AnyPath, StoragePath, read_json, storage_path
from activation_cache.storage.records import read_record
from activation_cache.storage.row_range import Segment
from activation_cache.store.manifest import Manifest, SiteEntry, first_difference
from activation_cache.store.order import BlockOrder, RollingOrder
from activation_cache.store.tap_array import Packing, array_layout, packing_of
from activation_cache.text.token_table import TokenTable, open_tokens

MANIFEST_FILE = "manifest.json"
PLAN_FILE = "plan.json"  # the manifest of a harvest that isn't finished, without norms
TOKENS_FOLDER = "tokens"
HELD_OUT_FOLDER = "held_out"  # the store of the rows of an import that are for evaluation
PROVENANCE = ("sequence", "position")


def entry_of(path: StoragePath, manifest: Manifest, tap: Tap) -> SiteEntry:
    """A tap's entry; raises `UserError` if the store doesn't have the tap."""
    entry = next((entry for entry in manifest.sites if entry.tap == tap), None)
    if entry is None:
        names = ", ".join(entry.tap.name for entry in manifest.sites)
        raise UserError(
            f"the store at {path} has no {tap.name}: it has {names}. Choose one of those, or "
            "harvest a store with this one in cache.sites."
        )
    return entry


def tap_layout(path: StoragePath, manifest: Manifest, tap: Tap) -> ArrayLayout:
    """The array of one tap; raises `UserError` if the store doesn't have the tap."""
    entry = entry_of(path, manifest, tap)
    return array_layout(
        path / tap.name,
        rows=manifest.rows,
        width=entry.width,
        dtype=manifest.dtype,
        block_rows=manifest.shuffling.block_rows,
        bucket_rows=manifest.shuffling.bucket_rows,
    )


def provenance_layout(path: StoragePath, manifest: Manifest, name: str) -> ArrayLayout:
    """One of the two arrays of `Provenance`, int32 [N]; a shard per bucket."""
    return ArrayLayout(
        path=path / name,
        shape=(manifest.rows,),
        dtype="int32",
        chunk_rows=manifest.shuffling.block_rows,
        shard_rows=manifest.shuffling.bucket_rows,
    )


@dataclass(frozen=True)
class TapInfo:
    """One tap of a store: width D, mean of |x|² over its rows, dtype of the rows."""

    width: int
    mean_squared_norm: float
    dtype: RowDtype


@dataclass(frozen=True)
class Provenance:
    """For each row, its sequence in the token table and its position there (0 is BOS)."""

    sequence: Int32[np.ndarray, " N"]
    position: Int32[np.ndarray, " N"]


@dataclass(frozen=True)
class Store:
    """A finished store, or a rolling one whose first window was harvested; made by `open_store`.

    `identity` is the checksum in its manifest: stores with the same identity hold the same rows in
    the same order.
    """

    path: StoragePath
    manifest: Manifest
    identity: str

    @property
    def rows(self) -> int:
        """N, the number of rows of each tap."""
        return self.manifest.rows

    @property
    def taps(self) -> tuple[Tap, ...]:
        """The taps it has."""
        return tuple(entry.tap for entry in self.manifest.sites)

    @cached_property
    def tokens(self) -> TokenTable:
        """The token table, held-out sequences included.

        Raises:
            UserError: it is damaged, or the rows were imported without token ids.
        """
        if not self.manifest.token_hash:
            raise UserError(
                f"the store at {self.path} was imported without token ids: import its rows again "
                "with them, as docs/import.md says, to read what the rows are of"
            )
        table = open_tokens(self.path / TOKENS_FOLDER)
        if table.summary.token_hash != self.manifest.token_hash:
            raise UserError(
                f"{table.path} has token hash {table.summary.token_hash} and the store was made "
                f"from {self.manifest.token_hash}: restore the folder from a copy."
            )
        return table

    def order(self, *, seed: int) -> BlockOrder | RollingOrder:
        """The order in which training reads the rows."""
        shuffling, window = self.manifest.shuffling, self.manifest.window
        if window is None:
            return BlockOrder(rows=self.rows, block_rows=shuffling.block_rows, seed=seed)
        return RollingOrder(
            rows=self.rows,
            block_rows=shuffling.block_rows,
            bucket_rows=shuffling.bucket_rows,
            window=window,
            seed=seed,
        )

    @cached_property
    def held_out(self) -> Store:
        """Of an imported store the one of its held-out rows; raises `UserError` if it is damaged.

        They lie in the order in which they were given.
        """
        return open_store(self.path / HELD_OUT_FOLDER)

    def layout(self, tap: Tap) -> ArrayLayout:
        """A tap's array; raises `UserError` if the store doesn't have the tap."""
        return tap_layout(self.path, self.manifest, tap)

    def tap_info(self, tap: Tap) -> TapInfo:
        """What the store knows of a tap; raises `UserError` if it doesn't have the tap."""
        entry = entry_of(self.path, self.manifest, tap)
        assert entry.mean_squared_norm is not None
        return TapInfo(entry.width, entry.mean_squared_norm, self.manifest.dtype)

    def packing(self, tap: Tap) -> Packing | None:
        """How a tap's rows are packed; None if its array has them as they are."""
        block_rows = self.manifest.shuffling.block_rows
        width = entry_of(self.path, self.manifest, tap).width
        return packing_of(self.manifest.dtype, block_rows=block_rows, width=width)

    def read(self, tap: Tap, *, start: int, stop: int) -> Float[np.ndarray, "N D"]:
        """Rows `[start, stop)` in stored order, those of int8 in float32.

        Raises:
            UserError: names a damaged file.
        """
        layout, packing = self.layout(tap), self.packing(tap)
        segments = [Segment(start, stop - start)]
        if packing is None:
            return read_rows(layout.open(), layout, segments)
        return packing.read(segments, lambda blocks: read_rows(layout.open(), layout, blocks))

    def provenance(self, *, start: int, stop: int) -> Provenance:
        """Where rows `[start, stop)` came from; raises `UserError` naming a damaged file."""
        layouts = [provenance_layout(self.path, self.manifest, name) for name in PROVENANCE]
        segments = [Segment(start, stop - start)]
        return Provenance(*(read_rows(layout.open(), layout, segments) for layout in layouts))

    def names_weights(self, model: ModelConfig) -> bool:
        """Does the store's manifest name its weights as this section does, or no weights?"""
        stored = self.manifest.model
        return stored is None or (model.weights, model.revision) == (
            stored.weights,
            stored.revision,
        )

    def check_matches(
        self,
        *,
        model: ModelConfig | None = None,
        text: TextConfig | None = None,
        cache: CacheConfig | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """Check that the store was made with these sections of a config.

        Weights may have moved since the harvest, so their name isn't compared. Where it differs
        (`names_weights`), pass the fingerprint of the config's weights, or call
        `harvest.matching_store.open_matching_store`, which does.

        Raises:
            UserError: names the first field that differs, and both values.
        """
        difference = first_difference(
            self.manifest, model=model, text=text, cache=cache, fingerprint=fingerprint
        )
        if difference is not None:
            raise UserError(
                f"the store at {self.path} was made with another config. {difference}. Change the "
                "config back, or choose another cache.path and harvest (nothing was changed)."
            )


def open_store(path: AnyPath) -> Store:
    """Open a finished store.

    Raises:
        UserError: there is none, its harvest hasn't finished, or its manifest is damaged.
    """
    folder = storage_path(path)
    if not (folder / MANIFEST_FILE).exists():
        begun = (folder / PLAN_FILE).exists()
        raise UserError(
            f"{folder} has no {MANIFEST_FILE}: "
            + (
                "its harvest or import has not finished"
                if begun
                else "there is no activation store"
            )
            + ". Run `sae harvest` with this config first (`sae import` for rows of your own), or "
            "say with cache.path=FOLDER where the store has moved."
        )
    manifest = read_record(folder / MANIFEST_FILE, Manifest)
    # The checksum as it was written. Computed again, that of an older manifest would cover the
    # defaults of fields added since, and runs trained on the store would take it for another.
    identity = read_json(folder / MANIFEST_FILE)["checksum"]
    return Store(folder, manifest, identity)

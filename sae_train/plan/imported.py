"""What an imported store tells a plan: its size and its rows' width and dtype are in its manifest.

There is no model whose forward passes cost anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from activation_cache.store.store import (
    PROVENANCE,
    Store,
    open_store,
    provenance_layout,
    tap_layout,
)
from activation_cache.text.token_table import count_layout, token_layout
from sae_train.config.run import Config
from sae_train.plan.work import HarvestWork, StorePlan

NO_HARVEST = HarvestWork(layers=0, positions=0, flops=0.0, weight_bytes=0)


@dataclass(frozen=True)
class ImportedRows:
    """The store of a config whose rows were imported."""

    store: Store

    @classmethod
    def of(cls, config: Config) -> ImportedRows:
        """Open it; raises `UserError` if it isn't there, or was harvested."""
        store = open_store(config.cache.path)
        store.check_matches(cache=config.cache)
        return cls(store)

    def width(self, config: Config) -> int:
        """Of the rows that a run reads; raises `UserError` if the store hasn't got them."""
        return self.store.tap_info(config.sae.tap).width

    def with_dtype(self, configs: Sequence[tuple[str, Config]]) -> list[tuple[str, Config]]:
        """The same runs, their configs saying what dtype the rows have."""
        manifest = self.store.manifest
        dtype = {"dtype": manifest.dtype, "block_rows": manifest.shuffling.block_rows}
        return [
            (name, one.model_copy(update={"cache": one.cache.model_copy(update=dtype)}))
            for name, one in configs
        ]

    @property
    def plan(self) -> StorePlan:
        """What is on the disk, without the held-out rows."""
        path, manifest = self.store.path, self.store.manifest
        layouts = {tap.name: tap_layout(path, manifest, tap) for tap in self.store.taps}
        imported = manifest.imported
        assert imported is not None
        tokens = 0
        if manifest.token_hash:
            table = token_layout(path, manifest.num_sequences, imported.sequence_length)
            tokens = table.stored_bytes + count_layout(path, manifest.num_sequences).stored_bytes
        return StorePlan(
            rows=manifest.rows,
            rows_on_disk=manifest.rows,
            window=None,
            row_bytes={
                name: -(-layout.row_bytes // layout.packs) for name, layout in layouts.items()
            },
            tap_bytes={name: layout.stored_bytes for name, layout in layouts.items()},
            provenance_bytes=sum(
                provenance_layout(path, manifest, name).stored_bytes for name in PROVENANCE
            ),
            token_bytes=tokens,
            buckets=manifest.num_buckets,
            host_bytes=0,
        )

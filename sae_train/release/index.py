"""saes.json: every SAE of a released tree, and which is canonical in its cell.

A cell is a site, a layer and a width; its SAEs differ in sparsity or seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from activation_cache.runtime.version import package_version
from sae_train.config.run import Config

INDEX = "saes.json"
FORMAT_VERSION = 1
CANONICAL_L0 = 100  # Gemma Scope's canonical SAE of a cell is the one with the nearest L0


@dataclass(frozen=True)
class Entry:
    """One SAE of the tree, as saes.json has it; None for what wasn't measured.

    Attributes:
        folder: relative to the folder of each format.
        cell: the part of `folder` that SAEs of one site, layer and width share.
        canonical: its L0 is nearest to `CANONICAL_L0` among the cell's evaluated SAEs.
        run: the run's folder, relative to the sweep's.
        sequences: the held-out sequences it was measured on.
        files: size in bytes, by path in the tree.
    """

    folder: str
    cell: str
    canonical: bool
    run: str
    site: str
    layer: int
    width: int
    architecture: str
    hook_name: str
    l0: float | None
    fvu: float | None
    fvu_without_outlying: float | None
    fvu_median_token: float | None
    delta_loss: float | None
    loss_recovered: float | None
    alive_fraction: float | None
    sequences: int | None
    sparsity: dict[str, Any]
    tokens: int
    steps: int
    seed: int
    fingerprint: str
    files: dict[str, int]

    @property
    def formats(self) -> list[str]:
        """The formats it is written in."""
        return sorted({file.partition("/")[0] for file in self.files})


def with_canonical(entries: Sequence[Entry]) -> list[Entry]:
    """The entries, the canonical one of each cell marked; of two equally near the sparser."""
    best: dict[str, tuple[float, float, str]] = {}
    for entry in entries:
        if entry.l0 is not None:
            key = (abs(entry.l0 - CANONICAL_L0), entry.l0, entry.folder)
            best[entry.cell] = min(best.get(entry.cell, key), key)
    chosen = {folder for _, _, folder in best.values()}
    return [dataclasses.replace(entry, canonical=entry.folder in chosen) for entry in entries]


def index(config: Config, entries: Sequence[Entry]) -> dict[str, Any]:
    """The content of saes.json."""
    return {
        "format_version": FORMAT_VERSION,
        "name": config.name,
        "model": config.model.weights,
        "software": f"open-gemma-scope {package_version()}",
        # As SAELens' `layer_12/width_16k/canonical`.
        "canonical": {f"{e.cell}/canonical": e.folder for e in entries if e.canonical},
        "saes": [dataclasses.asdict(entry) for entry in entries],
    }

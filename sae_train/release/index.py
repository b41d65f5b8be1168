"""saes.json: every SAE of a released tree, and which of its cell is the canonical one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from activation_cache.runtime.version import package_version
from sae_train.config.run import Config

INDEX = "saes.json"
FORMAT_VERSION = 1
CANONICAL_L0 = 100  # Gemma Scope's canonical SAEs are those of their cell nearest to it


@dataclass(frozen=True)
class Entry:
    """One SAE of the tree, as saes.json has it; None what wasn't measured.

    Attributes:
        folder: below the folder of each format.
        cell: the part of it that SAEs of one site, layer and width share.
        run: the run's folder, relative to the sweep's.
        files: bytes, by path in the tree.
        canonical: of its cell's measured SAEs the one whose L0 is nearest to 100.
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
    delta_loss: float | None
    loss_recovered: float | None
    alive_fraction: float | None
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
    """Each cell's SAE whose L0 is nearest to 100 marked; of two as near the sparser one."""
    best: dict[str, tuple[float, float, str]] = {}
    for entry in entries:
        if entry.l0 is not None:
            key = (abs(entry.l0 - CANONICAL_L0), entry.l0, entry.folder)
            best[entry.cell] = min(best.get(entry.cell, key), key)
    chosen = {folder for _, _, folder in best.values()}
    return [dataclasses.replace(entry, canonical=entry.folder in chosen) for entry in entries]


def index(config: Config, entries: Sequence[Entry]) -> dict[str, Any]:
    """The JSON object."""
    return {
        "format_version": FORMAT_VERSION,
        "name": config.name,
        "model": config.model.weights,
        "software": f"open-gemma-scope {package_version()}",
        # As SAELens' `layer_12/width_16k/canonical`.
        "canonical": {f"{e.cell}/canonical": e.folder for e in entries if e.canonical},
        "saes": [dataclasses.asdict(entry) for entry in entries],
    }

"""A suite of SAEs as one config: its cells, their names, and the stores they read.

A cell is one SAE to train: what kind, where, how wide, how sparse. Folders are named as the
released suites are. Gemma Scope 2's names have a label for the sparsity. Gemma Scope's have the
measured L0, so a run is named after its sparsity setting until it is released. docs/suites.md has
both.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from activation_cache.config import CacheConfig, MeshConfig, Site, SiteConfig
from activation_cache.gemma.config import GemmaConfig
from activation_cache.gemma.taps import Tap, check_tap
from activation_cache.runtime.errors import UserError
from launch.config.job import Job
from launch.config.sweep import CellsConfig, Kind, SweepConfig
from sae_train.release.suite_names import GEMMA_SCOPE_SITES, Tree, width_name

# What transcoders read: Gemma Scope's without the norm's gain, Gemma Scope 2's with it.
_TRANSCODERS_READ: dict[Tree, Site] = {
    "gemma_scope": "mlp_in_normalized",
    "gemma_scope_2": "mlp_in",
}
_SPECIAL_TOKENS = 3  # BOS, EOS and padding, which no store of the embedding holds

_GEMMA_SCOPE_2_SITES: dict[str, str] = {
    "resid_post": "resid_post",
    "mlp_out": "mlp_out",
    "attn_out_prelinear": "attn_out",
}


@dataclass(frozen=True)
class Cell:
    """One SAE of a suite.

    Attributes:
        site, layer: of an SAE what is read; a transcoder, whose site follows from the tree, has
            no site here, an SAE of the embedding neither.
        coefficient, target, label: one of λ and L0 is given; a target has a label.
        affine: a transcoder with an affine skip.
    """

    kind: Kind
    site: Site | None
    layer: int | None
    width: int
    tokens: int
    coefficient: float | None
    target: int | None
    label: str | None
    seed: int
    affine: bool
    mesh: MeshConfig
    tree: Tree
    folder_suffix: str = ""

    @property
    def folder(self) -> str:
        """The run's folder, relative to the suite's."""
        if self.tree == "gemma_scope_2":
            return self._gemma_scope_2()
        return f"{self._gemma_scope_cell()}/{self._sparsity()}"

    @property
    def tap(self) -> Tap:
        """The tap that is read."""
        if self.kind == "embedding":
            return Tap("embedding", 0)
        assert self.layer is not None
        return Tap(self.site or _TRANSCODERS_READ[self.tree], self.layer)

    @property
    def taps(self) -> tuple[Tap, ...]:
        """The tap that is read and, for a transcoder, the one that is predicted."""
        if self.kind != "transcoder":
            return (self.tap,)
        return self.tap, Tap("mlp_out", self.tap.layer)

    def settings(self) -> dict[str, Any]:
        """The settings of this cell's run that differ from the suite's, by dotted key."""
        sparsity = (
            {"train.sparsity.coefficient": self.coefficient}
            if self.target is None
            else {"train.sparsity.target": float(self.target)}
        )
        transcoder = {
            "sae.target": "mlp_out",
            # Not published for Gemma Scope 2, whose models' MLPs may put out a hundred times what
            # they read: docs/suites.md.
            "sae.target_scale": "input" if self.tree == "gemma_scope" else "own",
            "sae.affine_skip": self.affine,
            "sae.pre_encoder_bias": False,
        }
        return {
            "sae.site": self.tap.site,
            "sae.layer": self.tap.layer,
            **(transcoder if self.kind == "transcoder" else {}),
            "sae.width": self.width,
            "train.tokens": self.tokens,
            **sparsity,
            "train.seed": self.seed,
            "mesh": self.mesh.model_dump(),
        }

    def _gemma_scope_cell(self) -> str:
        parent = {
            "sae": f"{GEMMA_SCOPE_SITES.get(self.site or '')}/layer_{self.layer}",
            "transcoder": f"transcoders/layer_{self.layer}",
            "embedding": "res/embedding",
        }[self.kind]
        return f"{parent}{self.folder_suffix}/width_{width_name(self.width)}"

    def _gemma_scope_2(self) -> str:
        parent = self.kind if self.site is None else _GEMMA_SCOPE_2_SITES[self.site]
        where = "" if self.layer is None else f"layer_{self.layer}_"
        return (
            f"{parent}{self.folder_suffix}/{where}width_{width_name(self.width)}"
            f"_{self._sparsity(label='l0_')}"
        )

    def _sparsity(self, *, label: str = "target_") -> str:
        text = f"coefficient_{self.coefficient:g}" if self.label is None else label + self.label
        affine = "_affine" if self.affine else ""
        return text + affine + (f"_seed_{self.seed}" if self.seed else "")


def target_l0(shallow: int, deep: int, *, layer: int, num_layers: int) -> int:
    """The L0 that Gemma Scope 2 aimed at in a layer.

    Rises in a straight line from `shallow` at layer 0 to `deep` at a third of the depth, and stays;
    rounded down. Derived from the 8,784 released targets, all of which it gives.
    """
    return shallow + (deep - shallow) * min(3 * layer, num_layers) // num_layers


def cells_of(config: Job, gemma: GemmaConfig) -> list[Cell]:
    """Every cell of a suite that `sweep.kinds` and `sweep.only` choose.

    Raises:
        UserError: the model has no such layer, a target above a width, two cells of one name, or
            nothing is chosen.
    """
    sweep = _suite(config)
    cells = [cell for cell in all_cells(config, gemma) if cell.kind in (sweep.kinds or [cell.kind])]
    chosen = [cell for cell in cells if is_chosen(cell.folder, sweep.only)]
    if not chosen:
        raise UserError(
            f"sweep.kinds and sweep.only choose none of the cells of {config.name}; they are "
            f"called {_some([cell.folder for cell in cells])}"
        )
    return chosen


def all_cells(config: Job, gemma: GemmaConfig) -> list[Cell]:
    """Every cell of a suite, in the order of the config; raises as `cells_of`."""
    cells: list[Cell] = []
    for number, entry in enumerate(_suite(config).cells):
        try:
            cells += _expand(entry, config, gemma)
        except UserError as error:
            raise UserError(f"sweep.cells.{number} of {config.name}: {error}") from error
    seen: set[str] = set()
    for cell in cells:
        if cell.folder in seen:
            raise UserError(f"sweep.cells names {cell.folder} twice: leave one out")
        seen.add(cell.folder)
    return cells


def is_chosen(name: str, patterns: Sequence[str] | None) -> bool:
    """Does a run's name match one of `sweep.only`?"""
    return patterns is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def cache_of(cell: Cell, config: Job, cells: Sequence[Cell], *, gemma: GemmaConfig) -> CacheConfig:
    """The store a cell reads: its taps, and as many rows as its longest run takes.

    The embedding's has the whole table, and is always one by itself.

    Runs with a smaller budget read a part of it. What a store holds depends on all cells of the
    suite and not on those chosen, so that choosing others later finds it as it should be.

    Args:
        cells: all cells of the suite.
    """
    stores = _suite(config).stores
    mine = _store_name(cell, stores)
    inside = [one for one in cells if _store_name(one, stores) == mine]
    taps = sorted({(tap.site, tap.layer) for one in inside for tap in one.taps})
    sites = [
        SiteConfig(site=site, layers=[layer for other, layer in taps if other == site])
        for site in dict.fromkeys(site for site, _ in taps)
    ]
    base = config.cache
    rows = min(base.tokens, max(one.tokens for one in inside))
    if cell.kind == "embedding":
        rows = gemma.vocab_size - _SPECIAL_TOKENS
    path = base.path if mine is None else f"{base.path.rstrip('/')}/{mine}"
    return base.model_copy(update={"path": path, "sites": sites, "tokens": rows})


def _store_name(cell: Cell, stores: str) -> str | None:
    if cell.kind == "embedding":
        return "embedding"
    if stores == "one":
        return None
    if stores == "per_layer":
        return f"layer_{cell.layer}"
    return f"transcoder.{cell.layer}" if cell.kind == "transcoder" else cell.tap.name


def _suite(config: Job) -> SweepConfig:
    assert config.sweep is not None
    assert config.sweep.cells
    return config.sweep


def _expand(entry: CellsConfig, config: Job, gemma: GemmaConfig) -> Iterator[Cell]:
    budgets = entry.tokens or config.train.tokens
    if isinstance(budgets, int):
        budgets = [budgets] * len(entry.widths)
    sites: list[Site | None] = [*entry.sites] or [None]
    sizes = list(zip(entry.widths, budgets, strict=True))
    for site, layer, (width, tokens) in product(sites, _layers(entry, gemma), sizes):
        if layer is not None:
            check_tap(Tap(site or "mlp_out", layer), gemma)
        sparsities = _sparsities(entry, layer, width, gemma)
        for (coefficient, target, label), affine, seed in product(
            sparsities, entry.affine, entry.seeds
        ):
            yield Cell(
                kind=entry.kind,
                site=site,
                layer=layer,
                width=width,
                tokens=tokens,
                coefficient=coefficient,
                target=target,
                label=label,
                seed=seed,
                affine=affine,
                mesh=entry.mesh or config.mesh,
                tree=_suite(config).tree,
                folder_suffix=entry.folder_suffix,
            )


def _layers(entry: CellsConfig, gemma: GemmaConfig) -> list[int | None]:
    if entry.kind == "embedding":
        return [None]
    layers = range(gemma.num_layers) if entry.layers == "all" else entry.layers
    return [layer for layer in layers if layer not in entry.except_layers]


def _sparsities(
    entry: CellsConfig, layer: int | None, width: int, gemma: GemmaConfig
) -> Iterator[tuple[float | None, int | None, str | None]]:
    for coefficient in entry.coefficients:
        yield coefficient, None, None
    for label, (shallow, deep) in entry.targets.items():
        target = target_l0(shallow, deep, layer=layer or 0, num_layers=gemma.num_layers)
        if target > width:
            raise UserError(
                f"targets.{label} is {target} in layer {layer} and the width {width}: no more "
                "latents can be active than there are; lower the target or leave the width out"
            )
        yield None, target, label


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"

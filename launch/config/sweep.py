"""The `sweep` section: a grid of values, or the cells of a suite."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from activation_cache.config import (
    FilePath,
    MeshConfig,
    NonNegative,
    PositiveCount,
    PositiveSmallCount,
    Section,
    Seed,
    Site,
    SmallCount,
)


class CohortConfig(Section):
    """The most runs that read the same batches and train together, sharing every read."""

    max_members: PositiveSmallCount = 8


Kind = Literal["sae", "transcoder", "embedding"]


class CellsConfig(Section):
    """Cells of a suite: every site, layer, width and sparsity named here together.

    `coefficients` or `targets` is the sparsity, one cell for each: a target has a label and two
    numbers, for layer 0 and from a third of the depth on (Gemma Scope 2's rule, docs/suites.md).
    """

    kind: Kind = "sae"
    sites: list[Site] = Field(default_factory=list)  # of kind `sae`
    layers: list[SmallCount] | Literal["all"] = Field(default_factory=list)  # not of `embedding`
    except_layers: list[SmallCount] = Field(default_factory=list)
    widths: Annotated[list[PositiveSmallCount], Field(min_length=1)]
    tokens: PositiveCount | list[PositiveCount] | None = None  # None: train.tokens; or one a width
    coefficients: list[NonNegative] = Field(default_factory=list)
    targets: dict[str, list[PositiveSmallCount]] = Field(default_factory=dict)
    seeds: Annotated[list[Seed], Field(min_length=1)] = Field(default_factory=lambda: [0])
    affine: Annotated[list[bool], Field(min_length=1)] = Field(default_factory=lambda: [False])
    mesh: MeshConfig | None = None  # None: the config's own
    folder_suffix: str = ""

    @model_validator(mode="after")
    def _whole(self) -> CellsConfig:
        if (self.kind == "sae") != bool(self.sites):
            raise ValueError("sites must be given with kind sae, and with no other kind")
        if (self.kind == "embedding") == bool(self.layers):
            raise ValueError("layers must be given, except with kind embedding, which has none")
        if bool(self.coefficients) == bool(self.targets):
            raise ValueError("give either coefficients or targets, and not both")
        if isinstance(self.tokens, list) and len(self.tokens) != len(self.widths):
            raise ValueError(
                f"tokens has {len(self.tokens)} entries and widths {len(self.widths)}: give one "
                "number for all widths, or one for each"
            )
        if any(self.affine) and self.kind != "transcoder":
            raise ValueError(f"affine: a skip is for kind transcoder, and this is {self.kind}")
        for label, ends in self.targets.items():
            if len(ends) != 2 or ends[0] > ends[1]:
                raise ValueError(
                    f"targets.{label} is {ends}: give two numbers, for layer 0 and from a third "
                    "of the depth on, the second not the smaller one"
                )
        return self


class SweepConfig(Section):
    """Many runs from one file.

    Dotted config keys and the values each takes, where `grid` multiplies and `zip` walks in step;
    or `cells`, the SAEs of a suite, in folders named as the released suites' are.
    """

    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    zip: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    cells: list[CellsConfig] = Field(default_factory=list)
    tree: Literal["gemma_scope", "gemma_scope_2"] = "gemma_scope"
    kinds: list[Kind] | None = None  # None: all that `cells` has
    only: list[str] | None = None  # patterns of names, * for anything; None: all
    stores: Literal["one", "per_layer", "per_tap"] = "one"
    start_from: FilePath | None = None  # of cells; {folder} is theirs
    cohort: CohortConfig = CohortConfig()

    @model_validator(mode="after")
    def _kind_of_sweep(self) -> SweepConfig:
        if self.cells and (self.grid or self.zip):
            raise ValueError("sweep.cells stands alone: take out sweep.grid and sweep.zip")
        if not self.cells and (self.kinds is not None or self.stores != "one"):
            raise ValueError("sweep.kinds and sweep.stores are for sweep.cells, which is empty")
        if self.start_from is not None:
            if not self.cells:
                raise ValueError("sweep.start_from is for sweep.cells; one SAE has sae.start_from")
            rest = self.start_from.replace("{folder}", "")
            if rest == self.start_from or set("{}") & set(rest):
                raise ValueError(
                    f"sweep.start_from {self.start_from} must have {{folder}}, which stands for a "
                    "cell's folder, and no other braces: organisation/repository/{folder}"
                )
        return self

    @model_validator(mode="after")
    def _coherent(self) -> SweepConfig:
        lengths = {key: len(values) for key, values in self.zip.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the lists under sweep.zip must have one length; found {lengths}")
        both = sorted(set(self.grid) & set(self.zip))
        if both:
            raise ValueError(f"a key can be in sweep.grid or sweep.zip, not both: {both}")
        return self

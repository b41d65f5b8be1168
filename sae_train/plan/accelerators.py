"""Published peaks of the accelerators that `sae plan` uses, with their sources.

Peaks are dense (no structured sparsity), per chip: a v5p chip is one JAX device, as every chip
here is. A chip has a peak for each precision that it makes products at
(`activation_cache.precision`): a GPU's float32 units and, on its tensor cores, TF32 and bfloat16. A
TPU multiplies bfloat16 alone: float32 takes it six passes. `bfloat16_3x` is three passes on both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from activation_cache.config import ModelConfig
from activation_cache.precision import Precision, PrecisionChoice, resolve
from activation_cache.runtime.errors import UserError

ChipKind = Literal["gpu", "tpu"]

TERA, GIGA = 1e12, 1e9
# JAX's documentation of `jax.lax.DotAlgorithmPreset`: BF16_BF16_F32_X3, and X6, which
# `jax.lax.Precision.HIGHEST` is on a TPU.
_PASSES_3X, _PASSES_FLOAT32 = 3, 6


@dataclass(frozen=True)
class Accelerator:
    """One chip.

    Attributes:
        flops: dense peaks of products by their precision, a second, multiply-adds counted as two.
        hbm_bytes: memory, in bytes, as the maker counts gigabytes (10^9 on GPUs, 2^30 on TPUs).
        hbm_bandwidth: bytes a second.
    """

    name: str
    title: str
    kind: ChipKind
    flops: Mapping[Precision, float]
    hbm_bytes: int
    hbm_bandwidth: float
    source: str

    def has(self, chosen: PrecisionChoice) -> bool:
        """Can it make products at what a config's key says? `auto` it can."""
        return chosen == "auto" or chosen in self.flops

    def training(self, chosen: PrecisionChoice) -> Precision:
        """What `train.precision` means on it.

        Raises:
            UserError: it has no such products.
        """
        return self._resolved(chosen, key="train.precision")

    def harvesting(self, model: ModelConfig) -> Precision:
        """At what the language model's products are made in a harvest.

        Raises:
            UserError: it has no such products.
        """
        if model.dtype == "bfloat16":
            return "bfloat16"
        return self._resolved(model.precision, key="model.precision")

    def _resolved(self, chosen: PrecisionChoice, *, key: str) -> Precision:
        if not self.has(chosen):
            others = [one.name for one in ACCELERATORS.values() if one.has(chosen)]
            raise UserError(
                f"{key} is {chosen}, and {self.title} has no peak at it: set {key} to "
                f"{', '.join(self.flops)} or auto, or plan for {', '.join(others)} "
                "(--accelerator)"
            )
        return resolve(chosen, platform=self.kind, key=key)


def _peaks(*, float32: float, bfloat16: float, tf32: float | None = None) -> dict[Precision, float]:
    """In TFLOP/s; those that are not given follow from bfloat16's."""
    found: dict[Precision, float | None] = {
        "float32": float32,
        "bfloat16_3x": bfloat16 / _PASSES_3X,
        "tf32": tf32,
        "bfloat16": bfloat16,
    }
    return {name: peak * TERA for name, peak in found.items() if peak is not None}


def _tpu(title: str, *, bfloat16: float, hbm_gib: int, bandwidth: float) -> Accelerator:
    name = title.split()[1]
    return Accelerator(
        name=name,
        title=title,
        kind="tpu",
        flops=_peaks(float32=bfloat16 / _PASSES_FLOAT32, bfloat16=bfloat16),
        hbm_bytes=hbm_gib * 2**30,
        hbm_bandwidth=bandwidth * GIGA,
        source=f"Google Cloud TPU documentation, docs.cloud.google.com/tpu/docs/{name}",
    )


_A100 = Accelerator(
    name="a100",
    title="NVIDIA A100 80GB SXM",
    kind="gpu",
    flops=_peaks(float32=19.5, tf32=156.0, bfloat16=312.0),
    hbm_bytes=80 * 10**9,
    hbm_bandwidth=2039 * GIGA,
    source="NVIDIA A100 Tensor Core GPU data sheet (2021)",
)
_H100 = Accelerator(
    name="h100",
    title="NVIDIA H100 80GB SXM",
    kind="gpu",
    flops=_peaks(float32=67.0, tf32=494.5, bfloat16=989.0),
    hbm_bytes=80 * 10**9,
    hbm_bandwidth=3350 * GIGA,
    source="NVIDIA H100 Tensor Core GPU data sheet (half of the sparse TF32 and bfloat16 figures)",
)
_TABLE = (
    _tpu("TPU v5e", bfloat16=197.0, hbm_gib=16, bandwidth=819.0),
    _tpu("TPU v5p", bfloat16=459.0, hbm_gib=95, bandwidth=2765.0),
    _tpu("TPU v6e (Trillium)", bfloat16=918.0, hbm_gib=32, bandwidth=1640.0),
    _A100,
    _H100,
    dataclasses.replace(  # an H100 with other memory
        _H100,
        name="h200",
        title="NVIDIA H200 141GB SXM",
        hbm_bytes=141 * 10**9,
        hbm_bandwidth=4800 * GIGA,
        source=_H100.source.replace("H100", "H200"),
    ),
)
ACCELERATORS: dict[str, Accelerator] = {one.name: one for one in _TABLE}


def accelerator(name: str) -> Accelerator:
    """The row of the table with this name, in either case.

    Raises:
        UserError: there is none.
    """
    found = ACCELERATORS.get(name.lower())
    if found is None:
        raise UserError(
            f"--accelerator {name} is not in the table: use one of {', '.join(ACCELERATORS)}"
        )
    return found

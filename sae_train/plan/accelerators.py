"""Published peaks of the accelerators that `sae plan` uses, with their sources.

Peaks are dense (no structured sparsity), per chip: a v5p chip is one JAX device, as every chip
here is. `float32_flops` is what a product at `Precision.HIGHEST` can reach, for training asks for
it (docs/numerics.md): on a GPU its float32 units, tensor cores left aside; on a TPU, which has no
float32 multiplier, a sixth of the bfloat16 peak, since XLA makes six bfloat16 passes of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from activation_cache.config import Dtype
from activation_cache.runtime.errors import UserError

TERA, GIGA = 1e12, 1e9
_TPU_FLOAT32_PASSES = 6  # bf16_6x, JAX's documentation of `jax.lax.Precision.HIGHEST`


@dataclass(frozen=True)
class Accelerator:
    """One chip.

    Attributes:
        bfloat16_flops: dense peak, multiply-adds counted as two.
        float32_flops: the same for float32 products at the highest precision.
        hbm_bytes: memory, in bytes, as the maker counts gigabytes (10^9 on GPUs, 2^30 on TPUs).
        hbm_bandwidth: bytes a second.
    """

    name: str
    title: str
    kind: Literal["gpu", "tpu"]
    bfloat16_flops: float
    float32_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    source: str

    def peak(self, dtype: Dtype) -> float:
        """FLOP/s of products of this dtype."""
        return self.float32_flops if dtype == "float32" else self.bfloat16_flops


def _tpu(
    name: str, *, bfloat16: float, hbm_gib: int, bandwidth: float, title: str = ""
) -> Accelerator:
    return Accelerator(
        name=name,
        title=title or f"TPU {name}",
        kind="tpu",
        bfloat16_flops=bfloat16 * TERA,
        float32_flops=bfloat16 * TERA / _TPU_FLOAT32_PASSES,
        hbm_bytes=hbm_gib * 2**30,
        hbm_bandwidth=bandwidth * GIGA,
        source=f"Google Cloud TPU documentation, docs.cloud.google.com/tpu/docs/{name}",
    )


def _gpu(
    name: str,
    *,
    title: str,
    bfloat16: float,
    float32: float,
    hbm_gb: int,
    bandwidth: float,
    source: str,
) -> Accelerator:
    return Accelerator(
        name=name,
        title=title,
        kind="gpu",
        bfloat16_flops=bfloat16 * TERA,
        float32_flops=float32 * TERA,
        hbm_bytes=int(hbm_gb * GIGA),
        hbm_bandwidth=bandwidth * GIGA,
        source=source,
    )


_TABLE = (
    _tpu("v5e", bfloat16=197.0, hbm_gib=16, bandwidth=819.0),
    _tpu("v5p", bfloat16=459.0, hbm_gib=95, bandwidth=2765.0),
    _tpu("v6e", bfloat16=918.0, hbm_gib=32, bandwidth=1640.0, title="TPU v6e (Trillium)"),
    _gpu(
        "a100",
        title="NVIDIA A100 80GB SXM",
        bfloat16=312.0,
        float32=19.5,
        hbm_gb=80,
        bandwidth=2039.0,
        source="NVIDIA A100 Tensor Core GPU data sheet (2021)",
    ),
    _gpu(
        "h100",
        title="NVIDIA H100 80GB SXM",
        bfloat16=989.0,
        float32=67.0,
        hbm_gb=80,
        bandwidth=3350.0,
        source="NVIDIA H100 Tensor Core GPU data sheet (half of the sparse bfloat16 figure)",
    ),
    _gpu(
        "h200",
        title="NVIDIA H200 141GB SXM",
        bfloat16=989.0,
        float32=67.0,
        hbm_gb=141,
        bandwidth=4800.0,
        source="NVIDIA H200 Tensor Core GPU data sheet (half of the sparse bfloat16 figure)",
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

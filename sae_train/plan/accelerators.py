"""Published peaks of the accelerators that `sae plan` uses, with their sources.

Peaks are dense (no structured sparsity), per chip: a v5p chip is one JAX device, as every chip
here is. `float32_flops` is what a product at `Precision.HIGHEST` can reach, for training asks for
it (docs/numerics.md): on a GPU its float32 units, tensor cores left aside; on a TPU, which has no
float32 multiplier, a sixth of the bfloat16 peak, since XLA makes six bfloat16 passes of it.
"""

from __future__ import annotations

import dataclasses
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


def _tpu(title: str, *, bfloat16: float, hbm_gib: int, bandwidth: float) -> Accelerator:
    name = title.split()[1]
    return Accelerator(
        name=name,
        title=title,
        kind="tpu",
        bfloat16_flops=bfloat16 * TERA,
        float32_flops=bfloat16 * TERA / _TPU_FLOAT32_PASSES,
        hbm_bytes=hbm_gib * 2**30,
        hbm_bandwidth=bandwidth * GIGA,
        source=f"Google Cloud TPU documentation, docs.cloud.google.com/tpu/docs/{name}",
    )


_A100 = Accelerator(
    name="a100",
    title="NVIDIA A100 80GB SXM",
    kind="gpu",
    bfloat16_flops=312 * TERA,
    float32_flops=19.5 * TERA,
    hbm_bytes=80 * 10**9,
    hbm_bandwidth=2039 * GIGA,
    source="NVIDIA A100 Tensor Core GPU data sheet (2021)",
)
_H100 = Accelerator(
    name="h100",
    title="NVIDIA H100 80GB SXM",
    kind="gpu",
    bfloat16_flops=989 * TERA,
    float32_flops=67 * TERA,
    hbm_bytes=80 * 10**9,
    hbm_bandwidth=3350 * GIGA,
    source="NVIDIA H100 Tensor Core GPU data sheet (half of the sparse bfloat16 figure)",
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

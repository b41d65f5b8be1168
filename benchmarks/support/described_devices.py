"""Devices that aren't here, described well enough for their compilers.

XLA compiles for a described device as well as for one that is there. A GPU's compiler comes with
JAX's CUDA packages, a TPU's with libtpu; neither needs the device or its driver.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from activation_cache.mesh import AXES

# NVIDIA H100 Tensor Core GPU Architecture (white paper, 2022), as XLA's target descriptions put it.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# Of TPUs: the name of their topologies, how many dims these have, and how libtpu calls a chip that
# is one device.
_TPUS: Mapping[str, tuple[str, int, str]] = {
    "v5p": ("v5", 3, "megacore"),
    "v6e": ("v6e", 2, "default"),
}
TARGETS = ("h100", *_TPUS)


def prepare() -> None:
    """Before JAX looks for devices: it is to find the CPU, and ask nobody for a TPU."""
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Two processes may compile at once: there is no TPU that only one of them could have.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # A compiler keeps no program for a machine that isn't this one.
    jax.config.update("jax_enable_compilation_cache", False)


def described_mesh(target: str, *, data: int = 1, model: int = 1) -> Mesh:
    """A (data, model) mesh of a target's devices.

    Args:
        target: one of `TARGETS`; an H200 is an H100 to its compiler, but for the memory.
    """
    devices = data * model
    if target == "h100":
        topology = topologies.get_topology_desc(
            target, platform="cuda", target_config=H100, topology=f"1x1x{devices}"
        )
    else:
        name, num_dims, chip = _TPUS[target]
        # A host has one chip or four, in a square.
        bounds = (1, 1, 1) if devices == 1 else (2, 2, 1)
        topology = topologies.get_topology_desc(
            f"{name}:{'x'.join(map(str, bounds[:num_dims]))}",
            platform="tpu",
            chips_per_host_bounds=bounds,
            chip_config_name=chip,
        )
    return Mesh(np.asarray(topology.devices[:devices]).reshape(data, model), AXES)

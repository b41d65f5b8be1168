"""Compile the sparse step and its kernels for an H100, on a machine without a GPU.

    pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12
    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 python -m benchmarks.compile_for_gpu

XLA compiles for a described device as well as for one that is there; the first two packages must be
of jax's own version. Printed are the bytes of a device that the step's program holds beside its
arguments, those of its arguments that it writes over, and of each kernel the registers of a thread
and what the assembler found no register for. That says that the kernels compile, for a real device
and at real sizes, and nothing of how fast they are or of whether their results are right.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from activation_cache.mesh import AXES
from benchmarks.step import config_of
from sae_train.model.sharding import BATCH_DIMS, sharding
from sae_train.step.schedule import scheduled
from sae_train.step.state import abstract_state
from sae_train.train.train_step import make_train_step

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
KERNELS = ("_one_tile", "_one_part", "_one_program")


def described_mesh(devices: int) -> Mesh:
    """A mesh of GPUs that are not here, the latents split over them."""
    topology = topologies.get_topology_desc(
        "h100", platform="cuda", target_config=H100, topology=f"1x1x{devices}"
    )
    return Mesh(np.asarray(topology.devices).reshape(1, devices), AXES)


def compile_step(
    mesh: Mesh, *, d_model: int, width: int, batch_size: int, kernels: str, folder: str
) -> jax.stages.Compiled:
    """The sparse step, compiled; what is given to the assembler is left in a folder."""
    config = config_of(width=width, batch_size=batch_size, step="sparse")
    train = config.train.model_copy(update={"kernels": kernels})
    config = config.model_copy(update={"train": train})
    step: Any = make_train_step(config, input_scale=1.0, mesh=mesh)
    state = abstract_state(config.sae, d_model=d_model, mesh=mesh)
    rows = jax.ShapeDtypeStruct(
        (batch_size, d_model), jnp.float32, sharding=sharding(mesh, BATCH_DIMS)
    )
    return step.lower(state, rows, scheduled(train, step=1)).compile(
        compiler_options={"xla_dump_to": folder}
    )


def registers(folder: str) -> dict[str, str]:
    """Of each kernel that was compiled, what the assembler says of it."""
    found = find_spec("nvidia.cuda_nvcc")
    assert found is not None
    assert found.submodule_search_locations
    assembler = Path(next(iter(found.submodule_search_locations))) / "bin" / "ptxas"
    told = {}
    for path in sorted(Path(folder).glob("*.ptx")):
        own = re.search(r"\.entry (\w+)", path.read_text())
        if own is None or own[1] not in KERNELS:
            continue
        command = [str(assembler), "-v", "-arch=sm_90a", str(path), "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        used, spilled = re.search(r"Used (\d+)", report), re.search(r"(\d+) bytes spill st", report)
        assert used is not None
        assert spilled is not None
        told[own[1]] = f"{used[1]} registers, {spilled[1]} bytes spilled"
    return told


def main() -> None:
    """Compile the step and print what it needs: memory, registers, spilled bytes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=131_072)
    parser.add_argument("--d-model", type=int, default=2304)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--kernels", choices=("xla", "pallas"), default="pallas")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compiled = compile_step(
            described_mesh(arguments.devices),
            d_model=arguments.d_model,
            width=arguments.width,
            batch_size=arguments.batch_size,
            kernels=arguments.kernels,
            folder=folder,
        )
        used = registers(folder)
    memory = compiled.memory_analysis()
    assert memory is not None
    sys.stdout.write(
        f"arguments {memory.argument_size_in_bytes / 1e9:.3f} GB, of which the results are written "
        f"over {memory.alias_size_in_bytes / 1e9:.3f}; temporaries "
        f"{memory.temp_size_in_bytes / 1e9:.3f} GB\n"
    )
    for name, text in used.items():
        sys.stdout.write(f"{name}: {text}\n")


if __name__ == "__main__":
    main()

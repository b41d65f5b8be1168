"""The memory plan of `sae plan` against XLA's own analysis, over the whole grid: compile only.

    python -m benchmarks.plan_memory                          # 84 shapes on the CPU's compiler
    python -m benchmarks.plan_memory --topology v5p:2x2x2     # a TPU's compiler (minutes a shape)

The second needs no TPU, only the package libtpu in the version that `jax[tpu]` asks for: it
compiles for a described topology. docs/plan.md quotes both.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import sys

if "--topology" in sys.argv:
    # Without them libtpu looks for the machine's own TPU.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from activation_cache.mesh import AXES
from sae_train.config.run import MeshConfig
from sae_train.plan.memory import Backend, Shape, step_memory
from tests.support.plan_shapes import compile_step, measured_bytes

logger = logging.getLogger("plan_memory")

BATCH = 4096
WIDTHS = tuple(2**power for power in range(14, 21))
D_MODELS = (2304, 3584, 4608)
MESHES = ((1, 1), (1, 4), (1, 8), (2, 4))
# Few, for each takes minutes; large, for a TPU keeps what is small in its on-chip memory.
TPU_SHAPES = (
    (65_536, 2304, (1, 1)),
    (131_072, 3584, (1, 4)),
    (1_048_576, 4608, (1, 8)),
    (262_144, 3584, (2, 4)),
    (65_536, 4608, (8, 1)),
)


def main() -> None:
    """Log a line for each shape and the largest error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", help="a TPU topology to compile for, such as v5p:2x2x2")
    topology = parser.parse_args().topology
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("jax").setLevel(logging.ERROR)
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_num_cpu_devices", 8)
    backend: Backend = "accelerator" if topology else "cpu"
    grid = TPU_SHAPES if topology else tuple(itertools.product(WIDTHS, D_MODELS, MESHES))
    errors = []
    for width, d_model, (data, model) in grid:
        shape = Shape(BATCH, d_model, width, MeshConfig(data=data, model=model))
        devices = _topology_mesh(topology, data=data, model=model) if topology else None
        _, found = measured_bytes(compile_step(shape, devices=devices))
        planned = step_memory(shape, backend=backend).step
        errors.append(planned / found - 1)
        logger.info(
            "%8d x %d on %d x %d: XLA %8.3f GB, plan %8.3f GB, %+.1f %%",
            *(width, d_model, data, model, found / 1e9, planned / 1e9, 100 * errors[-1]),
        )
    logger.info("%d shapes, from %+.1f to %+.1f %%", len(errors), *_percent(errors))


def _percent(errors: list[float]) -> tuple[float, float]:
    return 100 * min(errors), 100 * max(errors)


def _topology_mesh(name: str, *, data: int, model: int) -> Mesh:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    places: np.ndarray = np.asarray(devices[: data * model]).reshape(data, model)
    return Mesh(places, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)


if __name__ == "__main__":
    main()

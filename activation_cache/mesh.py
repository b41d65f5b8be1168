"""The (data, model) mesh that harvesting, training and evaluation share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from activation_cache.config import MeshConfig
from activation_cache.runtime.errors import UserError

AXES = ("data", "model")


def devices_of_processes(config: MeshConfig) -> list[list[Any]]:
    """The devices of a mesh, by process: the first few of each, equally many.

    Raises:
        UserError: JAX sees fewer devices than the mesh needs, or they can't be shared equally.
    """
    needed, found = config.data * config.model, jax.device_count()
    if needed > found:
        raise UserError(
            f"mesh {config.data} x {config.model} (data x model) needs {needed} devices and JAX "
            f"sees {found} ({jax.default_backend()}): make mesh.data * mesh.model at most {found}"
        )
    processes = jax.process_count()
    each, rest = divmod(needed, processes)
    groups = [[d for d in jax.devices() if d.process_index == p] for p in range(processes)]
    if rest or min(map(len, groups)) < each:
        sizes = ", ".join(str(len(group)) for group in groups)
        raise UserError(
            f"mesh {config.data} x {config.model} (data x model) needs {needed} devices, equally "
            f"many of each of {processes} processes, and these have {sizes}: make mesh.data * "
            f"mesh.model a multiple of {processes} that they can share, or change the number of "
            "processes"
        )
    return [group[:each] for group in groups]


def make_mesh(devices: Sequence[Any], *, data: int = 1) -> Mesh:
    """A mesh over these devices with `data` of them along its first axis, the rest along `model`.

    Neighbours in `devices` are neighbours along `model`. Shardings are left to the compiler
    (`AxisType.Auto`).
    """
    kinds = (jax.sharding.AxisType.Auto,) * 2
    return Mesh(np.asarray(devices).reshape(data, -1), AXES, axis_types=kinds)

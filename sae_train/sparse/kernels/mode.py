"""Where the kernels can run: on a GPU, interpreted, or nowhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

from jax.sharding import Mesh

from activation_cache.runtime.errors import UserError

# As `jax.Device.platform` calls them.
_GPUS = ("gpu", "cuda", "rocm")


_without_gpu: ContextVar[Literal["interpret", "lower"] | None] = ContextVar(
    "without_gpu", default=None
)


@contextmanager
def without_gpu(to: Literal["interpret", "lower"]) -> Iterator[None]:
    """For tests: kernels may be traced for other devices than GPUs.

    Args:
        to: `interpret` runs them as XLA programs, one program of the grid after the other; with
            `lower` they can be lowered for a GPU, and not run.
    """
    token = _without_gpu.set(to)
    try:
        yield
    finally:
        _without_gpu.reset(token)


def is_interpreted() -> bool:
    """Are kernels that are traced now interpreted?"""
    return _without_gpu.get() == "interpret"


def check_devices(mesh: Mesh) -> None:
    """Kernels run on GPUs.

    Raises:
        UserError: the mesh is of other devices.
    """
    platform = mesh.devices.flat[0].platform
    if platform not in _GPUS and _without_gpu.get() is None:
        raise UserError(
            f"train.kernels: pallas is for GPUs, and the devices here are of {platform}: set "
            "train.kernels to xla"
        )

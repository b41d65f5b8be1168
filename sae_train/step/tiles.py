"""How a large array is cut into tiles that fit the memory for temporaries."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array

# A tile of [4096, 1024] float32 is 16 MB: measured the best of 512 to 4096 on a CPU.
LARGEST_TILE = 1024


def varying_like(value: Array, *, like: Array) -> Array:
    """The same value, typed as different on the devices of a `shard_map` on which `like` is.

    What a loop carries must have one type before and after its body.
    """
    return varying_on(value, varying_axes(like))


def varying_axes(value: Array) -> frozenset[Any]:
    """The mesh axes along which a value is typed as different, inside a `shard_map`."""
    return jax.typeof(value).manual_axis_type.varying


def varying_on(value: Array, axes: frozenset[Any]) -> Array:
    """The same value, typed as different along these axes too."""
    missing = tuple(axes - varying_axes(value))
    return jax.lax.pcast(value, missing, to="varying") if missing else value


def tile_of(width: int) -> int:
    """Latents of a tile: the largest divisor of the width that isn't above `LARGEST_TILE`."""
    return next(size for size in range(min(width, LARGEST_TILE), 0, -1) if width % size == 0)

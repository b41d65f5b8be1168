"""How a large array is cut into tiles that fit the memory for temporaries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sae_train.config.sae import SaeConfig
from sae_train.model.matryoshka import positions_of_groups

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


@dataclass(frozen=True)
class TiledLatents:
    """Latents of a device that go through a pass together, a tile after the other.

    Attributes:
        tile, num_tiles: latents of a tile, and how many tiles they are.
        positions: which of the device's latents they are, rising; None for all of them.
    """

    tile: int
    num_tiles: int
    positions: np.ndarray | None = None


def tiled_groups(
    config: SaeConfig, *, devices: int, tile_of: Callable[[int], int]
) -> tuple[TiledLatents, ...]:
    """What each device holds: of a Matryoshka SAE its part of each group, else all in one.

    Args:
        tile_of: of a number of latents, how many are a tile.
    """
    if len(config.groups) == 1:
        width = config.width // devices
        return (TiledLatents(tile_of(width), width // tile_of(width)),)
    return tuple(
        TiledLatents(tile_of(len(own)), len(own) // tile_of(len(own)), own)
        for own in positions_of_groups(config, devices=devices)
    )


def in_order(parts: Sequence[Array], groups: Sequence[TiledLatents]) -> Array:
    """Of arrays with a latent's values in each row, one for each group: the device's one array."""
    if len(parts) == 1:
        return parts[0]
    positions = [group.positions for group in groups if group.positions is not None]
    return jnp.concatenate(parts)[np.argsort(np.concatenate(positions))]


def first_rows(groups: Sequence[TiledLatents], *, num_rows: int) -> Array | None:
    """Of each of a device's latents its group times `num_rows`; None if all are in one group."""
    if len(groups) == 1:
        return None
    sizes = [group.tile * group.num_tiles for group in groups]
    numbers = [jnp.full(size, number * num_rows) for number, size in enumerate(sizes)]
    return in_order(numbers, groups)

"""Which way a run's steps may go, by whole products or by pairs of row and latent, and for how many
pairs there are places."""

from __future__ import annotations

from jax.sharding import Mesh

from sae_train.config.run import Config

# Below this width whole products are as fast on a CPU (docs/performance.md).
SMALLEST_WIDTH = 4096
# Pairs a row of a JumpReLU, unless configured. With one latent in 32 a step by pairs takes as long
# as one by products on a CPU, and places that aren't needed cost nothing (docs/performance.md).
_LATENTS_PER_PAIR = 32
_LARGEST_CAPACITY = 2048


def may_go_by_pairs(config: Config, *, on_cpu: bool) -> bool:
    """May steps go by pairs? Those of a JumpReLU; left open, wide ones' on CPUs.

    On other devices nothing was measured: many short loops may cost more there than products.
    """
    if config.sae.architecture != "jumprelu" or config.train.step == "dense":
        return False
    return config.train.step == "sparse" or (on_cpu and config.sae.width >= SMALLEST_WIDTH)


def is_by_pairs(config: Config, mesh: Mesh) -> bool:
    """`may_go_by_pairs` on the devices of a mesh."""
    return may_go_by_pairs(config, on_cpu=mesh.devices.flat[0].platform == "cpu")


def capacity_per_row(config: Config, *, width: int | None = None) -> int:
    """Pairs a row, in the mean of a batch, that there are places for.

    Args:
        width: latents, if not the config's.
    """
    width = width or config.sae.width
    if config.train.sparse_capacity is not None:
        return config.train.sparse_capacity
    return max(1, min(_LARGEST_CAPACITY, width // _LATENTS_PER_PAIR))

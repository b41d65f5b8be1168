"""How a run's steps are made: on which path, dense or sparse, and at which precision.

The dense path makes products of whole matrices; the sparse one works on pairs of a row and an
active latent.
"""

from __future__ import annotations

from jax.sharding import Mesh

from activation_cache.precision import Precision, resolve
from sae_train.config.run import Config

# Below this width the dense path is as fast on a CPU (docs/performance.md).
SMALLEST_WIDTH = 4096
# Pairs per row, unless configured. With one latent in 32 active both paths take as long on a CPU,
# and space that isn't needed costs no time (docs/performance.md).
_LATENTS_PER_PAIR = 32
_LARGEST_CAPACITY = 2048


def may_be_sparse(config: Config, *, on_cpu: bool) -> bool:
    """May steps take the sparse path? A JumpReLU's; with `train.step: auto` if wide, and on CPUs.

    On other devices nothing was measured: many short loops may cost more there than products.
    """
    if config.sae.architecture != "jumprelu" or config.train.step == "dense":
        return False
    if config.train.has_momentum:  # latents without a gradient move too
        return False
    return config.train.step == "sparse" or (on_cpu and config.sae.width >= SMALLEST_WIDTH)


def may_be_sparse_on(config: Config, mesh: Mesh) -> bool:
    """`may_be_sparse` on the devices of a mesh."""
    return may_be_sparse(config, on_cpu=mesh.devices.flat[0].platform == "cpu")


def precision_on(config: Config, mesh: Mesh) -> Precision:
    """How the products of a run's steps are made on the devices of a mesh.

    Raises:
        UserError: these devices have no such products.
    """
    return resolve(config.train.precision, platform=mesh.devices.flat[0].platform)


def capacity_per_row(config: Config) -> int:
    """How many pairs per row, in the mean of a batch, the sparse path has space for."""
    if config.train.sparse_capacity is not None:
        return min(config.train.sparse_capacity, config.sae.width)
    return max(1, min(_LARGEST_CAPACITY, config.sae.width // _LATENTS_PER_PAIR))

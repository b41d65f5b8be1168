"""The three costly parts of the sparse path: by XLA, or as kernels if `train.kernels` says so."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from jax.sharding import Mesh

from sae_train.config.run import Config
from sae_train.sparse import active_pairs, latent_updates, segment_sums
from sae_train.sparse.kernels.mode import check_devices
from sae_train.step.gradients import LatentSums, Rows
from sae_train.step.path_choice import precision_on


class Parts(NamedTuple):
    """Functions of one device's shard.

    Attributes:
        select: as `active_pairs.select_pairs`.
        decode: as `segment_sums.decode_pairs`.
        touched: as `latent_updates.touched_pass`.
    """

    select: Callable[..., active_pairs.Pairs]
    decode: Callable[..., Any]
    touched: Callable[..., tuple[Rows, LatentSums]]


def _finds_float32_by_bfloat16(config: Config, mesh: Mesh) -> bool:
    """Is a float32 product so much slower than bfloat16's that its pairs are found by the latter?

    On accelerators, by 6 to 16 times; a CPU makes float32's the faster.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return precision_on(config, mesh) == "float32" and not on_cpu


def parts_of(config: Config, mesh: Mesh) -> Parts:
    """Those that the config asks for.

    Raises:
        UserError: it asks for kernels, and the mesh isn't of GPUs.
    """
    if config.train.kernels == "xla":
        select: Callable[..., active_pairs.Pairs] = active_pairs.select_pairs
        if _finds_float32_by_bfloat16(config, mesh):
            select = partial(select, searched_rounded=True)
        return Parts(select, segment_sums.decode_pairs, latent_updates.touched_pass)
    check_devices(mesh)
    # Not before they are asked for: importing Triton takes half a second.
    from sae_train.sparse.kernels import decode as decode_module
    from sae_train.sparse.kernels import select as select_module
    from sae_train.sparse.kernels import update

    return Parts(select_module.select_pairs, decode_module.decode_pairs, update.touched_pass)

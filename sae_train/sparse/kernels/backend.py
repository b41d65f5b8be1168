"""The three costly parts of the sparse path: by XLA, or as kernels if `train.kernels` says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jax.sharding import Mesh

from sae_train.config.run import Config
from sae_train.sparse import active_pairs, latent_updates, segment_sums
from sae_train.sparse.kernels.mode import check_devices
from sae_train.step.gradients import LatentSums, Rows


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


def parts_of(config: Config, mesh: Mesh) -> Parts:
    """Those that the config asks for.

    Raises:
        UserError: it asks for kernels, and the mesh isn't of GPUs.
    """
    if config.train.kernels == "xla":
        return Parts(
            active_pairs.select_pairs, segment_sums.decode_pairs, latent_updates.touched_pass
        )
    check_devices(mesh)
    # Not before they are asked for: importing Triton takes half a second.
    from sae_train.sparse.kernels import decode as decode_module
    from sae_train.sparse.kernels import select as select_module
    from sae_train.sparse.kernels import update

    return Parts(select_module.select_pairs, decode_module.decode_pairs, update.touched_pass)

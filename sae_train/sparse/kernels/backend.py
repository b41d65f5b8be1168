"""The three costly parts of a step by pairs: by XLA, or as kernels if `train.kernels` says so."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from jax.sharding import Mesh

from sae_train.config.run import Config
from sae_train.sparse import active_pairs, latent_updates, segment_sums
from sae_train.sparse.kernels.mode import check_devices
from sae_train.sparse.latent_updates import Sums, Write
from sae_train.step.adam import Rows


class Parts(NamedTuple):
    """Functions of one device's shard.

    Attributes:
        select: as `pairs.select_pairs`.
        decode: as `pair_sums.decode_pairs`.
        touched: as `row_passes.touched_pass`, and given `arguments`, the first argument of `write`.
    """

    select: Callable[..., active_pairs.Pairs]
    decode: Callable[..., Any]
    touched: Callable[..., tuple[Rows, Sums]]


def parts_of(config: Config, mesh: Mesh) -> Parts:
    """Those that the config asks for.

    Raises:
        UserError: it asks for kernels, and the mesh isn't of GPUs.
    """
    if config.train.kernels == "xla":
        return Parts(active_pairs.select_pairs, segment_sums.decode_pairs, _touched_by_xla)
    check_devices(mesh)
    # Not before they are asked for: importing Triton takes half a second.
    from sae_train.sparse.kernels import decode as decode_module
    from sae_train.sparse.kernels import select as select_module
    from sae_train.sparse.kernels import update

    return Parts(
        select_module.select_pairs,
        decode_module.decode_pairs,
        partial(_touched_in_kernel, update.touched_pass, config=config.train.adam),
    )


def _touched_by_xla(
    *operands: Any, write: Write | None, arguments: Any, **options: Any
) -> tuple[Rows, Sums]:
    own = None if write is None else partial(write, arguments)
    return latent_updates.touched_pass(*operands, write=own, **options)


def _touched_in_kernel(
    kernel: Callable[..., Any],
    *operands: Any,
    write: Write | None,
    arguments: Any,
    **options: Any,
) -> tuple[Rows, Sums]:
    """A kernel can't call `write`; the update of unit-norm rows is written out in it."""
    return kernel(*operands, update=None if write is None else arguments, **options)

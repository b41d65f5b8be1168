"""The three costly parts of a step by pairs: by XLA, or as kernels if `train.kernels` says so."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from jax.sharding import Mesh

from sae_train import pair_sums, pairs, row_passes
from sae_train.config import Config
from sae_train.kernels import decode, select, touched
from sae_train.kernels.launcher import check_devices
from sae_train.optimiser import Rows
from sae_train.row_passes import Sums, Write


class Parts(NamedTuple):
    """Functions of one device's shard.

    Attributes:
        select: as `pairs.select_pairs`.
        decode: as `pair_sums.decode_pairs`.
        touched: as `row_passes.touched_pass`, and given `arguments`, the first argument of `write`.
    """

    select: Callable[..., pairs.Pairs]
    decode: Callable[..., Any]
    touched: Callable[..., tuple[Rows, Sums]]


def parts_of(config: Config, mesh: Mesh) -> Parts:
    """Those that the config asks for.

    Raises:
        UserError: it asks for kernels, and the mesh isn't of GPUs.
    """
    if config.train.kernels == "xla":
        return Parts(pairs.select_pairs, pair_sums.decode_pairs, _touched_by_xla)
    check_devices(mesh)
    return Parts(
        select.select_pairs,
        decode.decode_pairs,
        partial(_touched_in_kernel, config=config.train.adam),
    )


def _touched_by_xla(
    *operands: Any, write: Write | None, arguments: Any, **options: Any
) -> tuple[Rows, Sums]:
    own = None if write is None else partial(write, arguments)
    return row_passes.touched_pass(*operands, write=own, **options)


def _touched_in_kernel(
    *operands: Any, write: Write | None, arguments: Any, **options: Any
) -> tuple[Rows, Sums]:
    """A kernel can't call `write`; the update of unit-norm rows is written out in it."""
    return touched.touched_pass(*operands, update=None if write is None else arguments, **options)

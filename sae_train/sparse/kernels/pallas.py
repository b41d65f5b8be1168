"""How kernels are started, and what they read and write with: of Pallas, by Triton.

Triton rather than Mosaic GPU: it runs on every GPU that XLA knows, while Mosaic GPU is for Hopper
and Blackwell, whose asynchronous copies and warpgroup products only it can ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int

from sae_train.sparse.kernels.mode import is_interpreted
from sae_train.step.tiles import varying_axes, varying_on


def launch(
    kernel: Callable[..., None],
    operands: Sequence[Array],
    *,
    out: Sequence[tuple[tuple[int, ...], DTypeLike]],
    grid: tuple[int, ...],
    aliases: Mapping[int, int] | None = None,
    num_warps: int,
    num_stages: int = 1,
) -> tuple[Array, ...]:
    """A kernel's results; it is given its operands and its results whole, as references.

    Args:
        out: of each result its shape and dtype.
        aliases: from an operand to the result that is written in its place; the kernel should read
            it there too.
    """
    axes = frozenset[Any]().union(*map(varying_axes, operands))
    operands = [varying_on(operand, axes) for operand in operands]
    kind = jax.typeof(operands[0]).manual_axis_type
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=[
            jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind) for shape, dtype in out
        ],
        input_output_aliases=dict(aliases or {}),
        interpret=is_interpreted(),
        compiler_params=triton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
    )(*operands)


def table(ref: Any, first: Int[Array, " M"], second: Int[Array, " N"]) -> Any:
    """The part of a matrix at these rows and columns, [M, N], as a reference."""
    shape = first.shape[0], second.shape[0]
    return ref.at[jnp.broadcast_to(first[:, None], shape), jnp.broadcast_to(second[None, :], shape)]


def load(ref: Any, there: Bool[Array, "*shape"] | None = None) -> Array:
    """What is there, and 0 where nothing is."""
    return triton.load(ref, mask=there, other=None if there is None else 0)


def store(ref: Any, value: Array, there: Bool[Array, "*shape"] | None = None) -> None:
    """Write, where `there`."""
    triton.store(ref, value, mask=there)

"""What the compilers of accelerators are told besides the maths. Values stay as they are.

Each hint is there because of what a compiler made of a step without it; docs/performance.md has the
bytes. A CPU's compiler is told nothing: its steps work on tiles that stay in caches.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array


def written_once(arrays: Any, *, tpus: bool = True) -> Any:
    """Arrays that are written to memory, and that whoever needs them reads from there.

    Without it a compiler may make them again from what they came from, and keep that in memory.

    Args:
        tpus: on TPUs too; else on GPUs alone.
    """
    barrier = jax.lax.optimization_barrier
    on_tpus = barrier if tpus else _unchanged
    return jax.lax.platform_dependent(arrays, cpu=_unchanged, tpu=on_tpus, default=barrier)


def row_major(matrix: Array) -> Array:
    """A matrix [F, D] whose rows lie in memory one after the other, like those of the weights.

    A TPU's compiler may choose the transpose for a gradient. It then copies weights and second
    moments to that layout for their update, and back: eight copies of such a matrix in a step.
    """
    return jax.lax.platform_dependent(matrix, tpu=_in_rows, default=_unchanged)


def _in_rows(matrix: Array) -> Array:
    return with_layout_constraint(matrix, Layout((0, 1)))


def _unchanged(arrays: Any) -> Any:
    return arrays

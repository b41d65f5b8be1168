"""What one device holds while it trains, item by item, before anything is allocated.

It is the step by whole products (`train.step: dense`); of one that may go by pairs,
docs/performance.md has what was measured. The arguments of the compiled step (weights, second
moments, the batch) follow from the table in `sharding`, byte for byte. Its temporaries follow from
what the step keeps alive at its fullest, at the end of the backward pass:

    gradients     of every parameter; W_dec's and W_enc's, [F, D] each, are what counts
    activations   two [B, F]: pre-activations and latents, then their cotangents in their place;
                  two [B, D]: the scaled rows and the error; of a transcoder the target's rows too

The state is donated, so new weights and moments are written over the old ones and cost nothing.
XLA's TPU compiler was seen to need just this. On a CPU a JumpReLU's step needs far less and other
architectures' need more, see `_tiled` and `_cpu_temporaries`. docs/plan.md has the comparisons;
tests/test_plan_memory.py holds the JumpReLU's on a CPU within 10 %.

Legend: B rows of a batch, D model width, F latents, each as one device holds them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from activation_cache.config import Dtype
from sae_train.config import MeshConfig
from sae_train.dense_step import cpu_tile
from sae_train.sae_config import Architecture
from sae_train.sharding import AXIS_OF_DIM, BATCH_DIMS, LAST_FIRED, Tensor, params_table

Backend = Literal["accelerator", "cpu"]
FLOAT_BYTES = 4
# The step, what steering added to log λ, BatchTopK's threshold, overflows. When latents were last
# touched and how the last step went are no arguments of a step by whole products.
STATE_SCALAR_BYTES = 16
SCALAR_BYTES = 12  # learning rate, coefficient, bias correction
_STATE = ("weights", "second moment")
_HELD = (*_STATE, "batch")  # from one step to the next; the other items are temporaries


@dataclass(frozen=True)
class Shape:
    """The sizes a step is compiled for: global dims, and the mesh that cuts them."""

    batch_size: int
    d_model: int
    width: int
    mesh: MeshConfig
    architecture: Architecture = "jumprelu"
    is_transcoder: bool = False
    has_skip: bool = False

    @property
    def table(self) -> Iterable[Tensor]:
        """What is trained: rows of the sharding table."""
        table = params_table(
            self.architecture, is_transcoder=self.is_transcoder, has_skip=self.has_skip
        )
        return table.values()

    def local(self, dims: tuple[str, ...]) -> int:
        """Elements of a tensor with these dims on one device."""
        sizes = {"B": self.batch_size, "D": self.d_model, "F": self.width}
        return math.prod(sizes[dim] // self._cuts(dim) for dim in dims)

    def _cuts(self, dim: str) -> int:
        axis = AXIS_OF_DIM[dim]
        return 1 if axis is None else int(getattr(self.mesh, axis))

    def table_bytes(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of rows of the sharding table on one device."""
        return sum(self.local(tensor.dims) * tensor.dtype.itemsize for tensor in tensors)


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one device while the step runs, by item.

    `items` maps a name to bytes; `next_batch` is the batch put there while the step computes on
    the one before, which the compiled step doesn't know of.
    """

    items: dict[str, int]
    next_batch: int

    @property
    def step(self) -> int:
        """Bytes of the compiled step: arguments and temporaries."""
        return sum(self.items.values())

    @property
    def total(self) -> int:
        """Bytes the device must have."""
        return self.step + self.next_batch

    @property
    def biggest(self) -> str:
        """The name of the biggest item."""
        return max(self.items, key=lambda name: self.items[name])


def step_memory(
    shape: Shape, *, store_dtype: Dtype = "float32", backend: Backend = "accelerator"
) -> StepMemory:
    """Memory of one device for the training step.

    Args:
        store_dtype: of the rows as they reach the device.
        backend: whose compiler: TPU and GPU, or the CPU's.
    """
    params = shape.table_bytes(shape.table)
    arrays = 2 if shape.is_transcoder else 1
    batch = arrays * shape.local(BATCH_DIMS) * jnp.dtype(store_dtype).itemsize
    items = {
        "weights": params + shape.table_bytes([LAST_FIRED]) + STATE_SCALAR_BYTES,
        "second moment": params,
        "batch": batch + SCALAR_BYTES,
    }
    if backend == "cpu":
        items |= _tiled(shape) if shape.architecture == "jumprelu" else _cpu_temporaries(shape)
    else:
        latents = shape.local(("B", "F")) * FLOAT_BYTES
        rows = shape.local(("B", "D")) * FLOAT_BYTES
        items |= {"gradients": params, "activations": 2 * latents + (1 + arrays) * rows}
    return StepMemory(items=items, next_batch=batch)


def cohort_memory(members: Sequence[StepMemory]) -> StepMemory:
    """Memory of one device for runs that train together.

    The states of all are there; steps run one after the other, so that of temporaries only the
    most that any of them needs is; a batch is there once for all.
    """

    def temporaries(memory: StepMemory) -> dict[str, int]:
        return {name: size for name, size in memory.items.items() if name not in _HELD}

    fullest = max(members, key=lambda memory: sum(temporaries(memory).values()))
    states = {name: sum(memory.items[name] for memory in members) for name in _STATE}
    return StepMemory(
        items=states | {"batch": fullest.items["batch"]} | temporaries(fullest),
        next_batch=fullest.next_batch,
    )


def _tiled(shape: Shape) -> dict[str, int]:
    """Temporaries of the step a tile of latents at a time (`dense_step`), read off XLA's figures.

    Of what is [B, F] the pre-activations alone; five arrays the size of a tile's rows (gradients,
    weights, moments), and three more where gradients are added up over `data`.
    """
    rows = shape.local(("B", "D")) * FLOAT_BYTES
    tile = cpu_tile(shape.local(("F",))) * shape.d_model * FLOAT_BYTES
    return {
        "gradients": (5 if shape.mesh.data == 1 else 8) * tile,
        "activations": shape.local(("B", "F")) * FLOAT_BYTES + (3 + shape.is_transcoder) * rows,
    }


def _cpu_temporaries(shape: Shape) -> dict[str, int]:
    """Temporaries of XLA's CPU compiler for a step by autodiff, read off its live ranges.

    Those of a JumpReLU's gradients by autodiff: a ReLU's step takes less, the others more
    (docs/plan.md). Beyond what the step needs it keeps three [F, D] arrays that hold one scalar
    each (learning rate, bias correction, ε: its fused library calls take no scalars), and copies
    of donated weights, for it decides on copies before it fixes an order, and only an order shows
    that the new weights come last. The old weights' places then serve other arrays of at most
    their size.
    """
    matrix = shape.local(("F", "D")) * FLOAT_BYTES
    latents = shape.local(("B", "F")) * FLOAT_BYTES
    rows = shape.local(("B", "D")) * FLOAT_BYTES
    scalars = 3 * matrix
    if shape.mesh.data > 1:
        # One copy: W_dec's order is fixed by the all-reduce, which has its own two outputs. One
        # of the four gradient-sized arrays, and [B, F] arrays that fit, lie in others' places.
        copies, gradients = matrix, 3 * matrix
        activations = max(rows, 2 * latents + 3 * rows - 2 * matrix)
    else:
        # One of the gradients lies in the place of donated weights; so does one of the three
        # [B, F] arrays (pre-activations, their cotangent, the thresholds' pull) if it fits.
        copies, gradients = 2 * matrix, matrix
        backward = 2 * latents + rows if latents <= matrix else 3 * latents
        decoding = 2 * latents + 3 * rows - scalars - gradients
        activations = max(backward, decoding)
    return {
        "gradients": gradients,
        "activations": activations,
        "copies of donated weights": copies,
        "scalars spread out": scalars,
    }

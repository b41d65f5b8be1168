"""What one device holds while it trains, item by item, before anything is allocated.

The arguments of the compiled step (weights, second moments, the batch) follow from the table in
`sharding`, byte for byte. Its temporaries follow from what a step by whole products keeps alive at
its fullest, at the end of the backward pass:

    gradients     of every parameter; W_dec's and W_enc's, [F, D] each, are what counts
    activations   two [B, F]: pre-activations and latents, then their cotangents in their place;
                  two [B, D]: the scaled rows and the error; of a transcoder the target's rows too

The state is donated, so new weights and moments are written over the old ones and cost nothing.
XLA's TPU compiler was seen to need just this. On a CPU a JumpReLU's step needs far less and other
architectures' need more, see `_tiled` and `_cpu_temporaries`; a step that may go by pairs keeps
neither [B, F] nor gradients [F, D], see `_by_pairs`. docs/plan.md has the
comparisons; tests/sae_train/plan/test_memory.py holds the JumpReLU's on a CPU within 10 %.

Legend: B rows of a batch, D model width, F latents, each as one device holds them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from activation_cache.config import Dtype
from sae_train.config.run import MeshConfig
from sae_train.config.sae import Architecture
from sae_train.model.sharding import AXIS_OF_DIM, BATCH_DIMS, LAST_FIRED, Tensor, params_table
from sae_train.step.dense_jumprelu import cpu_tile
from sae_train.step.tiles import tile_of

Backend = Literal["accelerator", "cpu"]
FLOAT_BYTES = 4
# The step, what steering added to log λ, BatchTopK's threshold, overflows. When latents were last
# touched and how the last step went are no arguments of a step by whole products: pairs a row and
# the way it took are `WAY_BYTES`.
STATE_SCALAR_BYTES = 16
WAY_BYTES = 8
SCALAR_BYTES = 12  # learning rate, coefficient, bias correction
_STATE = ("weights", "second moment")
_HELD = (*_STATE, "batch")  # from one step to the next; the other items are temporaries


@dataclass(frozen=True)
class Shape:
    """The sizes a step is compiled for: global dims, and the mesh that cuts them.

    `places` are those for pairs, a row, of a step that may go by pairs; None: by products only.
    """

    batch_size: int
    d_model: int
    width: int
    mesh: MeshConfig
    architecture: Architecture = "jumprelu"
    is_transcoder: bool = False
    has_skip: bool = False
    places: int | None = None

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
    if shape.places is not None:
        items["weights"] += shape.table_bytes([LAST_FIRED]) + WAY_BYTES  # `last_touched` is alike
        items |= _by_pairs(shape, places=shape.places)
    elif backend == "cpu":
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


def nearest_mesh(shape: Shape, store_dtype: Dtype, *, usable: int, most: int) -> MeshConfig | None:
    """The mesh nearest to the config's that divides the batch and the latents and fits.

    Near means few doublings or halvings of each axis; of equally near ones the one with fewer
    devices, then the one with more latents' shards.

    Args:
        usable: bytes of a device.
        most: devices there are.
    """

    def distance(mesh: MeshConfig) -> tuple[float, int, int]:
        doublings = abs(math.log2(mesh.data / shape.mesh.data)) + abs(
            math.log2(mesh.model / shape.mesh.model)
        )
        return doublings, mesh.data * mesh.model, -mesh.model

    fitting = [
        mesh
        for mesh in _meshes(shape, most=most)
        if step_memory(dataclasses.replace(shape, mesh=mesh), store_dtype=store_dtype).total
        <= usable
    ]
    return min(fitting, key=distance, default=None)


def _meshes(shape: Shape, *, most: int) -> Iterator[MeshConfig]:
    for data in _divisors(shape.batch_size, most=most):
        for model in _divisors(shape.width, most=most // data):
            yield MeshConfig(data=data, model=model)


def _divisors(number: int, *, most: int) -> list[int]:
    return [one for one in range(1, min(number, most) + 1) if number % one == 0]


# Read off XLA's CPU compiler over widths, batches and places: rows [S, D] of a block of latents
# (weights, moments, gradients, the new ones); tiles [B, L] alive together; words that sorting a
# place takes, and those it holds; bytes of vectors of one number a latent.
_BLOCK_ROWS, _TILES, _SORTED_WORDS, _PLACE_WORDS, _LATENT_BYTES = 10, 4, 8, 3, 52


def _by_pairs(shape: Shape, *, places: int) -> dict[str, int]:
    """Temporaries of a step by pairs or by tiles, the larger: at the fullest of three moments."""
    width, rows = shape.local(("F",)), shape.local(("B",))
    tile = tile_of(width)
    row_bytes = shape.local(("B", "D")) * FLOAT_BYTES
    words = -(-rows * places // shape.mesh.model) * FLOAT_BYTES
    blocks = _BLOCK_ROWS * tile * shape.d_model * FLOAT_BYTES
    updating = 3 * row_bytes + blocks + _PLACE_WORDS * words * shape.mesh.data
    if shape.mesh.data > 1:  # what is read and what is sent back, of the whole batch
        updating += row_bytes + 2 * row_bytes * shape.mesh.data
    sorting = 4 * row_bytes + _SORTED_WORDS * words
    by_tiles = 3 * row_bytes + _TILES * rows * tile * FLOAT_BYTES
    fullest = max(updating, sorting, by_tiles) + _LATENT_BYTES * width
    target = row_bytes if shape.is_transcoder else 0
    return {"gradients": blocks, "activations": fullest - blocks + target}


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

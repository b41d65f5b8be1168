"""What one device holds while it trains, item by item, before anything is allocated.

The arguments of the compiled step (weights, second moments, the batch) follow from the table in
`sharding`, byte for byte. Its temporaries follow from what the dense step keeps alive at its
fullest, at the end of the backward pass:

    gradients     of every parameter; W_dec's and W_enc's, [F, D] each, are what counts
    activations   two [B, F]: pre-activations and latents, then their cotangents in the same memory;
                  two [B, D]: the scaled rows and the error; of a transcoder the target's rows too

The state is donated: new weights and moments overwrite the old ones and cost nothing. In all this
is 6 to 47 % more than XLA's compilers for accelerators keep, most at bfloat16. Its CPU compiler
needs other amounts, which were read off its analysis of the compiled step: `_tiled` for a JumpReLU,
`_CPU_ALIVE` for architectures that step by autodiff, `_sparse` for the sparse path on any device.
To ask the compiler itself would cost `sae plan` 1 s of processor time for each shape on the dense
path and 7 s on the sparse one, and as many CPU devices as the mesh has. docs/plan.md has the
comparisons; tests/sae_train/plan/test_memory.py holds the CPU's.

Legend: B rows of a batch, D model width, F latents, each as one device holds them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from activation_cache.config import Dtype
from activation_cache.gemma.config import GemmaConfig
from activation_cache.gemma.taps import check_tap, tap_width
from sae_train.config.run import Config, MeshConfig
from sae_train.config.sae import Architecture, SaeConfig
from sae_train.model.sharding import AXIS_OF_DIM, BATCH_DIMS, LAST_FIRED, Tensor, params_table
from sae_train.step.dense_jumprelu import cpu_tile
from sae_train.step.tiles import tile_of

Backend = Literal["accelerator", "cpu"]
FLOAT_BYTES = 4
# The step, what steering added to log λ, BatchTopK's threshold, overflows. The dense path has no
# use for the pairs a row and the path of the last step: those are `PATH_BYTES`.
STATE_SCALAR_BYTES = 16
PATH_BYTES = 8
SCALAR_BYTES = 12  # learning rate, coefficient, bias correction
STATE_ITEMS = ("weights", "first moment", "second moment")
_HELD = (*STATE_ITEMS, "batch")  # from one step to the next; the other items are temporaries


@dataclass(frozen=True)
class Shape:
    """The sizes a step is compiled for: global dims, and the mesh that cuts them.

    `capacity` is the sparse path's, in active pairs a row; None: the dense path only. `groups` are
    the latents of each group of a Matryoshka SAE; empty for another. `has_whole_gradients` is of
    the dense path: they are there all at once.
    """

    batch_size: int
    d_model: int
    width: int
    mesh: MeshConfig
    architecture: Architecture = "jumprelu"
    is_transcoder: bool = False
    has_skip: bool = False
    whitens: bool = False
    has_momentum: bool = False
    has_whole_gradients: bool = False
    capacity: int | None = None
    groups: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: Config, gemma: GemmaConfig | int, *, capacity: int | None) -> Shape:
        """A run's, of the model's shape or the width of its rows.

        Raises:
            UserError: the model has no such layer.
        """
        tap = config.sae.tap
        if not isinstance(gemma, int):
            check_tap(tap, gemma)
        return cls(
            batch_size=config.train.batch_size,
            d_model=gemma if isinstance(gemma, int) else tap_width(gemma, tap.site),
            width=config.sae.width,
            mesh=config.mesh,
            architecture=config.sae.architecture,
            is_transcoder=config.sae.is_transcoder,
            has_skip=config.sae.affine_skip,
            whitens=config.sae.whitening > 0,
            has_momentum=config.train.has_momentum,
            has_whole_gradients=config.train.has_whole_gradients,
            capacity=capacity,
            groups=_groups(config.sae),
        )

    def local(self, dims: tuple[str, ...]) -> int:
        """Elements of a tensor with these dims on one device."""
        sizes = {"B": self.batch_size, "D": self.d_model, "F": self.width}
        return math.prod(sizes[dim] // self._cuts(dim) for dim in dims)

    def _cuts(self, dim: str) -> int:
        axis = AXIS_OF_DIM[dim]
        return 1 if axis is None else int(getattr(self.mesh, axis))

    def tensor_bytes(self, *tensors: Tensor) -> int:
        """Bytes of rows of the sharding table on one device."""
        return sum(self.local(tensor.dims) * tensor.dtype.itemsize for tensor in tensors)

    def params_bytes(self) -> int:
        """Bytes of what is trained on one device."""
        table = params_table(
            self.architecture,
            is_transcoder=self.is_transcoder,
            has_skip=self.has_skip,
            whitens=self.whitens,
        )
        return self.tensor_bytes(*table.values())


def _groups(config: SaeConfig) -> tuple[int, ...]:
    ends = [end for end, _ in config.groups]
    if len(ends) == 1:
        return ()
    return tuple(end - start for start, end in itertools.pairwise([0, *ends]))


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
    params = shape.params_bytes()
    arrays = 2 if shape.is_transcoder else 1
    batch = arrays * shape.local(BATCH_DIMS) * jnp.dtype(store_dtype).itemsize
    items = {
        # When latents last fired, and when they were last touched.
        "weights": params + shape.tensor_bytes(LAST_FIRED, LAST_FIRED) + STATE_SCALAR_BYTES,
        "first moment": params if shape.has_momentum else 0,
        "second moment": params,
        "batch": batch + SCALAR_BYTES,
    }
    if shape.capacity is not None:
        items["weights"] += PATH_BYTES
        items |= _sparse(shape, capacity=shape.capacity)
    elif backend == "cpu":
        items |= _tiled(shape) if shape.architecture == "jumprelu" else _by_autodiff(shape)
        if shape.has_whole_gradients and shape.architecture == "jumprelu":
            items |= _whole(shape, activations=items["activations"])
    else:
        latents = shape.local(("B", "F")) * FLOAT_BYTES
        rows = shape.local(("B", "D")) * FLOAT_BYTES
        items |= {"gradients": params, "activations": 2 * latents + (1 + arrays) * rows}
        if shape.groups and shape.architecture == "jumprelu":
            items["gradients"] = max(params, _of_largest_group(shape))
    if shape.groups:
        arrays = _SPARSE_PREFIX_ROWS if shape.capacity is not None else _PREFIX_ROWS
        rows = shape.local(("B", "D")) * FLOAT_BYTES
        items["activations"] += arrays * (len(shape.groups) - 1) * rows
    return StepMemory(items=items, next_batch=batch)


# Of a Matryoshka SAE: arrays [B, D] for each prefix but one, read off XLA's CPU compiler; and of
# rows [F, D] of a group those taken out, their gradients and the new ones.
_PREFIX_ROWS, _SPARSE_PREFIX_ROWS, _GROUP_ROWS = 2, 5, 8


def _of_largest_group(shape: Shape) -> int:
    """Bytes of the rows that one group's update takes out of the arrays and puts back."""
    rows = max(shape.groups) // shape.mesh.model
    return _GROUP_ROWS * rows * shape.d_model * FLOAT_BYTES


def cohort_memory(members: Sequence[StepMemory]) -> StepMemory:
    """Memory of one device for runs that train together.

    The states of all are there; steps run one after the other, so that of temporaries only the
    most that any of them needs is; a batch is there once for all.
    """

    def temporaries(memory: StepMemory) -> dict[str, int]:
        return {name: size for name, size in memory.items.items() if name not in _HELD}

    fullest = max(members, key=lambda memory: sum(temporaries(memory).values()))
    states = {name: sum(memory.items[name] for memory in members) for name in STATE_ITEMS}
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
        for model in _divisors(math.gcd(shape.width, *shape.groups), most=most // data):
            yield MeshConfig(data=data, model=model)


def _divisors(number: int, *, most: int) -> list[int]:
    return [one for one in range(1, min(number, most) + 1) if number % one == 0]


# Read off XLA's CPU compiler over widths, batches and capacities: rows [S, D] of a block of latents
# (weights, moments, gradients, the new ones); tiles [B, L] alive together; words for each pair
# while pairs are sorted, and afterwards; bytes of vectors with one number a latent.
_BLOCK_ROWS, _TILES, _SORTED_WORDS, _PAIR_WORDS, _LATENT_BYTES = 10, 4, 8, 3, 52


def _sparse(shape: Shape, *, capacity: int) -> dict[str, int]:
    """Temporaries of the sparse path, or of the tiles it falls back to where that is more.

    The largest of three moments: sorting the pairs, updating the latents, a step by tiles.
    """
    width, rows = shape.local(("F",)), shape.local(("B",))
    tile = tile_of(width)
    row_bytes = shape.local(("B", "D")) * FLOAT_BYTES
    words = -(-rows * capacity // shape.mesh.model) * FLOAT_BYTES
    blocks = _BLOCK_ROWS * tile * shape.d_model * FLOAT_BYTES
    updating = 3 * row_bytes + blocks + _PAIR_WORDS * words * shape.mesh.data
    if shape.mesh.data > 1:  # what is read and what is sent back, of the whole batch
        updating += row_bytes + 2 * row_bytes * shape.mesh.data
    sorting = 4 * row_bytes + _SORTED_WORDS * words
    by_tiles = 3 * row_bytes + _TILES * rows * tile * FLOAT_BYTES
    fullest = max(updating, sorting, by_tiles) + _LATENT_BYTES * width
    target = row_bytes if shape.is_transcoder else 0
    return {"gradients": blocks, "activations": fullest - blocks + target}


def _tiled(shape: Shape) -> dict[str, int]:
    """Temporaries of the step a tile of latents at a time (`dense_step`), read off XLA's figures.

    One array [B, F], the pre-activations; and eight arrays of the size of a tile's rows (gradients,
    weights, moments, old and new).
    """
    rows = shape.local(("B", "D")) * FLOAT_BYTES
    tile = cpu_tile(shape.local(("F",))) * shape.d_model * FLOAT_BYTES
    return {
        "gradients": 8 * tile,
        "activations": shape.local(("B", "F")) * FLOAT_BYTES + (3 + shape.is_transcoder) * rows,
    }


def _whole(shape: Shape, *, activations: int) -> dict[str, int]:
    """Temporaries of a step that makes all gradients before it updates anything, off XLA's figures.

    Six matrices [F, D]: gradients, projected ones, new rows. A seventh, of the first moment, comes
    when the pre-activations are gone.
    """
    matrix = shape.local(("F", "D")) * FLOAT_BYTES
    if shape.has_momentum:
        activations = max(activations, matrix)
    return {"gradients": 6 * matrix, "activations": activations}


# Arrays [F, D], [B, F] and [B, D] that XLA's CPU compiler keeps at once for a step by autodiff, to
# the nearest whole number over widths 4096 to 65536: within 10 % of its analysis on one device.
_CPU_ALIVE: dict[Architecture, tuple[int, int, int]] = {
    "relu": (2, 3, 1),
    "gated": (5, 5, 1),
    "topk": (5, 6, 2),
    "batch_topk": (5, 6, 2),
}


def _by_autodiff(shape: Shape) -> dict[str, int]:
    """Temporaries of the step by autodiff on CPUs."""
    matrices, latents, rows = _CPU_ALIVE[shape.architecture]
    return {
        "gradients": matrices * shape.local(("F", "D")) * FLOAT_BYTES,
        "activations": latents * shape.local(("B", "F")) * FLOAT_BYTES
        + (rows + shape.is_transcoder) * shape.local(("B", "D")) * FLOAT_BYTES,
    }

"""The one table: per tensor of the training state its dims, dtype and initialiser.

Shapes, shardings, the abstract tree that a checkpoint restores into and the memory estimate all
derive from it, so they can't disagree. No other file writes a PartitionSpec.

Dims: B rows of a batch, D model width, F latents. `axis` is a mesh axis, `dim` a tensor dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from activation_cache import mesh as device_mesh
from activation_cache.config import MeshConfig
from sae_train.config.sae import Architecture, SaeConfig

AXIS_OF_DIM: dict[str, str | None] = {
    "B": "data",
    "F": "model",
    "D": None,
    "whole": None,  # any dim, where every device has all of it
}

Initialiser = Callable[[jax.Array, tuple[int, ...], "SaeConfig"], Array]


@dataclass(frozen=True)
class Tensor:
    """One row of the table."""

    dims: tuple[str, ...]
    dtype: jnp.dtype
    init: Initialiser


def _zeros(key: jax.Array, shape: tuple[int, ...], config: SaeConfig) -> Array:
    return jnp.zeros(shape)


def _unit_rows(key: jax.Array, shape: tuple[int, ...], config: SaeConfig) -> Array:
    """He-uniform, then every latent's vector rescaled to unit norm (Gemma Scope 3.2).

    The rescaling cancels He's bound, so the draw is from [-1, 1].
    """
    rows_FD = jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)
    return rows_FD / jnp.linalg.norm(rows_FD, axis=1, keepdims=True)


def _other_unit_rows(key: jax.Array, shape: tuple[int, ...], config: SaeConfig) -> Array:
    """As `_unit_rows`, and not the same: a transcoder's W_enc isn't tied (Gemma Scope, app. B)."""
    return _unit_rows(jax.random.fold_in(key, 1), shape, config)


def _threshold(key: jax.Array, shape: tuple[int, ...], config: SaeConfig) -> Array:
    init = config.threshold.init
    log = config.threshold.parametrisation == "log"
    return jnp.full(shape, np.log(init) if log else init, jnp.float32)


_FLOAT = jnp.dtype(jnp.float32)
# W_enc starts as the transpose of W_dec; latent-major storage makes them the same array.
_SHARED: dict[str, Tensor] = {
    "W_dec": Tensor(dims=("F", "D"), dtype=_FLOAT, init=_unit_rows),
    "W_enc": Tensor(dims=("F", "D"), dtype=_FLOAT, init=_unit_rows),
    "b_dec": Tensor(dims=("D",), dtype=_FLOAT, init=_zeros),
}
_UNTIED = Tensor(dims=("F", "D"), dtype=_FLOAT, init=_other_unit_rows)
_SKIP = Tensor(dims=("D", "D"), dtype=_FLOAT, init=_zeros)  # [in, out], whole on every device
_INPUT_MEAN = Tensor(dims=("D",), dtype=_FLOAT, init=_zeros)  # never trained
_WHITENING = Tensor(dims=("D", "D"), dtype=_FLOAT, init=_zeros)  # never trained, whole everywhere
_BIAS = Tensor(dims=("F",), dtype=_FLOAT, init=_zeros)
_OWN: dict[Architecture, dict[str, Tensor]] = {
    "jumprelu": {
        "b_enc": _BIAS,
        "threshold": Tensor(dims=("F",), dtype=_FLOAT, init=_threshold),
    },
    "relu": {"b_enc": _BIAS},
    "gated": {"b_gate": _BIAS, "b_mag": _BIAS, "r_mag": _BIAS},
    "topk": {"b_enc": _BIAS},
    "batch_topk": {"b_enc": _BIAS},
}
LAST_FIRED = Tensor(dims=("F",), dtype=jnp.dtype(jnp.int32), init=_zeros)
BATCH_DIMS = ("B", "D")


def params_table(
    architecture: Architecture,
    *,
    is_transcoder: bool = False,
    has_skip: bool = False,
    subtracts_mean: bool = False,
    whitens: bool = False,
) -> dict[str, Tensor]:
    """The rows of the parameters that an architecture trains, as an SAE or as a transcoder."""
    table = _SHARED | _OWN[architecture]
    if is_transcoder:
        table["W_enc"] = _UNTIED
    if subtracts_mean:
        table["input_mean"] = _INPUT_MEAN
    if whitens:
        table["whitening"] = _WHITENING
    return table | ({"W_skip": _SKIP} if has_skip else {})


def table_of(config: SaeConfig) -> dict[str, Tensor]:
    """`params_table` of a config."""
    return params_table(
        config.architecture,
        is_transcoder=config.is_transcoder,
        has_skip=config.affine_skip,
        subtracts_mean=config.subtract_mean,
        whitens=config.whitening > 0,
    )


def make_mesh(config: MeshConfig) -> Mesh:
    """A (data, model) mesh over as many devices of every process.

    Devices of one process are neighbours, so that its part of a batch is one run of rows.

    Raises:
        UserError: fewer devices than the mesh has, or processes without a part in it.
    """
    devices = device_mesh.devices_of_processes(config)
    return device_mesh.make_mesh(devices, data=config.data)


def local_mesh() -> Mesh:
    """One device of this process alone."""
    return device_mesh.make_mesh(jax.local_devices()[:1])


def rows_here(mesh: Mesh, *, batch_size: int) -> slice:
    """The rows of a batch that devices of this process hold: one run of them."""
    placement = sharding(mesh, BATCH_DIMS)
    held = placement.addressable_devices_indices_map((batch_size, 1)).values()
    spans = [index[0].indices(batch_size) for index in held if index is not None]
    return slice(min(start for start, _, _ in spans), max(stop for _, stop, _ in spans))


def place_batch(rows_BD: np.ndarray, *, mesh: Mesh, batch_size: int, span: slice) -> Array:
    """The batch of all processes on its devices, from this one's rows: those of `span`."""

    def part(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(batch_size)
        return rows_BD[start - span.start : stop - span.start]

    shape = (batch_size, rows_BD.shape[1])
    return jax.make_array_from_callback(shape, sharding(mesh, BATCH_DIMS), part)


def spec(dims: tuple[str, ...]) -> PartitionSpec:
    """The mesh axis each dim is split over."""
    return PartitionSpec(*(AXIS_OF_DIM[dim] for dim in dims))


def over_devices(
    function: Callable[..., Any], *, mesh: Mesh, in_dims: Any, out_dims: Any, check: bool = True
) -> Callable[..., Any]:
    """A function of each device's parts of arrays, called with whole arrays (`jax.shard_map`).

    Args:
        in_dims, out_dims: the arguments' and results' trees, with dims in place of arrays.
        check: whether types say over which axes values differ; Pallas' interpreter can't tell.
    """

    def specs(dims: Any) -> Any:
        return jax.tree.map(lambda leaf: _used_spec(mesh, leaf), dims, is_leaf=_is_dims)

    return jax.shard_map(
        function, mesh=mesh, in_specs=specs(in_dims), out_specs=specs(out_dims), check_vma=check
    )


def sum_over(axis: str, value: Any, *, mesh: Mesh) -> Any:
    """Inside `over_devices`: the sum over the devices along a mesh axis."""
    return jax.lax.psum(value, axis) if mesh.shape[axis] > 1 else value


def max_over(axis: str, value: Array, *, mesh: Mesh) -> Array:
    """Inside `over_devices`: the largest value along a mesh axis."""
    return jax.lax.pmax(value, axis) if mesh.shape[axis] > 1 else value


def max_over_all(value: Array, *, mesh: Mesh) -> Array:
    """Inside `over_devices`: the largest of all devices' values."""
    axes = tuple(axis for axis in device_mesh.AXES if mesh.shape[axis] > 1)
    return jax.lax.pmax(value, axes) if axes else value


def _used_spec(mesh: Mesh, dims: tuple[str, ...]) -> PartitionSpec:
    """As `spec`, but without axes of one device, over which there is nothing to add up."""
    axes = (AXIS_OF_DIM[dim] for dim in dims)
    return PartitionSpec(*(axis if axis and mesh.shape[axis] > 1 else None for axis in axes))


def _is_dims(leaf: Any) -> bool:
    # Not a NamedTuple, and not (), which is a scalar's dims as well as an empty tree.
    return type(leaf) is tuple and all(isinstance(dim, str) for dim in leaf)


def sharding(mesh: Mesh, dims: tuple[str, ...]) -> NamedSharding:
    """Where a tensor with these dims lives."""
    return NamedSharding(mesh, spec(dims))


def mesh_of(array: Array) -> Mesh:
    """The mesh an array of ours lies on."""
    assert isinstance(array.sharding, NamedSharding), array.sharding
    assert isinstance(array.sharding.mesh, Mesh)
    return array.sharding.mesh


def shape_of(tensor: Tensor, *, width: int, d_model: int) -> tuple[int, ...]:
    """The global shape of a table row."""
    return tuple({"F": width, "D": d_model}[dim] for dim in tensor.dims)

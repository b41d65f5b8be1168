"""The memory plan against XLA's own analysis of the compiled step, at sizes of real suites.

`python -m benchmarks.plan_memory` compares every shape of the issue's grid, and TPUs.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest

from activation_cache.config import Dtype
from sae_train.config.run import MeshConfig
from sae_train.config.sae import Architecture
from sae_train.plan.memory import PATH_BYTES, STATE_ITEMS, Shape, step_memory
from tests.support.plan_shapes import compile_step, measured_bytes

pytestmark = pytest.mark.slow

# XLA lays buffers of several sizes into one heap; which lies in whose place is its own choice.
TOLERANCE = 0.10


def shape(width: int, d_model: int, data: int, model: int, batch_size: int = 4096) -> Shape:
    return Shape(batch_size, d_model, width, MeshConfig(data=data, model=model))


# Gemma 2's widths, and Gemma Scope's narrowest, a middle and the widest SAE, over the meshes.
SHAPES = [
    shape(16_384, 2304, 1, 1),
    shape(1_048_576, 4608, 1, 1),
    shape(131_072, 4608, 1, 4),
    shape(16_384, 2304, 1, 8),
    shape(1_048_576, 2304, 2, 4),
    shape(16_384, 2304, 8, 1),
]


@pytest.mark.parametrize(
    "sizes",
    SHAPES,
    ids=lambda s: f"{s.width}-{s.d_model}-{s.mesh.data}x{s.mesh.model}",
)
def test_the_plan_is_what_xla_allocates(sizes: Shape) -> None:
    arguments, total = measured_bytes(compile_step(sizes))
    planned = step_memory(sizes, backend="cpu")
    known = ("weights", "second moment", "batch")
    assert sum(planned.items[name] for name in known) == arguments, "to the byte"
    assert planned.step == pytest.approx(total, rel=TOLERANCE)
    assert set(known) < set(planned.items)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_gradients_made_whole_are_planned(beta1: float) -> None:
    """To be clipped, and with momentum, which is kept from step to step besides."""
    sizes = shape(16_384, 2304, 1, 1)
    compiled = compile_step(sizes, adam={"beta1": beta1}, gradient_clip=0.1)
    arguments, total = measured_bytes(compiled)
    sizes = dataclasses.replace(sizes, has_momentum=beta1 > 0, has_whole_gradients=True)
    planned = step_memory(sizes, backend="cpu")
    held = sum(planned.items[name] for name in (*STATE_ITEMS, "batch"))
    assert held + (4 if beta1 else 0) == arguments, "to the byte, but for a scalar"
    assert planned.step == pytest.approx(total, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("sizes", "capacity", "tolerance"),
    [
        (shape(16_384, 640, 1, 1), 512, 0.05),
        (shape(16_384, 640, 1, 1), 1024, 0.05),
        (shape(65_536, 2304, 1, 1), 512, 0.02),
        (shape(65_536, 2304, 2, 4), 512, 0.05),
    ],
)
def test_the_plan_of_the_sparse_path_is_what_xla_allocates(
    sizes: Shape, capacity: int, tolerance: float
) -> None:
    arguments, total = measured_bytes(compile_step(sizes, step="sparse", sparse_capacity=capacity))
    planned = step_memory(dataclasses.replace(sizes, capacity=capacity), backend="cpu")
    known = ("weights", "second moment", "batch")
    # A step that always tries the sparse path doesn't ask which one the last step took.
    assert sum(planned.items[name] for name in known) == arguments + PATH_BYTES
    assert planned.step == pytest.approx(total, rel=tolerance)
    assert set(planned.items) == set(step_memory(sizes).items)


@pytest.mark.parametrize("architecture", ["relu", "gated", "topk", "batch_topk"])
@pytest.mark.parametrize(
    "sizes", [shape(4096, 640, 1, 1), shape(16_384, 2304, 1, 1, batch_size=1024)], ids=str
)
def test_the_plan_of_a_step_by_autodiff_is_near(sizes: Shape, architecture: Architecture) -> None:
    own = {"architecture": architecture} | ({"k": 64} if "topk" in architecture else {})
    sparsity = {"penalty": "none" if "topk" in architecture else "l1"}
    arguments, total = measured_bytes(compile_step(sizes, sae=own, sparsity=sparsity))
    planned = step_memory(dataclasses.replace(sizes, architecture=architecture), backend="cpu")
    known = ("weights", "second moment", "batch")
    assert sum(planned.items[name] for name in known) == arguments, "to the byte"
    assert planned.step == pytest.approx(total, rel=TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arguments_follow_the_store_s_dtype(dtype: Dtype) -> None:
    sizes = shape(512, 64, 2, 2, batch_size=128)
    penalty = {"penalty": "target_l0", "target": 5.0}
    arguments, _ = measured_bytes(compile_step(sizes, dtype=dtype, sparsity=penalty))
    planned = step_memory(sizes, store_dtype=dtype)
    assert sum(planned.items[n] for n in ("weights", "second moment", "batch")) == arguments
    assert planned.next_batch == 64 * 64 * (4 if dtype == "float32" else 2)


def test_an_accelerator_needs_what_the_step_keeps_alive() -> None:
    # Counted by hand: F, D, B = 8, 4, 16 on a 2 x 2 mesh; 4 latents and 8 rows a device.
    memory = step_memory(shape(8, 4, 2, 2, batch_size=16))
    params = 4 * (2 * 4 * 4 + 4 + 4 + 4)  # W_dec, W_enc; b_dec, b_enc, threshold
    assert memory.items == {
        "weights": params
        + 2 * 4 * 4
        + 16,  # last_fired, last_touched; step, log_gain, selection_threshold, overflows
        "first moment": 0,
        "second moment": params,
        "batch": 4 * 8 * 4 + 12,
        "gradients": params,
        "activations": 4 * (2 * 8 * 4 + 2 * 8 * 4),
    }
    assert memory.biggest == "activations"
    assert memory.total == sum(memory.items.values()) + 4 * 8 * 4


@pytest.mark.parametrize("step", ["dense", "sparse"])
def test_prefixes_take_arrays_of_rows(step: Literal["dense", "sparse"]) -> None:
    capacity = 128 if step == "sparse" else None
    groups = (256, 256, 512, 1024, 2048)
    sizes = Shape(512, 256, 4096, MeshConfig(), capacity=capacity, groups=groups)
    own = {"matryoshka": [0.0625, 0.125, 0.25, 0.5]}
    arguments, total = measured_bytes(compile_step(sizes, step=step, sae=own))
    planned = step_memory(sizes, backend="cpu")
    held = sum(planned.items[name] for name in ("weights", "second moment", "batch"))
    assert held - (PATH_BYTES if capacity else 0) == arguments
    assert planned.step == pytest.approx(total, rel=TOLERANCE)


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_has_two_batches_and_perhaps_a_skip(skip: bool) -> None:
    sizes = Shape(512, 256, 4096, MeshConfig(), is_transcoder=True, has_skip=skip)
    own = {"site": "mlp_in", "target": "mlp_out", "affine_skip": skip}
    arguments, total = measured_bytes(compile_step(sizes, sae=own))
    planned = step_memory(sizes, backend="cpu")
    assert sum(planned.items[name] for name in ("weights", "second moment", "batch")) == arguments
    assert planned.step == pytest.approx(total, rel=TOLERANCE)

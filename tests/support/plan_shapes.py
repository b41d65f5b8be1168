"""Compiling the training step for shapes far too large for this machine: nothing is allocated."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from activation_cache.config import Dtype
from sae_train.model.sharding import BATCH_DIMS, make_mesh, sharding
from sae_train.plan.memory import Shape
from sae_train.step.schedule import scheduled
from sae_train.step.state import abstract_state
from sae_train.train.train_step import make_train_step
from tests.support.configs import make_config


def compile_step(
    shape: Shape,
    *,
    dtype: Dtype = "float32",
    devices: Mesh | None = None,
    step: Literal["dense", "sparse"] = "dense",
    **options: Any,
) -> jax.stages.Compiled:
    """The step compiled for a shape; `options` go to `make_config`, `devices` default to ours."""
    config = make_config(
        width=shape.width,
        batch_size=shape.batch_size,
        tokens=10 * shape.batch_size,
        mesh=(shape.mesh.data, shape.mesh.model),
        step=step,
        **options,
    )
    mesh = devices or make_mesh(config.mesh)
    compile_ready = make_train_step(config, input_scale=1.3, mesh=mesh)
    state = abstract_state(
        config.sae, d_model=shape.d_model, mesh=mesh, momentum=config.train.has_momentum
    )
    rows: Any = jax.ShapeDtypeStruct(
        (shape.batch_size, shape.d_model), jnp.dtype(dtype), sharding=sharding(mesh, BATCH_DIMS)
    )
    if config.sae.is_transcoder:
        rows = (rows, rows)
    lowered: jax.stages.Lowered = compile_ready.lower(  # type: ignore[attr-defined]
        state, rows, scheduled(config.train, step=0)
    )
    return lowered.compile()


def measured_bytes(compiled: jax.stages.Compiled) -> tuple[int, int]:
    """(arguments, arguments + temporaries + outputs that alias nothing) of one device."""
    found = compiled.memory_analysis()
    assert found is not None
    arguments = found.argument_size_in_bytes
    fresh = found.output_size_in_bytes - found.alias_size_in_bytes
    return arguments, arguments + found.temp_size_in_bytes + fresh

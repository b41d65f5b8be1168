"""The dense step as accelerators' compilers are given it, and how it keeps latents at bfloat16.

Legend: B rows, D model width, F latents, S latents of a tile.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from activation_cache.precision import Precision
from sae_train.model.sharding import BATCH_DIMS, make_mesh, sharding
from sae_train.step.latents import kept_for_gradients, latents_of, read_kept
from sae_train.step.schedule import scheduled
from sae_train.step.state import abstract_state
from sae_train.train.train_step import make_train_step
from tests.support.configs import make_config

B, D, F = 32, 24, 112


def lowered(platform: str, precision: Precision) -> str:
    """The dense step for a platform, before its compiler saw it."""
    config = make_config(width=F, batch_size=B, tokens=B, precision=precision, step="dense")
    mesh = make_mesh(config.mesh)
    step: Any = make_train_step(config, input_scale=1.0, mesh=mesh)
    state = abstract_state(config.sae, d_model=D, mesh=mesh)
    rows = jax.ShapeDtypeStruct((B, D), jnp.float32, sharding=sharding(mesh, BATCH_DIMS))
    traced = step.trace(state, rows, scheduled(config.train, step=0))
    return traced.lower(lowering_platforms=(platform,)).as_text()


def products(text: str) -> list[tuple[str, ...]]:
    """The types of operands and result of every product of two matrices."""
    found = re.findall(r"dot_general .* : \(tensor<(\S+)>, tensor<(\S+)>\) -> tensor<(\S+)>", text)
    assert len(found) == text.count("dot_general ")
    return [types for types in found if all(one.count("x") == 2 for one in types)]


def converts(text: str, before: str, after: str) -> list[str]:
    """Of arrays that change their type so, the dims."""
    pattern = rf"convert .* : \(tensor<(\d+x\d+)x{before}>\) -> tensor<\1x{after}>"
    return sorted(re.findall(pattern, text))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_five_products_of_operands_that_are_rounded_before(platform: str):
    text = lowered(platform, "bfloat16")
    found = products(text)
    assert len(found) == 5
    for types in found:
        assert [one.split("x")[-1] for one in types] == ["bf16", "bf16", "f32"]
    # W_enc once and W_dec for two products; x for two and the output's gradient; the latents that
    # are kept, and their gradient. Compilers merge what is rounded twice.
    rounded = [f"{F}x{D}"] * 3 + [f"{B}x{D}"] * 3 + [f"{F}x{B}"] * 2
    assert converts(text, "f32", "bf16") == sorted(rounded)
    assert not converts(text, "bf16", "f32")


@pytest.mark.parametrize(
    ("platform", "layouts", "barriers"), [("tpu", 2, 2), ("cuda", 0, 3), ("cpu", 0, 0)]
)
def test_compilers_of_accelerators_are_given_hints(platform: str, layouts: int, barriers: int):
    """Of both gradients' layout; that what is kept is written, and read; that new rows are."""
    text = lowered(platform, "bfloat16")
    assert text.count("@LayoutConstraint") == layouts
    assert text.count("optimization_barrier") == barriers


def test_float32_products_round_nothing():
    text = lowered("tpu", "float32")
    assert len(products(text)) == 5
    assert "bf16" not in text


@pytest.mark.parametrize("theta", [0.0, 0.01, 0.3])
def test_kept_latents_carry_the_decisions_of_float32(theta: float):
    """Pre-activations so close to both edges of the window that rounding would move them over."""
    bandwidth = 0.001
    edges = theta + bandwidth / 2 * np.asarray([-1.0, 0.0, 1.0])
    near = edges[:, None] * (1 + 1e-6 * np.arange(-20, 21)) + 1e-9 * np.arange(-20, 21)
    pre_SB = np.concatenate([near.ravel(), np.linspace(-1, 1, 101)])[None].astype(np.float32)
    assert pre_SB.astype(jnp.bfloat16).astype(np.float32)[0, 0] != pre_SB[0, 0]
    exact, kept = (
        {"theta_S": jnp.full(1, theta), "bandwidth": bandwidth},
        {"theta_S": jnp.full(1, theta), "bandwidth": bandwidth, "precision": "bfloat16"},
    )
    expected = latents_of(jnp.asarray(pre_SB), **exact)
    kept_SB, at_once = kept_for_gradients(jnp.asarray(pre_SB), **kept)
    assert kept_SB.dtype == jnp.bfloat16
    for found in (at_once, read_kept(kept_SB, **kept)):
        np.testing.assert_array_equal(found.active_SB, expected.active_SB)
        np.testing.assert_array_equal(found.window_SB, expected.window_SB)
        rounded = expected.f_SB.astype(jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_allclose(found.f_SB.astype(jnp.float32), rounded, rtol=0, atol=1e-37)
    assert expected.window_SB.any()
    assert not expected.window_SB.all()

"""The steps of TopK and BatchTopK against a float64 reference that selects by sorting.

Legend: B rows, D model width, F latents.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from sae_train.model.sharding import make_mesh
from sae_train.step.schedule import scheduled
from sae_train.step.state import init_state
from sae_train.train.train_step import make_train_step
from tests.support.configs import make_config
from tests.support.oracles import reference_topk

pytestmark = pytest.mark.slow

B, D, F, K = 64, 32, 128, 2
EPSILON = 1e-6


def rows_of(step: int, *, width: int = D) -> np.ndarray:
    """Raw rows of one batch, some of them far longer than the others."""
    rng = np.random.default_rng(step)
    rows = 2.0 * rng.standard_normal((B, width)) / np.sqrt(width)
    rows[:3] *= 6.0
    return rows.astype(np.float32)


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "batch_topk transcoder"])
def test_steps_follow_the_float64_reference(architecture: str):
    architecture, _, kind = architecture.partition(" ")
    sae: dict[str, Any] = {"architecture": architecture, "k": K, "aux_k_coefficient": 0.5}
    if kind:
        sae |= {"site": "mlp_in", "target": "mlp_out", "affine_skip": True}
        sae |= {"pre_encoder_bias": False}
    config = make_config(
        width=F,
        batch_size=B,
        tokens=B * 200,
        sparsity={"penalty": "none"},
        sae=sae,
        learning_rate={"peak": 1e-3, "warmup_steps": 0},
        dead_after_tokens=B,
        # Adam divides by |g|: of a gradient near 0 this leaves no step made of float32 noise.
        adam={"epsilon": EPSILON},
    )
    state = init_state(config.sae, d_model=D, seed=1, mesh=make_mesh(config.mesh))
    oracle = reference_topk.Trainer(
        params=jax.device_get(state.params),
        k=K,
        over_batch=architecture == "batch_topk",
        dead_after=1,
        aux=0.5,
        epsilon=EPSILON,
        skip_shift=bool(kind),
    )
    step_function = make_train_step(
        config, input_scale=2.0, target_scale=1.5, mesh=make_mesh(config.mesh)
    )
    dead = []
    for step in range(12):
        rows, targets = rows_of(step), rows_of(1000 + step)
        batch = (rows, targets) if kind else rows
        state, metrics = step_function(state, batch, scheduled(config.train, step=step))
        expected = oracle.step(rows / 2.0, rate=1e-3, target=targets / 1.5 if kind else None)
        np.testing.assert_allclose(metrics.loss, expected["loss"], rtol=1e-5)
        assert float(metrics.l0) == expected["l0"]
        dead.append(float(metrics.dead_fraction) * F)
    assert max(dead) > D // 2
    for name, value in oracle.params.items():
        np.testing.assert_allclose(state.params[name], value, rtol=1e-4, atol=1e-5, err_msg=name)

"""Thresholds of each latent of a BatchTopK SAE against a sort of everything.

Legend: B rows, D model width, F latents.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from sae_train.model.sharding import make_mesh
from sae_train.step.state import init_state
from sae_train.train import latent_thresholds as module
from tests.support.configs import make_config

B, D, F, K, STEPS = 48, 8, 40, 4, 5
SILENT = 3  # a latent that is never selected
SCALE = 2.5


@pytest.mark.parametrize("single", [0.9, 30.0, 0.0])
def test_each_latent_fires_as_often_as_it_is_selected(
    monkeypatch: pytest.MonkeyPatch, single: float
):
    """Whatever the search begins with: too high a value is lowered until nothing is missed."""
    monkeypatch.setattr(module, "ROWS", 3 * B)
    monkeypatch.setattr(module, "LOOKED_AT", 20 * F)  # chunks of 20, 20 and 8 rows
    sae = {"architecture": "batch_topk", "k": K, "threshold_per_latent": True}
    config = make_config(
        width=F, batch_size=B, tokens=B * STEPS, sparsity={"penalty": "none"}, sae=sae
    )
    state = init_state(config.sae, d_model=D, seed=1, mesh=make_mesh(config.mesh))
    random = np.random.default_rng(0)
    bias_F = 0.3 * random.standard_normal(F).astype(np.float32)
    bias_F[SILENT] = -50.0
    params = state.params | {"b_enc": jax.numpy.asarray(bias_F)}
    data = SCALE * random.standard_normal((STEPS, B, D)).astype(np.float32)
    read: list[int] = []

    def batch(step: int) -> tuple[np.ndarray]:
        read.append(step)
        return (data[step],)

    found_F = module.latent_thresholds(
        config, params=params, single=single, batch=batch, input_scale=SCALE
    )
    assert set(read) == {2, 3, 4}, "the last batches, as many as hold ROWS"
    W_enc_FD = np.asarray(params["W_enc"], np.float64)
    pre = np.maximum((data[2:].astype(np.float64) / SCALE) @ W_enc_FD.T + bias_F, 0.0)
    smallest = np.sort(pre.reshape(3, -1))[:, -K * B]
    selected_F = (pre >= smallest[:, None, None]).sum(axis=(0, 1))
    fires_F = (pre > found_F).sum(axis=(0, 1))
    np.testing.assert_array_equal(fires_F, selected_F)
    assert selected_F[SILENT] == 0
    assert found_F[SILENT] == pytest.approx(smallest.mean(), rel=1e-6)
    text = module.as_text(found_F)
    assert isinstance(text, str)

"""Training recovers a known sparse dictionary from its activations alone."""

from __future__ import annotations

import numpy as np
import pytest

from sae_train.model.sharding import make_mesh
from sae_train.step.schedule import scheduled
from sae_train.step.state import init_state
from sae_train.train.train_step import make_train_step
from tests.support.configs import make_config

pytestmark = pytest.mark.slow

D_MODEL, NUM_DIRECTIONS, ACTIVE = 32, 48, 3


def sparse_rows(rng: np.random.Generator, directions: np.ndarray, rows: int) -> np.ndarray:
    """Sums of `ACTIVE` random directions with positive coefficients, unit mean squared norm."""
    codes = np.zeros((rows, NUM_DIRECTIONS))
    for row in range(rows):
        chosen = rng.choice(NUM_DIRECTIONS, ACTIVE, replace=False)
        codes[row, chosen] = rng.uniform(0.5, 1.5, ACTIVE)
    x = codes @ directions
    return (x / np.sqrt((x**2).sum(axis=1).mean())).astype(np.float32)


def test_the_true_directions_are_recovered():
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((NUM_DIRECTIONS, D_MODEL))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    steps, batch = 6000, 256
    config = make_config(
        width=96,
        bandwidth=0.1,
        parametrisation="direct",
        threshold_init=0.1,
        batch_size=batch,
        tokens=batch * steps,
        sparsity={"coefficient": 0.03, "warmup_steps": 600},
        learning_rate={"peak": 1e-3, "warmup_steps": 100, "decay_steps": 1200},
    )
    mesh = make_mesh(config.mesh)
    state = init_state(config.sae, d_model=D_MODEL, seed=0, mesh=mesh)
    step_function = make_train_step(config, input_scale=1.0, mesh=mesh)
    data = sparse_rows(rng, directions, 40_000)
    for step in range(steps):
        rows = data[rng.integers(0, len(data), batch)]
        state, metrics = step_function(state, rows, scheduled(config.train, step=step))
    learned = np.asarray(state.params["W_dec"])
    best = (directions @ learned.T).max(axis=1)
    assert best.mean() > 0.9
    assert (best > 0.9).mean() > 0.9
    assert float(metrics.l0) < 2 * ACTIVE
    assert float(metrics.fvu) < 0.1

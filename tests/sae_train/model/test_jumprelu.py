"""Every explicit step of a JumpReLU against `jax.grad` of its equations, parameter by parameter.

With β₂ = 0 a step shows its gradients: the second moments are their squares, and every parameter
moves against their signs.

Legend: B rows, D model width, F latents.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_train.config.run import Config
from sae_train.model import jumprelu
from sae_train.model.forward import threshold_of
from sae_train.model.sharding import make_mesh
from sae_train.sparse.kernels.mode import without_gpu
from sae_train.step.optimiser import remove_parallel
from sae_train.step.schedule import scheduled
from sae_train.step.sparsity_penalty import penalty_of
from sae_train.step.state import TrainState
from sae_train.train.train_step import make_train_step
from tests.sae_train.step.test_step import PENALTIES, biased_state
from tests.support.configs import make_config
from tests.support.oracles.rows_off_edges import off_edges

pytestmark = pytest.mark.slow

B, D, F = 64, 24, 96
PATHS: dict[str, dict[str, Any]] = {
    "dense": {"step": "dense"},
    "sparse": {"step": "sparse", "sparse_capacity": F},
    "sparse, too many pairs": {"step": "sparse", "sparse_capacity": 1},
    "kernels": {"step": "sparse", "sparse_capacity": F, "kernels": "pallas"},
}


def config_of(penalty: str, parametrisation: str, **options: Any) -> Config:
    return make_config(
        width=F,
        bandwidth=0.2,
        threshold_init=0.3,
        parametrisation=parametrisation,
        sparsity=PENALTIES[penalty][0] | {"warmup_steps": 0},
        batch_size=B,
        adam={"beta2": 0.0, "epsilon": 1e-30},
        learning_rate={"peak": 1e-3, "warmup_steps": 0},
        **options,
    )


def gradients_of_equations(
    config: Config, state: TrainState, x_BD: jax.Array
) -> dict[str, jax.Array]:
    """By autodiff, the decoder's projected."""

    def penalty(l0_B: jax.Array, frequency_F: jax.Array) -> jax.Array:
        scalars = scheduled(config.train, step=0)
        return penalty_of(
            l0_B, frequency_F, scalars=scalars, log_gain=state.log_gain, train=config.train
        ).loss

    found = jax.grad(jumprelu.loss)(
        state.params,
        x_BD,
        target_BD=x_BD,
        penalty=penalty,
        config=config.sae,
        precision="float32",
    )
    projected = remove_parallel(found["W_dec"], rows_FD=state.params["W_dec"])
    return found | {"W_dec": projected}


def rows_for(config: Config, state: TrainState) -> np.ndarray:
    """Rows away from thresholds and the edges of their windows."""
    rng = np.random.default_rng(0)
    params = {name: np.asarray(value, np.float64) for name, value in state.params.items()}
    params["threshold"] = np.asarray(threshold_of(state.params, config=config.sae), np.float64)

    def draw() -> np.ndarray:
        return (3.5 * (rng.standard_normal((B, D)) / np.sqrt(D) + 0.1)).astype(np.float32)

    return off_edges(draw, params, scale=3.5, bandwidth=config.sae.bandwidth)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("penalty", "parametrisation"),
    [("l0", "log"), ("per_token_frequency", "direct"), ("batch_mean", "log")],
)
def test_a_step_has_the_gradients_of_the_equations(path: str, penalty: str, parametrisation: str):
    config = config_of(penalty, parametrisation, **PATHS[path])
    mesh = make_mesh(config.mesh)
    state = biased_state(config, d_model=D)
    before = jax.tree.map(np.asarray, state.params)
    rows = rows_for(config, state)
    expected = gradients_of_equations(config, state, jnp.asarray(rows) / 3.5)
    with without_gpu("interpret"):
        step = make_train_step(config, input_scale=3.5, mesh=mesh)
        after, _ = step(state, rows, scheduled(config.train, step=0))
    assert set(expected) == set(after.params)
    for name, gradient in expected.items():
        moved = np.asarray(after.params[name]) - before[name]
        if name == "W_dec":  # renormalised: only the direction along the gradient is left
            size = np.sqrt(np.asarray(after.second_moment[name]))
            np.testing.assert_allclose(size, np.abs(gradient), **near(gradient), err_msg=name)
            assert (moved * np.asarray(gradient)).sum() < 0
            continue
        found = -np.sign(moved) * np.sqrt(np.asarray(after.second_moment[name]))
        np.testing.assert_allclose(found, gradient, **near(gradient), err_msg=name)


def near(gradient: jax.Array) -> dict[str, float]:
    return {"rtol": 1e-4, "atol": 2e-6 * float(np.abs(gradient).max())}


def test_a_threshold_learns_from_its_window_alone():
    """By hand: θ 0.5, ε 0.25. Pre-activations inside, above, below and on the window's edge."""
    pre = jnp.asarray([[0.4375], [0.5625], [0.75], [0.25], [0.625], [-1.0]], jnp.float32)
    theta = jnp.asarray([[0.5]], jnp.float32)
    latent = jax.jacobian(jumprelu.jumprelu, argnums=1)(pre, theta, 0.25).ravel()
    np.testing.assert_array_equal(latent, [-2, -2, 0, 0, 0, 0])
    count = jax.jacobian(jumprelu.step, argnums=1)(pre, theta, 0.25).ravel()
    np.testing.assert_array_equal(count, [-4, -4, 0, 0, 0, 0])
    assert float(jnp.abs(jax.jacobian(jumprelu.step)(pre, theta, 0.25)).max()) == 0.0
    in_pre = jax.grad(lambda pre: jumprelu.jumprelu(pre, theta, 0.25).sum())(pre).ravel()
    np.testing.assert_array_equal(in_pre, [0, 1, 1, 0, 1, 0])

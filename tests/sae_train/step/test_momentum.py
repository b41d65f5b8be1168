"""Adam with a first moment, and biases with a rate of their own: `train.adam.beta1`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from activation_cache.runtime.errors import Interrupted
from sae_train.checkpoint.trained import load_trained
from sae_train.config.run import Config
from sae_train.model.sharding import make_mesh
from sae_train.plan.memory import Shape, step_memory
from sae_train.step import optimiser
from sae_train.step.path_choice import may_be_sparse
from sae_train.step.schedule import scheduled
from sae_train.step.state import TrainState, init_state
from sae_train.train.loop import train
from sae_train.train.train_step import make_train_step
from tests.support.configs import make_config
from tests.support.oracles import reference
from tests.support.oracles.rows_off_edges import off_edges
from tests.support.training import assert_same_run, make_run, stop_after

BETA1, SCALE = 0.9, 3.5


def momentum_config(**options: Any) -> Config:
    common = {
        "width": 96,
        "bandwidth": 0.05,
        "threshold_init": 0.03,
        "batch_size": 64,
        "tokens": 64 * 30,
        "sparsity": {"coefficient": 0.02, "warmup_steps": 0},
        "learning_rate": {"peak": 1e-3, "warmup_steps": 0, "bias_multiplier": 0.25},
        "adam": {"beta1": BETA1},
    }
    return make_config(**common | options)


def first_state(config: Config, *, d_model: int = 24) -> TrainState:
    mesh = make_mesh(config.mesh)
    state = init_state(config.sae, d_model=d_model, seed=3, mesh=mesh, momentum=True)
    noise = np.random.default_rng(5).standard_normal(d_model).astype(np.float32)
    b_dec = jax.device_put(0.1 * noise, state.params["b_dec"].sharding)
    return dataclasses.replace(state, params=state.params | {"b_dec": b_dec})


def raw_rows(rng: np.random.Generator) -> np.ndarray:
    return (SCALE * (rng.standard_normal((64, 24)) / np.sqrt(24) + 0.1)).astype(np.float32)


def test_thirty_steps_follow_the_float64_reference():
    config = momentum_config(parametrisation="direct")
    state = first_state(config)
    params = {name: np.asarray(value, np.float64) for name, value in state.params.items()}
    oracle = reference.Trainer(
        params=params, bandwidth=0.05, log_threshold=False, beta1=BETA1, bias_multiplier=0.25
    )
    step_function = make_train_step(config, input_scale=SCALE, mesh=make_mesh(config.mesh))
    rng = np.random.default_rng(0)
    for step in range(30):
        rows = off_edges(lambda: raw_rows(rng), oracle.params, scale=SCALE, bandwidth=0.05)
        state, metrics = step_function(state, rows, scheduled(config.train, step=step))
        expected = oracle.step(rows / SCALE, rate=1e-3, sparsity=reference.Sparsity("l0", 0.02))
        for name in ("loss", "mse", "fvu", "l0"):
            np.testing.assert_allclose(getattr(metrics, name), expected[name], rtol=1e-5)
    for name, value in state.params.items():
        np.testing.assert_allclose(value, oracle.params[name], rtol=1e-4, atol=2e-5, err_msg=name)
        first = np.asarray(state.first_moment[name])
        size = np.abs(oracle.first_moments[name]).max()
        np.testing.assert_allclose(first, oracle.first_moments[name], atol=1e-4 * size)


def test_updates_are_torch_s_adam():
    """Whose biases have their rate in a group of parameters of their own."""
    config = momentum_config(learning_rate={"peak": 1e-2, "bias_multiplier": 0.5})
    names = {"W_enc": (7, 5), "b_enc": (7,), "b_dec": (5,)}  # none that has a norm or an edge
    rng = np.random.default_rng(1)
    params: dict[str, Any] = {
        name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in names.items()
    }
    theirs = {
        name: torch.tensor(np.asarray(value), dtype=torch.float64) for name, value in params.items()
    }
    groups = [{"params": [one], "name": name} for name, one in theirs.items()]
    adam = torch.optim.Adam(groups, betas=(BETA1, 0.999), eps=1e-8)
    moments = {name: jax.tree.map(jnp.zeros_like, params) for name in ("mu", "nu")}
    for step in range(30):
        scalars = jax.tree.map(jnp.asarray, scheduled(config.train, step=step))
        gradients = {
            name: jnp.asarray(rng.standard_normal(shape), jnp.float32)
            for name, shape in names.items()
        }
        chain = optimiser.transformation(scalars, config=config, momentum=True)
        params, moments = optimiser.applied(chain, params, gradients, moments, config=config)
        for group in adam.param_groups:
            rate = float(scalars.learning_rate)
            group["lr"] = rate * (0.5 if group["name"].startswith("b_") else 1.0)
            group["params"][0].grad = torch.tensor(
                np.asarray(gradients[group["name"]]), dtype=torch.float64
            )
        adam.step()
    for name, value in params.items():
        np.testing.assert_allclose(value, theirs[name].numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mesh", [(4, 2), (1, 8)])
def test_a_mesh_has_the_same_momentum(mesh: tuple[int, int]):
    def run(config: Config) -> TrainState:
        state = first_state(config)
        step_function = make_train_step(config, input_scale=SCALE, mesh=make_mesh(config.mesh))
        rng = np.random.default_rng(7)
        for step in range(10):
            state, _ = step_function(state, raw_rows(rng), scheduled(config.train, step=step))
        return state

    alone, meshed = run(momentum_config()), run(momentum_config(mesh=mesh))
    again = run(momentum_config(mesh=mesh))
    jax.tree.map(np.testing.assert_array_equal, again, meshed)
    for name, value in alone.params.items():
        np.testing.assert_allclose(meshed.params[name], value, atol=2e-5)
        moment = np.asarray(alone.first_moment[name])
        np.testing.assert_allclose(
            meshed.first_moment[name], moment, rtol=1e-3, atol=1e-4 * np.abs(moment).max()
        )


@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
def test_a_stopped_run_goes_on_with_its_momentum(architecture: str, tmp_path: Path):
    own: dict[str, Any] = {"adam": {"beta1": BETA1}, "steps": 24, "gradient_clip": 0.5}
    own["dead_after_tokens"] = 48 * 5
    if architecture == "topk":
        own |= {"sae": {"architecture": "topk", "k": 4}, "sparsity": {"penalty": "none"}}
    else:
        own["sae"] = {"revive_coefficient": 0.5}
    whole, parts = (make_run(tmp_path, output=name, **own) for name in ("whole", "parts"))
    train(whole)
    with pytest.raises(Interrupted):
        train(parts, stop=stop_after(11))
    assert load_trained(parts.output).step == 11
    train(parts)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", step=24)
    without = make_run(tmp_path, output="without", **own | {"adam": {"beta1": 0.0}})
    train(without)
    W_dec, other = (
        load_trained(str(tmp_path / name)).params["W_dec"] for name in ("whole", "without")
    )
    assert np.abs(W_dec - other).max() > 1e-4


def test_its_steps_are_dense():
    wide = {"width": 8192, "adam": {"beta1": BETA1}}
    assert not may_be_sparse(make_config(**wide), on_cpu=True)
    assert may_be_sparse(make_config(width=8192), on_cpu=True)
    with pytest.raises(ValueError, match=r"train.step sparse .* with train.adam.beta1 0.9"):
        make_config(**wide, step="sparse")


def test_the_plan_has_the_first_moment():
    shapes = [
        Shape.of(momentum_config(adam={"beta1": beta1}), 24, capacity=None) for beta1 in (0.0, 0.9)
    ]
    plain, more = (step_memory(shape, store_dtype="float32", backend="cpu") for shape in shapes)
    params = more.items["second moment"]
    assert (plain.items["first moment"], more.items["first moment"]) == (0, params)

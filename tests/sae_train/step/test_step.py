"""The step against others' numbers: the authors' notebook, a float64 oracle, and other meshes."""

from __future__ import annotations

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_train.config.run import Config
from sae_train.model import jumprelu
from sae_train.model.forward import pre_activations
from sae_train.model.sharding import make_mesh
from sae_train.step.dense_jumprelu import DenseStep, cpu_tile
from sae_train.step.schedule import scheduled
from sae_train.step.state import TrainState, init_state
from sae_train.train.train_step import make_train_step
from tests.support.configs import make_config
from tests.support.oracles import reference
from tests.support.oracles.rows_off_edges import off_edges

GOLDEN = {
    # DeepMind's notebook "Implementing and Training JumpReLU SAEs": saved outputs.
    "reconstruction": (5001, [-0.34825447, -0.12089294, -0.20722952, 1.4071178]),
    "pre": (40001, [0.6627157, -0.2485388, 0.52095324, -0.01966003]),
    "b_dec": (7, [-1.7614671, -2.9526186, 0.99276465]),
    "b_enc": (37, [0.29240608, 0.9655949, 0.20811056, 1.051967]),
    "threshold": (37, [-0.01634991, -0.00306892, -0.00966095, -0.0034949]),
    "W_dec": (601, [0.02478151, -0.01372844, 0.00353589, 0.10577872]),
    "W_enc": (601, [0.02030803, 0.02437474, -0.01442294, 0.01866631]),
}


def golden_inputs() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The notebook's data and parameters; the trained threshold is its logarithm."""
    data = np.random.default_rng(9328302).standard_normal((3, 1024, 16)) / 4.0
    check = [-0.26036463, 0.07950339, -0.10517059, 0.11135695]
    np.testing.assert_allclose(data.ravel()[::13001], check, atol=1e-7)
    rng = np.random.default_rng(24396)
    W_dec = rng.uniform(size=(128, 16)) - 0.5
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    W_enc = rng.uniform(size=(16, 128)) - 0.5
    b_enc = (rng.uniform(size=128) - 0.5) * 0.1
    b_dec = (rng.uniform(size=16) - 0.5) * 0.1
    threshold = np.log(rng.uniform(size=128) * 0.015)
    params = {"W_dec": W_dec, "W_enc": W_enc.T, "b_enc": b_enc, "b_dec": b_dec}
    return params | {"threshold": threshold}, data


@pytest.mark.usefixtures("optimised_programs")
def test_golden_numbers_of_the_authors():
    config = make_config(bandwidth=0.1, parametrisation="log", sparsity={"coefficient": 1.2})
    params, data = golden_inputs()
    dense = DenseStep(config, make_mesh(config.mesh), precision="float32")
    with jax.enable_x64(True):
        here, x = jax.tree.map(jnp.asarray, params), jnp.asarray(data[0])
        scalars = jax.tree.map(jnp.float64, scheduled(config.train, step=0))
        operands = dense._encoder_operands(here, x)
        encoded = dense._encode_tiles(operands, keep=True)
        reconstruction = encoded.decoded_BD + here["b_dec"][None, :]
        penalty, output = dense._output_gradients(
            operands, [x - reconstruction], encoded, scalars=scalars, log_gain=jnp.asarray(0.0)
        )
        loss = jnp.square(x - reconstruction).sum(axis=1).mean() + penalty.loss
        gradients = dense._gradients(here, x, encoded, output)
        pre = encoded.kept[0].reshape(len(params["b_enc"]), -1).T
    assert_golden(loss, gradients, reconstruction=reconstruction, pre=pre)


def test_golden_numbers_by_autodiff():
    """Of the equations as they are to be read, `sae_train.model.jumprelu`."""
    config = make_config(bandwidth=0.1, parametrisation="log").sae
    params, data = golden_inputs()
    with jax.enable_x64(True):
        here, x = jax.tree.map(jnp.asarray, params), jnp.asarray(data[0])
        loss, gradients = jax.value_and_grad(jumprelu.loss)(
            here,
            x,
            target_BD=x,
            penalty=lambda l0_B, _: 1.2 * l0_B.mean(),
            config=config,
            precision="float32",
        )
        out = jumprelu.forward(here, x, config=config, precision="float32")
        reconstruction = out.reconstruction_BD
        pre = pre_activations(here, x, bias=here["b_enc"], config=config, precision="float32")
    assert_golden(loss, gradients, reconstruction=reconstruction, pre=pre)


def assert_golden(loss: jax.Array, gradients: dict[str, jax.Array], **others: jax.Array) -> None:
    np.testing.assert_allclose(loss, 81.98928, atol=1e-4)  # printed to five decimals
    found = dict(gradients) | others
    found["W_enc"] = found["W_enc"].T
    for name, (stride, expected) in GOLDEN.items():
        values = np.asarray(found[name]).ravel()[::stride]
        np.testing.assert_allclose(values, expected, atol=1e-5, err_msg=name)


SEVERAL_TILES = 3 * 347  # latents, of which 347, a prime, are a tile

PENALTIES = {
    "l0": ({"penalty": "l0", "coefficient": 0.05}, reference.Sparsity("l0", 0.05)),
    "batch_mean": (
        {"penalty": "target_l0", "form": "batch_mean", "target": 6.0, "coefficient": 0.5},
        reference.Sparsity("batch_mean", 0.5, 6.0),
    ),
    "per_token": (
        {"penalty": "target_l0", "form": "per_token", "target": 6.0, "coefficient": 0.05},
        reference.Sparsity("per_token", 0.05, 6.0),
    ),
    "match_l0": (
        {"penalty": "match_l0", "target": 6.0, "coefficient": 0.02, "settle_steps": 20},
        reference.Sparsity("match", 0.02, 6.0, settle=20),
    ),
    "frequency": (
        {"penalty": "l0", "coefficient": 0.05, "frequency": {"scale": 0.1}},
        reference.Sparsity("l0", 0.05, frequency=(0.05, 0.1)),
    ),
    "per_token_frequency": (
        {
            "penalty": "target_l0",
            "form": "per_token",
            "target": 6.0,
            "coefficient": 0.02,
            "frequency": {"scale": 0.1, "coefficient": 0.03},
        },
        reference.Sparsity("per_token", 0.02, 6.0, frequency=(0.03, 0.1)),
    ),
}


def plain_threshold(state: TrainState, parametrisation: str) -> dict[str, np.ndarray]:
    params = {name: np.asarray(value, np.float64) for name, value in state.params.items()}
    if parametrisation == "log":
        params["threshold"] = np.exp(params["threshold"])
    return params


def biased_state(config: Config, *, d_model: int) -> TrainState:
    """An initial state with non-zero biases, so that dropping one shows."""
    state = init_state(config.sae, d_model=d_model, seed=3, mesh=make_mesh(config.mesh))
    rng = np.random.default_rng(5)
    params = dict(state.params)
    for name in ("b_dec", "b_enc"):
        noise = 0.1 * rng.standard_normal(params[name].shape)
        params[name] = jax.device_put(noise.astype(np.float32), params[name].sharding)
    return dataclasses.replace(state, params=params)


def biased_rows(rng: np.random.Generator) -> np.ndarray:
    """Raw rows, to be divided by 3.5, whose mean isn't zero."""
    x = rng.standard_normal((64, 24)) / np.sqrt(24) + 0.1
    return (3.5 * x).astype(np.float32)


@pytest.mark.parametrize("parametrisation", ["log", "direct"])
@pytest.mark.parametrize("penalty", sorted(PENALTIES))
def test_forty_steps_follow_the_float64_reference(
    parametrisation: str, penalty: str, request: pytest.FixtureRequest
):
    if penalty == "l0":
        request.getfixturevalue("optimised_programs")
    follow_the_reference(parametrisation, penalty, width=96, steps=40)


@pytest.mark.parametrize("parametrisation", ["log", "direct"])
def test_a_step_of_several_tiles_follows_the_float64_reference(parametrisation: str):
    assert cpu_tile(SEVERAL_TILES) == 347
    follow_the_reference(parametrisation, "per_token_frequency", width=SEVERAL_TILES, steps=10)


def follow_the_reference(parametrisation: str, penalty: str, *, width: int, steps: int) -> None:
    config_penalty, oracle_penalty = copy.deepcopy(PENALTIES[penalty])
    config = make_config(
        width=width,
        bandwidth=0.05,
        parametrisation=parametrisation,
        threshold_init=0.03,
        multiplier=2.0,
        sparsity=config_penalty | {"warmup_steps": 0},
        batch_size=64,
        tokens=64 * 40,
        learning_rate={"peak": 1e-3, "warmup_steps": 0},
    )
    scale = 3.5
    state = biased_state(config, d_model=24)
    oracle = reference.Trainer(
        params=plain_threshold(state, parametrisation),
        bandwidth=0.05,
        log_threshold=parametrisation == "log",
        threshold_multiplier=2.0,
    )
    step_function = make_train_step(config, input_scale=scale, mesh=make_mesh(config.mesh))
    rng = np.random.default_rng(0)
    for step in range(steps):
        rows = off_edges(lambda: biased_rows(rng), oracle.params, scale=scale, bandwidth=0.05)
        state, metrics = step_function(state, rows, scheduled(config.train, step=step))
        expected = oracle.step(rows / scale, rate=1e-3, sparsity=oracle_penalty)
        for name in ("loss", "mse", "fvu", "l0"):
            np.testing.assert_allclose(
                getattr(metrics, name), expected[name], rtol=1e-5, err_msg=f"{name} step {step}"
            )
    for name, value in plain_threshold(state, parametrisation).items():
        # Adam divides by |g|: a gradient near 0 turns float32 noise into a visible step.
        np.testing.assert_allclose(value, oracle.params[name], rtol=1e-4, atol=2e-5, err_msg=name)


def run_on_mesh(config: Config, steps: int) -> tuple[TrainState, list[float]]:
    mesh = make_mesh(config.mesh)
    state = init_state(config.sae, d_model=32, seed=1, mesh=mesh)
    step_function = make_train_step(config, input_scale=2.0, mesh=mesh)
    rng, losses = np.random.default_rng(7), []
    for step in range(steps):
        rows = (2.0 * rng.standard_normal((64, 32)) / np.sqrt(32)).astype(np.float32)
        state, metrics = step_function(state, rows, scheduled(config.train, step=step))
        losses.append(float(metrics.loss))
    return jax.device_get(state), losses


MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]


@pytest.mark.parametrize(("data", "model"), MESHES)
def test_one_maths_on_many_meshes(data: int, model: int):
    common = {
        "width": 128,
        "bandwidth": 0.05,
        "threshold_init": 0.02,
        "batch_size": 64,
        "tokens": 64 * 20,
        "sparsity": {"coefficient": 0.01, "warmup_steps": 5},
        "learning_rate": {"peak": 1e-3, "warmup_steps": 5},
    }
    single, losses = run_on_mesh(make_config(**common), 20)
    meshed, meshed_losses = run_on_mesh(make_config(**common, mesh=(data, model)), 20)
    np.testing.assert_allclose(meshed_losses, losses, rtol=1e-5)
    again, again_losses = run_on_mesh(make_config(**common, mesh=(data, model)), 20)
    assert again_losses == meshed_losses
    jax.tree.map(np.testing.assert_array_equal, again, meshed)
    np.testing.assert_allclose(meshed.params["W_dec"], single.params["W_dec"], atol=2e-5)


@pytest.mark.parametrize(("data", "model"), [(2, 1), (1, 2), (2, 2)])
def test_tiles_of_latents_are_one_maths_on_many_meshes(data: int, model: int):
    common = {
        "width": 2 * SEVERAL_TILES,
        "bandwidth": 0.05,
        "threshold_init": 0.02,
        "batch_size": 64,
        "tokens": 64 * 8,
        "sparsity": {"coefficient": 0.01, "frequency": {"scale": 0.1}},
        "learning_rate": {"peak": 1e-3, "warmup_steps": 5},
    }
    single, losses = run_on_mesh(make_config(**common), 8)
    meshed, meshed_losses = run_on_mesh(make_config(**common, mesh=(data, model)), 8)
    np.testing.assert_allclose(meshed_losses, losses, rtol=1e-5)
    for name, value in single.params.items():
        np.testing.assert_allclose(meshed.params[name], value, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)])
def test_gradients_made_whole_for_their_norm_are_those_of_the_tiles(mesh: tuple[int, int]):
    common = {
        "width": 2 * SEVERAL_TILES,
        "threshold_init": 0.02,
        "mesh": mesh,
        "tokens": 64 * 8,
        "learning_rate": {"peak": 3e-3, "warmup_steps": 0},  # W_enc and W_dec part soon
    }
    tiled, losses = run_on_mesh(make_config(**common), 2)
    whole, whole_losses = run_on_mesh(make_config(**common, gradient_clip=1e6), 2)
    np.testing.assert_allclose(whole_losses, losses, rtol=1e-6)
    for name, value in tiled.params.items():
        np.testing.assert_allclose(whole.params[name], value, atol=2e-5, err_msg=name)
    moments = (state.second_moment["b_dec"] for state in (whole, tiled))
    np.testing.assert_allclose(*moments, rtol=1e-4)


def test_a_width_without_divisors_is_one_tile():
    assert cpu_tile(16_384) == 1024
    assert cpu_tile(1031) == 1031
    assert cpu_tile(4 * 1031) == 4 * 1031


STEERED = {
    "penalty": "match_l0",
    "target": 8.0,
    "coefficient": 0.01,
    "warmup_steps": 5,
    "settle_steps": 10,
    "frequency": {"scale": 0.1},
}


@pytest.mark.parametrize(("data", "model"), [(8, 1), (2, 4)])
def test_steering_and_frequencies_see_the_whole_batch_on_any_mesh(data: int, model: int):
    common = {
        "width": 128,
        "bandwidth": 0.05,
        "threshold_init": 0.02,
        "batch_size": 64,
        "tokens": 64 * 20,
        "sparsity": STEERED,
        "learning_rate": {"peak": 1e-3, "warmup_steps": 5},
    }
    single, losses = run_on_mesh(make_config(**common), 20)
    meshed, meshed_losses = run_on_mesh(make_config(**common, mesh=(data, model)), 20)
    np.testing.assert_allclose(meshed_losses, losses, rtol=1e-5)
    np.testing.assert_allclose(meshed.log_gain, single.log_gain, rtol=1e-5)
    assert float(single.log_gain) != 0.0
    np.testing.assert_allclose(meshed.params["threshold"], single.params["threshold"], atol=2e-5)


def test_decoder_rows_stay_unit_norm_and_rows_are_born_tied():
    config = make_config(width=64)
    state = init_state(config.sae, d_model=16, seed=0, mesh=make_mesh(config.mesh))
    np.testing.assert_array_equal(state.params["W_enc"], state.params["W_dec"])
    after, _ = run_on_mesh(make_config(width=128, batch_size=64, tokens=64 * 5), 5)
    norms = np.linalg.norm(after.params["W_dec"], axis=1)
    np.testing.assert_allclose(norms, 1.0, atol=1e-6)


def test_dead_latents_are_counted_in_tokens():
    config = make_config(
        width=64, batch_size=64, tokens=64 * 6, dead_after_tokens=64 * 3, threshold_init=0.02
    )
    mesh = make_mesh(config.mesh)
    state = init_state(config.sae, d_model=32, seed=1, mesh=mesh)
    silenced = np.full(64, -100.0, np.float32) * (np.arange(64) < 16)
    state = dataclasses.replace(state, params=state.params | {"b_enc": jnp.asarray(silenced)})
    step_function = make_train_step(config, input_scale=1.0, mesh=mesh)
    rng, fractions = np.random.default_rng(0), []
    for step in range(6):
        rows = rng.standard_normal((64, 32)).astype(np.float32)
        state, metrics = step_function(state, rows, scheduled(config.train, step=step))
        fractions.append(float(metrics.dead_fraction))
    assert fractions == [0.0, 0.0, 0.25, 0.25, 0.25, 0.25]

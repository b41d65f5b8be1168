"""Matryoshka SAEs: the step against float64, against the plain step, sparse, on meshes.

Legend: B rows, D model width, F latents.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_train.checkpoint.trained import in_order
from sae_train.config.run import Config
from sae_train.model.matryoshka import latent_at, positions_of_groups
from sae_train.model.sharding import make_mesh
from sae_train.step.schedule import scheduled
from sae_train.step.state import TrainState, abstract_state, init_state
from sae_train.train.train_step import make_train_step
from tests.sae_train.step.test_step import biased_rows, plain_threshold
from tests.support.configs import make_config
from tests.support.oracles import reference, reference_topk
from tests.support.oracles.rows_off_edges import off_edges

B, D, F = 64, 24, 96
PREFIXES = {"prefixes": [16, 0.5], "weights": [0.5, 2.0, 1.5]}
WEIGHTED = [(16, 0.5), (48, 2.0), (96, 1.5)]
ALONE = {"prefixes": [16, 0.5], "weights": [0, 0, 1]}
SCALE = 3.5


def config_with(matryoshka: Any, *, sae: dict[str, Any] | None = None, **options: Any) -> Config:
    """A config of one SAE; a JumpReLU one unless `sae` says otherwise."""
    values: dict[str, Any] = {
        "width": F,
        "threshold_init": 0.03,
        "batch_size": B,
        "tokens": B * 40,
        "sparsity": {"coefficient": 0.05, "frequency": {"scale": 0.1}},
        "learning_rate": {"peak": 1e-3, "warmup_steps": 0},
    }
    return make_config(**values | options, sae={"matryoshka": matryoshka} | (sae or {}))


def test_every_device_holds_its_share_of_every_prefix():
    config = config_with([12, 36, 0.5]).sae
    latents = latent_at(config)
    assert sorted(latents) == list(range(F))
    for devices in (1, 2, 3, 4, 6, 12):
        for own in latents.reshape(devices, -1):
            assert [(own < end).sum() for end in (12, 36, 48)] == [
                end // devices for end in (12, 36, 48)
            ]
        groups = positions_of_groups(config, devices=devices)
        spans = [(0, 12), (12, 36), (36, 48), (48, 96)]
        for positions, (start, end) in zip(groups, spans, strict=True):
            found = latents.reshape(devices, -1)[:, positions].reshape(-1)
            assert sorted(found) == list(range(start, end))


@pytest.mark.slow
@pytest.mark.parametrize("step", ["dense", "sparse", "autodiff"])
def test_one_reconstruction_is_the_plain_program(step: str):
    """Not only its bits: what is compiled is the same."""
    options: dict[str, Any] = {"step": step}
    if step == "autodiff":
        options = {"sae": {"architecture": "batch_topk", "k": 4}, "sparsity": {"penalty": "none"}}

    def program(matryoshka: Any) -> str:
        config = config_with(matryoshka, **options)
        mesh = make_mesh(config.mesh)
        state = abstract_state(config.sae, d_model=D, mesh=mesh)
        rows = jax.ShapeDtypeStruct((B, D), jnp.float32)
        take_step: Any = make_train_step(config, input_scale=SCALE, mesh=mesh)
        return take_step.lower(state, rows, scheduled(config.train, step=0)).as_text()

    plain = program(None)
    assert program(ALONE) == plain
    assert step != "dense" or program([16]) != plain
    assert config_with([]).sae.groups == config_with(ALONE).sae.groups == ((F, 1.0),)
    np.testing.assert_array_equal(latent_at(config_with(ALONE).sae), np.arange(F))


@functools.cache
def trained(step: str, mesh: tuple[int, int] = (1, 1), clip: float | None = None) -> Any:
    """(state, loss of each step) after some steps; the oracle is asked on one device only."""
    config = config_with(PREFIXES, step=step, sparse_capacity=F, mesh=mesh, gradient_clip=clip)
    devices = make_mesh(config.mesh)
    state = init_state(config.sae, d_model=D, seed=3, mesh=devices)
    take_step = make_train_step(config, input_scale=SCALE, mesh=devices)
    oracle = reference.Trainer(
        params=in_order(plain_threshold(state, "log"), config=config.sae),
        bandwidth=0.05,
        log_threshold=True,
        prefixes=WEIGHTED,
    )
    sparsity = reference.Sparsity("l0", 0.05, frequency=(0.05, 0.1))
    rng, losses, expected = np.random.default_rng(0), [], []
    for number in range(8):
        draw = functools.partial(biased_rows, rng)
        rows = off_edges(draw, oracle.params, scale=SCALE, bandwidth=0.05)
        state, metrics = take_step(state, rows, scheduled(config.train, step=number))
        losses.append(float(metrics.loss))
        expected.append(oracle.step(rows / SCALE, rate=1e-3, sparsity=sparsity)["loss"])
    return jax.device_get(state), losses, oracle, expected


@pytest.mark.slow
@pytest.mark.parametrize("step", ["dense", "sparse"])
def test_steps_follow_the_float64_reference(step: str):
    state, losses, oracle, expected = trained(step)
    assert int(state.sparse) == int(step == "sparse")
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    found = in_order(plain_threshold(state, "log"), config=config_with(PREFIXES).sae)
    for name, value in oracle.params.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "mesh"), [("dense", (2, 4)), ("sparse", (2, 4))])
def test_meshes_train_the_same_sae(step: str, mesh: tuple[int, int]):
    single, losses, *_ = trained("dense", clip=0.05)
    meshed, meshed_losses, *_ = trained(step, mesh, 0.05)
    np.testing.assert_allclose(meshed_losses, losses, rtol=1e-5)
    assert_same_latents(meshed, single)


def assert_same_latents(a: TrainState, b: TrainState) -> None:
    for name, value in a.params.items():
        np.testing.assert_allclose(b.params[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(a.last_fired, b.last_fired)


@pytest.mark.slow
def test_a_step_by_selection_follows_the_float64_reference():
    sae = {"architecture": "batch_topk", "k": 3, "site": "mlp_in", "target": "mlp_out"}
    config = config_with(
        PREFIXES,
        sae=sae | {"affine_skip": True},
        sparsity={"penalty": "none"},
        adam={"epsilon": 1e-6},
        mesh=(2, 4),
    )
    mesh = make_mesh(config.mesh)
    state = init_state(config.sae, d_model=D, seed=1, mesh=mesh)
    take_step = make_train_step(config, input_scale=SCALE, mesh=mesh)
    oracle = reference_topk.Trainer(
        params=in_order(jax.device_get(state.params), config=config.sae),
        k=3,
        over_batch=True,
        dead_after=10_000,
        aux=0.0,
        epsilon=1e-6,
        skip_shift=True,
        prefixes=WEIGHTED,
    )
    rng = np.random.default_rng(0)
    for number in range(6):
        rows, targets = biased_rows(rng), biased_rows(rng)
        state, metrics = take_step(state, (rows, targets), scheduled(config.train, step=number))
        expected = oracle.step(rows / SCALE, rate=1e-3, target=targets / SCALE)
        np.testing.assert_allclose(metrics.loss, expected["loss"], rtol=1e-5)
    found = in_order(jax.device_get(state.params), config=config.sae)
    for name, value in oracle.params.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("matryoshka", "options", "said"),
    [
        ([16, 16], {}, "16 latents after one of 16: each must be wider"),
        ([16, 96], {}, "a prefix of 96 latents, and sae.width is 96"),
        ([0.3], {}, "0.3 of sae.width 96, which are 28.8 latents: give a whole number, as 29"),
        ([16.5], {}, "16.5 is neither a number of latents nor a share"),
        ({"prefixes": [16], "weights": [1]}, {}, "1 numbers for 1 prefixes and the whole SAE"),
        ({"prefixes": [16], "weights": [1, 0]}, {}, "the last of sae.matryoshka.weights is 0"),
        ([18], {"mesh": (1, 4)}, "'model' has size 4, which must divide each"),
        (
            [16],
            {"sae": {"architecture": "relu"}, "sparsity": {"penalty": "l1"}},
            "sae.matryoshka is for jumprelu, topk, batch_topk, and sae.architecture is relu",
        ),
    ],
)
def test_prefixes_that_cant_be_are_refused(matryoshka: Any, options: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        config_with(matryoshka, **options)

"""`sae.whitening`: the root of its metric, a step on whitened rows, a release, a resumed run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from activation_cache.runtime.errors import Interrupted
from sae_train.checkpoint.trained import load_trained
from sae_train.config.run import Config
from sae_train.inference.fold import fold
from sae_train.model.sharding import make_mesh
from sae_train.step.schedule import scheduled
from sae_train.step.state import init_state, state_shardings
from sae_train.train.initial_state import prepare_start
from sae_train.train.loop import train
from sae_train.train.train_step import make_train_step
from sae_train.train.whitening import whitening_root
from tests.support.configs import make_config
from tests.support.saes import (
    make_trained,
    make_trained_as,
    reference_latents,
    reference_reconstruction,
)
from tests.support.stores import random_rows
from tests.support.training import ROWS, WIDTH, assert_same_run, make_run, stop_after

WHITENED: dict[str, Any] = {"whitening": 0.8}


def some_root(D: int) -> np.ndarray:
    """A symmetric positive matrix whose eigenvalues lie between 0.5 and 3."""
    random = np.random.default_rng(7)
    Q_DD = np.linalg.qr(random.standard_normal((D, D)))[0]
    return (Q_DD * random.uniform(0.5, 3, D)) @ Q_DD.T


def test_the_root_undoes_covariance_by_its_power_and_keeps_the_mean_square():
    random = np.random.default_rng(0)
    typical_ND = random.standard_normal((3000, 6)) * np.array([5, 3, 2, 1, 0.5, 0]) + 20
    x_ND = typical_ND.copy()
    x_ND[::300] *= 30  # no direction of theirs counts
    A_DD = whitening_root(np.split(x_ND.astype(np.float32), 3), power=0.5).astype(np.float64)
    after_D, before_D = (
        np.linalg.eigvalsh(np.cov(one.T)) for one in (typical_ND @ A_DD, typical_ND)
    )
    np.testing.assert_allclose(after_D / after_D[5], np.sqrt(before_D / before_D[5]), atol=5e-3)
    np.testing.assert_allclose(np.square(x_ND @ A_DD).sum(), np.square(x_ND).sum(), rtol=1e-5)
    assert np.linalg.cond(A_DD) < 1e3  # a direction of no variance doesn't weigh without end
    plain = whitening_root([x_ND], power=0.0)
    np.testing.assert_allclose(plain, np.eye(6), atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_a_release_computes_on_raw_rows_what_training_does_on_whitened_ones(bias: bool):
    A_DD = some_root(10).astype(np.float32)
    plain = make_trained(pre_encoder_bias=bias)
    own = make_trained(pre_encoder_bias=bias, **WHITENED)
    own = dataclasses.replace(own, params={**own.params, "whitening": A_DD})
    x_ND = 4 * np.random.default_rng(3).standard_normal((40, 10))
    moved_ND = x_ND @ A_DD.astype(np.float64)
    released, unfolded = fold(own), fold(plain)
    latents_NF = reference_latents(unfolded, moved_ND)
    assert 0.1 < (latents_NF > 0).mean() < 0.9
    np.testing.assert_allclose(np.linalg.norm(released.W_dec, axis=1), 1.0, rtol=1e-6)
    norm_F = np.linalg.norm(plain.params["W_dec"] @ np.linalg.inv(A_DD), axis=1)
    found_NF = reference_latents(released, x_ND)
    np.testing.assert_allclose(found_NF, norm_F * latents_NF, rtol=1e-4, atol=1e-5)
    back_ND = reference_reconstruction(unfolded, moved_ND) @ np.linalg.inv(A_DD.astype(np.float64))
    np.testing.assert_allclose(reference_reconstruction(released, x_ND), back_ND, atol=1e-5)


def test_latents_of_topk_keep_their_sizes_which_are_compared():
    A_DD = some_root(10).astype(np.float32)
    plain = make_trained_as("topk", k=3)
    sae = plain.config.sae.model_copy(update=WHITENED)
    config = plain.config.model_copy(update={"sae": sae})
    params = {**plain.params, "whitening": A_DD}
    released = fold(dataclasses.replace(plain, config=config, params=params))
    x_ND = 4 * np.random.default_rng(3).standard_normal((40, 10)).astype(np.float32)
    moved_ND = (x_ND @ A_DD.astype(np.float64)).astype(np.float32)
    found_NF, expected_NF = (
        np.asarray(released.encode(x_ND)),
        np.asarray(fold(plain).encode(moved_ND)),
    )
    np.testing.assert_allclose(found_NF, expected_NF, rtol=1e-3, atol=1e-4)


def stepped(config: Config, rows: list[np.ndarray], *, root: np.ndarray | None) -> dict[str, Any]:
    """The parameters after a step on each batch of rows, from the initial state."""
    mesh = make_mesh(config.mesh)
    state = init_state(config.sae, d_model=16, seed=3, mesh=mesh)
    if root is not None:
        state = dataclasses.replace(state, params=state.params | {"whitening": root})
        state = jax.device_put(state, state_shardings(mesh, config=config.sae))
    step = make_train_step(config, input_scale=2.0, mesh=mesh)
    for number, rows_BD in enumerate(rows):
        state, _ = step(state, rows_BD, scheduled(config.train, step=number))
    return {name: np.asarray(value) for name, value in state.params.items()}


@pytest.mark.parametrize(
    ("mesh", "how"), [((1, 1), "dense"), ((2, 4), "dense"), ((2, 4), "sparse")], ids=str
)
def test_whitened_training_is_training_on_rows_times_the_root(mesh: tuple[int, int], how: str):
    A_DD = some_root(16).astype(np.float32)
    rows = list(np.random.default_rng(5).standard_normal((6, 64, 16)).astype(np.float32))
    common: dict[str, Any] = {"parametrisation": "direct", "learning_rate": {"peak": 3e-3}}
    common["gradient_clip"] = 0.5
    inside = make_config(sae=WHITENED, mesh=mesh, step=how, **common)
    found = stepped(inside, rows, root=A_DD)
    plain = make_config(step="dense", **common)
    expected = stepped(plain, [rows_BD @ A_DD for rows_BD in rows], root=None)
    np.testing.assert_array_equal(found.pop("whitening"), A_DD)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=2e-6, err_msg=name)


def test_b_dec_starts_at_the_mean_of_whitened_rows():
    config = make_config(sae=WHITENED | {"b_dec_init": "mean"})
    rows_ND = random_rows(0, 64, WIDTH)
    state = init_state(config.sae, d_model=WIDTH, seed=0, mesh=make_mesh(config.mesh))
    scales = {"input_scale": 2.0, "target_scale": 2.0}
    state = prepare_start(config, state=state, batch=lambda step: (rows_ND,), **scales)
    root_DD = np.asarray(state.params["whitening"])
    mean_D = (rows_ND @ root_DD).mean(axis=0) / 2.0
    np.testing.assert_allclose(state.params["b_dec"], mean_D, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_run_whitens_by_its_rows_and_resumes_bit_for_bit(tmp_path: Path):
    options: dict[str, Any] = {"sae": WHITENED | {"b_dec_init": "mean"}, "width": 32}
    config = make_run(tmp_path, steps=6, output="whole", **options)
    train(config)
    halted = make_run(tmp_path, steps=6, output="halted", **options)
    with pytest.raises(Interrupted):
        train(halted, stop=stop_after(3))
    train(halted)
    assert_same_run(tmp_path / "whole", tmp_path / "halted", step=6)

    rows_ND = random_rows(0, ROWS, WIDTH).astype(np.float64)
    root_DD = np.asarray(load_trained(tmp_path / "whole").params["whitening"], np.float64)
    values_D = np.linalg.eigvalsh(np.cov((rows_ND @ root_DD).T))
    plain_D = np.linalg.eigvalsh(np.cov(rows_ND.T))
    # C^(1 - p): at p = 0.8 eigenvalues are as far apart as the fifth roots of what they were.
    np.testing.assert_allclose(
        values_D / values_D.max(), (plain_D / plain_D.max()) ** 0.2, rtol=0.01
    )


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        ({"site": "mlp_in", "target": "mlp_out"}, "sae.whitening isn't for transcoders"),
        ({"start_from": "sae"}, "can't be combined with sae.start_from"),
        ({"whitening": 1.5}, "less than or equal to 1"),
    ],
    ids=["transcoder", "start_from", "too much"],
)
def test_what_it_cannot_be_combined_with(sae: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make_config(sae=WHITENED | sae)


def test_it_cannot_be_combined_with_the_phase_through_the_model():
    with pytest.raises(ValueError, match=r"can't be combined with sae\.whitening 0\.8"):
        make_config(sae=WHITENED, end_to_end={"tokens": 64})

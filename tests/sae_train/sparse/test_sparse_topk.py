"""TopK and BatchTopK steps by pairs against those by products, and against the float64 reference.

Legend: B rows, D model width, F latents.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from activation_cache.runtime.errors import Interrupted
from sae_train.config.run import Config, MeshConfig
from sae_train.model.sharding import make_mesh
from sae_train.plan.memory import Shape
from sae_train.runs.metrics_file import read_metrics
from sae_train.sparse import active_pairs
from sae_train.step.schedule import scheduled
from sae_train.step.state import TrainState, init_state
from sae_train.train.loop import train, train_cohort
from sae_train.train.train_step import StepMetrics, make_train_step
from tests.sae_train.sparse.test_sparse_step import assert_same_training, rows_of
from tests.support.configs import make_config
from tests.support.oracles import reference_topk
from tests.support.plan_shapes import compile_step
from tests.support.steps_made_once import StepsMadeOnce
from tests.support.training import TIMINGS, assert_same_run, make_run, stop_after

B, D, F, K = 64, 32, 128, 2
TILE = 16
EPSILON = 1e-6
KINDS = ("topk", "batch_topk")

step_of = StepsMadeOnce()


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> Iterator[None]:
    """Eight tiles of latents on one device, and two on each of four."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(active_pairs, "LARGEST_TILE", TILE)
        yield


def config_of(architecture: str, **options: Any) -> Config:
    common: dict[str, Any] = {
        "width": F,
        "batch_size": B,
        "tokens": B * 200,
        "sparsity": {"penalty": "none"},
        "sae": {"architecture": architecture, "k": K} | options.pop("sae", {}),
        "learning_rate": {"peak": 1e-3, "warmup_steps": 5},
        "dead_after_tokens": B,
        # Adam divides by |g|: of a gradient near 0 this leaves no step made of float32 noise.
        "adam": {"epsilon": EPSILON},
        "step": "sparse",
    }
    return make_config(**(common | options))


def start_of(config: Config, *, seed: int = 1) -> TrainState:
    return init_state(config.sae, d_model=D, seed=seed, mesh=make_mesh(config.mesh))


def run(
    config: Config, steps: int, *, state: TrainState | None = None
) -> tuple[TrainState, list[StepMetrics]]:
    state = start_of(config) if state is None else state
    step_function, found = step_of(config, input_scale=2.0, mesh=make_mesh(config.mesh)), []
    for step in range(steps):
        state, metrics = step_function(state, rows_of(step), scheduled(config.train, step=step))
        found.append(metrics)
    return jax.device_get(state), found


def assert_same_metrics(ours: list[StepMetrics], theirs: list[StepMetrics]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "mse", "fvu", "l0", "gradient_norm", "dead_fraction"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(a.threshold_mean, b.threshold_mean, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("architecture", KINDS)
def test_two_hundred_steps_by_pairs_are_those_by_products(architecture: str):
    """With more dead latents than D/2 now and then, fewer at other times, and some that rest."""
    dense, dense_metrics = run(config_of(architecture, step="dense", dead_after_tokens=2 * B), 200)
    sparse, metrics = run(config_of(architecture, dead_after_tokens=2 * B), 200)
    assert int(sparse.overflows) == 0
    assert int(sparse.sparse) == 1
    dead = {round(float(m.dead_fraction) * F) for m in metrics}
    assert 0 < min(dead - {0}) <= D // 2 < max(dead)
    assert (int(sparse.step) - np.asarray(sparse.last_touched) > 0).any()
    assert_same_metrics(metrics, dense_metrics)
    assert_same_training(sparse, dense)
    np.testing.assert_allclose(
        sparse.selection_threshold, dense.selection_threshold, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize(
    ("architecture", "capacity"), [("topk", F), ("batch_topk", F), ("topk", K), ("batch_topk", K)]
)
def test_steps_follow_the_float64_reference(architecture: str, capacity: int):
    """Places for all pairs, and for so few that every step is made by products."""
    config = config_of(
        architecture,
        sparse_capacity=capacity,
        sae={"aux_k_coefficient": 0.5},
        learning_rate={"peak": 1e-3, "warmup_steps": 0},
    )
    state = start_of(config)
    oracle = reference_topk.Trainer(
        params=jax.device_get(state.params),
        k=K,
        over_batch=architecture == "batch_topk",
        dead_after=1,
        aux=0.5,
        epsilon=EPSILON,
    )
    step_function = make_train_step(config, input_scale=2.0, mesh=make_mesh(config.mesh))
    dead = []
    for step in range(12):
        state, metrics = step_function(state, rows_of(step), scheduled(config.train, step=step))
        expected = oracle.step(rows_of(step) / 2.0, rate=1e-3)
        np.testing.assert_allclose(metrics.loss, expected["loss"], rtol=1e-5)
        assert float(metrics.l0) == expected["l0"]
        dead.append(float(metrics.dead_fraction) * F)
    assert int(state.overflows) == (0 if capacity == F else 12)
    assert max(dead) > D // 2
    for name, value in oracle.params.items():
        np.testing.assert_allclose(state.params[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@functools.cache
def on_one_device(architecture: str, step: str) -> tuple[TrainState, list[StepMetrics]]:
    return run(config_of(architecture, step=step, gradient_clip=0.05), 12)


@pytest.mark.parametrize(
    ("architecture", "data", "model", "capacity"),
    [
        ("topk", 1, 4, F),
        ("topk", 2, 2, K),
        ("batch_topk", 1, 1, F),
        ("batch_topk", 2, 2, F),
    ],
)
def test_pairs_on_many_meshes(architecture: str, data: int, model: int, capacity: int):
    dense, dense_metrics = on_one_device(architecture, "dense")
    assert float(dense_metrics[-1].gradient_norm) > 0.05
    config = config_of(
        architecture, gradient_clip=0.05, mesh=(data, model), sparse_capacity=capacity
    )
    meshed, metrics = run(config, 12)
    assert max(float(m.dead_fraction) for m in metrics) * F > D // 2
    assert_same_metrics(metrics, dense_metrics)
    assert_same_training(meshed, dense)
    assert int(meshed.overflows) == (12 if capacity == K else 0)
    if (data, model) == (2, 2) and capacity == F:
        again, _ = run(config, 12)
        jax.tree.map(np.testing.assert_array_equal, again, meshed)


def test_a_transcoder_with_a_skip_goes_by_pairs_too():
    own = {"site": "mlp_in", "target": "mlp_out", "affine_skip": True, "pre_encoder_bias": False}
    states = []
    for step in ("dense", "sparse"):
        config = config_of("batch_topk", sae=own, step=step)
        mesh, state = make_mesh(config.mesh), start_of(config)
        step_function = make_train_step(config, input_scale=2.0, target_scale=1.5, mesh=mesh)
        for number in range(12):
            batch = rows_of(number), rows_of(1000 + number)
            state, metrics = step_function(state, batch, scheduled(config.train, step=number))
        states.append(jax.device_get(state))
    assert float(metrics.dead_fraction) > 0
    assert np.abs(states[0].params["W_skip"]).max() > 1e-3
    assert_same_training(states[1], states[0])


def test_dead_latents_are_touched_once_and_others_rest():
    """One dead latent fires, another doesn't: both step once, as their second moments show."""
    config = config_of("topk", learning_rate={"peak": 1e-3, "warmup_steps": 0})
    results = []
    for step in ("dense", "sparse"):
        own = config.model_copy(update={"train": config.train.model_copy(update={"step": step})})
        state = start_of(own)
        bias = np.zeros(F, np.float32)
        bias[3], bias[4], bias[5:40] = 1.0, 0.05, -5.0  # 3 is in every row's selection
        fired = np.full(F, 10, np.int32)
        fired[[3, 4, 50]] = 0
        state = dataclasses.replace(
            state,
            params=state.params | {"b_enc": jnp.asarray(bias)},
            step=jnp.int32(10),
            last_fired=jnp.asarray(fired),
            last_touched=jnp.full(F, 10, jnp.int32),
        )
        results.append(run(own, 1, state=state))
    (dense, _), (sparse, _) = results
    assert int(sparse.overflows) == 0
    assert int(sparse.last_fired[3]) == 11
    touched = np.asarray(sparse.last_touched) == 11
    assert touched[[3, 4, 50]].all()
    assert not touched[5:40].any()
    assert_same_training(sparse, dense)


def run_of(folder: Path, architecture: str, output: str, **options: Any) -> Config:
    """Most of the latents rest in most steps, and some are dead."""
    return make_run(
        folder,
        output=output,
        **{
            "sparsity": {"penalty": "none"},
            "sae": {"architecture": architecture, "k": K},
            "step": "sparse",
            "dead_after_tokens": 96,
            "checkpoint": {"every_steps": 7, "keep": 2},
        }
        | options,
    )


@pytest.mark.parametrize("architecture", KINDS)
def test_stopped_and_gone_on_it_ends_with_the_same_bits(tmp_path: Path, architecture: str):
    whole, parts = (run_of(tmp_path, architecture, name) for name in ("whole", "parts"))
    train(whole)
    with pytest.raises(Interrupted):
        train(parts, stop=stop_after(17))
    train(parts)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", step=40)
    rows = read_metrics(tmp_path / "whole")
    assert rows[-1]["sparse_overflows"] == 0
    assert rows[-1]["sparse_candidates"] > 0
    assert max(row["dead_fraction"] for row in rows) > 0


def test_members_of_a_stacked_cohort_agree_with_themselves_alone(tmp_path: Path):
    rates = {"slow": 3e-4, "fast": 1e-3}

    def members(place: str, **options: Any) -> list[Config]:
        return [
            run_of(tmp_path, "topk", f"{place}/{name}", learning_rate={"peak": peak}, **options)
            for name, peak in rates.items()
        ]

    for config in members("alone"):
        train(config)
    train_cohort(members("stacked", stacked=True))
    for name in rates:
        alone, stacked = (read_metrics(tmp_path / place / name) for place in ("alone", "stacked"))
        assert alone[-1]["sparse_overflows"] == 0
        for left, right in zip(alone, stacked, strict=True):
            for key in left.keys() - TIMINGS:
                np.testing.assert_allclose(left[key], right[key], rtol=1e-5, atol=1e-7)


def test_nothing_as_large_as_all_latents_of_a_batch_is_kept():
    """Compiled for a shape too large for this machine; nothing is allocated."""
    rows, width, d_model = 4096, 262_144, 640
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(active_pairs, "LARGEST_TILE", 1024)
        shape = Shape(rows, d_model, width, MeshConfig(), architecture="topk")
        found = compile_step(
            shape,
            step="sparse",
            sae={"architecture": "topk", "k": 64},
            sparsity={"penalty": "none"},
        ).memory_analysis()
    assert found is not None
    assert found.temp_size_in_bytes < rows * width * 4 / 8
    state = found.argument_size_in_bytes - rows * d_model * 4
    assert found.alias_size_in_bytes == pytest.approx(state, abs=64)

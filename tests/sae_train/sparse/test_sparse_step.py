"""The sparse step against the dense one, and against the float64 reference.

Legend: B rows, D model width, F latents.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_train.config.run import Config
from sae_train.model.sharding import make_mesh
from sae_train.sparse.kernels import backend
from sae_train.step.schedule import scheduled
from sae_train.step.state import TrainState, init_state
from sae_train.train.train_step import StepMetrics, make_train_step
from tests.sae_train.step.test_step import PENALTIES, biased_rows, biased_state, plain_threshold
from tests.support.configs import make_config
from tests.support.oracles import reference
from tests.support.oracles.rows_off_edges import off_edges
from tests.support.session.steps_made_once import StepsMadeOnce

pytestmark = pytest.mark.slow

B, D, F = 64, 32, 128
COMMON: dict[str, Any] = {
    "width": F,
    "bandwidth": 0.05,
    "threshold_init": 0.02,
    "batch_size": B,
    "tokens": B * 200,
    "sparsity": {"coefficient": 0.01, "warmup_steps": 5},
    "learning_rate": {"peak": 1e-3, "warmup_steps": 5},
}

step_of = StepsMadeOnce()


def rows_of(step: int, *, num: int = B, width: int = D) -> np.ndarray:
    """Raw rows of one batch, some of them far longer than the others: their L0 is extreme."""
    rng = np.random.default_rng(step)
    rows = 2.0 * rng.standard_normal((num, width)) / np.sqrt(width)
    rows[:3] *= 6.0
    return rows.astype(np.float32)


def run(
    config: Config, steps: int, *, state: TrainState | None = None, first: int = 0
) -> tuple[TrainState, list[StepMetrics]]:
    """Some steps, on the same rows whichever way they go: those that its first run chose."""
    mesh = make_mesh(config.mesh)
    if state is None:
        state = init_state(config.sae, d_model=D, seed=1, mesh=mesh)
    step_function, found = step_of(config, input_scale=2.0, mesh=mesh), []
    batches = _batches[_whatever_the_way(config)]
    for step in range(first, first + steps):
        if step == len(batches):
            batches.append(rows_for(state, config, step=step))
        state, metrics = step_function(state, batches[step], scheduled(config.train, step=step))
        found.append(metrics)
    return jax.device_get(state), found


def rows_for(state: TrainState, config: Config, *, step: int) -> np.ndarray:
    """`rows_of` a step; of a JumpReLU's those off its edges, on which all ways must agree."""
    if "threshold" not in state.params:
        return rows_of(step)
    others = (rows_of(step + 10_000 * attempt) for attempt in itertools.count())
    return off_edges(
        functools.partial(next, others),
        plain_threshold(state, config.sae.threshold.parametrisation),
        scale=2.0,
        bandwidth=config.sae.bandwidth,
        centred=config.sae.pre_encoder_bias,
    )


_batches: dict[str, list[np.ndarray]] = collections.defaultdict(list)


def _whatever_the_way(config: Config) -> str:
    values = config.model_dump(mode="json", exclude={"mesh"})
    for name in ("step", "sparse_capacity", "kernels"):
        values["train"].pop(name)
    return json.dumps(values)


def moments_now(state: TrainState, name: str) -> np.ndarray:
    """A second moment brought up to date: decayed for the steps without a gradient."""
    moment = np.asarray(state.second_moment[name], np.float64)
    if moment.shape[0] != F:
        return moment
    late = np.asarray(state.step - state.last_touched, np.float64)
    return moment * (0.999**late if moment.ndim == 1 else 0.999 ** late[:, None])


def assert_same_training(a: TrainState, b: TrainState, *, atol: float = 1e-5) -> None:
    for name, value in a.params.items():
        np.testing.assert_allclose(b.params[name], value, atol=atol, rtol=1e-5, err_msg=name)
        ours, theirs = moments_now(a, name), moments_now(b, name)
        largest = max(theirs.max(), 1e-30)
        np.testing.assert_allclose(ours / largest, theirs / largest, atol=1e-4, err_msg=name)
    np.testing.assert_array_equal(a.last_fired, b.last_fired)


@pytest.mark.usefixtures("optimised_programs")
def test_two_hundred_steps_by_pairs_are_those_by_products():
    dense, dense_metrics = run(make_config(**COMMON, step="dense"), 200)
    sparse, metrics = run(make_config(**COMMON, step="sparse", sparse_capacity=F), 200)
    assert int(sparse.overflows) == 0
    assert int(sparse.sparse) == 1
    assert any(float(m.l0) < 40 for m in metrics)
    for ours, theirs in zip(metrics, dense_metrics, strict=True):
        for name in ("loss", "mse", "fvu", "l0", "gradient_norm", "dead_fraction"):
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-5)
    assert_same_training(sparse, dense)


def test_latents_that_rest_are_as_if_they_had_stepped():
    options = COMMON | {"threshold_init": 1.5}
    dense, _ = run(make_config(**options, step="dense"), 60)
    sparse, metrics = run(make_config(**options, step="sparse", sparse_capacity=F), 60)
    assert int(sparse.overflows) == 0
    rested = int(sparse.step) - np.asarray(sparse.last_touched)
    assert (rested > 2).sum() > F // 4
    assert 0 < float(metrics[-1].l0) < 1
    assert_same_training(sparse, dense)


def test_too_many_pairs_fall_back_and_are_counted():
    dense, _ = run(make_config(**COMMON, step="dense"), 120)
    mixed, metrics = run(make_config(**COMMON, step="sparse", sparse_capacity=48), 120)
    counts = [int(m.sparse_overflows) for m in metrics]
    assert counts[0] == 1  # half of all latents are active at first
    assert 1 < counts[-1] < 120
    assert int(mixed.sparse) == 1
    assert float(metrics[0].sparse_candidates) > 48 > float(metrics[-1].sparse_candidates)
    assert_same_training(mixed, dense)


def test_left_open_a_step_goes_by_pairs_once_they_are_few(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sae_train.step.path_choice.SMALLEST_WIDTH", F)
    dense, _ = run(make_config(**COMMON, step="dense"), 120)
    config = make_config(**COMMON, step="auto", sparse_capacity=70)
    auto, metrics = run(config, 120)
    assert int(auto.overflows) == 0
    assert int(auto.sparse) == 1
    assert float(metrics[0].sparse_candidates) > 0.7 * 70
    assert_same_training(auto, dense)
    # Which way a step goes is in the state: stopped anywhere and gone on, the bits are the same.
    for stop in (20, 110):
        half, _ = run(config, stop)
        assert int(half.sparse) == int(stop == 110)
        again, _ = run(config, 120 - stop, first=stop, state=jax.device_put(half))
        jax.tree.map(np.testing.assert_array_equal, again, auto)


@pytest.mark.parametrize(
    ("before", "share", "goes"),
    [(0, 0.69, 1), (0, 0.71, 0), (0, 0.94, 0), (1, 0.71, 1), (1, 0.94, 1), (1, 0.96, 0)],
)
def test_the_sparse_path_starts_at_fewer_pairs_than_it_stops_at(
    idle_step: Any, before: int, share: float, goes: int
):
    """Far fewer pairs than places: what the step before had decides alone."""
    config, step_function = idle_step
    state = init_state(config.sae, d_model=D, seed=1, mesh=make_mesh(config.mesh))
    state = dataclasses.replace(state, candidates=jnp.float32(share * F), sparse=jnp.int32(before))
    state, _ = step_function(state, rows_of(0), scheduled(config.train, step=0))
    assert int(state.sparse) == goes
    assert int(state.overflows) == 0
    assert 0 < float(state.candidates) < F / 2


@pytest.fixture(scope="module")
def idle_step() -> Any:
    """A config with few active latents and its step, which takes the way it finds best."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sae_train.step.path_choice.SMALLEST_WIDTH", F)
        config = make_config(**COMMON | {"threshold_init": 0.3}, step="auto", sparse_capacity=F)
        return config, make_train_step(config, input_scale=2.0, mesh=make_mesh(config.mesh))


# Every sum over devices has a say: of latents' frequencies, and of the norm that clips.
ON_MESHES: dict[str, Any] = COMMON | {
    "gradient_clip": 0.05,
    "sparsity": {"coefficient": 0.01, "warmup_steps": 5, "frequency": {"scale": 0.1}},
}


@functools.cache
def on_one_device(capacity: int) -> tuple[TrainState, list[StepMetrics]]:
    return run(make_config(**ON_MESHES, step="sparse", sparse_capacity=capacity), 40)


@pytest.mark.parametrize(
    ("data", "model", "capacity"),
    [(4, 2, F), (1, 8, F), (2, 4, 36)],
)
def test_pairs_on_many_meshes(data: int, model: int, capacity: int):
    single, metrics = on_one_device(capacity)
    assert float(metrics[-1].gradient_norm) > 0.05
    config = make_config(**ON_MESHES, step="sparse", sparse_capacity=capacity, mesh=(data, model))
    meshed, meshed_metrics = run(config, 40)
    for ours, theirs in zip(meshed_metrics, metrics, strict=True):
        np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-5)
        np.testing.assert_allclose(ours.gradient_norm, theirs.gradient_norm, rtol=1e-5)
    assert_same_training(meshed, single)
    assert int(meshed.sparse) == int(capacity == F)
    if (data, model) == (4, 2):
        again, _ = run(config, 40)
        jax.tree.map(np.testing.assert_array_equal, again, meshed)


def test_steps_whose_pairs_a_bfloat16_product_finds_are_float32_s(monkeypatch: pytest.MonkeyPatch):
    """As on an accelerator: with more candidates than pairs, and the same training."""
    monkeypatch.setattr(backend, "_finds_float32_by_bfloat16", lambda config, mesh: True)
    plain, plain_metrics = on_one_device(F)
    config = make_config(**ON_MESHES, step="sparse", sparse_capacity=F, mesh=(2, 4))
    mesh = make_mesh(config.mesh)
    step_function = make_train_step(config, input_scale=2.0, mesh=mesh)
    state, candidates = init_state(config.sae, d_model=D, seed=1, mesh=mesh), []
    for step, batch in enumerate(_batches[_whatever_the_way(config)][: len(plain_metrics)]):
        state, metrics = step_function(state, batch, scheduled(config.train, step=step))
        candidates.append(float(metrics.sparse_candidates))
    pairs = [float(metrics.sparse_candidates) for metrics in plain_metrics]
    assert np.mean(candidates) > 1.001 * np.mean(pairs)
    assert_same_training(jax.device_get(state), plain)


def test_one_device_with_too_many_pairs_is_enough_to_fall_back():
    """Room for all pairs in the sum of the devices, but they all lie on one of eight."""
    rows = np.zeros((B, D), np.float32)
    rows[: B // 8] = rows_of(0, num=B // 8)
    found = []
    for mesh, capacity in (((1, 1), F), ((8, 1), 8)):
        config = make_config(
            **COMMON | {"threshold_init": 0.3}, step="sparse", sparse_capacity=capacity, mesh=mesh
        )
        state = init_state(config.sae, d_model=D, seed=1, mesh=make_mesh(config.mesh))
        step_function = make_train_step(config, input_scale=2.0, mesh=make_mesh(config.mesh))
        state, metrics = step_function(state, rows, scheduled(config.train, step=4))
        found.append((jax.device_get(state), metrics))
    (alone, before), (meshed, metrics) = found
    assert 1 < float(before.l0) < 8  # a device with all of them has places for 1 a row of the batch
    assert int(metrics.sparse_overflows) == 1
    assert float(metrics.sparse_candidates) > 8
    assert_same_training(meshed, alone)


@pytest.mark.parametrize(
    ("penalty", "parametrisation", "capacity"),
    [
        *((penalty, "log", 96) for penalty in sorted(PENALTIES)),
        (min(PENALTIES), "direct", 96),
        (max(PENALTIES), "log", 1),
        (min(PENALTIES), "direct", 1),
    ],
)
def test_forty_steps_follow_the_float64_reference(
    parametrisation: str, penalty: str, capacity: int, request: pytest.FixtureRequest
):
    if penalty == "l0":
        request.getfixturevalue("optimised_programs")
    config_penalty, oracle_penalty = copy.deepcopy(PENALTIES[penalty])
    config = make_config(
        width=96,
        bandwidth=0.05,
        parametrisation=parametrisation,
        threshold_init=0.03,
        multiplier=2.0,
        sparsity=config_penalty | {"warmup_steps": 0},
        batch_size=64,
        tokens=64 * 40,
        learning_rate={"peak": 1e-3, "warmup_steps": 0},
        step="sparse",
        sparse_capacity=capacity,
    )
    state = biased_state(config, d_model=24)
    oracle = reference.Trainer(
        params=plain_threshold(state, parametrisation),
        bandwidth=0.05,
        log_threshold=parametrisation == "log",
        threshold_multiplier=2.0,
    )
    step_function = make_train_step(config, input_scale=3.5, mesh=make_mesh(config.mesh))
    rng = np.random.default_rng(0)
    for step in range(40):
        rows = off_edges(lambda: biased_rows(rng), oracle.params, scale=3.5, bandwidth=0.05)
        state, metrics = step_function(state, rows, scheduled(config.train, step=step))
        expected = oracle.step(rows / 3.5, rate=1e-3, sparsity=oracle_penalty)
        for name in ("loss", "mse", "fvu", "l0"):
            np.testing.assert_allclose(getattr(metrics, name), expected[name], rtol=1e-5)
    assert int(state.overflows) == (40 if capacity == 1 else 0)
    for name, value in plain_threshold(state, parametrisation).items():
        # Adam divides by |g|: a gradient near 0 turns float32 noise into a visible step.
        np.testing.assert_allclose(value, oracle.params[name], rtol=1e-4, atol=2e-5, err_msg=name)


def test_a_dense_step_continues_what_a_sparse_one_left_waiting():
    """As of a run that began on a CPU and goes on where `auto` is dense."""
    options = COMMON | {"threshold_init": 1.5}
    dense, _ = run(make_config(**options, step="dense"), 60)
    half, _ = run(make_config(**options, step="sparse", sparse_capacity=F), 40)
    assert (int(half.step) - np.asarray(half.last_touched) > 2).sum() > F // 4
    found, _ = run(make_config(**options, step="dense"), 20, first=40, state=jax.device_put(half))
    assert (np.asarray(found.last_touched) == 60).all()
    assert_same_training(found, dense)


def test_a_clipped_gradient_is_clipped_the_same_way():
    common = COMMON | {"gradient_clip": 0.05}
    dense, metrics = run(make_config(**common, step="dense"), 30)
    assert float(metrics[-1].gradient_norm) > 0.05
    for capacity in (F, 1):
        sparse, _ = run(make_config(**common, step="sparse", sparse_capacity=capacity), 30)
        assert_same_training(sparse, dense)


@pytest.mark.parametrize("capacity", [F, 1])
def test_a_transcoder_with_a_skip_goes_by_pairs_too(capacity: int):
    config = make_config(**COMMON, sparse_capacity=capacity)
    values = config.model_dump(mode="json")
    values["sae"] |= {"site": "mlp_in", "target": "mlp_out", "affine_skip": True}
    values["sae"]["pre_encoder_bias"] = False
    values["cache"]["sites"] = [{"site": site, "layers": [1]} for site in ("mlp_in", "mlp_out")]
    states, batches = [], []
    for kind in ("dense", "sparse"):
        values["train"]["step"] = kind
        own = Config.model_validate(values)
        mesh = make_mesh(own.mesh)
        state = init_state(own.sae, d_model=D, seed=1, mesh=mesh)
        step_function = make_train_step(own, input_scale=2.0, target_scale=1.5, mesh=mesh)
        for step in range(20):
            if step == len(batches):
                batches.append((rows_for(state, own, step=step), rows_of(1000 + step)))
            state, _ = step_function(state, batches[step], scheduled(own.train, step=step))
        states.append(jax.device_get(state))
    assert np.abs(states[0].params["W_skip"]).max() > 1e-3
    assert_same_training(states[1], states[0])

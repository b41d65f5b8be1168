"""The steps against a float64 reference, which rounds the operands of its products alike.

The reference (`tests/support/oracles`) is NumPy and imports nothing of ours. Three steps are made
from one state with rows on which rounding can't decide what is active.

Legend: B rows of a batch, D model width, F latents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np

from activation_cache.precision import Precision
from benchmarks.accelerator.results import Clock, Row, precisions, reason
from benchmarks.accelerator.steps import KINDS, Kind, is_interpreted, step_config
from sae_train.config.run import AdamConfig, LearningRateConfig
from sae_train.config.sae import ThresholdConfig
from sae_train.model.sharding import make_mesh
from sae_train.sparse.kernels.mode import without_gpu
from sae_train.step.schedule import scheduled
from sae_train.step.state import TrainState, init_state
from sae_train.train.train_step import make_train_step
from tests.support.oracles import reference
from tests.support.oracles.rounded_products import numpy_product
from tests.support.oracles.rows_off_edges import off_edges

B, D, F = 64, 64, 256
STEPS, SCALE, BANDWIDTH, RATE, PRICE = 3, 3.5, 0.05, 1e-3, 0.05
# On a CPU 4e-5, the last bits of weights; with products in another precision than the reference's
# 5e-3 (TF32 for float32) and more.
MOST = 3e-4


def rows(*, small: bool, clock: Clock) -> Iterator[Row]:
    """Each step at each precision: how far losses, second moments and weights are off at most.

    Of the moments the root, which a first step makes of the gradients; of the weights how far they
    went. Distances are L2, relative to the length of what the reference has.
    """
    for kind in KINDS:
        for precision in precisions()[:1] if small and kind != "dense" else precisions():
            if kind != "dense" and precision == "tf32":
                continue  # rounds in the encoder's product alone, unlike the reference
            columns = {"what": kind, "precision": precision, "d_model": D, "width": F}
            if clock.left <= 0:
                yield Row(**columns, note="left out: no time")
                continue
            interpreted = is_interpreted(kind)
            try:
                with without_gpu("interpret") if interpreted else nullcontext():
                    errors = _errors(kind, precision)
            except Exception as error:  # the other lines are of use without this one
                yield Row(**columns, note=reason(error))
                continue
            worst = max(errors.values())
            note = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
            verdict = "right" if worst < MOST else "WRONG"
            note = f"{verdict}{', interpreted' if interpreted else ''}: {note}"
            yield Row(**columns, error=worst, note=note)


def _config(kind: Kind, precision: Precision) -> Any:
    config = step_config(kind, precision, width=F, batch_size=B)
    sae = config.sae.model_copy(
        update={"bandwidth": BANDWIDTH, "threshold": ThresholdConfig(init=0.03)}
    )
    penalty = config.train.sparsity.model_copy(update={"coefficient": PRICE})
    train = config.train.model_copy(
        update={
            "sparsity": penalty,
            "learning_rate": LearningRateConfig(peak=RATE, warmup_steps=0),
            "adam": AdamConfig(),
            "sparse_capacity": F,
        }
    )
    return config.model_copy(update={"sae": sae, "train": train})


def _state(config: Any) -> TrainState:
    """With biases that aren't zero, so that to leave one out shows."""
    state = init_state(config.sae, d_model=D, seed=3, mesh=make_mesh(config.mesh))
    rng, params = np.random.default_rng(5), dict(state.params)
    for name in ("b_dec", "b_enc"):
        noise = 0.1 * rng.standard_normal(params[name].shape)
        params[name] = jax.device_put(noise.astype(np.float32), params[name].sharding)
    return dataclasses.replace(state, params=params)


def _errors(kind: Kind, precision: Precision) -> dict[str, float]:
    config, product = _config(kind, precision), numpy_product(precision)
    state = _state(config)
    start = _plain(state)
    oracle = reference.Trainer(
        params=start, bandwidth=BANDWIDTH, log_threshold=True, product=product
    )
    step = make_train_step(config, input_scale=SCALE, mesh=make_mesh(config.mesh))
    rng, errors = np.random.default_rng(0), {"loss": 0.0}

    def draw() -> np.ndarray:
        return (SCALE * (rng.standard_normal((B, D)) / np.sqrt(D) + 0.1)).astype(np.float32)

    for number in range(STEPS):
        x = off_edges(draw, oracle.params, scale=SCALE, bandwidth=BANDWIDTH, product=product)
        state, metrics = step(state, x, scheduled(config.train, step=number))
        expected = oracle.step(x / SCALE, rate=RATE, sparsity=reference.Sparsity("l0", PRICE))
        off = abs(float(metrics.loss) / expected["loss"] - 1)
        errors["loss"] = max(errors["loss"], off)
    found = _plain(state)
    errors["weights"] = max(
        _distance(found[name] - start[name], oracle.params[name] - start[name]) for name in start
    )
    errors["moments"] = max(
        _distance(np.sqrt(np.asarray(state.second_moment[name], np.float64)), np.sqrt(moment))
        for name, moment in oracle.moments.items()
    )
    return errors


def _plain(state: TrainState) -> dict[str, np.ndarray]:
    params = {name: np.asarray(value, np.float64) for name, value in state.params.items()}
    return params | {"threshold": np.exp(params["threshold"])}


def _distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))

"""The start of a run: b_dec at the mean, and the warning about thresholds that can't move."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from sae_train.model.sharding import make_mesh
from sae_train.step.schedule import learning_rate_factors, scheduled
from sae_train.step.state import init_state
from sae_train.train.initial_state import (
    MEAN_ROWS,
    needed_threshold,
    prepare_start,
    reachable_threshold,
)
from tests.support.configs import make_config

OFFSET = np.linspace(-1.0, 1.0, 16)


def batch(step: int) -> tuple[np.ndarray]:
    rng = np.random.default_rng(step)
    return ((5.0 * (OFFSET + rng.standard_normal((1024, 16)) / 4)).astype(np.float32),)


def start(*, rows=batch, **options):
    config = make_config(**options)
    state = init_state(config.sae, d_model=16, seed=0, mesh=make_mesh(config.mesh))
    return prepare_start(config, state=state, batch=rows, input_scale=5.0, target_scale=5.0)


def test_b_dec_starts_at_the_mean_only_when_asked():
    options = {"batch_size": 1024, "tokens": 1024, "threshold_init": 10.0}
    assert not np.asarray(start(**options).params["b_dec"]).any()
    found = np.asarray(start(**options, sae={"b_dec_init": "mean"}).params["b_dec"])
    np.testing.assert_allclose(found, OFFSET, atol=5 * 0.25 / np.sqrt(MEAN_ROWS))


def test_left_to_itself_b_dec_starts_at_the_mean_of_rows_far_from_zero(
    caplog: pytest.LogCaptureFixture,
):
    """γ of the rows is |OFFSET| over 1 as they are, and is less than a tenth around zero."""
    options = {"batch_size": 1024, "tokens": 1024, "threshold_init": 10.0}
    options["sae"] = {"b_dec_init": "auto"}
    with caplog.at_level(logging.INFO):
        far = start(**options)
        near = start(**options, rows=lambda step: (batch(step)[0] - np.float32(5.0 * OFFSET),))
    np.testing.assert_allclose(far.params["b_dec"], OFFSET, atol=5 * 0.25 / np.sqrt(MEAN_ROWS))
    assert not np.asarray(near.params["b_dec"]).any()
    first, second = (record.message for record in caplog.records)
    assert "b_dec starts at the mean of the data, for γ is " in first
    said = float(first.partition("γ is ")[2].split()[0])
    assert said == pytest.approx(np.linalg.norm(OFFSET), rel=0.02)
    assert "b_dec starts at zeros, for γ is 0.0" in second


def test_a_log_threshold_in_a_short_run_is_warned_about(caplog: pytest.LogCaptureFixture):
    short = {"threshold_init": 0.001, "learning_rate": {"peak": 7e-5}, "tokens": 64 * 300}
    with caplog.at_level(logging.WARNING):
        start(**short, sparsity={"penalty": "target_l0", "target": 5.0})
    [record] = caplog.records
    assert "0.001" in record.message
    assert "300 steps" in record.message
    assert "sae.threshold.parametrisation" in record.message
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        start(**short, multiplier=1e4, sparsity={"penalty": "target_l0", "target": 5.0})
        start(**(short | {"threshold_init": 3.0}), parametrisation="direct")
    assert not caplog.records


def test_reachable_thresholds_follow_the_sum_of_the_learning_rate():
    steps = 14_286
    flat = {"learning_rate": {"peak": 7e-5, "warmup_steps": 0}, "tokens": 64 * steps}
    log = make_config(threshold_init=0.001, parametrisation="log", **flat)
    assert reachable_threshold(log) == pytest.approx(0.001 * np.e, rel=1e-3)
    direct = make_config(threshold_init=0.001, parametrisation="direct", multiplier=2.0, **flat)
    assert reachable_threshold(direct) == pytest.approx(0.001 + 2.0, rel=1e-3)


def test_needed_threshold_is_the_quantile():
    pre = np.arange(1000.0).reshape(1, 1000)
    assert needed_threshold(pre, l0=100) == pytest.approx(899.1)


def test_learning_rate_warms_up_by_a_cosine_and_decays_linearly():
    config = make_config(
        tokens=64 * 100,
        learning_rate={"peak": 1.0, "warmup_steps": 10, "decay_steps": 20, "decay_to": 0.5},
    ).train.learning_rate
    factors = learning_rate_factors(config, steps=100).tolist()
    assert factors[0] == pytest.approx(0.1)
    assert factors[2] == pytest.approx(0.1 + 0.9 * 0.0954915)  # (1 - cos 36°) / 2; a line has 0.2
    assert factors[5] == pytest.approx(0.55)
    assert factors[10:80] == [1.0] * 70
    assert factors[90] == pytest.approx(0.75)
    assert factors[99] == pytest.approx(0.525)


def test_sparsity_warms_up_from_zero_and_bias_is_corrected():
    config = make_config(tokens=64 * 1000, sparsity={"coefficient": 2.0, "warmup_steps": 4}).train
    found = [float(scheduled(config, step=step).sparsity_coefficient) for step in range(6)]
    assert found == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    corrections = [float(scheduled(config, step=step).bias_correction) for step in (0, 1, 999)]
    assert corrections == pytest.approx([1 - 0.999, 1 - 0.999**2, 1 - 0.999**1000], rel=1e-6)

"""Runs on the sparse path, stopped and killed: a checkpoint keeps what waits to decay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activation_cache.runtime.errors import Interrupted
from sae_train.checkpoint.checkpoints import Checkpoints
from sae_train.config.file import write_config
from sae_train.config.run import Config
from sae_train.model.sharding import make_mesh
from sae_train.runs.metrics_file import read_metrics
from sae_train.step.state import TrainState, abstract_state
from sae_train.train.loop import train
from tests.sae_train.train.test_train_kill import finish, kill, reached, start
from tests.support.training import assert_same_run, lines_logged, make_run, stop_after

pytestmark = pytest.mark.slow

STEPS, WIDTH = 150, 64


def by_pairs(folder: Path, output: str, **options: Any) -> Config:
    """A run in which most latents are silent in most steps, and none falls back to products.

    From step 30 on dead ones are revived.
    """
    return make_run(
        folder,
        output=output,
        **{
            "steps": STEPS,
            "width": WIDTH,
            "threshold_init": 0.5,
            "step": "sparse",
            "sparse_capacity": WIDTH,
            "sae": {"revive_coefficient": 0.1},
            "dead_after_tokens": 48 * 30,
            "checkpoint": {"every_steps": 7, "keep": 2},
        }
        | options,
    )


def state_at(config: Config, step: int) -> TrainState:
    with Checkpoints(Path(config.output)) as checkpoints:
        d_model = checkpoints.read_meta(step)["d_model"]
        mesh = make_mesh(config.mesh)
        return checkpoints.restore(
            abstract_state(config.sae, d_model=d_model, mesh=mesh), step=step
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the run `whole`, which nothing has disturbed."""
    folder = tmp_path_factory.mktemp("resume")
    train(by_pairs(folder, "whole"))
    return folder


@pytest.mark.parametrize("stop_step", [1, 26])
def test_stopped_and_gone_on_it_ends_with_the_same_bits(folder: Path, stop_step: int):
    parts = by_pairs(folder, f"until{stop_step}")
    with pytest.raises(Interrupted):
        train(parts, stop=stop_after(stop_step))
    waiting = state_at(parts, stop_step)
    assert (np.asarray(waiting.last_touched) < stop_step).sum() > WIDTH // 8
    assert np.asarray(waiting.second_moment["W_dec"]).any(axis=1).sum() > WIDTH // 8
    train(parts)
    assert_same_run(folder / "whole", folder / f"until{stop_step}", step=STEPS)
    assert read_metrics(folder / "whole")[-1]["sparse_overflows"] == 0


def test_a_killed_run_ends_with_the_same_bits(folder: Path):
    write_config(by_pairs(folder, "killed"), folder / "config")
    process = start(folder / "config" / "config.yaml")
    assert reached(lambda: lines_logged(folder / "killed") >= 31, process)
    kill(process)
    finish(folder / "config" / "config.yaml")
    assert_same_run(folder / "whole", folder / "killed", step=STEPS)


def test_second_moments_that_wait_are_restored_on_another_mesh(tmp_path: Path):
    whole, parts = (by_pairs(tmp_path, name, steps=40) for name in ("whole", "parts"))
    train(whole)
    with pytest.raises(Interrupted):
        train(parts, stop=stop_after(13))
    moved = by_pairs(tmp_path, "parts", steps=40, mesh=(2, 4))
    train(moved)
    alone, meshed = state_at(whole, 40), state_at(moved, 40)
    np.testing.assert_array_equal(alone.last_touched, meshed.last_touched)
    assert len(set(np.asarray(alone.last_touched).tolist())) > 3
    for name in alone.params:
        np.testing.assert_allclose(meshed.params[name], alone.params[name], atol=1e-5)
        moment = np.asarray(alone.second_moment[name])
        np.testing.assert_allclose(
            meshed.second_moment[name], moment, rtol=1e-4, atol=1e-6 * moment.max()
        )

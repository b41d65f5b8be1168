"""Runs whose last phase goes through the language model: resume, cohorts, meshes, mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activation_cache.harvest.harvest import harvest
from activation_cache.runtime.errors import Interrupted, UserError
from sae_train.config.file import load_config, with_values
from sae_train.config.run import Config
from sae_train.runs.metrics_file import read_metrics
from sae_train.train.loop import train, train_cohort
from tests.sae_train.end_to_end.test_gradient import LAYERS
from tests.support.pipeline import write_pipeline
from tests.support.training import assert_same_run, final_state, stop_after

pytestmark = pytest.mark.slow

STEPS, FIRST = 5, 2  # of all, and done when the phase begins
BATCH = 60  # four sequences of 15 rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of a Gemma of two layers, its weights and text; `whole` is a finished run."""
    folder = tmp_path_factory.mktemp("through")
    config = config_in(folder, output="whole", write=True)
    harvest(model=config.model, text=config.text, cache=config.cache)
    train(config)
    return folder


def config_in(folder: Path, *, output: str, write: bool = False, **own: Any) -> Config:
    path = write_pipeline(folder, **LAYERS) if write else folder / "config.yaml"
    taps = [("resid_post", 0), ("mlp_in", 1), ("mlp_out", 1)]
    values = {
        "cache.sites": [{"site": site, "layers": [layer]} for site, layer in taps],
        "sae.layer": 0,
        "train.batch_size": BATCH,
        "train.tokens": STEPS * BATCH,
        "train.log_every_steps": 1,
        "train.end_to_end": {"beta": 0.5, "tokens": (STEPS - FIRST) * BATCH},
        "checkpoint.every_steps": 2,
        "output": str(folder / output),
    }
    return with_values(load_config(path), values | own, source="test")


def test_the_step_log_tells_of_the_phase(world: Path):
    rows = read_metrics(world / "whole")
    assert [("kl" in row, "alpha" in row) for row in rows] == [(False,) * 2] * 2 + [(True,) * 2] * 3
    for row in rows[FIRST:]:
        assert row["alpha"] == pytest.approx(row["mse"] / row["kl"], rel=1e-5)
        # α KL is the MSE, so the weighted mean of the two is too; beside it stands the penalty.
        penalty = row["sparsity_coefficient"] * row["l0"]
        assert row["loss"] == pytest.approx(row["mse"] + penalty, rel=1e-5)


@pytest.mark.parametrize("stop_step", [1, FIRST, 3])
def test_a_resumed_run_is_bit_identical(world: Path, stop_step: int):
    parts = config_in(world, output=f"parts_{stop_step}")
    with pytest.raises(Interrupted, match=f"at step {stop_step} of {STEPS}"):
        train(parts, stop=stop_after(stop_step))
    train(parts)
    assert_same_run(world / "whole", world / f"parts_{stop_step}", step=STEPS)


def test_a_member_of_a_cohort_ends_as_it_would_alone(world: Path):
    own = {"train.sparsity.coefficient": 5e-3}
    plain = config_in(world, output="plain", **own | {"train.end_to_end": None})
    train_cohort([config_in(world, output="member"), plain])
    assert_same_run(world / "whole", world / "member", step=STEPS)
    assert "kl" not in read_metrics(world / "plain")[-1]


def test_a_transcoder_trains_through_the_model_on_any_mesh(world: Path):
    own: dict[str, Any] = {
        "sae": {"site": "mlp_in", "target": "mlp_out", "layer": 1, "width": 64, "k": 8},
        "train.tokens": 2 * BATCH,
        "train.end_to_end.tokens": 2 * BATCH,
        "train.sparsity": {"penalty": "none"},
    }
    own["sae"] |= {"architecture": "batch_topk"}
    ends = []
    for data, model in ((1, 1), (2, 2)):
        name = f"mesh_{data}_{model}"
        train(config_in(world, output=name, **own, **{"mesh.data": data, "mesh.model": model}))
        ends.append(final_state(world / name, step=2))
        assert read_metrics(world / name)[0]["kl"] > 0
    for one, other in zip(*ends, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_a_model_that_is_missing_is_told_before_the_first_step(world: Path):
    (world / "gemma").rename(world / "elsewhere")
    try:
        with pytest.raises(UserError, match=r"train\.end_to_end needs the language model"):
            train(config_in(world, output="missing"))
    finally:
        (world / "elsewhere").rename(world / "gemma")
    assert not read_metrics(world / "missing")


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"train.end_to_end.tokens": 601, "train.tokens": 600}, "601 is above train.tokens 600"),
        ({"train.end_to_end.beta": 0.0}, "train.end_to_end.beta"),
        ({"mesh.data": 3, "train.batch_size": 63}, "4 whole sequences of 16 tokens"),
        (
            {"sae": {"site": "embedding", "layer": 0}, "cache.sites": [
                {"site": "embedding", "layers": [0]}]},
            "sae.site is embedding",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(world: Path, own: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        config_in(world, output="refused", **own)

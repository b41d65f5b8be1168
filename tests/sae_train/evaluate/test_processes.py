"""An evaluation shared by two processes gives the numbers of one process."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activation_cache.language_model import model
from activation_cache.language_model.model import LanguageModel
from activation_cache.store.store import open_store
from launch.cli import main
from sae_train.config.file import load_config
from sae_train.evaluate import jobs
from tests.support.children.processes import child_environment
from tests.support.pipeline import write_pipeline
from tests.support.saes import make_trained, save_run

pytestmark = pytest.mark.slow

# Three batches for two processes: one has less to do than the other.
SETTINGS = ["evaluation={sequences: 3, sequences_per_batch: 1}"]


def numbers(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of a JSON value by its path."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, inner in items for k, v in numbers(inner, f"{path}.{key}").items()}
    return {path: value}


def test_two_processes_measure_what_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = str(write_pipeline(tmp_path)), tmp_path / "out"
    assert main(["harvest", config]) == 0
    own = load_config(config, ["cache.mesh={data: 2, model: 4}"])
    trained = make_trained(D=20, F=own.sae.width, scale=2.0)
    store = open_store(own.cache.path).identity
    save_run(run, dataclasses.replace(trained, config=own, store=store))
    meshes: list[Any] = []

    def load_model(*arguments: Any, mesh: Any, **options: Any) -> LanguageModel:
        meshes.append(mesh.shape["model"])
        return model.load_model(*arguments, mesh=mesh, **options)

    monkeypatch.setattr(jobs, "load_model", load_model)
    assert main(["evaluate", config, *SETTINGS]) == 0
    assert meshes == [4], "the language model on four devices; of two processes each has one"
    alone = json.loads((run / "evaluation.json").read_text())
    counts = np.load(run / "firing_counts.npy")
    (run / "evaluation.json").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "evaluate", config, *SETTINGS, "launch.processes=2"],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "joined: process 0 of 2" in done.stderr
    shared = json.loads((run / "evaluation.json").read_text())
    np.testing.assert_array_equal(np.load(run / "firing_counts.npy"), counts)
    left, right = numbers(alone), numbers(shared)
    assert left.keys() == right.keys()
    for key, value in left.items():
        if key == ".importance_uniformity":
            # It counts active latents: one at its threshold changes a token's r by 1 / L0.
            assert right[key] == pytest.approx(value, abs=3e-3), key
        elif isinstance(value, float):
            # Four devices add up in another order; delta loss is a difference of two sums.
            assert right[key] == pytest.approx(value, rel=1e-5, abs=2e-6), key
        else:
            assert right[key] == value, key

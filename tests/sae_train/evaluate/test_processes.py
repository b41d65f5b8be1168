"""An evaluation and a walk shared by two processes give what one process gives."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from activation_cache.language_model import model
from activation_cache.language_model.model import LanguageModel
from activation_cache.mesh import make_mesh
from activation_cache.store.store import open_store
from launch.cli import main
from sae_train.config.file import load_config
from sae_train.evaluate import jobs
from sae_train.latents.reader import open_latents
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline's folder, with a store and a run in `out`."""
    folder = tmp_path_factory.mktemp("shared")
    config = str(write_pipeline(folder))
    assert main(["harvest", config]) == 0
    places = ["cache.mesh={data: 2, model: 4}", "evaluation.sequences_per_batch=64"]
    own = load_config(config, places)
    trained = make_trained(D=20, F=own.sae.width, scale=2.0)
    store = open_store(own.cache.path).identity
    save_run(folder / "out", dataclasses.replace(trained, config=own, store=store))
    return folder


@pytest.fixture
def of_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the supervisor: those that it starts have its environment."""
    for name, value in child_environment().items():
        monkeypatch.setenv(name, value)


def test_two_processes_measure_what_one_does(
    folder: Path, of_children: None, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    config, run = str(folder / "config.yaml"), folder / "out"
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
    capsys.readouterr()
    assert main(["evaluate", config, *SETTINGS, "launch.processes=2"]) == 0
    assert "joined: process 0 of 2" in capsys.readouterr().err
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


def test_two_processes_write_the_latents_that_one_does(
    folder: Path, of_children: None, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Of other text, which one of them tokenises: two shards, and a part each."""
    run, words = folder / "out", random.Random(1)
    (folder / "more.txt").write_text(
        " ".join(words.choices(["the", "cat", "and", "dog"], k=20_000))
    )
    command = ["latents", str(run), f"latents.source=[{folder}/more.txt]", "latents.tokens=20_000"]
    # As each of the two has it: one device.
    monkeypatch.setattr(jobs, "_local_mesh", lambda config, gemma: make_mesh(jax.devices()[:1]))
    assert main(command) == 0
    assert open_latents(run).record.sequences * 16 > 2**14, "more than a shard"
    alone = {path.name: path.read_bytes() for path in (run / "latents").iterdir()}
    (run / "latents" / "latents.json").unlink()
    capsys.readouterr()
    assert main([*command, "launch.processes=2"]) == 0
    assert "joined: process 0 of 2" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (run / "latents").iterdir()} == alone

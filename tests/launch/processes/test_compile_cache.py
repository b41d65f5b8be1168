"""Compiled programs are kept between commands, and change nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sae_train.checkpoint.trained import load_trained
from sae_train.config.file import resolved_yaml
from tests.support.configs import make_config
from tests.support.pipeline import ROOT
from tests.support.stores import make_manifest, random_rows, write_store

PROGRAM = """
import os, sys, jax
jax.config.update("jax_num_cpu_devices", int(os.environ["CPU_DEVICES"]))
from launch import stages
from sae_train.config_file import load_config
hits = []
jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None
)
stages.train([load_config(sys.argv[1], [])], fresh=True, stop=lambda: False)
print("hits", len(hits))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, as a file."""
    folder = tmp_path_factory.mktemp("cold")
    write_store(folder / "store", make_manifest(rows=64, width=8), make_rows=random_rows)
    made = make_config(
        width=16,
        batch_size=16,
        tokens=64,
        rows=64,
        cache_path=str(folder / "store"),
        output=str(folder / "run"),
    )
    (folder / "config.yaml").write_text(resolved_yaml(made))
    return folder / "config.yaml"


def train(config: Path, **environment: str) -> int:
    """Train in a process of its own; returns how many programs came from the cache."""
    # A test before may have chosen a folder for the processes that it starts.
    inherited = {key: os.environ[key] for key in os.environ if not key.startswith("JAX_COMP")}
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(config)],
        env=inherited | {"PYTHONPATH": str(ROOT), "CPU_DEVICES": "1"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(told.stdout.split("hits ")[1])


def weights(config: Path) -> dict[str, bytes]:
    """The trained parameters' bytes."""
    trained = load_trained(config.parent / "run")
    return {name: np.asarray(value).tobytes() for name, value in trained.params.items()}


def test_a_second_run_compiles_less_and_ends_the_same(config: Path, tmp_path: Path) -> None:
    assert train(config, XDG_CACHE_HOME=str(tmp_path)) == 0
    assert list((tmp_path / "open-gemma-scope" / "compiled").rglob("jit_step*"))
    compiled_here = weights(config)
    assert train(config, XDG_CACHE_HOME=str(tmp_path)) > 0
    assert weights(config) == compiled_here


def test_a_folder_of_the_users_own_is_left_to_him(config: Path, tmp_path: Path) -> None:
    own = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own"), "XDG_CACHE_HOME": str(tmp_path)}
    train(config, **own)
    assert not (tmp_path / "open-gemma-scope").exists()


def test_a_home_that_cannot_be_written_is_no_mistake(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert train(config, XDG_CACHE_HOME=str(tmp_path / "file")) == 0


@pytest.mark.parametrize("chosen", ["XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"])
def test_programs_of_several_cpu_devices_are_compiled_each_time(
    config: Path, tmp_path: Path, chosen: str
) -> None:
    """Loaded ones have been seen to hang, and to add up what doesn't belong together."""
    for _ in range(2):
        assert train(config, CPU_DEVICES="2", **{chosen: str(tmp_path)}) == 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]

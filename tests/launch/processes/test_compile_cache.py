"""Compiled programs are kept between commands, and change nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launch.processes.compile_cache import _processor_key
from sae_train.checkpoint.trained import load_trained
from sae_train.config.file import resolved_yaml
from tests.support.configs import make_config
from tests.support.pipeline import ROOT
from tests.support.stores import make_manifest, random_rows, write_store

pytestmark = pytest.mark.slow


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


def train(config: Path, *, devices: int = 1, **environment: str) -> int:
    """Give `sae train` in a process of its own; returns how many programs it took from a cache."""
    # A test before may have chosen a folder for the processes that it starts.
    inherited = {key: os.environ[key] for key in os.environ if not key.startswith("JAX_COMP")}
    told = subprocess.run(
        [sys.executable, "-m", "launch.cli", "train", str(config), "--fresh"],
        env=inherited
        | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(devices)}
        | {"JAX_DEBUG_LOG_MODULES": "jax._src.compiler", "XLA_FLAGS": ""}
        | environment,
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    assert "get_compile_options" in told.stderr, "JAX says what it compiles"
    return told.stderr.count("Persistent compilation cache hit")


def weights(config: Path) -> dict[str, bytes]:
    """The trained parameters' bytes."""
    trained = load_trained(config.parent / "run")
    return {name: np.asarray(value).tobytes() for name, value in trained.params.items()}


def test_a_second_run_compiles_less_and_ends_the_same(config: Path, tmp_path: Path) -> None:
    assert train(config, XDG_CACHE_HOME=str(tmp_path)) == 0
    (kept,) = (tmp_path / "open-gemma-scope").iterdir()
    assert kept.name == "compiled"
    assert list(kept.glob(f"{_processor_key()}/jit_step*")), "by processor, the quick ones too"
    compiled_here = weights(config)
    assert train(config, XDG_CACHE_HOME=str(tmp_path)) > 0
    assert weights(config) == compiled_here


def test_a_folder_of_the_users_own_is_used_alone(config: Path, tmp_path: Path) -> None:
    own = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own"), "XDG_CACHE_HOME": str(tmp_path)}
    train(config, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0", **own)
    assert list((tmp_path / "own").glob("jit_step*"))
    assert not (tmp_path / "open-gemma-scope").exists()


def test_a_home_that_cannot_be_written_is_no_mistake(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert train(config, XDG_CACHE_HOME=str(tmp_path / "file")) == 0


@pytest.mark.parametrize("chosen", ["XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"])
def test_programs_of_several_cpu_devices_are_compiled_each_time(
    config: Path, tmp_path: Path, chosen: str
) -> None:
    """Loaded ones have been seen to hang, and to add up what doesn't belong together."""
    environment = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", chosen: str(tmp_path)}
    assert train(config, devices=2, **environment) == 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]

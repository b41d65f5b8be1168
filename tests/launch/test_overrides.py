"""Every override of every command has an effect or is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import stages
from launch.cli import COMMANDS, main
from launch.command_table import Command
from launch.config.job import Job, load_job
from launch.show import plan_tables
from launch.sweep import run_sweep
from sae_train.config import schema
from sae_train.config.file import write_config
from tests.support.configs import as_job, make_config
from tests.support.run_folders import write_run

# One or more keys of each section, with a value that isn't the default.
NEW: dict[str, Any] = {
    "name": "other",
    "model.dtype": "bfloat16",
    "text.field": "body",
    "cache.path": "/elsewhere",
    "cache.block_rows": 64,
    "sae.width": 64,
    "train.batch_size": 16,
    "train.sparsity.coefficient": 0.5,
    "mesh.data": 2,
    "checkpoint.keep": 7,
    "evaluation.sequences": 3,
    "output": "/out",
    "launch.restarts": 9,
}
FOLLOWED = ("evaluation", "output", "launch", "cache.path", "model.weights")


def value_at(config: Job, key: str) -> Any:
    value: Any = config.model_dump(mode="python")
    for part in key.split("."):
        value = value[part]
    return value


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A trained run's folder, as stages leave it."""
    return write_run(make_config(output=str(tmp_path / "run")), l0=20, steps=400)


def kept(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, at: str = "") -> list[Any]:
    """What a stage is called with instead of running: its first argument, or the one named."""
    calls: list[Any] = []

    def stage(*arguments: Any, **named: Any) -> int:
        calls.append(named[at] if at else arguments[0])
        return 0

    monkeypatch.setattr(module, name, stage)
    return calls


@pytest.mark.parametrize("key", NEW)
@pytest.mark.parametrize(
    ("command", "module", "stage"),
    [
        ("harvest", stages, "harvest"),
        ("train", stages, "train"),
        ("sweep", run_sweep, "run_sweep"),
        ("plan", plan_tables, "show_plan"),
    ],
)
@pytest.mark.parametrize("as_folder", [True, False], ids=["folder", "file"])
def test_what_runs_a_config_is_given_every_override(
    command: str, module: Any, stage: str, key: str, as_folder: bool, folder: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    if command == "sweep":
        shutil.rmtree(folder)
        job = as_job(make_config(output=str(folder)), sweep={"grid": {"train.seed": [0, 1]}})
        write_config(job, folder)
    calls = kept(monkeypatch, module, stage)
    target = folder if as_folder else folder / "config.yaml"
    assert main([command, str(target), f"{key}={NEW[key]}"]) == 0
    (config,) = calls if command != "train" else calls[0]
    assert value_at(config, key) == NEW[key]


@pytest.mark.parametrize(
    "command", [one for one in COMMANDS if not one.overrides], ids=lambda one: one.name
)
def test_what_reads_folders_takes_none(
    command: Command, folder: Path, capsys: pytest.CaptureFixture[str]
):
    needed = [word for flag, how in command.settings if how.get("required") for word in (flag, "x")]
    for key in NEW:
        assert main([command.name, str(folder), *needed, f"{key}={NEW[key]}"]) == 2
        words = f"`sae {command.name}` takes no overrides: leave out {key}={NEW[key]}"
        assert words in capsys.readouterr().err


@pytest.mark.slow  # goes through every key of the schema
def test_an_evaluation_follows_some_and_refuses_the_rest(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Every key of the schema, with the very value that the run has."""
    config = load_job(folder / "config.yaml")
    calls = kept(monkeypatch, stages, "evaluate")
    keys = [key for key in schema.dotted_keys(Job) if not key.startswith(("sweep", "launch."))]
    assert len(keys) > 60
    refused = 0
    for key in [*keys, "launch.processes"]:
        try:
            value = value_at(config, key)
        except (KeyError, TypeError):  # of another variant of a section, or inside what is null
            continue
        code = main(["evaluate", str(folder), f"{key}={json.dumps(value)}"])
        told = capsys.readouterr().err
        if any(key == one or key.startswith(f"{one}.") for one in FOLLOWED):
            assert code == 0, told
        else:
            assert code == 2, f"{key} is followed by nobody"
            assert f"override {key}=" in told
            refused += 1
    assert refused > 30
    assert calls


@pytest.mark.parametrize(
    ("override", "name", "wanted"),
    [
        ("evaluation.sequences=3", "settings", lambda given: given.sequences == 3),
        ("cache.path=/elsewhere", "places", lambda given: given == ['cache.path="/elsewhere"']),
        ("model.weights=/there", "places", lambda given: given == ["model.weights=/there"]),
        ("launch.processes=2", "config", lambda given: given.launch.processes == 2),
        ("evaluation={}", "places", lambda given: given == []),
    ],
)
def test_what_an_evaluation_follows_reaches_it(
    override: str,
    name: str,
    wanted: Callable[[Any], bool],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    calls = kept(monkeypatch, stages, "evaluate", at=name)
    assert main(["evaluate", str(folder), override]) == 0
    (given,) = calls
    assert wanted(given)


def test_an_evaluation_of_chosen_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    base = as_job(make_config(output=str(tmp_path)), sweep={"grid": {"train.seed": [0, 1]}})
    write_config(base, tmp_path)
    for seed in (0, 1):
        output = str(tmp_path / f"seed_{seed}")
        write_run(make_config(output=output, seed=seed), l0=20)
    calls = kept(monkeypatch, stages, "evaluate")
    assert main(["evaluate", str(tmp_path), "sweep.only=['*_1']"]) == 0
    assert [[path.name for path in folders] for folders in calls] == [["seed_1"]]
    calls.clear()
    both = ["sweep.only=['seed_*']", "launch.processes=2"]
    assert main(["evaluate", str(tmp_path), *both]) == 0
    assert [len(folders) for folders in calls] == [1, 1], "no group is given the whole sweep"
    assert main(["evaluate", str(tmp_path), "sweep.grid.train.seed=[0]"]) == 2
    assert "override sweep.grid.train.seed=[0]: " in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path), "launch={on: slurm}"]) == 2
    assert "runs on this machine" in capsys.readouterr().err

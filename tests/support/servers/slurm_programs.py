"""Slurm's side, made up: configs that go there, their scripts, and programs of its names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.clusters.slurm_script import Script, render
from launch.config.job import Job
from sae_train.config.file import with_values
from tests.support.configs import as_job, make_config

NASTY = 'it\'s a "run" $(touch hacked) `x` %j #1 ; & \u00e9'
SWEEP = {
    "grid": {"train.sparsity.coefficient": [1e-3, 1e-2, 1e-1]},
    "cohort": {"max_members": 2},
}


def make(output: str = "run", *, sweep: bool = True, mesh=(1, 1), **launch: Any) -> Job:
    values = {"launch": {"on": "slurm", **launch}} | ({"sweep": SWEEP} if sweep else {})
    job = as_job(make_config(output=output, mesh=mesh))
    return with_values(job, values, source="test")


def script(config: Job, stage: str = "train") -> Script:
    command = "sweep" if config.sweep else stage
    return next(one for one in render(config, command=command) if one.stage == stage)


def programs(folder: Path, monkeypatch: pytest.MonkeyPatch, **bodies: str) -> None:
    """Put programs of ours before Slurm's on the PATH; those not given are no Slurm's at all."""
    folder.mkdir(exist_ok=True)
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

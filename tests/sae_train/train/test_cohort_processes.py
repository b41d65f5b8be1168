"""A cohort in two processes: stopped, killed, one member failing; the others end as alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from activation_cache.storage.locks import folder_lock
from sae_train.config.file import load_config, write_config
from sae_train.runs.folder import newest_checkpoint
from sae_train.train.loop import train
from tests.support.children.processes import (
    Group,
    child_environment,
    children,
    start_group,
    wait_for,
)
from tests.support.configs import as_job
from tests.support.training import assert_same_run, lines_logged, make_run

pytestmark = pytest.mark.slow

STEPS = {"a": 120, "b": 75, "c": 120}
MEMBERS: dict[str, dict[str, Any]] = {
    "a": {"checkpoint": {"every_steps": 30, "keep": 2}},
    "b": {"width": 32, "checkpoint": {"every_steps": 13, "keep": 2}},
    "c": {"seed": 1, "sparsity": {"penalty": "target_l0", "target": 4.0}},
    # Diverges in its first steps, before it has saved anything.
    "bad": {
        "parametrisation": "direct",
        "learning_rate": {"peak": 1e37, "warmup_steps": 20, "warmup_from": 0.0},
    },
}


def make_file(folder: Path, place: str, name: str) -> str:
    config = make_run(
        folder,
        steps=STEPS.get(name, 120),
        output=f"{place}/{name}",
        mesh=(2, 1),
        data_seed=0,
        **MEMBERS.get(name, {}),
    )
    launch = {"processes": 2, "restart_pause_seconds": 0.1, "heartbeat_seconds": 60}
    write_config(as_job(config, launch=launch), folder / f"{place}-configs" / name)
    return str(folder / f"{place}-configs" / name / "config.yaml")


def make_files(folder: Path, place: str, *names: str) -> list[str]:
    return [make_file(folder, place, name) for name in names]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each member was trained alone, by this process, which has the mesh's two devices."""
    folder = tmp_path_factory.mktemp("cohort")
    for name in STEPS:
        train(load_config(make_file(folder, "alone", name)))
    return folder


def start(files: list[str]) -> Group:
    command = ["-m", "launch.cli", "train", *files]
    return start_group([command] * 2, environment={"SAE_HEARTBEAT_SECONDS": "60"})


def assert_as_alone(folder: Path, place: str) -> None:
    for name, steps in STEPS.items():
        assert_same_run(folder / "alone" / name, folder / place / name, step=steps)


def test_stopped_and_one_diverging_all_others_end_as_alone(folder: Path) -> None:
    files, place = make_files(folder, "together", "a", "bad", "b", "c"), folder / "together"
    group = start(files)
    if not wait_for(lambda: lines_logged(place / "a") >= 20, group.alive):
        pytest.fail("\n".join([str(group.wait()), *group.logs]))
    group.processes[1].send_signal(signal.SIGTERM)
    assert group.wait() == [75, 75], "\n".join(group.logs)
    logs = "\n".join(group.logs)
    assert "Traceback" not in logs
    (step,) = set(re.findall(r"a, b, c: stopped by a signal at step (\d+)", logs))
    saved = {name: newest_checkpoint(place / name) for name in STEPS}
    assert set(saved.values()) == {int(step)}, saved

    with folder_lock(place / "taken"):
        group = start([*files, make_file(folder, "together", "taken")])
        assert group.wait() == [2, 2], "\n".join(group.logs)
    for log in group.logs:
        assert "2 of 5 runs failed:\n  bad: training stopped at step" in log
        assert "\n  taken: " in log
        assert "taken is in use by another process" in log
        assert "Traceback" not in log
    assert_as_alone(folder, "together")
    assert "not finite" in json.loads((place / "bad" / "failure.json").read_text())["reason"]
    assert newest_checkpoint(place / "bad") is None


def test_a_killed_process_costs_no_member_anything(folder: Path) -> None:
    files, place = make_files(folder, "killed", *STEPS), folder / "killed"
    supervisor = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "train", *files],
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    # Once b is done and the others are on their way.
    if not wait_for(lambda: lines_logged(place / "a") >= 80, lambda: supervisor.poll() is None):
        pytest.fail(str(supervisor.communicate()))
    os.kill(sorted(children(supervisor))[0], signal.SIGKILL)
    output, _ = supervisor.communicate(timeout=600)
    assert supervisor.returncode == 0, output
    assert output.count("was lost (SIGKILL)") == 1, output
    assert_as_alone(folder, "killed")

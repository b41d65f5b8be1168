"""`sae train` on several processes, stopped, killed, misled: it ends bit-identical, or in words."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.cli import main
from sae_train.config.file import write_config
from sae_train.runs.folder import newest_checkpoint
from sae_train.train.loop import train
from tests.support.children.processes import (
    ROOT,
    Group,
    child_environment,
    children,
    start_group,
    wait_for,
)
from tests.support.configs import as_job
from tests.support.training import assert_same_run, lines_logged, make_run

pytestmark = pytest.mark.slow

STEPS = 400
SAVES = {"every_steps": 50, "keep": 2}
MESH = (2, 1)


def make_file(folder: Path, name: str, **options) -> Path:
    """A config file for a run of two processes."""
    config = make_run(folder, steps=STEPS, output=name, mesh=MESH, checkpoint=SAVES, **options)
    launch = {"processes": 2, "restart_pause_seconds": 0.1, "heartbeat_seconds": 60}
    write_config(as_job(config, launch=launch), folder / f"{name}-config")
    return folder / f"{name}-config" / "config.yaml"


def start_processes(file: Path, *, heartbeat: int = 60) -> Group:
    """Both processes, started as a cluster would."""
    command = ["-m", "launch.cli", "train", str(file)]
    return start_group([command] * 2, environment={"SAE_HEARTBEAT_SECONDS": str(heartbeat)})


def start_supervised(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *command],
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs are, an undisturbed one among them."""
    folder = tmp_path_factory.mktemp("preemption")
    # In this process, which has the two devices of the mesh: sums of two have one order.
    train(make_run(folder, steps=STEPS, output="undisturbed", mesh=MESH, checkpoint=SAVES))
    return folder


def test_a_signal_to_any_process_stops_all_at_one_step(folder: Path):
    file, run = make_file(folder, "stopped"), folder / "stopped"
    stops = ((0, signal.SIGTERM), (1, signal.SIGINT))
    for number, (index, kind) in enumerate(stops):
        goal = lines_logged(run) + 20
        group = start_processes(file)
        if not wait_for(lambda goal=goal: lines_logged(run) >= goal, group.alive):
            pytest.fail("\n".join([str(group.wait()), *group.logs]))
        group.processes[index].send_signal(kind)
        codes = group.wait()
        logs = "\n".join(group.logs)
        assert codes == [75, 75], logs
        assert "Traceback" not in logs
        steps = set(re.findall(r"stopped by a signal at step (\d+)", logs))
        assert steps == {str(newest_checkpoint(run))}, logs
        assert newest_checkpoint(run) == lines_logged(run), number
    group = start_processes(file)
    assert group.wait() == [0, 0], "\n".join(group.logs)
    assert_same_run(folder / "undisturbed", run, step=STEPS)


def test_a_killed_process_is_recovered_from_and_fresh_is_done_once(folder: Path):
    """The folder has another run, which `--fresh` deletes: at the start, not after the kill."""
    file, run = make_file(folder, "killed"), folder / "killed"
    train(make_run(folder, steps=20, output="killed", mesh=MESH, bandwidth=0.1))
    supervisor = start_supervised("train", str(file), "--fresh")

    def has_saved() -> bool:  # the earlier run's one checkpoint is of step 20
        return (newest_checkpoint(run) or 0) >= SAVES["every_steps"]

    if not wait_for(has_saved, lambda: supervisor.poll() is None):
        pytest.fail(str(supervisor.communicate()))
    os.kill(sorted(children(supervisor))[0], signal.SIGKILL)
    output, _ = supervisor.communicate(timeout=600)
    assert supervisor.returncode == 0, output
    assert output.count("was lost (SIGKILL)") == 1, output
    assert output.count("restarting all 2 processes") == 1, output
    assert output.count("joined") <= 2, "one process speaks at each start"
    begun = re.search(r"going on from the checkpoint at step (\d+)", output)
    assert begun, output
    assert int(begun[1]) in range(50, STEPS, 50), output
    assert_same_run(folder / "undisturbed", run, step=STEPS)


def test_the_others_notice_a_lost_process_by_themselves(folder: Path):
    group = start_processes(make_file(folder, "noticed"), heartbeat=10)
    assert wait_for(lambda: lines_logged(folder / "noticed") >= 5, group.alive)
    group.processes[1].kill()
    begin = time.monotonic()
    codes = group.wait()
    # JAX's own heartbeat is 100 s; a busy machine adds to the 10 s.
    assert time.monotonic() - begin < 60, "the heartbeat was ours"
    assert codes[0] not in (0, 2, 75), group.logs[0]


def test_a_stop_through_the_supervisor(folder: Path):
    file, run = make_file(folder, "through"), folder / "through"
    supervisor = start_supervised("train", str(file))
    assert wait_for(lambda: lines_logged(run) >= 20, lambda: supervisor.poll() is None)
    supervisor.send_signal(signal.SIGINT)
    output, _ = supervisor.communicate(timeout=600)
    assert supervisor.returncode == 75, output
    assert output.count("stopped by a signal at step") == 1, output
    assert "Traceback" not in output
    assert not children(supervisor)


def test_processes_of_different_configs_are_refused(folder: Path):
    file = make_file(folder, "alike")
    commands = [["-m", "launch.cli", "train", str(file), f"train.seed={index}"] for index in (0, 1)]
    group = start_group(commands)
    assert group.wait() == [2, 2], "\n".join(group.logs)
    for log in group.logs:
        assert "process 1 was started with another config than process 0" in log
        assert "'seed: 1' where process 0 has 'seed: 0'" in log
    assert not (folder / "alike").exists()


def test_processes_of_different_code_are_refused(folder: Path):
    other = folder / "other-code"
    # Python writes it meanwhile, under names that go away again.
    no_bytecode = shutil.ignore_patterns("__pycache__")
    for package in ("activation_cache", "sae_train", "launch"):
        shutil.copytree(ROOT / package, other / package, ignore=no_bytecode)
    with open(other / "sae_train" / "step.py", "a") as file:
        file.write("# one line more\n")
    command = ["-m", "launch.cli", "train", str(make_file(folder, "coded"))]
    # PYTHONPATH alone: `-m` would put the folder it is started in before it.
    paths = {0: {"PYTHONPATH": str(ROOT)}, 1: {"PYTHONPATH": str(other)}}
    alone = {index: {**path, "PYTHONSAFEPATH": "1"} for index, path in paths.items()}
    group = start_group([command] * 2, of_process=alone)
    assert group.wait() == [2, 2], "\n".join(group.logs)
    for log in group.logs:
        assert "process 1 was started with another code version than process 0" in log
        assert "sae_train" in log
    assert not (folder / "coded").exists()


def test_a_mistake_in_a_group_is_told_once_and_in_words(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    file = make_file(folder, "mistaken")
    process = start_supervised("train", str(file), f"cache.path={folder}/nowhere")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 2, output
    assert output.count("sae harvest") == 1, output
    assert main(["train", str(file), "mesh.data=3", "train.batch_size=3"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "launch.processes 2 does not divide the mesh's 3 devices" in told

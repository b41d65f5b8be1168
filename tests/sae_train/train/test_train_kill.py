"""Real `sae train` processes, killed: the same command again ends bit-identical."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sae_train.config.file import load_config, write_config
from sae_train.train.loop import train
from tests.support.children.processes import wait_for
from tests.support.training import assert_same_run, lines_logged, make_run

pytestmark = pytest.mark.slow

STEPS = 120


def start(config_file: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "train", str(config_file)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "default"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(config_file: Path) -> None:
    process = start(config_file)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output.decode()


def make_config_file(folder: Path, output: str) -> Path:
    # Wide enough that a save takes a while, and saved often enough to be caught in the act.
    config = make_run(
        folder,
        steps=STEPS,
        output=output,
        width=16_384,
        checkpoint={"every_steps": 10, "keep": 2},
    )
    write_config(config, folder / f"{output}-config")
    return folder / f"{output}-config" / "config.yaml"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    train(load_config(make_config_file(folder, "undisturbed")))
    return folder


def reached(condition: Callable[[], bool], process: subprocess.Popen) -> bool:
    """As `wait_for` of one process, often enough to catch a save in the act."""
    return wait_for(condition, lambda: process.poll() is None, pause=0.001)


def kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_kills_in_mid_training(undisturbed: Path):
    config_file, run = make_config_file(undisturbed, "killed"), undisturbed / "killed"
    rng, killed = random.Random(0), 0
    for _ in range(2):
        process, target = start(config_file), lines_logged(run) + rng.randint(5, 35)
        if reached(lambda goal=target: lines_logged(run) >= goal, process):
            kill(process)
            killed += 1
    assert killed == 2
    finish(config_file)
    assert_same_run(undisturbed / "undisturbed", run, step=STEPS)


def test_kills_in_the_middle_of_a_checkpoint_save(undisturbed: Path):
    config_file, run = make_config_file(undisturbed, "saving"), undisturbed / "saving"
    for _ in range(10):  # of twelve saves; a kill may come when a save is over
        process = start(config_file)
        known = set(run.glob("checkpoints/*"))
        if reached(lambda old=known: bool(partial(run) - old), process):
            kill(process)
        else:
            process.communicate()
        if partial(run):
            break
    assert partial(run), "no kill hit a save: make the state larger"
    finish(config_file)
    assert not partial(run)
    assert_same_run(undisturbed / "undisturbed", run, step=STEPS)


def partial(run: Path) -> set[Path]:
    """Checkpoints under a temporary name."""
    return {path for path in run.glob("checkpoints/*") if not path.name.isdigit()}


def test_a_signal_saves_and_exits_75(undisturbed: Path):
    config_file, run = make_config_file(undisturbed, "told"), undisturbed / "told"
    process = start(config_file)
    assert reached(lambda: lines_logged(run) >= 23, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 75, output.decode()
    assert b"Traceback" not in output
    saved = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    assert saved == lines_logged(run)
    finish(config_file)
    assert_same_run(undisturbed / "undisturbed", run, step=STEPS)

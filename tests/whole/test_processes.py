"""Training agrees on 1, 2 and 4 processes; checkpoints of one group restore in another."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from sae_train.config.file import write_config
from sae_train.config.run import Config
from sae_train.runs.metrics_file import read_metrics
from sae_train.train.loop import train
from tests.support.children.processes import start_group
from tests.support.paths import ROOT
from tests.support.training import TIMINGS, assert_same_run, final_state, make_run, untimed_metrics

pytestmark = pytest.mark.slow

STEPS = 20
MESHES = ((4, 1), (2, 2), (1, 4))
RESTORED = (1, 6, 13, 18)
# The width of the noise: a mean of counts may change by one count in 48 * 64.
RTOL = 1e-5

# The second process of each group has a clock that is a day ahead.
CLOCK = "import time\n_real = time.time\ntime.time = lambda: _real() + 86400\n"


def config_of(folder: Path, name: str, mesh: tuple[int, int], **options) -> Config:
    return make_run(
        folder,
        steps=STEPS,
        output=name,
        mesh=mesh,
        sae={"b_dec_init": "mean"},
        **{"checkpoint": {"every_steps": 5, "keep": 2}} | options,
    )


def run_group(folder: Path, configs: list[Config], *, processes: int) -> None:
    """Train all configs, one after the other, in one group over four devices."""
    files = []
    for config in configs:
        own = folder / "configs" / Path(config.output).name
        write_config(config, own)
        files.append(str(own / "config.yaml"))
    (folder / "clock").mkdir(exist_ok=True)
    (folder / "clock" / "sitecustomize.py").write_text(CLOCK)
    root = str(ROOT)
    group = start_group(
        [["-m", "tests.support.children.train_child", *files]] * processes,
        devices_each=4 // processes,
        of_process={1: {"PYTHONPATH": f"{folder / 'clock'}:{root}"}},
    )
    codes = group.wait()
    assert codes == [0] * processes, "\n".join(group.logs)


def name_of(mesh: tuple[int, int], processes: int) -> str:
    return f"{mesh[0]}x{mesh[1]}-{processes}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs: each mesh on 1, 2 and 4 processes, one repeated, and some restored."""
    folder = tmp_path_factory.mktemp("processes")
    for mesh in MESHES:
        train(config_of(folder, name_of(mesh, 1), mesh))
    of_two = [config_of(folder, name_of(mesh, 2), mesh) for mesh in MESHES]
    again = config_of(folder, "again", (2, 2))
    every = config_of(folder, "every", (2, 2), checkpoint={"every_steps": 1, "keep": 100})
    run_group(folder, [*of_two, again, every], processes=2)
    restored = []
    for step in RESTORED:
        copy = folder / f"from-{step}"
        shutil.copytree(folder / "every", copy)
        for checkpoint in (copy / "checkpoints").iterdir():
            if int(checkpoint.name) > step:
                shutil.rmtree(checkpoint)
        mesh = (1, 4) if step % 2 else (4, 1)
        restored.append(
            config_of(folder, copy.name, mesh, checkpoint={"every_steps": STEPS, "keep": 2})
        )
    of_four = [config_of(folder, name_of(mesh, 4), mesh) for mesh in MESHES]
    run_group(folder, [*of_four, *restored], processes=4)
    return folder


def assert_close_runs(a: Path, b: Path) -> None:
    left, right = read_metrics(a), read_metrics(b)
    assert [row["step"] for row in left] == [row["step"] for row in right]
    for one, other in zip(left, right, strict=True):
        for key in one.keys() - TIMINGS:
            np.testing.assert_allclose(one[key], other[key], rtol=RTOL, err_msg=f"{key} {one}")
    for one, other in zip(final_state(a, step=STEPS), final_state(b, step=STEPS), strict=True):
        np.testing.assert_allclose(one, other, rtol=RTOL, atol=1e-7)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("mesh", MESHES)
def test_meshes_and_processes_agree(runs: Path, mesh: tuple[int, int], processes: int):
    assert_close_runs(runs / name_of((4, 1), 1), runs / name_of(mesh, processes))


def test_the_same_mesh_twice_is_bit_identical(runs: Path):
    assert_same_run(runs / name_of((2, 2), 2), runs / "again", step=STEPS)
    assert_same_run(runs / name_of((2, 2), 2), runs / "every", step=STEPS)


@pytest.mark.parametrize("step", RESTORED)
def test_a_group_of_another_size_and_mesh_goes_on(runs: Path, step: int):
    assert_close_runs(runs / "every", runs / f"from-{step}")
    before = untimed_metrics(runs / "every")[:step]
    assert untimed_metrics(runs / f"from-{step}")[:step] == before


def test_one_process_restores_what_two_saved_bit_for_bit(runs: Path):
    """The restored state is the saved one, and training on in one process agrees."""
    shutil.copytree(runs / "every", runs / "alone")
    for checkpoint in (runs / "alone" / "checkpoints").iterdir():
        if int(checkpoint.name) > 9:
            shutil.rmtree(checkpoint)
    for left, right in zip(
        final_state(runs / "alone", step=9), final_state(runs / "every", step=9), strict=True
    ):
        np.testing.assert_array_equal(left, right)
    train(config_of(runs, "alone", (1, 1)))
    assert_close_runs(runs / "every", runs / "alone")

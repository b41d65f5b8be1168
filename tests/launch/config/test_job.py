"""The whole YAML: a run's config with `sweep` and `launch`, read under one set of checks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_cache.runtime.errors import UserError
from launch.config.job import Job, load_job, read_job
from sae_train.config.file import read_run_config, resolved_yaml, with_values, write_config
from sae_train.config.run import Config
from tests.sae_train.config.test_config import BASE
from tests.sae_train.config.test_file import names, positive
from tests.support.configs import as_job, make_config
from tests.support.paths import ROOT


def load(tmp_path: Path, *overrides: str, text: str = BASE) -> Job:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_job(path, overrides)


def test_both_sections_are_read_and_overridden(tmp_path: Path) -> None:
    job = load(
        tmp_path,
        "sweep.grid.train.sparsity.coefficient=[1e-3, 1]",
        "launch={processes: 2}",
        "train.batch_size=2048",
    )
    assert job.sweep is not None
    assert job.sweep.grid == {"train.sparsity.coefficient": [1e-3, 1]}
    assert (job.launch.on, job.train.batch_size) == ("local", 2048)
    assert load(tmp_path).sweep is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sweep={grid: {sae.width: [1]}, zip: {sae.width: [1]}}", "not both"),
        ("sweep.grid.sae.width=[]", "must not be empty"),
        ("sweep.grid.sae.width=3", "3 is not a list"),
        ("sweep.gird={}", "did you mean 'sweep.grid'?"),
        ("sweep.zip={sae.width: [1], sae.layer: [1, 2]}", "must have one length"),
        ("launch.on=moon", "'moon' is not one of"),
        ("launch.proceses=2", "did you mean 'launch.processes'?"),
        ("train.batchsize=3", "did you mean 'train.batch_size'?"),
        ("mesh.data=3", "train.batch_size 4096 is not divisible by mesh axis 'data' (size 3)"),
    ],
)
def test_mistakes_in_any_section_are_told_alike(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, override)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value), "one mistake, one line"


def test_mistakes_of_all_sections_are_told_at_once(tmp_path: Path) -> None:
    text = BASE.replace("tokens: 4e9", "tokens: 1.9") + "sweeep: {}\n"
    with pytest.raises(UserError) as caught:
        load(tmp_path, "launch={on: slurm, nodes: 0}", text=text)
    message = str(caught.value)
    assert "has 4 mistakes" in message
    for words in (
        "line 7, cache.tokens: 1.9",
        "launch.nodes: 0 is out of range",
        "line 17, sweeep: unknown key; did you mean 'sweep'?",
    ):
        assert words in message


def test_a_folder_keeps_both_sections_and_training_reads_the_rest(tmp_path: Path) -> None:
    config = make_config(output=str(tmp_path))
    job = as_job(config, sweep={"grid": {"train.seed": [0, 1]}}, launch={"processes": 2})
    write_config(job, tmp_path)
    assert read_job(tmp_path) == job
    assert read_run_config(tmp_path) == config
    write_config(config, tmp_path)  # as training alone does
    assert read_job(tmp_path) == as_job(config)


@settings(deadline=None, max_examples=30)
@given(values=st.lists(positive | st.integers() | names, min_size=1, max_size=3))
def test_a_sweep_s_values_round_trip(
    tmp_path_factory: pytest.TempPathFactory, values: list[object]
) -> None:
    job = with_values(as_job(make_config()), {"sweep.grid.sae.width": values}, source="test")
    path = tmp_path_factory.getbasetemp() / "job.yaml"
    path.write_text(resolved_yaml(job), encoding="utf-8")
    assert load_job(path) == job


NO_JAX = f"""
import sys
from launch.config.job import load_job
from launch.sweep.expand import expand
import launch.cli, launch.show.status, sae_train.report.page
assert len(expand(load_job("{ROOT}/configs/small_suite.yaml"))) == 18
assert len(expand(load_job("{ROOT}/configs/demo.yaml"))) == 3
heavy = sorted({{"jax", "scipy", "orbax", "tensorstore"}} & set(sys.modules))
sys.exit(", ".join(heavy) or 0)
"""


def test_expansion_status_and_report_load_no_jax() -> None:
    done = subprocess.run([sys.executable, "-c", NO_JAX], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_job_is_a_config() -> None:
    assert issubclass(Job, Config)
    assert set(Job.model_fields) - set(Config.model_fields) == {"sweep", "launch", "rollout"}

"""Training on a real Slurm: sweeps, several nodes, requeues, preemption, limits, refusals.

Skipped, visibly, where Debian's Slurm isn't installed; `SAE_TEST_SLURM=required` makes that a
failure (.ci/run installs it).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activation_cache.runtime.errors import Interrupted
from launch.cli import main
from launch.clusters import slurm
from launch.clusters.slurm_script import script_folder
from launch.config.job import Job, load_job
from sae_train.config.file import with_values, write_config
from sae_train.config.run import Config
from sae_train.runs.folder import count_starts
from sae_train.runs.metrics_file import read_metrics
from sae_train.train.loop import train
from tests.support.configs import as_job
from tests.support.pipeline import ROOT, write_pipeline
from tests.support.servers.slurm_cluster import Cluster, is_installed, running_cluster
from tests.support.stores import file_hashes
from tests.support.training import assert_same_run, make_run, stop_after, untimed_metrics

pytestmark = pytest.mark.slow

STEPS = 300
PATIENCE = 600.0  # seconds, for what takes some on a quiet machine


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if not is_installed():
        assert os.environ.get("SAE_TEST_SLURM") != "required", "Slurm is not installed"
        pytest.skip("Slurm is not installed (apt-get install slurmctld slurmd slurm-client munge)")
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a socket's path must be short
    with running_cluster(folder) as started, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", started.environment["SLURM_CONF"])
        patch.setenv("PYTHONPATH", str(ROOT))
        yield started
    shutil.rmtree(folder)


# A stand-in for the trainer, so that the minutes of a time limit cost no processor.
# TERM ends its `sleep` too, perhaps first: then it waits for its own.
STUB = """#!/bin/bash
trap 'echo told; exit 75' TERM
echo "start after ${SLURM_RESTART_COUNT:-0} restarts"
[ -z "$SLURM_RESTART_COUNT" ] || exit 0
sleep 200 & wait $!
sleep 5 & wait $!
"""


@pytest.fixture(scope="module", autouse=True)
def limited(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A job with a time limit of two minutes, submitted while the other tests run.

    Slurm may send its notice a minute early: with a limit of one it could come before the start.
    """
    script = stub_script(tmp_path_factory.mktemp("limited"), node="n1")
    return cluster.run("sbatch", "--parsable", "--time=2", str(script)), script.parent


def stub_script(folder: Path, *, node: str) -> Path:
    """The script of a run whose trainer is the stand-in, to be submitted by hand."""
    stub = folder / "stub"
    stub.write_text(STUB)
    stub.chmod(0o755)
    launch = {"python": str(stub), "signal_seconds": 30, "sbatch": [f"--nodelist={node}"]}
    config = slurm_config(make_run(folder), **launch)
    write_config(config, folder)
    assert main(["train", str(folder / "config.yaml"), "--dry-run"]) == 0
    return script_folder(config) / "train.sbatch"


def slurm_config(config: Config, **launch: Any) -> Job:
    return as_job(config, launch={"on": "slurm", "restart_pause_seconds": 0, **launch})


def submit(config: Job, folder: Path, *, stage: slurm.Stage = "train") -> str:
    """Give `sae train`, or `sae harvest`; returns the number of its job."""
    write_config(config, folder)
    assert main([stage, str(folder / "config.yaml")]) == 0
    return slurm.read_jobs(script_folder(config))[stage].number


def await_(
    what: str,
    condition: Callable[[], Any],
    *,
    log: Path | None = None,
    patience: float = PATIENCE,
) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        said = "\n".join(file.read_text() for file in (log.glob("*.log") if log else []))
        assert time.monotonic() < deadline, f"no {what}\n{said}"
        time.sleep(0.1)


def await_state(cluster: Cluster, job: str, state: str, *, log: Path | None = None) -> None:
    await_(f"{state} of job {job}", lambda: cluster.state(job) == state, log=log)


def rows(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def await_progress(run: Path, *, log: Path) -> None:
    """Wait until the run has come further than it was."""
    goal = rows(run) + 15
    await_(f"progress of {run}", lambda: rows(run) >= goal, log=log)


def read_logs(config: Job) -> str:
    return "".join(file.read_text() for file in sorted(script_folder(config).glob("*.log")))


def status(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["status", str(folder)]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_a_sweep_from_text_to_report_though_one_run_fails(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = "{train.learning_rate.peak: [1e-3, 1e30, 2e-3]}"
    sweep = f"sweep: {{grid: {grid}, cohort: {{max_members: 2}}}}\n"
    launch = "launch: {on: slurm, at_once: 2, restart_pause_seconds: 0}\n"
    target = str(write_pipeline(tmp_path, sweep=sweep + launch))
    output = tmp_path / 'it\'s "out" %j #1'
    assert main(["sweep", target, f"output={json.dumps(str(output))}"]) == 0
    jobs = slurm.read_jobs(output / "slurm")
    throttle = cluster.run("scontrol", "show", "job", jobs["train"].number)
    assert "ArrayTaskThrottle=2" in throttle
    assert "PENDING (Dependency)" in status(output, capsys)
    await_state(cluster, jobs["report"].number, "COMPLETED", log=output / "slurm")
    names = ("peak_0.001", "peak_1e+30", "peak_0.002")
    assert jobs["train"].cohorts == (names[:2], names[2:])
    states = slurm.task_states([job.number for job in jobs.values()])
    found = {name: state.state for name, state in states.items()}
    number = jobs["train"].number
    assert found == {
        jobs["harvest"].number: "COMPLETED",
        f"{number}_0": "FAILED",
        f"{number}_1": "COMPLETED",
        jobs["evaluate"].number: "COMPLETED",
        jobs["report"].number: "COMPLETED",
    }
    evaluated = [name for name in names if (output / name / "evaluation.json").exists()]
    assert evaluated == [names[0], names[2]]
    assert (output / names[2] / "release" / "sae_lens").is_dir()
    page = (output / "report" / "index.html").read_text()
    assert all(name in page for name in names)
    assert "Restarts=0" in cluster.run("scontrol", "show", "job", f"{number}_0"), "exit 2 stays"
    shown = status(output, capsys)
    assert shown.count(f"{number}_0 FAILED") == 2, "one job for both runs of the cohort"
    assert f"report: job {jobs['report'].number} COMPLETED" in shown


def disturb_requeue(cluster: Cluster, job: str) -> None:
    cluster.run("scontrol", "requeue", job)


def disturb_preempt(cluster: Cluster, job: str) -> None:
    options = ("--partition=high", "--nodelist=n2", "--exclusive", "--output=/dev/null")
    cluster.run("sbatch", *options, "--wrap=sleep 1")


def test_cancelled_requeued_and_preempted_it_ends_bit_identical(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"width": 8192, "checkpoint": {"every_steps": 20, "keep": 2}}
    launch = {"sbatch": ["--nodelist=n2"]}
    calm = make_run(tmp_path, steps=STEPS, output="calm", **options)
    config = slurm_config(make_run(tmp_path, steps=STEPS, output="run", **options), **launch)
    run, log = Path(config.output), script_folder(config)
    job = submit(config, tmp_path / "run-config")
    await_progress(run, log=log)
    cluster.run("scancel", job)
    await_state(cluster, job, "CANCELLED", log=log)
    time.sleep(2)
    assert cluster.state(job) == "CANCELLED", "its owner's word is the last"

    job = submit(config, tmp_path / "run-config")
    for disturb in (disturb_requeue, disturb_preempt):
        await_progress(run, log=log)
        shown = status(run, capsys)
        assert f"{job} RUNNING" in shown
        assert re.search(rf" {count_starts(run) - 1} .*{job} RUNNING", shown), shown
        disturb(cluster, job)
        await_state(cluster, job, "PENDING", log=log)
    train(calm)
    await_state(cluster, job, "COMPLETED", log=log)
    assert count_starts(run) == 4
    assert "Restarts=2" in cluster.run("scontrol", "show", "job", job)
    assert read_logs(config).count("stopped by a signal at step") >= 3
    assert_same_run(run, Path(calm.output), step=STEPS)


def test_two_nodes_find_each_other_and_stop_together(cluster: Cluster, tmp_path: Path) -> None:
    options = {"width": 8192, "mesh": (2, 1), "checkpoint": {"every_steps": 100, "keep": 2}}
    alone = make_run(tmp_path, steps=200, output="alone", **options)
    config = slurm_config(make_run(tmp_path, steps=200, output="run", **options), nodes=2)
    run, log = Path(config.output), script_folder(config)
    job = submit(config, tmp_path)
    await_progress(run, log=log)
    cluster.run("scancel", "--signal=USR1", "--batch", job)  # as before a time limit
    await_state(cluster, job, "PENDING", log=log)
    with pytest.raises(Interrupted):
        train(alone, stop=stop_after(60))
    await_state(cluster, job, "COMPLETED", log=log)
    said = read_logs(config)
    assert "joined: process 0 of 2" in said
    assert len(set(re.findall(r"stopped by a signal at step (\d+)", said))) == 1
    assert f"job {job} goes back into the queue" in said
    assert "going on from the checkpoint at step" in said
    assert len(read_metrics(run)) == 200
    # Two processes sum in another order than one; later steps would show that, not a mistake.
    pairs = zip(untimed_metrics(run)[:60], untimed_metrics(Path(alone.output)), strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=1e-5)


def test_two_nodes_harvest_one_store(cluster: Cluster, tmp_path: Path) -> None:
    """Asked to stop on the way, as before a time limit; the bytes are those of one process."""
    # 250 buckets: the signal takes its time to get there.
    small = ["cache.shuffle_rows=16", "cache.block_rows=16", "cache.sequences_per_batch=1"]
    small.append("cache.tokens=4000")
    config = load_job(str(write_pipeline(tmp_path)), [*small, "cache.mesh={data: 2}"])
    config = slurm_config(config, nodes=2)
    store, log = Path(config.cache.path), script_folder(config)
    job = submit(config, tmp_path / "submitted", stage="harvest")
    await_("commits", lambda: len(list(store.glob("commits/*.json"))) >= 3, log=log)
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    await_state(cluster, job, "COMPLETED", log=log)
    said = read_logs(config)
    assert "joined: process 0 of 2" in said
    assert f"job {job} goes back into the queue" in said
    assert "going on: " in said
    alone = [str(tmp_path / "config.yaml"), *small, f"cache.path={tmp_path / 'alone'}"]
    assert main(["harvest", *alone]) == 0
    hashes = [file_hashes(path) for path in (store, tmp_path / "alone")]
    for one in hashes:
        del one["config.yaml"]
    assert hashes[0] == hashes[1]


def test_what_slurm_refuses_is_told_with_what_was_submitted(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_run(tmp_path)
    write_config(slurm_config(config, partition="nowhere"), tmp_path)
    assert main(["train", str(tmp_path / "config.yaml")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "invalid partition specified: nowhere" in said
    assert "Nothing was submitted." in said

    # The cluster takes arrays of up to 20 tasks; the harvest before is held back meanwhile.
    sweep = {"sweep": {"grid": {"train.seed": list(range(21))}}, "output": str(tmp_path / "many")}
    values = sweep | {"cache.path": str(tmp_path / "none")}
    many = with_values(slurm_config(config, sbatch=["--hold"]), values, source="test")
    write_config(many, tmp_path)
    assert main(["sweep", str(tmp_path / "config.yaml")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    harvest = slurm.read_jobs(script_folder(many))["harvest"].number
    assert f"In the queue: harvest (job {harvest}). Not submitted: train, evaluate, report" in said
    assert "Invalid job array specification" in said
    assert cluster.state(harvest) == "PENDING"
    cluster.run("scancel", harvest)


def test_a_time_limit_sends_the_job_back_into_the_queue(
    cluster: Cluster, limited: tuple[str, Path]
) -> None:
    job, log = limited
    file = log / f"train-{job}.log"
    # It may have waited for its node until now: its two minutes, and two of a requeue's delay.
    restarted = lambda: file.exists() and "after 1 restarts" in file.read_text()  # noqa: E731
    await_("restart", restarted, patience=2 * PATIENCE)
    await_state(cluster, job, "COMPLETED", log=log)
    said = (log / f"train-{job}.log").read_text()
    order = ("after 0 restarts", "told", f"job {job} goes back into the queue", "after 1 restarts")
    places = [said.find(words) for words in order]
    assert -1 not in places, said
    assert places == sorted(places), said


def test_a_lost_node_puts_the_job_back_into_the_queue(cluster: Cluster, tmp_path: Path) -> None:
    script = stub_script(tmp_path, node="n2")
    job = cluster.run("sbatch", "--parsable", str(script))
    log = script.parent / f"train-{job}.log"
    await_("start", lambda: log.exists() and "after 0 restarts" in log.read_text())
    cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=lost")
    await_state(cluster, job, "PENDING", log=script.parent)
    assert "Restarts=1" in cluster.run("scontrol", "show", "job", job)
    cluster.run("scancel", job)

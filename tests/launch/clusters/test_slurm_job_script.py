"""What a batch script does as things end: played here by bash, with Slurm's commands made up."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.servers.slurm_programs import NASTY, make, programs, script

pytestmark = pytest.mark.slow


class Job:
    """A batch script under Slurm's own names, played here: steps are commands of ours."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, step: str, **launch: Any):
        self.folder, self.calls = folder, folder / "calls"
        self.calls.touch()
        (folder / "state").write_text("RUNNING")
        note = f'echo "$(basename "$0") $*" >>{self.calls}'
        step = f"{note}\necho $$ >{folder}/step\nn=$(grep -c ^srun {self.calls})\n{step}"
        state = f'[ "$1" != show ] || echo "JobId=5 JobState=$(cat {folder}/state) Reason=None"'
        programs(
            folder / "bin",
            monkeypatch,
            srun=step,
            scancel=f"{note}\nkill -TERM $(cat {folder}/step)",
            scontrol=f"{note}\n{state}",
        )
        settings = {"restart_pause_seconds": 0} | launch
        config = make(str(folder / NASTY / "out"), sweep=False, **settings)
        self.script = folder / "job.sbatch"
        self.script.write_text(script(config).text)
        self.run_folder = Path(config.output)

    def start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "SLURM_JOB_ID": "5"}
        with (self.folder / "log").open("w") as log:
            return subprocess.Popen(["bash", str(self.script)], env=environment, stdout=log)

    def finish(self) -> int:
        return self.start().wait(timeout=300)

    def count(self, start: str) -> int:
        lines = self.calls.read_text().splitlines()
        return sum(line.startswith(start) for line in lines)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)


WAITS = "trap 'sleep 0.3; exit 75' TERM; touch {folder}/ready; sleep 600 & wait $!"


@pytest.mark.parametrize(
    ("step", "status", "starts", "requeues"),
    [
        ("exit 0", 0, 1, 0),
        ("exit 2", 2, 1, 0),
        ("exit 75", 75, 1, 1),
        ("exit 137", 137, 3, 0),
        ("[ $n = 3 ] || exit 1", 0, 3, 0),
        ("[ $n = 3 ] && exit 75; exit 1", 75, 3, 1),
    ],
)
def test_how_a_job_ends(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    status: int,
    starts: int,
    requeues: int,
) -> None:
    job = Job(tmp_path, monkeypatch, step=step, restarts=2)
    assert job.finish() == status
    assert (job.count("srun"), job.count("scontrol requeue 5")) == (starts, requeues)
    assert not (tmp_path / "hacked").exists()


def test_the_command_and_its_files_survive_quoting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tmp_path, monkeypatch, step=f'printf "%s\\n" "$@" >{tmp_path}/arguments')
    assert job.finish() == 0
    words = (tmp_path / "arguments").read_text().splitlines()
    command = [sys.executable, "-m", "launch.cli", "train", f"{job.run_folder}/slurm/train.yaml"]
    assert words == ["--nodes=1", "--ntasks=1", "--kill-on-bad-exit=0", *command]


def test_tries_are_counted_from_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = shlex.quote(f"{tmp_path}/{NASTY}/out/checkpoints") + '/"$n"'
    step = f"case $n in 2 | 4) mkdir -p {saves} ;; esac\n[ $n = 6 ] || exit 1"
    job = Job(tmp_path, monkeypatch, step=step, restarts=2)
    assert job.finish() == 0
    assert job.count("srun") == 6


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING", "CANCELLED"])
def test_a_stopped_job_is_requeued_unless_slurm_is_ending_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    job = Job(tmp_path, monkeypatch, step="exit 75")
    (tmp_path / "state").write_text(state)
    assert job.finish() == 75
    assert job.count("scontrol requeue 5") == (state == "RUNNING")


@pytest.mark.parametrize("numbers", [["USR1"], ["TERM"], ["USR1", "TERM", "USR1"]])
def test_a_signal_to_the_script_reaches_the_step_and_its_end_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: list[str]
) -> None:
    job = Job(tmp_path, monkeypatch, step=WAITS.format(folder=tmp_path))
    process = job.start()
    job.wait_until((tmp_path / "ready").exists)
    for number in numbers:
        process.send_signal(signal.Signals[f"SIG{number}"])
        time.sleep(0.1)
    assert process.wait(timeout=300) == 75
    assert job.count("scancel --signal=TERM 5") >= 1
    assert (job.count("srun"), job.count("scontrol requeue 5")) == (1, 1)


def test_a_process_lost_while_stopping_is_for_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = WAITS.format(folder=tmp_path).replace("exit 75", "exit 134")
    job = Job(tmp_path, monkeypatch, step=step)
    process = job.start()
    job.wait_until((tmp_path / "ready").exists)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=300) == 75
    assert (job.count("srun"), job.count("scontrol requeue 5")) == (1, 1)


def test_a_signal_in_a_pause_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path, monkeypatch, step="exit 1", restart_pause_seconds=600)
    process = job.start()
    job.wait_until(lambda: "again in 600 s" in (tmp_path / "log").read_text())
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=300) == 75
    assert (job.count("srun"), job.count("scontrol requeue 5")) == (1, 1)


def test_pauses_double_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path, monkeypatch, step="exit 1", restart_pause_seconds=200, restarts=4)
    programs(tmp_path / "bin", monkeypatch, sleep=f'echo "sleep $1" >>{job.calls}')
    assert job.finish() == 1
    sleeps = [line for line in job.calls.read_text().splitlines() if line.startswith("sleep")]
    assert sleeps == [f"sleep {seconds}" for seconds in (200, 400, 600, 600)]


def test_the_array_task_finds_its_cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path, monkeypatch, step="exit 0")
    config = make(str(tmp_path / NASTY / "out"))
    job.script.write_text(script(config).text)
    for index, names in enumerate(script(config).cohorts):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(index))
        job.calls.write_text("")
        assert job.finish() == 0
        configs = [f"{tmp_path}/{NASTY}/out/slurm/runs/{name}.yaml" for name in names]
        assert job.calls.read_text().strip().endswith(f" launch.cli train {' '.join(configs)}")


def test_progress_of_any_member_is_progress_of_the_cohort(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(str(tmp_path / NASTY / "out"), restarts=1, restart_pause_seconds=0)
    saved = shlex.quote(f"{config.output}/coefficient_0.01/checkpoints/")
    step = f"mkdir -p {saved}$n\n[ $n -lt 6 ] || exit 2\nexit 1"
    job = Job(tmp_path, monkeypatch, step=step)
    job.script.write_text(script(config).text)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    assert job.finish() == 2, "five failures, each with something new, are not two in a row"


def test_evaluation_that_fails_does_not_keep_the_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tmp_path, monkeypatch, step='case "$*" in *" evaluate "*) exit 2 ;; esac')
    config = make(str(tmp_path / NASTY / "out"), nodes=2, mesh=(2, 1))
    job.script.write_text(script(config, "evaluate").text)
    assert job.finish() == 2
    evaluated, exported = job.calls.read_text().splitlines()
    assert "--nodes=2 --ntasks=2" in evaluated
    assert "--nodes=1 --ntasks=1" in exported

"""The local launcher: exit statuses, bounded tries, growing pauses, one voice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from activation_cache.runtime.errors import UserError
from launch.config.local import LocalLaunch
from launch.processes import beside, group
from launch.processes import supervise as module
from launch.processes.supervise import _Output, supervise
from tests.support.configs import as_job, make_config
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

# A process of a group without JAX: its number says what it does.
CHILD = """
import os, signal, sys, time
index = int(os.environ["SAE_PROCESS_ID"])
folder = sys.argv[1]
starts = os.path.join(folder, f"starts-{index}")
with open(starts, "a") as file:
    file.write("x")
number = os.path.getsize(starts)
def wait(code):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(code))
    time.sleep(600)
"""


def launch(processes: int = 2, **options) -> LocalLaunch:
    return LocalLaunch(processes=processes, **{"restart_pause_seconds": 0.01} | options)


def run(folder: Path, code: str, settings: LocalLaunch, **options) -> int:
    command = [sys.executable, "-S", "-c", CHILD + code, str(folder)]
    return supervise(command, launch=settings, devices=settings.processes, **options)


def starts(folder: Path, index: int) -> int:
    return len((folder / f"starts-{index}").read_text())


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("", 0),
        ("sys.exit(75)", 75),
        ("sys.exit(75 if index else 0)", 75),
        ("sys.exit(2) if index else wait(0)", 2),
    ],
)
def test_exit_statuses_are_passed_up_at_once(tmp_path: Path, code: str, expected: int):
    begin = time.monotonic()
    assert run(tmp_path, code, launch()) == expected
    assert time.monotonic() - begin < 300, "the rest was waited for"
    assert starts(tmp_path, 0) == 1


@pytest.mark.parametrize(
    ("end", "status"), [("sys.exit(1)", 1), ("os.kill(os.getpid(), signal.SIGKILL)", 137)]
)
def test_a_lost_process_starts_all_again_so_often_and_no_more(
    tmp_path: Path, end: str, status: int, caplog: pytest.LogCaptureFixture
):
    lost = f"if index == 1:\n    {end}\nwait(0)"
    assert run(tmp_path, lost, launch(restarts=2)) == status
    # The other may have been ended before it was far enough to count itself.
    assert starts(tmp_path, 1) == 3
    assert "process 1 was lost" in caplog.text
    assert "giving up: 3 starts" in caplog.text


def test_a_group_that_recovers_is_done(tmp_path: Path):
    assert run(tmp_path, "sys.exit(9 if index == 1 and number < 3 else 0)", launch()) == 0
    assert starts(tmp_path, 1) == 3


def test_tries_are_counted_from_the_last_progress(tmp_path: Path):
    saved = tmp_path / "saved"
    code = f"""
if index == 0:
    time.sleep(0.2)
    if number in (2, 4):
        open({str(saved)!r}, "a").write("x")
    sys.exit(0 if number == 6 else 1)
"""
    progress = lambda: saved.stat().st_size if saved.exists() else 0  # noqa: E731
    assert run(tmp_path, code, launch(restarts=2), progress=progress) == 0
    assert starts(tmp_path, 0) == 6


def test_pauses_double_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pauses = []
    monkeypatch.setattr(module, "_paused", lambda seconds, stop: pauses.append(seconds))
    run(tmp_path, "sys.exit(1)", launch(restarts=4, restart_pause_seconds=100.0))
    assert pauses == [100.0, 200.0, 400.0, 600.0]


def test_a_stop_reaches_all_and_is_waited_for(tmp_path: Path):
    def asked() -> bool:
        return (tmp_path / "ready-0").exists() and (tmp_path / "ready-1").exists()

    code = """
def stop(*_):
    time.sleep(0.3)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
open(os.path.join(folder, f"ready-{index}"), "w").close()
time.sleep(600)
"""
    assert run(tmp_path, code, launch(), stop=asked) == 75


def test_a_process_lost_while_stopping_is_not_started_again(tmp_path: Path):
    def asked() -> bool:
        return (tmp_path / "starts-0").exists() and (tmp_path / "starts-1").exists()

    assert run(tmp_path, "time.sleep(600)", launch(restarts=0), stop=asked) == 75
    assert starts(tmp_path, 0) == 1


def test_a_stop_ends_a_pause(tmp_path: Path):
    begin = time.monotonic()
    asked = lambda: time.monotonic() - begin > 2  # noqa: E731
    assert run(tmp_path, "sys.exit(1)", launch(restart_pause_seconds=600.0), stop=asked) == 75
    assert time.monotonic() - begin < 300


def test_each_process_is_told_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    code = """
names = ["SAE_COORDINATOR", "SAE_NUM_PROCESSES", "SAE_HEARTBEAT_SECONDS", "JAX_NUM_CPU_DEVICES"]
with open(os.path.join(folder, str(index)), "w") as file:
    file.write(" ".join(os.environ[name] for name in names))
"""
    settings = launch(heartbeat_seconds=7)
    command = [sys.executable, "-S", "-c", CHILD + code, str(tmp_path)]
    assert supervise(command, launch=settings, devices=6) == 0
    first, second = ((tmp_path / name).read_text().split() for name in "01")
    assert first == second
    assert first[0].startswith("127.0.0.1:")
    assert first[1:] == ["2", "7", "3"]
    with pytest.raises(UserError, match=r"launch\.processes 2 does not divide the mesh's 3"):
        supervise(command, launch=settings, devices=3)


def test_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4,5,6")
    shares = [e["CUDA_VISIBLE_DEVICES"] for e in module._environments(launch(), devices=4)]
    assert shares == ["3,4", "5,6"]
    with pytest.raises(UserError, match="can't share 4 GPUs evenly"):
        module._environments(launch(3), devices=3)


def test_output_has_one_voice():
    written: list[str] = []
    output = _Output(write=written.append)
    output.take(0, "12:00:00 step 1\n")
    output.take(1, "12:00:01 step 1\n")
    output.take(1, "12:00:02 only here\n")
    output.take(0, "[Gloo] Rank 0 is connected to 1 peer ranks.\n")
    output.take(0, "12:00:03 step 1\n")
    assert written == ["12:00:00 step 1\n", "[1] only here\n", "12:00:03 step 1\n"]


def test_only_the_first_process_starts_a_group(monkeypatch: pytest.MonkeyPatch):
    config = as_job(make_config(output="out"))
    two = config.model_copy(update={"launch": launch()})
    assert group.starts_here(two)
    assert not group.starts_here(config)
    monkeypatch.setenv("SAE_NUM_PROCESSES", "2")
    assert not group.starts_here(two)


def test_processes_stop_when_their_supervisor_is_gone(tmp_path: Path):
    code = (
        "import sys, time\n"
        "from launch.processes.supervise import supervise\n"
        "from launch.config.local import LocalLaunch\n"
        f"child = '''{CHILD}\n"
        "from launch.processes.supervise import stop_with_supervisor\n"
        "def leave(*_):\n"
        '    open(os.path.join(folder, f"left-{index}"), "w").close()\n'
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "stop_with_supervisor()\n"
        'open(os.path.join(folder, f"ready-{index}"), "w").close()\n'
        "time.sleep(600)\n'''\n"
        "command = [sys.executable, '-c', child, sys.argv[1]]\n"
        "supervise(command, launch=LocalLaunch(processes=2), devices=2)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)

    def both(name: str) -> bool:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            if all((tmp_path / f"{name}-{index}").exists() for index in (0, 1)):
                return True
            time.sleep(0.1)
        return False

    assert both("ready")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert both("left")


def test_a_harvest_beside_a_trainer_has_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch):
    job = as_job(make_config(mesh=(2, 1)))
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4,5,6,7")
    assert beside._harvest_gpus(job) == ["5", "6"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,4"
    with pytest.raises(UserError, match=r"takes 2 GPUs.*\(mesh\) 2, and there are 2"):
        beside._harvest_gpus(job)

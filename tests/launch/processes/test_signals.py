"""Which signals ask the work to stop, and what becomes of it when the terminal is gone."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.clusters import slurm_script
from launch.processes.signals import stop_on_signals
from tests.support.paths import ROOT

ALL = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@pytest.mark.parametrize("number", ALL)
def test_each_asks_to_stop_and_is_given_back(number: signal.Signals):
    before = signal.signal(number, signal.SIG_DFL)  # under nohup the tests ignore SIGHUP too
    try:
        with stop_on_signals() as stop:
            assert not stop()
            signal.raise_signal(number)
            assert stop()
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", ALL[2:])
def test_ignored_from_the_start_it_stays_so(number: signal.Signals):
    """As SIGHUP under nohup."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            signal.raise_signal(number)
            assert not stop()
    finally:
        signal.signal(number, before)


def test_batch_scripts_hear_what_other_clusters_send():
    assert "trap 'asked=yes' HUP USR1 USR2 TERM\n" in slurm_script._FUNCTIONS


_WORK = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it may be ignored, as under nohup
from rich.console import Console
from launch import console, cli
from launch.processes.signals import stop_on_signals
console.prepare_process()
with stop_on_signals() as stop:
    print("ready", flush=True)
    while not stop():
        time.sleep(0.01)
    for _ in range(3):  # as log lines, a progress bar and a last message do
        sys.stderr.write("saving" * 1000)
        sys.stderr.flush()
        Console(file=sys.stderr, force_terminal=True).print("saved")
    try:
        console.print_text("done")
    except console.ClosedOutput:
        Path(sys.argv[1]).write_text("saved")
    sys.exit(75)
"""


def test_a_closed_terminal_loses_nothing(tmp_path: Path):
    keyboard, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", _WORK, f"{tmp_path}/saved"],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        cwd=ROOT,
    )
    os.close(terminal)
    said = b""
    while not said.endswith(b"\n"):  # to its end: print would meet a closed terminal
        said += os.read(keyboard, 10)
    assert said == b"ready\r\n"
    os.close(keyboard)
    process.send_signal(signal.SIGHUP)  # this terminal controls no session
    assert process.wait(300) == 75
    assert (tmp_path / "saved").read_text() == "saved"

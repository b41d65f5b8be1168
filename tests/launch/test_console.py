"""What is printed, on every kind of terminal, pipe and nothing at all."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.table import Table

from activation_cache.runtime.errors import Interrupted, UserError
from launch import console
from launch.cli import main
from launch.processes import devices
from tests.support.configs import make_config
from tests.support.paths import ROOT
from tests.support.run_folders import write_run

PLANNED = str(ROOT / "configs" / "gemma2_2b.yaml")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(make_config(output=str(tmp_path / "run")), l0=20)


def stream(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize(
    "line", ["plan", "status", "report", "--help", "harvest λ×.yaml", "status données\udcff"]
)
def test_no_text_is_too_much_for_a_terminal(
    line: str, encoding: str, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    out, err = stream(encoding), stream(encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "__stderr__", None)
    err.reconfigure(errors="backslashreplace")  # as Python starts
    command = line.split()
    target = {"plan": [PLANNED], "status": [str(folder)], "report": [str(folder)]}.get(line, [])
    assert main([*command, *target]) == (0 if len(command) == 1 else 2)
    for one in (out, err):
        one.flush()
    printed = out.buffer.getvalue() if len(command) == 1 else err.buffer.getvalue()
    assert printed
    if line == "plan":
        sign = {"ascii": b"?", "latin-1": b"\xd7", "utf-8": "×".encode()}[encoding]
        assert b"B" + sign + b"D" in printed


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Standard output into a pipe; gives the end that is read."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        yield reader


@pytest.mark.parametrize("line", ["plan", "plan --json", "status", "--help"])
def test_nobody_reads_on(line: str, folder: Path, pipe: int, capfd: pytest.CaptureFixture[str]):
    os.close(pipe)
    command, *options = line.split()
    target = {"plan": [PLANNED], "status": [str(folder)], "--help": []}[command]
    assert main([command, *target, *options]) == 0
    sys.stdout.flush()  # as Python does at its end
    assert capfd.readouterr().err == ""


def test_a_full_disk_behind_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["plan", PLANNED]) == 2
        full.flush()
    assert "standard output can't be written: No space left" in capsys.readouterr().err


def test_a_process_without_streams(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["status", str(folder)]) == 0
    assert main(["status", "nowhere"]) == 2
    for one in (sys.stdout, sys.stderr):
        one.close()


def test_watch_shows_the_table_until_a_signal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            raise Interrupted("Ctrl-C")  # as `StopFlag.at_once` does

    monkeypatch.setattr(console, "time", SimpleNamespace(sleep=sleep))
    assert main(["status", str(folder), "--watch"]) == 0
    assert waits == [5.0] * 3
    assert capsys.readouterr().out.count(f"test in {folder}") == 3
    waits.clear()
    assert main(["status", str(folder), "--watch", "0.5"]) == 0
    assert waits == [0.5] * 3
    for wrong in ("0", "-1", "nan", "inf", str(folder)):
        assert main(["status", str(folder), "--watch", wrong]) == 2
        assert "is not a number of seconds above 0" in capsys.readouterr().err


def test_watch_stays_in_its_place_on_a_terminal(monkeypatch: pytest.MonkeyPatch):
    screen = io.StringIO()
    monkeypatch.setattr(
        console, "table_console", lambda: console._Console(file=screen, force_terminal=True)
    )
    rounds: list[int] = []

    def sleep(seconds: float) -> None:
        rounds.append(len(screen.getvalue()))
        if len(rounds) == 2:
            raise Interrupted("Ctrl-C")

    monkeypatch.setattr(console, "time", SimpleNamespace(sleep=sleep))
    with pytest.raises(Interrupted):
        console.watch(lambda: Table("one", "two"), seconds=1)
    assert "\x1b[1A\x1b[2K" in screen.getvalue(), "the cursor goes up and lines are cleared"


def test_warnings_of_orbax_are_shown_and_what_it_narrates_is_not():
    console.configure_logging(verbosity=0)
    absl = logging.getLogger("absl")
    assert absl.isEnabledFor(logging.WARNING)
    assert not absl.isEnabledFor(logging.INFO)
    console.configure_logging(verbosity=1)
    assert absl.isEnabledFor(logging.INFO)
    console.configure_logging(verbosity=0)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (AssertionError(), "JAX_PLATFORMS=cuda asks for devices that JAX doesn't find. Install"),
        (
            RuntimeError(
                "Unable to initialize backend 'tpu': no libtpu.so (set JAX_PLATFORMS='' to "
                "automatically choose an available backend)"
            ),
            "doesn't find: Unable to initialize backend 'tpu': no libtpu.so. Install",
        ),
        (RuntimeError("ABORTED: The TPU is already in use by process with pid 7."), "pid 7"),
    ],
)
def test_an_accelerator_that_is_not_there(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
):
    import jax

    def missing() -> None:
        raise error

    monkeypatch.setattr(jax, "devices", missing)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(UserError) as told:
        devices.check_devices()
    assert words in str(told.value)
    if "in use" in str(error):  # perhaps by this process as it was before a restart
        monkeypatch.setattr(devices.processes, "process_count", lambda: 2)
        with pytest.raises(RuntimeError, match="in use"):
            devices.check_devices()

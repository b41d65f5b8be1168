"""A slice of `make fuzz`, the same inputs each time; and that the fuzzer sees what is wrong."""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz import outcome
from tests.fuzz.outcome import Input, run
from tests.fuzz.world import World
from tests.support import file_system_faults
from tests.support.paths import ROOT

INPUTS = 250


@pytest.mark.slow
def test_broken_files_words_and_file_systems_end_with_words(tmp_path: Path) -> None:
    if file_system_faults.compiler() is None:
        assert "SAE_TEST_COMPILER" not in os.environ, "a C compiler is required"
        pytest.skip("file systems that fail are made with a C compiler, and there is none")
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--inputs", str(INPUTS), "--folder", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert f"seed 0: {INPUTS} inputs" in done.stdout


def _prints(text: str) -> int:
    sys.stderr.write(text)
    return 2


@pytest.mark.parametrize(
    ("main", "wrong"),
    [
        (lambda words: 1 // 0, "ZeroDivisionError: "),
        (lambda words: 1, "exit status 1"),
        (lambda words: _prints("sae status: x\n" * 200), "200 lines, 2800 characters are printed"),
        (lambda words: _prints("Traceback (most recent call last)\n"), "a traceback is printed"),
        (lambda words: _prints("sae status: \n"), "exit status 2 without a reason"),
        (lambda words: _prints("sae status: x is wrong\n"), ""),
        (lambda words: 75, ""),
    ],
)
def test_the_fuzzer_tells_a_wrong_end(
    main: Callable[[list[str]], int], wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.cli.main", main)
    ended = run(Input(("status", "x"), {"a/b": b"1"}), World(tmp_path))
    assert ended.wrong.startswith(wrong)
    assert bool(ended.wrong) == bool(wrong)
    assert not any(tmp_path.iterdir()), "what an input changes is brought back"


def test_a_command_that_neither_ends_nor_stops_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.cli.main", lambda words: time.sleep(60))
    monkeypatch.setattr(outcome, "ASK_SECONDS", 0.05)
    monkeypatch.setattr(outcome, "MOST_SECONDS", 0.1)
    assert run(Input(("status", "x")), World(tmp_path)).wrong.startswith("Hang")


def test_a_thread_that_keeps_the_process_from_ending_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = threading.Event()

    def main(words: list[str]) -> int:
        threading.Thread(target=done.wait, name="waits").start()
        return 0

    monkeypatch.setattr("launch.cli.main", main)
    monkeypatch.setattr(outcome, "END_SECONDS", 0.05)
    ended = run(Input(("status", "x")), World(tmp_path))
    done.set()
    assert ended.wrong == "the process can't end: thread waits is at work"


def test_a_thread_that_ends_with_an_error_after_the_command_is_only_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Raises(threading.Thread):  # as Orbax's writing threads do
        def join(self, timeout: float | None = None) -> None:
            super().join(timeout)
            raise OSError("the disk is full")

    def main(words: list[str]) -> int:
        Raises(target=lambda: time.sleep(0.2)).start()
        return _prints("sae train: the disk is full\n")

    monkeypatch.setattr("launch.cli.main", main)
    ended = run(Input(("train", "x")), World(tmp_path))
    assert (ended.status, ended.wrong) == (2, "")


def test_a_thread_of_a_pool_that_is_at_work_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def write() -> None:
        time.sleep(0.2)
        written.append("late")

    def main(words: list[str]) -> int:
        pool.submit(write)
        return 0

    monkeypatch.setattr("launch.cli.main", main)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert run(Input(("train", "x")), World(tmp_path)).wrong == ""
        assert written == ["late"]


def test_a_folder_that_gets_a_file_while_it_is_deleted_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delete, tries = shutil.rmtree, iter([OSError("Directory not empty")])

    def rmtree(path: Path) -> None:
        for error in tries:
            raise error
        delete(path)

    (tmp_path / "new").mkdir()
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    World(tmp_path).restore()
    assert not any(tmp_path.iterdir())

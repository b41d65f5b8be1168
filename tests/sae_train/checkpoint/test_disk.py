"""Checkpoints on disks that are full, without locks, linked, or used by other processes."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activation_cache.runtime.errors import Interrupted, UserError
from sae_train.checkpoint.checkpoints import Checkpoints
from sae_train.checkpoint.trained import load_trained
from sae_train.runs import folder as run_files
from sae_train.runs.folder import newest_checkpoint, read_run, record_failure
from sae_train.runs.metrics_file import MetricsLog
from sae_train.train.loop import train
from tests.support.training import (
    assert_same_run,
    final_state,
    make_run,
    stop_after,
    untimed_metrics,
)

STEPS = 40  # of `finished_run`, saved every 10


@pytest.fixture
def file_limit() -> Any:
    """Sets the largest size of a file that this process may write; lifted after the test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size or hard, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def at_call(number: int, act: Callable[[], None]) -> Callable[[], bool]:
    """A `stop` that never says yes, and acts when it is asked for the n-th time."""
    now = stop_after(number)

    def stop() -> bool:
        if now():
            act()
        return False

    return stop


def test_a_save_that_finds_no_room_is_one_message_and_nothing_is_lost(
    finished_run: Path,
    file_limit: Callable[[int], None],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
):
    config = make_run(finished_run, output="full", log_every_steps=10)  # a small file
    words = (
        r"^cannot save a checkpoint in .*full/checkpoints: it passes the limit on the size of "
        r"files \(ulimit -f\)\. A checkpoint takes up to 18\.\d kB\. What was finished before is"
    )

    def fill() -> None:
        while newest_checkpoint(finished_run / "full") is None:
            time.sleep(0.01)
        # Orbax gathers arrays in files as they come; a weight matrix alone takes 4.1 kB.
        file_limit(4000)

    with caplog.at_level(logging.INFO), pytest.raises(UserError, match=words):
        train(config, stop=at_call(15, fill))
    assert "absl" not in {one.name for one in caplog.records}, "Orbax adds words of its own"
    assert "Traceback" not in capfd.readouterr().err
    file_limit(0)
    assert newest_checkpoint(finished_run / "full") == 10
    train(config)
    states = [final_state(finished_run / name, step=STEPS) for name in ("whole", "full")]
    assert all((a == b).all() for a, b in zip(*states, strict=True))
    whole, full = (untimed_metrics(finished_run / name) for name in ("whole", "full"))
    assert full == [row for row in whole if row["step"] % 10 == 0]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, r"the disk is full\. A checkpoint takes up to .*, and .* are free\. "),
        (errno.EDQUOT, r"the disk quota is used up\. A checkpoint takes up to \S+ \S+\. What"),
        (errno.ESTALE, "the file system it is on has gone away"),
        (errno.EIO, "the disk fails"),
    ],
)
def test_what_orbax_reports_in_the_background_is_said_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
):
    with Checkpoints(tmp_path) as checkpoints:
        text = f"UNKNOWN: Failed to write 5 bytes [os_error_code='{number}']"

        def fail() -> None:
            raise ValueError(text)

        monkeypatch.setattr(checkpoints._files._manager, "wait_until_finished", fail)  # type: ignore[union-attr]
        with pytest.raises(UserError, match=words):
            checkpoints.wait()
        text = "RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"  # of a device, not of a disk
        with pytest.raises(ValueError, match="allocating") as bug:
            checkpoints.wait()
        assert not isinstance(bug.value, UserError)
        monkeypatch.undo()


def test_a_run_without_locks_is_the_run_with_locks(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Stopped and continued with and without locks: both forms of a checkpoint are gone on from."""
    config = make_run(finished_run, output="unlocked")
    folder = finished_run / "unlocked"

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    for calls, name in ((15, "no locks"), (10, "locks"), (10, "no locks"), (99, "no locks")):
        with monkeypatch.context() as patch:
            if name == "no locks":
                patch.setattr(fcntl, "flock", no_locks)
                patch.setattr(fcntl, "lockf", no_locks)
                (folder / "checkpoints" / "7.unfinished").mkdir(parents=True)
            try:
                train(config, stop=stop_after(calls))
            except Interrupted:
                assert calls < 99
    assert "a checkpoint that was only half written" in caplog.text
    assert sorted(os.listdir(folder / "checkpoints")) == ["35", "40"]
    assert_same_run(finished_run / "whole", folder, step=STEPS)
    whole, ours = (load_trained(finished_run / name) for name in ("whole", "unlocked"))
    for name, values in whole.params.items():
        np.testing.assert_array_equal(values, ours.params[name])
    assert read_run(folder).state == "trained"


@pytest.mark.parametrize("number", [errno.ENOTEMPTY, errno.EBUSY])
def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(
    finished_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
):
    config = make_run(finished_run, output=f"busy{number}")
    real = os.rmdir

    def rmdir(path: Any, **rest: Any) -> None:
        if os.path.basename(path) == "10":
            raise OSError(number, os.strerror(number), path)
        real(path, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", rmdir)
        train(config)
    assert "isn't wholly deleted, as another process uses it" in caplog.text
    assert "Traceback" not in caplog.text
    assert_same_run(finished_run / "whole", Path(config.output), step=STEPS)


def test_a_checkpoint_kept_elsewhere_and_linked_stays_there(finished_run: Path, tmp_path: Path):
    config = make_run(finished_run, output="linked_step")
    with pytest.raises(Interrupted):
        train(config, stop=stop_after(20))
    ten = finished_run / "linked_step" / "checkpoints" / "10"
    kept = ten.rename(tmp_path / "kept")
    ten.symlink_to(kept)
    train(config)
    assert not ten.is_symlink()
    assert (kept / "meta" / "metadata").is_file()
    assert_same_run(finished_run / "whole", finished_run / "linked_step", step=STEPS)


def test_checkpoints_on_another_disk_by_a_link(finished_run: Path, tmp_path: Path):
    config, folder = make_run(finished_run, output="link"), finished_run / "link"
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    for place in (elsewhere, run):
        place.mkdir()
    folder.symlink_to(run)
    (run / "checkpoints").symlink_to(elsewhere)
    (elsewhere / "notes.txt").write_text("mine")
    with pytest.raises(Interrupted):
        train(config, stop=stop_after(15))
    train(config, fresh=True)
    assert (run / "checkpoints").is_symlink()
    assert sorted(os.listdir(elsewhere)) == ["30", "40", "notes.txt"]
    assert_same_run(finished_run / "whole", folder, step=STEPS)


def test_metrics_that_cannot_be_written_are_one_error(
    tmp_path: Path, file_limit: Callable[[int], None]
):
    def write_much() -> None:
        with MetricsLog(tmp_path, from_step=0, tensorboard=False) as log:
            file_limit(500)
            for step in range(100):
                log.write({"step": step, "loss": 0.5})

    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: it passes the limit"):
        write_much()


def test_a_failure_is_told_even_where_it_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def refuse(*_: Any) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(run_files, "write_json", refuse)
    record_failure(tmp_path, stage="train", reason="no room")
    assert "the reason of the failure isn't kept: the disk is full" in caplog.text


def test_a_folder_that_the_disk_refuses_keeps_no_thread_waiting(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
):
    config = make_run(finished_run, output="refused")
    before, make = set(threading.enumerate()), os.mkdir

    def refuse(path: Any, *rest: Any, **options: Any) -> None:
        if "orbax-checkpoint-tmp/" in os.fspath(path):
            raise OSError(errno.EDQUOT, "Disk quota exceeded", os.fspath(path))
        make(path, *rest, **options)

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(UserError, match="quota is used up"):
        train(config)
    waiting = [one for one in set(threading.enumerate()) - before if "Signaling" in repr(one)]
    for one in waiting:  # told to end, one may still be about it
        threading.Thread.join(one, 30)
        assert not one.is_alive(), "the process can't end before it does, minutes later"

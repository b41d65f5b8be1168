"""A rolling store that is harvested beside its trainer: real processes, killed at any moment."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from activation_cache.harvest import rolling as harvest_rolling
from activation_cache.harvest.rolling import RollingHarvest, waiting_supply
from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.storage.locks import folder_lock
from activation_cache.storage.records import FORMAT_VERSION
from activation_cache.store.rolling import (
    KEPT_FILE,
    READING_FILE,
    Reading,
    is_kept,
    write_kept,
    write_reading,
)
from launch.cli import main
from launch.config.job import load_job
from launch.processes import beside
from launch.processes.supervise import SUPERVISOR
from sae_train.train.loop import train
from tests.launch.processes.rolling import (
    STEPS,
    WINDOW,
    Watch,
    begun,
    committed,
    overrides,
    rolling_job,
)
from tests.support.children.processes import child_environment, children, wait_for
from tests.support.training import assert_same_run, lines_logged

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_model")]

SIDES = ["train"] * 2 + ["harvest"] * 6


def while_asked(stop: Callable[[], bool]) -> Callable[[], bool]:
    """`stop`, which must say yes once the thread of the harvest is gone: nobody else will."""

    def asked() -> bool:
        over = all(one.name != "harvest beside" for one in threading.enumerate())
        told = stop()
        assert told or not over, "the trainer would wait for ever"
        return told

    return asked


@pytest.mark.parametrize(
    "error", [UserError("cannot write it: the disk is full"), Interrupted("harvest stopped")]
)
def test_a_harvest_that_can_not_go_on_stops_its_trainer(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    job = rolling_job(config, tmp_path, "cache.rolling.beside=true")

    def ended(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(beside, "group", SimpleNamespace(run_stage=ended))
    with (
        pytest.raises(type(error), match=str(error)),
        beside.harvest_beside(job, stop=lambda: False) as stop,
    ):
        train(job, stop=while_asked(stop))  # it waits for the first window


def test_a_second_trainer_leaves_a_store_in_use_alone(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    job = rolling_job(config, tmp_path, "cache.rolling.beside=true")
    monkeypatch.setattr(beside, "_BUSY_SECONDS", 0.0)
    with folder_lock(tmp_path / "store"):
        reading = tmp_path / "store" / READING_FILE
        reading.write_text("the first trainer's")
        with (
            pytest.raises(UserError, match="one trainer at a time reads a rolling store"),
            beside.harvest_beside(job, stop=lambda: False),
        ):
            pass
        assert reading.read_text() == "the first trainer's"


def test_a_harvest_notices_from_its_start_that_its_trainer_is_gone(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def tokenises(self: Any, *, stop: Callable[[], bool], **options: Any) -> None:
        until = time.monotonic() + 300
        while not stop():
            assert time.monotonic() < until, "nobody told it"
            time.sleep(0.05)
        raise Interrupted("stopped while it tokenised")

    monkeypatch.setattr(RollingHarvest, "__init__", tokenises)
    monkeypatch.setenv(SUPERVISOR, "0")  # nobody's parent
    words = overrides(tmp_path, beside=True)
    assert main(["harvest", str(config), "--follow", *words]) == 75


def reading_at(stretch: int) -> Reading:
    """That of a trainer in the middle of a stretch."""
    through = stretch + WINDOW - 1
    return Reading(format_version=FORMAT_VERSION, stretch=stretch, through=through, end=40)


def test_a_trainer_that_moves_back_loses_no_bucket_to_a_harvest_that_has_not_seen_it(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The harvest has read where the trainer was, and is about to delete when that one moves."""
    job, store = rolling_job(config, tmp_path), tmp_path / "store"
    supply = waiting_supply(store)
    moved: list[bool] = []

    def moves_back(path: Path, buckets: range) -> None:
        write_kept(path, buckets)
        if not moved:
            moved.append(True)
            write_reading(store, reading_at(0))
            # Its buckets are there, and still it doesn't take them for its own.
            with pytest.raises(Interrupted):
                supply(reading_at(0), lambda: True)

    monkeypatch.setattr(harvest_rolling, "write_kept", moves_back)
    with RollingHarvest(model=job.model, text=job.text, cache=job.cache) as harvest:
        harvest.make_store()
        write_reading(store, reading_at(2))
        missing = harvest._next_missing()
    assert moved
    assert committed(store) == [0, 1, 2, 3]
    assert missing == [4]
    supply(reading_at(0), lambda: True)


def test_a_bucket_that_a_kill_left_half_written_is_made_again(config: Path, tmp_path: Path):
    job, store = rolling_job(config, tmp_path), tmp_path / "store"
    with RollingHarvest(model=job.model, text=job.text, cache=job.cache) as harvest:
        harvest.make_store()
        record, shard = store / "commits" / "bucket-000001.json", store / "resid_post.1/c/1/0"
        whole = record.read_bytes(), shard.read_bytes()
        record.unlink()
        shard.write_bytes(bytes(len(whole[1])))
        write_kept(store, range(WINDOW))
        with pytest.raises(Interrupted):
            waiting_supply(store)(reading_at(0), lambda: True)
        harvest.supply(reading_at(0), lambda: False)
    assert (record.read_bytes(), shard.read_bytes()) == whole


def test_a_trainer_reads_what_is_kept_alone(tmp_path: Path):
    for bucket in range(6):
        record = tmp_path / "commits" / f"bucket-{bucket:06d}.json"
        record.parent.mkdir(exist_ok=True)
        record.touch()
    supply = waiting_supply(tmp_path)
    assert not is_kept(tmp_path, range(4))
    for kept in (range(1, 6), range(3)):
        write_kept(tmp_path, kept)
        with pytest.raises(Interrupted):
            supply(reading_at(0), lambda: True)
    write_kept(tmp_path, range(4))
    supply(reading_at(0), lambda: True)
    # Nothing is read any more: nobody is waited for.
    (tmp_path / KEPT_FILE).unlink()
    supply(Reading(format_version=FORMAT_VERSION, stretch=9, through=9, end=9), lambda: True)


def start(stage: str, config: Path, words: Sequence[str], log: Path) -> subprocess.Popen[str]:
    """Start a command of ours; what it says is appended to a file."""
    with log.open("a") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "launch.cli", stage, str(config), *words],
            env=child_environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
        )


def stage_of(process: int) -> str:
    """The stage that a process of ours runs, by its command line."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return ""
    return words[words.index("launch.cli") + 1] if "launch.cli" in words else ""


def children_at(trainer: subprocess.Popen[str], stage: str) -> list[int]:
    return [child for child in children(trainer) if stage_of(child) == stage]


def test_kills_of_either_side_change_no_bit(config: Path, tmp_path: Path):
    """Trainer and harvest are killed (SIGKILL) at random moments of a run of 40 buckets."""
    train(rolling_job(config, tmp_path / "undisturbed"))
    folder, log, generator = tmp_path / "killed", tmp_path / "log", random.Random(19)
    words = overrides(folder, "launch={restart_pause_seconds: 0, restarts: 50}", beside=True)
    sides = generator.sample(SIDES, k=len(SIDES))
    trainer, due = start("train", config, words, log), 0

    def alive() -> bool:
        return trainer.poll() is None

    def is_time() -> bool:
        return watch.written >= due and bool(children_at(trainer, "harvest"))

    killed: list[tuple[str, int, int]] = []
    with Watch(folder / "store") as watch:
        try:
            for side in sides:
                # Some milliseconds after so many further buckets were begun, or after a start.
                due = watch.written + generator.choice([0, 1, 2, 4])
                assert wait_for(is_time, alive), (killed, log.read_text())
                time.sleep(generator.uniform(0, 0.1))
                if side == "train":
                    trainer.kill()
                    assert trainer.wait() == -signal.SIGKILL, killed
                    trainer = start("train", config, words, log)
                else:
                    (harvest,) = children_at(trainer, "harvest")
                    os.kill(harvest, signal.SIGKILL)
                killed.append((side, watch.newest, lines_logged(folder / "run")))
            assert trainer.wait(timeout=600) == 0, log.read_text()
        finally:
            trainer.kill()
            trainer.wait()
    assert len({newest for _, newest, _ in killed}) >= 3, killed  # on the way
    assert watch.looks > 1000
    assert watch.most <= WINDOW + 1
    assert begun(folder / "store") == committed(folder / "store") == []
    assert_same_run(tmp_path / "undisturbed" / "run", folder / "run", step=STEPS)


def test_two_processes_of_either_side_and_one_give_the_same_bits(config: Path, tmp_path: Path):
    meshes = ["mesh.data=2", "cache.mesh={data: 2}"]
    train(rolling_job(config, tmp_path / "one", *meshes))
    folder, log = tmp_path / "two", tmp_path / "log"
    words = overrides(folder, *meshes, beside=True)
    harvest = start("harvest", config, ["--follow", *words, "launch={processes: 2}"], log)
    try:
        with Watch(folder / "store") as watch:  # the trainer is this process
            lost = lambda: harvest.poll() not in (None, 0)  # noqa: E731
            train(load_job(config, words), stop=lost)
            assert harvest.wait(timeout=600) == 0, log.read_text()
    finally:
        harvest.kill()
        harvest.wait()
    assert watch.most <= WINDOW + 1
    assert begun(folder / "store") == []
    assert_same_run(tmp_path / "one" / "run", tmp_path / "two" / "run", step=STEPS)
    # As `sae train` does; the trainers begin again while the harvest beside them lives.
    launch = "launch={processes: 2, restart_pause_seconds: 0}"
    folder = tmp_path / "killed"
    trainer = start("train", config, overrides(folder, *meshes, launch, beside=True), log)
    try:
        with Watch(folder / "store") as watch:
            assert wait_for(
                lambda: lines_logged(folder / "run") >= 8, lambda: trainer.poll() is None
            ), log.read_text()
            beside_it = children_at(trainer, "harvest")
            os.kill(children_at(trainer, "train")[1], signal.SIGKILL)
            again = wait_for(
                lambda: lines_logged(folder / "run") >= 20, lambda: trainer.poll() is None
            )
            assert again, log.read_text()
            assert children_at(trainer, "harvest") == beside_it
            assert trainer.wait(timeout=600) == 0, log.read_text()
    finally:
        trainer.kill()
        trainer.wait()
    assert "restarting all 2 processes" in log.read_text()
    assert watch.most <= WINDOW + 1
    assert_same_run(tmp_path / "one" / "run", folder / "run", step=STEPS)

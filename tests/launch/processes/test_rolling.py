"""A rolling store: kills of either side change no bit, and the disk holds a window and a bucket."""

from __future__ import annotations

import functools
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from activation_cache.gemma.taps import Tap
from activation_cache.harvest import rolling as harvest_rolling
from activation_cache.harvest import worker
from activation_cache.harvest.harvest import harvest
from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.storage.locks import folder_lock
from activation_cache.store import rolling as store_rolling
from activation_cache.store import writer
from activation_cache.store.order import RollingOrder
from activation_cache.store.store import PLAN_FILE, open_store
from launch.cli import main
from launch.config.job import Job, load_job
from launch.processes import beside
from launch.show.inspect import inspect_store
from launch.show.rolling_line import rolling_line
from sae_train.checkpoint.checkpoints import StoredCheckpoints
from sae_train.train import loop, opened_store
from sae_train.train.loop import train, train_cohort
from tests.support.children.processes import child_environment, children, wait_for
from tests.support.pipeline import write_pipeline
from tests.support.training import assert_same_run, final_state, stop_after

pytestmark = pytest.mark.slow

TAP = Tap("resid_post", 1)
# 40 buckets of 32 rows, a window of four, 80 steps of 16 rows.
BUCKETS, WINDOW, STEPS = 40, 4, 80
OVERRIDES = [
    f"cache.tokens={BUCKETS * 32}",
    "cache.shuffle_rows=32",
    "cache.block_rows=4",
    f"train.tokens={STEPS * 16}",
    "train.batch_size=16",
    "train.log_every_steps=1",
    "checkpoint={every_steps: 7, keep: 2}",
]


def overrides(folder: Path, *more: str, beside: bool = False) -> list[str]:
    """Overrides of `write_pipeline`'s config for a run in `folder`."""
    rolling = f"cache.rolling={{buckets: {WINDOW}, beside: {str(beside).lower()}}}"
    places = [f"cache.path={folder}/store", f"output={folder}/run"]
    return [*OVERRIDES, rolling, *places, *more]


def rolling_job(config: Path, folder: Path, *more: str) -> Job:
    """The config of a run in `folder`."""
    return load_job(config, overrides(folder, *more))


def committed(store: Path) -> list[int]:
    """The buckets on the disk that have a record."""
    return sorted(int(file.stem[-6:]) for file in store.glob("commits/bucket-*.json"))


def shards(store: Path, tap: str = "resid_post.1") -> list[int]:
    """The buckets on the disk that have rows."""
    return sorted(int(file.parent.name) for file in store.glob(f"{tap}/c/*/0"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """The model is loaded, and its programs compiled, once for all runs of this file."""
    with pytest.MonkeyPatch.context() as patched:
        load, kept = worker.load_replicas, []

        def load_once(*arguments: Any, **options: Any) -> Any:
            if not kept:
                kept.append(load(*arguments, **options))
            return kept[0]

        patched.setattr(worker, "load_replicas", load_once)
        yield


class Disk:
    """Notes how many buckets a store holds whenever one has just been written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: list[int] = []
        write = writer.write_record

        def watched(path: Path, record: Any) -> None:
            write(path, record)
            store = path.parent.parent
            self.held.append(max(len(committed(store)), len(shards(store))))

        monkeypatch.setattr(writer, "write_record", watched)


@dataclass(frozen=True)
class Whole:
    """A run that nothing disturbed: its folder, and the rows of all its steps."""

    folder: Path
    rows: np.ndarray


@pytest.fixture(scope="module")
def undisturbed(config: Path, quick: None, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder, rows = tmp_path_factory.mktemp("undisturbed"), []
    with pytest.MonkeyPatch.context() as patched:
        disk, place = Disk(patched), loop.place_batch

        def noted(own: np.ndarray, **options: Any) -> Any:
            rows.append(own.copy())
            return place(own, **options)

        patched.setattr(loop, "place_batch", noted)
        train(rolling_job(config, folder))
    assert len(disk.held) == BUCKETS, "each bucket is harvested once"
    assert max(disk.held) == WINDOW + 1  # a batch may lie across two stretches
    assert committed(folder / "store") == shards(folder / "store") == []  # all are read
    return Whole(folder, np.concatenate(rows))


def test_the_rows_are_a_whole_store_s_in_the_rolling_order(
    config: Path, undisturbed: Whole, tmp_path: Path
):
    job = load_job(config, [*OVERRIDES, f"cache.path={tmp_path}/store"])
    harvest(model=job.model, text=job.text, cache=job.cache)
    plain = open_store(tmp_path / "store")
    rows = plain.read(TAP, start=0, stop=BUCKETS * 32)
    order = RollingOrder(rows=len(rows), block_rows=4, bucket_rows=32, window=WINDOW, seed=0)
    segments = order.segments(0, STEPS * 16)
    expected = np.concatenate([rows[s.start : s.start + s.count] for s in segments])
    np.testing.assert_array_equal(undisturbed.rows, expected)
    over_it = overrides(tmp_path, f"cache.path={tmp_path}/store")
    with pytest.raises(UserError, match=r"the store has None, the config says 4"):
        train(load_job(config, over_it))
    assert not (tmp_path / "store" / PLAN_FILE).exists(), "the finished store is as it was"
    rolling = open_store(undisturbed.folder / "store")
    first = np.square(rows[: WINDOW * 32].astype(np.float64)).sum(axis=1).mean()
    assert rolling.tap_info(TAP).mean_squared_norm == pytest.approx(first, rel=1e-12)
    assert rolling.tap_info(TAP).mean_squared_norm != plain.tap_info(TAP).mean_squared_norm
    meta = StoredCheckpoints(undisturbed.folder / "run").read_meta(STEPS)
    assert meta["input_scale"] == pytest.approx(np.sqrt(first), rel=1e-12)


class Killed(BaseException):
    """As SIGKILL: nobody catches it, and nothing was prepared for it."""


class Killer:
    """Raises `Killed` before or after a chosen call of what writes, deletes or takes a step."""

    PLACES = (
        (writer, "write_shards"),
        (writer, "write_record"),
        (store_rolling, "write_reading"),
        (store_rolling, "remove_file"),
        (harvest_rolling, "delete_bucket"),
        (loop, "place_batch"),
    )

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls_left, self.struck = -1, set[str]()
        for module, name in self.PLACES:
            monkeypatch.setattr(module, name, self._deadly(name, getattr(module, name)))

    def _deadly(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def deadly(*arguments: Any, **options: Any) -> Any:
            self.calls_left -= 1
            at = self.calls_left
            if at == 1:
                self._strike(name)
            result = work(*arguments, **options)
            if at == 0:
                self._strike(name)
            return result

        return deadly

    def _strike(self, name: str) -> None:
        self.calls_left = -1
        self.struck.add(name)
        raise Killed


def test_twenty_kills_change_no_bit(
    config: Path, undisturbed: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    disk, killer, generator = Disk(monkeypatch), Killer(monkeypatch), random.Random(19)
    job, kills = rolling_job(config, tmp_path), 0
    while kills < 20:
        killer.calls_left = generator.randint(1, 70)
        try:
            train(job)
        except Killed:
            kills += 1
        else:
            pytest.fail(f"it was done after {kills} kills")
    killer.calls_left = -1
    train(job)
    assert len(killer.struck) >= 4, killer.struck
    assert max(disk.held) <= WINDOW + 1
    assert committed(tmp_path / "store") == shards(tmp_path / "store") == []
    assert_same_run(undisturbed.folder / "run", tmp_path / "run", step=STEPS)


def test_a_stop_and_a_full_disk_lose_no_step(
    config: Path, undisturbed: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    job, taken, write = rolling_job(config, tmp_path, "checkpoint.every_steps=1000"), [], []
    place, write_shards = loop.place_batch, writer.write_shards

    def noted(*arguments: Any, **options: Any) -> Any:
        taken.append(1)
        return place(*arguments, **options)

    def full(*arguments: Any, **options: Any) -> None:
        write.append(1)
        if len(write) in (40, 80):
            raise UserError("cannot write it: the disk is full")
        write_shards(*arguments, **options)

    monkeypatch.setattr(loop, "place_batch", noted)
    monkeypatch.setattr(writer, "write_shards", full)
    outcomes = []
    for limit in (3, 30, *[10**6] * 3):
        try:
            train(job, stop=stop_after(limit))
        except (Interrupted, UserError) as error:
            outcomes.append(type(error))
        # No step is taken twice: whatever came, the last one was saved.
        assert sum(taken) == max([0, *StoredCheckpoints(tmp_path / "run").steps()])
    assert outcomes.count(UserError) == 2
    assert outcomes.count(Interrupted) == 2
    for left, right in zip(
        final_state(undisturbed.folder / "run", step=STEPS),
        final_state(tmp_path / "run", step=STEPS),
        strict=True,
    ):
        np.testing.assert_array_equal(left, right)


def test_runs_of_a_cohort_read_one_window_and_look_back_at_their_end(
    config: Path, undisturbed: Whole, tmp_path: Path
):
    topk = [
        "sae={site: resid_post, layer: 1, width: 64, architecture: batch_topk, k: 8, "
        "threshold_per_latent: true}",
        "train.sparsity={penalty: none}",
    ]
    short = rolling_job(config, tmp_path, *topk, f"output={tmp_path}/short", "train.tokens=176")
    together = [short, rolling_job(config, tmp_path)]
    train_cohort(together)
    train(rolling_job(config, tmp_path / "alone", *topk, "train.tokens=176"))
    assert_same_run(undisturbed.folder / "run", tmp_path / "run", step=STEPS)
    assert_same_run(tmp_path / "alone" / "run", tmp_path / "short", step=11)
    metas = [
        StoredCheckpoints(folder).read_meta(11)["thresholds"]
        for folder in (tmp_path / "alone" / "run", tmp_path / "short")
    ]
    assert metas[0] == metas[1]


def test_another_window_is_refused_and_nothing_deleted(config: Path, tmp_path: Path):
    job = rolling_job(config, tmp_path)
    assert rolling_line(job, []) == "rolling store: it is empty; no trainer has read from it yet"
    with pytest.raises(Interrupted):
        train(job, stop=stop_after(40))
    held = shards(tmp_path / "store")
    line = rolling_line(job, [tmp_path / "run"])
    assert line is not None
    assert line.startswith(
        f"rolling store: buckets {held[0] + 1} to {held[-1] + 1} are on the disk; the trainer "
        f"reads buckets {held[0] + 1} to "
    )
    assert re.search(
        r"of 40; it waits \d+% of its time, the slower side is the (model|trainer)$", line
    )
    inspect_store(tmp_path / "store", verify=False)
    with pytest.raises(UserError, match="whose rows come and go"):
        inspect_store(tmp_path / "store", verify=True)
    with pytest.raises(UserError, match=r"window in buckets: the store has 4, the config says 5"):
        train(rolling_job(config, tmp_path, "cache.rolling.buckets=5"))
    with pytest.raises(
        UserError, match=r"window in buckets: the store has 4, the config says None"
    ):
        train(rolling_job(config, tmp_path, "cache.rolling=null"))
    with pytest.raises(UserError, match=r"train\.seed"):
        train(rolling_job(config, tmp_path, "train.seed=5"))
    assert shards(tmp_path / "store") == held


def test_several_processes_do_not_take_turns(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(opened_store, "processes", SimpleNamespace(process_count=lambda: 2))
    with pytest.raises(UserError, match=r"set cache\.rolling\.beside to true"):
        train(rolling_job(config, tmp_path))


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
        train(job, stop=stop)  # waits for the first window


def test_a_second_trainer_leaves_a_store_in_use_alone(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    job = rolling_job(config, tmp_path, "cache.rolling.beside=true")
    monkeypatch.setattr(beside, "_BUSY_SECONDS", 0.0)
    with folder_lock(tmp_path / "store"):
        reading = tmp_path / "store" / store_rolling.READING_FILE
        reading.write_text("the first trainer's")
        with (
            pytest.raises(UserError, match="one trainer at a time reads a rolling store"),
            beside.harvest_beside(job, stop=lambda: False),
        ):
            pass
        assert reading.read_text() == "the first trainer's"


def test_either_side_is_killed_while_they_work_side_by_side(
    config: Path, undisturbed: Whole, tmp_path: Path
):
    words = overrides(tmp_path, "launch.restart_pause_seconds=0", beside=True)
    store, run = tmp_path / "store", tmp_path / "run"
    trainer = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "train", str(config), *words],
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    most: list[int] = []

    def steps_beyond(steps: int) -> bool:
        most.append(len(shards(store)))
        metrics = run / "metrics.jsonl"
        return metrics.exists() and metrics.read_bytes().count(b"\n") >= steps

    def alive() -> bool:
        return trainer.poll() is None

    try:
        assert wait_for(lambda: steps_beyond(5), alive)
        (killed,) = children(trainer)
        os.kill(killed, signal.SIGKILL)  # the harvest: it is started again beside a living trainer
        assert wait_for(lambda: steps_beyond(35), alive)
        (left,) = children(trainer)
        assert left != killed
    finally:
        trainer.kill()
        said = trainer.communicate()[0]
    assert "restart 1 of" in said, said
    until = time.monotonic() + 30
    while Path(f"/proc/{left}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{left}").exists(), "a harvest without its trainer ends"
    assert main(["train", str(config), *words]) == 0
    most.append(len(shards(store)))
    assert max(most) <= WINDOW + 1
    assert most[-1] == 0
    assert_same_run(undisturbed.folder / "run", run, step=STEPS)

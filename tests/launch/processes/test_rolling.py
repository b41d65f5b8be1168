"""A rolling store whose trainer harvests itself: kills change no bit, the disk holds a window."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from activation_cache.gemma.taps import Tap
from activation_cache.harvest import rolling as harvest_rolling
from activation_cache.harvest.harvest import harvest
from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.store import rolling as store_rolling
from activation_cache.store import writer
from activation_cache.store.order import RollingOrder
from activation_cache.store.store import PLAN_FILE, open_store
from launch.cli import main
from launch.config.job import load_job
from launch.show.inspect import inspect_store
from launch.show.rolling_line import rolling_line
from sae_train.checkpoint.checkpoints import StoredCheckpoints
from sae_train.train import loop, opened_store
from sae_train.train.cohort_member import Member
from sae_train.train.loop import train, train_cohort
from tests.launch.processes.rolling import (
    BUCKETS,
    OVERRIDES,
    STEPS,
    WINDOW,
    Disk,
    begun,
    committed,
    overrides,
    rolling_job,
    shards,
)
from tests.support.training import assert_same_run, final_state, stop_after

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_model")]

TAP = Tap("resid_post", 1)


@dataclass(frozen=True)
class Whole:
    """A run that nothing disturbed: its folder, and the rows of all its steps."""

    folder: Path
    rows: np.ndarray


@pytest.fixture(scope="module")
def undisturbed(config: Path, one_model: None, tmp_path_factory: pytest.TempPathFactory) -> Whole:
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


def test_the_harvest_is_told_when_all_processes_have_read(
    undisturbed: Whole, monkeypatch: pytest.MonkeyPatch
):
    events: list[str] = []
    monkeypatch.setattr(store_rolling.exchange, "barrier", lambda name: events.append("all read"))
    monkeypatch.setattr(store_rolling, "write_reading", lambda *_: events.append("told"))
    monkeypatch.setattr(store_rolling, "is_there", lambda *_: True)
    window = store_rolling.RollingWindow(
        open_store(undisturbed.folder / "store"),
        seed=0,
        batch_size=16,
        steps=STEPS,
        supply=lambda reading, stop: None,
    )
    for step in range(STEPS):
        window.prepare(step, stop=lambda: False)
    assert events == ["all read", "told"] * (len(events) // 2)
    assert len(events) > 2 * (BUCKETS - WINDOW)


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
    config: Path, undisturbed: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    topk = [
        "sae={site: resid_post, layer: 1, width: 64, architecture: batch_topk, k: 8, "
        "threshold_per_latent: true}",
        "train.sparsity={penalty: none}",
    ]
    short = rolling_job(config, tmp_path, *topk, f"output={tmp_path}/short", "train.tokens=176")
    together = [short, rolling_job(config, tmp_path)]
    looks_back, find = [], Member.find_thresholds

    def found(self: Member, batch: Callable[[int], Any]) -> None:
        looks_back.append(self)
        find(self, batch)

    monkeypatch.setattr(Member, "find_thresholds", found)
    with pytest.raises(Interrupted):  # while the rows of a look back are harvested again
        train_cohort(together, stop=lambda: bool(looks_back))
    saved = [StoredCheckpoints(tmp_path / name).steps()[-1] for name in ("short", "run")]
    assert saved == [10, 11], "of a run that looks back, a step is lost"
    train_cohort(together)
    train(rolling_job(config, tmp_path / "alone", *topk, "train.tokens=176"))
    assert_same_run(undisturbed.folder / "run", tmp_path / "run", step=STEPS)
    assert_same_run(tmp_path / "alone" / "run", tmp_path / "short", step=11)
    metas = [
        StoredCheckpoints(folder).read_meta(11)["thresholds"]
        for folder in (tmp_path / "alone" / "run", tmp_path / "short")
    ]
    assert metas[0] == metas[1]


def test_a_sweep_harvests_trains_evaluates_and_releases(
    config: Path, undisturbed: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    disk = Disk(monkeypatch)
    grid = "sweep={grid: {train.sparsity.coefficient: [1e-3, 2e-3]}}"
    assert main(["sweep", str(config), *overrides(tmp_path, grid)]) == 0
    assert len(disk.held) == BUCKETS, "its runs are one cohort"
    assert max(disk.held) == WINDOW + 1
    assert begun(tmp_path / "store") == []
    runs = [tmp_path / "run" / f"coefficient_{value}" for value in ("0.001", "0.002")]
    assert_same_run(undisturbed.folder / "run", runs[0], step=STEPS)
    for run in runs:
        assert (run / "evaluation.json").exists()
        assert (run / "release").is_dir()


def test_a_text_that_ends_before_the_steps_do_is_told_before_the_first(
    config: Path, tmp_path: Path
):
    more = ["cache.tokens=100000", "train.tokens=100000"]
    with pytest.raises(UserError, match=r"cache\.tokens asks for 100000 rows and the text has 41"):
        train(rolling_job(config, tmp_path, *more))
    assert begun(tmp_path / "store") == []
    with pytest.raises(UserError, match=r"A rolling store deletes a row once it is read"):
        rolling_job(config, tmp_path, "train.tokens=2560")


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

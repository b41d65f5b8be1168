"""Cohorts: every member ends as it would alone, whatever becomes of the others."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.storage.locks import folder_lock, is_locked
from sae_train.checkpoint.trained import load_trained
from sae_train.config.run import Config
from sae_train.runs.folder import newest_checkpoint, read_run
from sae_train.runs.metrics_file import read_metrics
from sae_train.train import cohort_step, loop
from sae_train.train.loop import train, train_cohort
from tests.support.training import assert_same_run, make_run, stop_after

pytestmark = pytest.mark.slow

# Three runs that have nothing in common but what they read.
MEMBERS: dict[str, dict[str, Any]] = {
    "a": {},
    "b": {
        "steps": 25,
        "width": 32,
        "sparsity": {"penalty": "match_l0", "target": 5.0},
        "checkpoint": {"every_steps": 7, "keep": 2},
        "parametrisation": "direct",
        "log_every_steps": 3,
        "learning_rate": {"peak": 3e-3, "warmup_steps": 2},
    },
    "c": {"seed": 3, "sparsity": {"coefficient": 0.1}, "sae": {"b_dec_init": "mean"}},
}
STEPS = {"a": 40, "b": 25, "c": 40}
MESHES = ((1, 1), (2, 4))
DIVERGING = {
    "parametrisation": "direct",
    "learning_rate": {"peak": 1e37, "warmup_steps": 20, "warmup_from": 0.0},
}


def member(folder: Path, name: str, *, place: str = "cohort", **options: Any) -> Config:
    options = {"data_seed": 0} | MEMBERS.get(name, {}) | options
    return make_run(folder, output=f"{place}/{name}", **options)


def cohort(folder: Path, *, place: str = "cohort", **options: Any) -> list[Config]:
    return [member(folder, name, place=place, **options) for name in MEMBERS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every member was trained alone, on one device."""
    folder = tmp_path_factory.mktemp("cohort")
    train_alone(folder, mesh=(1, 1))
    return folder


def train_alone(folder: Path, *, mesh: tuple[int, int]) -> None:
    for name in MEMBERS:
        train(member(folder, name, place=alone(mesh), mesh=mesh))


def alone(mesh: tuple[int, int] = (1, 1)) -> str:
    return f"alone-{mesh[0]}x{mesh[1]}"


def assert_as_alone(folder: Path, place: str, *names: str, mesh: tuple[int, int] = (1, 1)) -> None:
    for name in names or MEMBERS:
        assert_same_run(folder / alone(mesh) / name, folder / place / name, step=STEPS[name])


class Counted:
    """How often batches were read and put on the devices, and steps made."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.reads: list[int] = []
        self.puts = 0
        self.made: list[Any] = []
        read, put, make = loop.ActivationReader.batch, loop.place_batch, cohort_step.make_train_step

        def batch(reader: Any, step: int) -> Any:
            self.reads.append(step)
            return read(reader, step)

        def place(*arguments: Any, **options: Any) -> Any:
            self.puts += 1
            return put(*arguments, **options)

        def step(*arguments: Any, **options: Any) -> Any:
            self.made.append(make(*arguments, **options))
            return self.made[-1]

        patch.setattr(loop.ActivationReader, "batch", batch)
        patch.setattr(loop, "place_batch", place)
        patch.setattr(cohort_step, "make_train_step", step)


@pytest.mark.parametrize("mesh", MESHES)
def test_members_end_as_they_would_alone(folder: Path, mesh: tuple[int, int]) -> None:
    place = f"together-{mesh[0]}x{mesh[1]}"
    if mesh != (1, 1):
        train_alone(folder, mesh=mesh)
    results = train_cohort(cohort(folder, place=place, mesh=mesh))
    assert [result.step for result in results] == list(STEPS.values())
    assert_as_alone(folder, place, mesh=mesh)
    for result in results:
        assert result.metrics == read_metrics(result.folder)[-1]


def test_a_batch_is_read_and_placed_once_for_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    configs = [member(folder, name, place="counted", sae={}) for name in MEMBERS]
    train_cohort(configs)
    # The first is looked at before training, for the thresholds: once for all, too.
    assert counted.reads == [0, *range(40)]
    assert counted.puts == 40
    # One compilation for a and c, whose numbers alone differ.
    assert len(counted.made) == 2
    assert [step._cache_size() for step in counted.made] == [1, 1]


@pytest.mark.parametrize("stop_step", [25, 33])
def test_a_stop_saves_all_at_one_step_and_all_go_on(folder: Path, stop_step: int) -> None:
    place = f"stopped-{stop_step}"
    left = "a, b, c" if stop_step < STEPS["b"] else "a, c"
    with pytest.raises(Interrupted, match=f"^{left}: stopped by a signal at step {stop_step};"):
        train_cohort(cohort(folder, place=place), stop=stop_after(stop_step))
    for name, steps in STEPS.items():
        assert newest_checkpoint(folder / place / name) == min(stop_step, steps)
        assert read_run(folder / place / name).state == (
            "trained" if steps <= stop_step else "stopped"
        )
    train_cohort(cohort(folder, place=place))
    assert_as_alone(folder, place)


def test_members_at_different_steps_join_when_the_stream_comes_by(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = "staggered"
    a, b, c = cohort(folder, place=place)
    train(b)
    for config, step in ((a, 12), (c, 31)):
        with pytest.raises(Interrupted):
            train(config, stop=stop_after(step))
    before = (folder / place / "b" / "metrics.jsonl").stat().st_mtime_ns
    counted = Counted(monkeypatch)
    train_cohort([a, b, c])
    assert counted.reads == list(range(12, 40)), "from the step of the one furthest behind"
    assert (folder / place / "b" / "metrics.jsonl").stat().st_mtime_ns == before
    assert_as_alone(folder, place)
    assert [read_run(folder / place / name).restarts for name in "abc"] == [1, 0, 1]


def test_steps_that_nobody_needs_are_not_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = "gap"
    late, short = member(folder, "c", place=place), member(folder, "b", place=place)
    with pytest.raises(Interrupted):
        train(late, stop=stop_after(33))
    with pytest.raises(Interrupted):
        train(short, stop=stop_after(20))
    counted = Counted(monkeypatch)
    train_cohort([late, short])
    assert counted.reads == [*range(20, 25), *range(33, 40)]
    assert_as_alone(folder, place, "b", "c")


def test_a_stop_before_a_member_has_joined_leaves_it_where_it_was(folder: Path) -> None:
    place = "waiting"
    ahead, behind = member(folder, "a", place=place), member(folder, "c", place=place)
    with pytest.raises(Interrupted):
        train(ahead, stop=stop_after(30))
    with pytest.raises(Interrupted, match="at step 5"):
        train_cohort([ahead, behind], stop=stop_after(5))
    assert newest_checkpoint(folder / place / "a") == 30
    assert newest_checkpoint(folder / place / "c") == 5
    train_cohort([ahead, behind])
    assert_as_alone(folder, place, "a", "c")


def test_one_whose_loss_diverges_fails_alone(folder: Path) -> None:
    place = "diverging"
    bad = member(folder, "bad", place=place, **DIVERGING)
    held: list[list[bool]] = []

    def look() -> bool:
        held.append([is_locked(folder / place / name) for name in ("bad", "b", "a")])
        return False

    with pytest.raises(UserError) as told:
        train_cohort([bad, *cohort(folder, place=place)], stop=look)
    assert held[0] == [True, True, True]
    assert held[-1] == [False, False, True], "who has failed or is done lets go of the folder"
    assert str(told.value).startswith("1 of 4 runs failed:\n  bad: training stopped at step")
    assert_as_alone(folder, place)
    with pytest.raises(UserError, match="training stopped at step") as same:
        train(member(folder, "bad", place="alone-1x1", **DIVERGING))
    run = read_run(folder / place / "bad")
    assert run.state == "failed"
    assert run.failure == f"{same.value} (in train)"
    assert len(run.metrics) == len(read_metrics(folder / "alone-1x1" / "bad"))


def test_one_that_cannot_begin_leaves_the_others_theirs(folder: Path) -> None:
    place = "begin"
    nowhere = member(folder, "d", place=place, sae={"start_from": str(folder / "nowhere")})
    configs = [nowhere, *cohort(folder, place=place)]
    train(member(folder, "b", place=place, bandwidth=0.1))
    with (
        folder_lock(folder / place / "c"),
        pytest.raises(UserError, match="3 of 4 runs failed") as told,
    ):
        train_cohort(configs)
    assert "b: " in str(told.value)
    assert "sae.bandwidth was 0.1 and is now 0.05" in str(told.value)
    assert "c: " in str(told.value)
    assert "d: " in str(told.value)
    assert "is in use by another process" in str(told.value)
    assert_as_alone(folder, place, "a")


def test_too_many_for_the_devices_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(cohort_step, "make_train_step", full)
    with pytest.raises(UserError, match=r"set sweep\.cohort\.max_members below 3"):
        train_cohort(cohort(folder, place="full"))
    with pytest.raises(UserError, match=r"too little memory for this run: lower sae\.width"):
        train(member(folder, "a", place="full"))


def test_one_seed_is_of_the_weights_the_other_of_the_order(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, rows = loop.place_batch, []

    def place(rows_BD: Any, **options: Any) -> Any:
        rows.append(rows_BD)
        return put(rows_BD, **options)

    monkeypatch.setattr(loop, "place_batch", place)
    weights = []
    for seeds in ({"seed": 0}, {"seed": 1, "data_seed": 0}, {"seed": 0, "data_seed": 1}):
        name = "-".join(map(str, seeds.values()))
        config = make_run(
            folder, output=f"seeds/{name}", steps=1, learning_rate={"peak": 1e-12}, **seeds
        )
        train(config)
        weights.append(load_trained(config.output).params["W_enc"])
    assert np.array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[0], rows[2])
    np.testing.assert_allclose(weights[0], weights[2], atol=1e-6)
    assert np.abs(weights[0] - weights[1]).max() > 0.01


def test_a_log_line_stays_short(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("activation_cache.runtime.progress.LOG_INTERVAL_SECONDS", 0.0)
    sweep = [member(folder, "a", place="line", seed=number) for number in range(6)]
    configs = [
        one.model_copy(
            update={"name": f"l12-coefficient_0.{number}", "output": f"{one.output}{number}"}
        )
        for number, one in enumerate(sweep)
    ]
    with caplog.at_level(logging.INFO):
        train_cohort(configs)
    lines = [one.message for one in caplog.records if " tokens/s" in one.message]
    assert any("step 20/40 6 of 6 runs L0 " in line for line in lines)
    assert all(line.startswith("l12-coefficient ") for line in lines)
    assert max(map(len, lines)) < 160

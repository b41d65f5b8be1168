"""Sweeps: expansion and names, going on past a failure, doing only what is missing."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_cache.runtime.errors import UserError
from activation_cache.storage.locks import folder_lock
from launch.cli import main
from launch.config.job import Job
from launch.sweep.expand import expand
from sae_train.config.file import differing_fields, read_run_config, write_config
from sae_train.train import loop
from tests.support.configs import as_job, make_config
from tests.support.pipeline import write_pipeline
from tests.support.training import final_state

pytestmark = pytest.mark.slow

SWEEP = "sweep: {grid: {train.sparsity.coefficient: [1e-3, 1e-2], train.seed: [0]}}\n"


def swept(sweep: dict[str, Any], **values: Any) -> Job:
    return as_job(make_config(output="out", **values), sweep=sweep)


def names(sweep: dict[str, Any]) -> list[str]:
    return [run.name for run in expand(swept(sweep))]


def test_grid_multiplies_and_zip_walks_in_step() -> None:
    runs = expand(
        swept(
            {
                "grid": {"train.sparsity.coefficient": [1e-3, 7e-5], "sae.width": [64, 128]},
                "zip": {"train.seed": [0, 1], "train.learning_rate.peak": [1e-3, 2e-3]},
            }
        )
    )
    settings = [
        (
            run.config.train.sparsity.coefficient,
            run.config.sae.width,
            run.config.train.seed,
            run.config.train.learning_rate.peak,
        )
        for run in runs
    ]
    assert settings == [
        (coefficient, width, seed, peak)
        for coefficient in (1e-3, 7e-5)
        for width in (64, 128)
        for seed, peak in ((0, 1e-3), (1, 2e-3))
    ]
    assert runs[0].name == "coefficient_0.001-width_64-seed_0-peak_0.001"
    assert runs[-1].name == "coefficient_7e-05-width_128-seed_1-peak_0.002"
    assert runs[0].config.output == "out/coefficient_0.001-width_64-seed_0-peak_0.001"
    assert all(run.config.sweep is None for run in runs)


def test_a_run_differs_from_the_base_in_its_settings_alone() -> None:
    config = swept({"grid": {"sae.width": [64]}})
    (run,) = expand(config)
    differing = differing_fields(config.model_copy(update={"sweep": None}), run.config)
    assert differing == ["name", "sae.width", "output"]


def test_only_chooses_by_name() -> None:
    grid = {"train.seed": [0, 1], "sae.width": [64, 128]}
    assert names({"grid": grid, "only": ["*-width_64", "seed_1-*"]}) == [
        "seed_0-width_64",
        "seed_1-width_64",
        "seed_1-width_128",
    ]
    with pytest.raises(UserError, match=r"sweep\.only chooses none.*seed_0-width_64"):
        names({"grid": grid, "only": ["width_64"]})


def test_names_are_short_but_tell_keys_apart() -> None:
    keys = {"train.learning_rate.warmup_steps": [1], "train.sparsity.warmup_steps": [2]}
    assert names({"grid": keys}) == ["learning_rate.warmup_steps_1-sparsity.warmup_steps_2"]
    sections = [{"penalty": "target_l0", "target": 80}, {"coefficient": 0.5}]
    assert names({"grid": {"train.sparsity": sections}}) == [
        "sparsity_penalty_target_l0-target_80",
        "sparsity_coefficient_0.5",
    ]


@settings(deadline=None)
@given(
    st.lists(st.floats(min_value=1e-12, max_value=1e12), min_size=1, max_size=6, unique=True),
    st.lists(st.integers(min_value=0, max_value=2**64 - 1), min_size=1, max_size=3, unique=True),
)
def test_names_are_unique_folder_names(coefficients: list[float], seeds: list[int]) -> None:
    found = names({"grid": {"train.sparsity.coefficient": coefficients, "train.seed": seeds}})
    assert len({name.lower() for name in found}) == len(coefficients) * len(seeds)
    for name in found:
        assert len(name) < 150
        assert not set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789_.+-")


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ({"grid": {"sae.witdh": [1]}}, "unknown key 'sae.witdh'; did you mean 'sae.width'?"),
        ({"grid": {"sae.width": [64, 1.5]}}, "sae.width=1.5, sae.width: 1.5 is not a whole number"),
        ({"grid": {"sae.width": [64, 64]}}, "are the same run"),
        ({"grid": {"train.learning_rate.peak": [1, 1.0]}}, "are the same run"),
        ({"grid": {"cache.tokens": [1, 2]}}, "share one activation store"),
        ({"grid": {"text.field": ["a"]}}, "share one activation store"),
        ({"grid": {"output": ["a", "b"]}}, "output can't be swept"),
        ({"grid": {"train.sparsity": [{}], "train.sparsity.coefficient": [1]}}, "lies inside"),
        ({"grid": {"sae.layer": [1, 2]}}, "cache.sites does not harvest"),
        ({}, "the sweep section is empty"),
    ],
)
def test_every_run_is_checked_before_anything_starts(sweep: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        expand(swept(sweep))
    assert words in str(caught.value)


def test_without_a_sweep_section() -> None:
    with pytest.raises(UserError, match="has no `sweep:` section"):
        expand(as_job(make_config()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config and its finished sweep; copy before changing it."""
    folder = tmp_path_factory.mktemp("sweep")
    config = write_pipeline(folder, sweep=SWEEP)
    assert main(["sweep", str(config)]) == 0
    return folder


def run_of(folder: Path, coefficient: str) -> Path:
    return folder / "out" / f"coefficient_{coefficient}-seed_0"


def stamps(*folders: Path) -> dict[Path, int]:
    """When each file was last written."""
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {path: path.stat().st_mtime_ns for path in files if path.name != "config.yaml"}


def test_a_sweep_leaves_everything_in_place(finished: Path) -> None:
    for coefficient, value in (("0.001", 1e-3), ("0.01", 1e-2)):
        run = run_of(finished, coefficient)
        assert read_run_config(run).train.sparsity.coefficient == value
        assert json.loads((run / "evaluation.json").read_text())["step"] == 20
        assert (run / "release" / "sae_lens" / "cfg.json").exists()
        assert (run / "metrics.jsonl").read_text().count("\n") == 4
        assert not (run / "failure.json").exists()
    assert "coefficient" in (finished / "out" / "report" / "index.html").read_text()
    assert (finished / "out" / "config.yaml").exists()


def test_started_again_it_does_nothing_twice(finished: Path) -> None:
    runs = [run_of(finished, "0.001"), run_of(finished, "0.01"), finished / "out" / "store"]
    before = stamps(*runs)
    assert main(["sweep", str(finished / "config.yaml")]) == 0
    assert stamps(*runs) == before


def test_only_what_is_missing_is_made(finished: Path) -> None:
    whole, lacking = run_of(finished, "0.001"), run_of(finished, "0.01")
    untouched = stamps(whole, lacking / "checkpoints")
    (lacking / "evaluation.json").unlink()
    shutil.rmtree(lacking / "release")
    assert main(["sweep", str(finished / "config.yaml")]) == 0
    assert stamps(whole, lacking / "checkpoints") == untouched
    assert (lacking / "evaluation.json").exists()
    assert (lacking / "release" / "gemma_scope" / "params.npz").exists()


def test_new_evaluation_settings_reach_finished_runs(finished: Path) -> None:
    run = run_of(finished, "0.001")
    weights = stamps(run / "checkpoints")
    arguments = ["sweep", str(finished / "config.yaml"), "evaluation.loss_sequences=2"]
    assert main(arguments) == 0
    assert json.loads((run / "evaluation.json").read_text())["loss_sequences"] == 2
    assert stamps(run / "checkpoints") == weights
    assert main(["sweep", str(finished / "config.yaml")]) == 0  # back, for the other tests


def test_a_dry_run_prints_which_runs_train_together(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = "{train.sparsity.coefficient: [1e-3, 1e-2, 0.1], train.batch_size: [64, 32]}"
    overrides = [f"output={finished}/dry", f"sweep.grid={grid}", "sweep.cohort.max_members=2"]
    assert main(["sweep", str(finished / "config.yaml"), *overrides, "--dry-run"]) == 0
    assert not (finished / "dry").exists()
    printed = [line.split() for line in capsys.readouterr().out.replace("│", " ").splitlines()]
    runs = {line[0]: line[-1] for line in printed if line and line[0].startswith("coefficient_")}
    assert runs == {
        "coefficient_0.001-batch_size_64": "1",
        "coefficient_0.01-batch_size_64": "1",
        "coefficient_0.1-batch_size_64": "2",
        "coefficient_0.001-batch_size_32": "3",
        "coefficient_0.01-batch_size_32": "3",
        "coefficient_0.1-batch_size_32": "4",
    }
    cohorts = [line for line in printed if len(line) > 5 and line[0] in ("1", "2", "3", "4")]
    assert [line[:5] for line in cohorts] == [
        ["1", "2", "20", "40", "1"],
        ["2", "1", "20", "20", "1"],
        ["3", "2", "40", "80", "1"],
        ["4", "1", "40", "40", "1"],
    ]
    assert " ".join(cohorts[2][5:]) == "resid_post.1, 32 rows a batch, seed 0, mesh 1 x 1"


def test_several_configs_train_side_by_side(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a cluster's job is told to do, by hand: as the sweep did it."""
    names = [run_of(finished, coefficient).name for coefficient in ("0.001", "0.01")]
    configs = []
    for name in names:
        run = read_run_config(finished / "out" / name)
        write_config(
            run.model_copy(update={"output": f"{finished}/by=hand/{name}"}), finished / name
        )
        configs.append(str(finished / name / "config.yaml"))
    command = ["train", *configs, "train.log_every_steps=20"]
    assert main(command) == 0
    for name in names:
        before, after = (
            final_state(finished / place / name, step=20) for place in ("out", "by=hand")
        )
        assert all((left == right).all() for left, right in zip(before, after, strict=True))
        assert (finished / "by=hand" / name / "metrics.jsonl").read_text().count("\n") == 1
    capsys.readouterr()
    assert main(["train", *configs, "train.log_every_steps"]) == 2
    assert "'train.log_every_steps' is neither a config that exists nor" in capsys.readouterr().err
    assert main(["train", configs[0], configs[0]]) == 2
    assert "have the same output" in capsys.readouterr().err
    assert main(["train", *configs, "output=here"]) == 2
    assert "have the same output" in capsys.readouterr().err


def test_a_failing_run_does_not_stop_the_rest(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"output={finished}/other", "sweep.grid={train.learning_rate.peak: [1e38, 1e-3]}"]
    command = ["sweep", str(finished / "config.yaml"), *overrides]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "1 of 2 runs failed" in message
    assert "not finite" in message
    assert "Traceback" not in message
    failed, good = finished / "other" / "peak_1e+38", finished / "other" / "peak_0.001"
    assert (good / "evaluation.json").exists()
    assert (good / "release").is_dir()
    assert "not finite" in json.loads((failed / "failure.json").read_text())["reason"]
    assert "not finite" in (finished / "other" / "report" / "index.html").read_text()

    assert main(["status", str(finished / "other")]) == 0
    table = capsys.readouterr().out
    assert "failed" in table
    assert "trained" in table

    before = stamps(good)
    assert main(command) == 2, "it is tried again, and fails again"
    assert stamps(good) == before


def test_a_run_of_another_config_is_not_taken_for_done(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = stamps(finished / "out")
    assert main(["sweep", str(finished / "config.yaml"), "sae.bandwidth=0.5"]) == 2
    assert "sae.bandwidth was 0.001 and is now 0.5" in capsys.readouterr().err
    assert stamps(finished / "out") == before, "the sweep's own config is as it was, too"


def test_a_signal_ends_the_sweep_and_the_same_command_goes_on(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = finished / "stopped"
    overrides = [f"output={out}", "sweep.grid={train.seed: [0, 1]}", "checkpoint.every_steps=1000"]
    command = ["sweep", str(finished / "config.yaml"), *overrides]
    place, batches = loop.place_batch, itertools.count(1)

    def stopped_in_the_first_run(*arguments: Any, **options: Any) -> Any:
        if next(batches) == 5:
            signal.raise_signal(signal.SIGTERM)
        return place(*arguments, **options)

    monkeypatch.setattr(loop, "place_batch", stopped_in_the_first_run)
    assert main(command) == 75
    assert not (out / "seed_0" / "failure.json").exists(), "to be stopped is not to fail"
    assert not (out / "seed_1").exists()
    assert main(command) == 0
    assert (out / "seed_1" / "evaluation.json").exists()


def test_one_process_at_a_time(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with folder_lock(finished / "out"):
        assert main(["sweep", str(finished / "config.yaml")]) == 2
    assert "is in use by another process" in capsys.readouterr().err


def test_a_moved_sweep_goes_on_and_harvests_nothing_anew(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All of it moved twice, seen through a link, without locks; then without its store.

    A run that is missing is trained again from the store where it lies now, to the same bits.
    """

    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    for call in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, call, no_locks)
    shutil.copytree(finished, tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "second")
    (tmp_path / "second").rename(tmp_path / "third")
    out = tmp_path / "link"
    out.symlink_to(tmp_path / "third" / "out")
    run = out / "coefficient_0.01-seed_0"
    before = (run / "evaluation.json").read_bytes()
    others = [out / "store", out / "coefficient_0.001-seed_0"]
    kept = stamps(*others)
    shutil.rmtree(run)
    assert main(["sweep", str(out)]) == 0
    assert (run / "evaluation.json").read_bytes() == before
    assert (run / "release").is_dir()
    assert stamps(*others) == kept

    store, hidden = finished / "out" / "store", finished / "hidden"
    (out / "store").rename(tmp_path / "elsewhere")
    store.rename(hidden)  # the old place, which would serve as well
    (run / "evaluation.json").unlink()
    capsys.readouterr()
    try:
        assert main(["sweep", str(out)]) == 2
        assert "If it has moved, say where it is: cache.path=FOLDER" in capsys.readouterr().err
        assert main(["evaluate", str(out)]) == 2
        assert "say with cache.path=FOLDER where the store has moved" in capsys.readouterr().err
        assert not store.exists(), "nothing is harvested anew"
        assert not (out / "store").exists()
        assert main(["sweep", str(out), f"cache.path={tmp_path}/elsewhere"]) == 0
        assert (run / "evaluation.json").read_bytes() == before
    finally:
        hidden.rename(store)

"""Runs, sweeps and stores that were moved, copied and renamed are found where they lie now."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from sae_train.config.file import read_run_config, write_config
from tests.support.configs import make_config


def lay_out(root: Path, *, store: str = "sweep/store", run: str = "sweep/run") -> Path:
    """A run and its store below `root`, and weights beside them; returns the run's folder."""
    config = make_config(output=str(root / run), cache_path=str(root / store))
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"weights": str(root / "gemma")})}
    )
    write_config(config, root / run)
    (root / store).mkdir(parents=True, exist_ok=True)
    (root / store / "manifest.json").touch()
    (root / "gemma").mkdir()
    return root / run


def places(folder: Path) -> tuple[str, str]:
    config = read_run_config(folder)
    return config.output, config.cache.path


def test_where_nothing_moved_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert places(run) == places(Path("sweep/run")) == (str(run), str(tmp_path / "sweep/store"))


@pytest.mark.parametrize("store", ["sweep/store", "stores/one", "sweep/run/store"])
def test_a_tree_moved_twice_is_found_there(store: str, tmp_path: Path):
    run = lay_out(tmp_path / "first", store=store)
    (tmp_path / "first").rename(tmp_path / "second")
    (tmp_path / "second").rename(tmp_path / "third")
    now = tmp_path / "third"
    assert places(now / "sweep/run") == (str(now / "sweep/run"), str(now / store))
    assert read_run_config(now / "sweep/run").model.weights == str(now / "gemma")
    assert not run.exists()


def test_a_copy_reads_its_own_store(tmp_path: Path):
    lay_out(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    assert places(tmp_path / "copy/sweep/run")[1] == str(tmp_path / "copy/sweep/store")
    weights = read_run_config(tmp_path / "copy/sweep/run").model.weights
    assert weights == str(tmp_path / "first/gemma"), "the same weights, as long as they are there"


def test_a_run_moved_alone_reads_the_old_store(tmp_path: Path):
    run = lay_out(tmp_path)
    (tmp_path / "far/away").mkdir(parents=True)
    run.rename(tmp_path / "far/away/renamed")
    assert places(tmp_path / "far/away/renamed") == (
        str(tmp_path / "far/away/renamed"),
        str(tmp_path / "sweep/store"),
    )


def test_a_folder_that_is_no_store_is_not_taken_for_one(tmp_path: Path):
    run = lay_out(tmp_path / "first", store="stores/one")
    shutil.copytree(run, tmp_path / "second/sweep/run")
    (tmp_path / "second/stores/one").mkdir(parents=True)
    assert places(tmp_path / "second/sweep/run")[1] == str(tmp_path / "first/stores/one")


@pytest.mark.parametrize("store", ["sweep/store", "stores/one"])
def test_through_a_link(store: str, tmp_path: Path):
    """What lies beside the folder is beside the link or beside what it points to."""
    lay_out(tmp_path / "first", store=store)
    (tmp_path / "first").rename(tmp_path / "moved")
    (tmp_path / "links").mkdir()
    link = tmp_path / "links/run"
    link.symlink_to(tmp_path / "moved/sweep/run")
    assert places(link) == (str(link), str(tmp_path / "moved" / store))


def test_relative_paths_are_those_of_the_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As the demo's: found from another folder too."""
    monkeypatch.chdir(tmp_path)
    lay_out(Path("."), store="store", run="runs/demo")
    monkeypatch.chdir("/")
    assert places(tmp_path / "runs/demo")[1] == str(tmp_path / "store")
    relative = os.path.relpath(tmp_path / "runs/demo")
    assert places(Path(relative))[1] == os.path.relpath(tmp_path / "store")


def test_overrides_are_heard_after_that(tmp_path: Path):
    lay_out(tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "second")
    run = tmp_path / "second/sweep/run"
    assert read_run_config(run, ["cache.path=/told"]).cache.path == "/told"
    assert read_run_config(run, ["output=/told"]).output == "/told"
    assert read_run_config(run, ["output=/told"]).cache.path == str(run.parent / "store")


@pytest.mark.parametrize(
    ("output", "store", "folder", "wanted"),
    [
        ("gs://old/runs/a", "gs://old/runs/store", "gs://new/b", "gs://new/store"),
        ("gs://old/runs/a", "/disk/store", "gs://new/b", None),
        ("gs://old/runs/a", "gs://old/runs/store", "/copied/b", None),
        ("gs://old/a/", "gs://old/a/store", "gs://old/a", None),
    ],
)
def test_in_buckets(
    output: str, store: str, folder: str, wanted: str | None, monkeypatch: pytest.MonkeyPatch
):
    from activation_cache.storage.bucket import BucketPath
    from activation_cache.storage.files import storage_path
    from sae_train.config.places import moved_places

    for name in ("exists", "is_dir"):
        monkeypatch.setattr(BucketPath, name, lambda path: "old" not in str(path))
    values = {"output": output, "cache": {"path": store}, "model": {"weights": "google/gemma"}}
    assert moved_places(values, storage_path(folder)).get("cache.path") == wanted

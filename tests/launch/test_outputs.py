"""The command on outputs that can't be written, on linked folders, and without a home."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path

import jax
import pytest

from activation_cache.storage import files
from launch.cli import main
from sae_train.checkpoint.trained import load_trained
from tests.support.pipeline import write_pipeline

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, its store, and a trained, evaluated and exported run on it."""
    folder = tmp_path_factory.mktemp("outputs")
    config = write_pipeline(folder)
    for command in ("harvest", "train", "evaluate", "export"):
        assert main([command, str(config)]) == 0
    return folder


def _bad_outputs(folder: Path, *, making: bool) -> dict[str, str]:
    """Outputs that no folder can be made of, and what is said of them."""
    (folder / "file").touch()
    (folder / "nowhere").symlink_to(folder / "missing" / "there")
    (folder / "loop").symlink_to(folder / "loop")
    lost = "a link that leads nowhere"
    return {
        f"{folder}/file": "a file",
        f"{folder}/file/below": "a part of the path is a file, not a folder",
        f"{folder}/nowhere": lost,
        f"{folder}/loop": lost if making else "its symbolic links go round in a circle",
        f"{folder}/{'o' * 300}": "the name is too long",
        f"{folder}/a\0b": "the character NUL",
    }


@pytest.mark.parametrize(
    ("command", "key"),
    [("train", "output"), ("harvest", "cache.path"), ("sweep", "output")],
)
def test_an_output_that_cannot_be_written_is_said_in_words(
    harvested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, key: str
):
    config, sweep = str(harvested / "config.yaml"), "sweep={grid: {train.seed: [1, 2]}}"
    options = [sweep] if command == "sweep" else []
    for output, words in _bad_outputs(tmp_path, making=command != "train").items():
        assert main([command, config, f"{key}={json.dumps(output)}", *options]) == 2, output
        told = capsys.readouterr().err
        assert words in told, (output, told)
        assert "Traceback" not in told


@pytest.mark.parametrize("command", ["status", "report", "export", "evaluate", "inspect"])
def test_a_target_that_is_no_folder_is_said_in_words(
    harvested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
):
    for target in _bad_outputs(tmp_path, making=False):
        assert main([command, target]) == 2, target
        assert "Traceback" not in capsys.readouterr().err


def test_what_a_disk_refuses_anywhere_is_said_in_words(
    harvested: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(error: OSError) -> None:
        def table(*_: object) -> None:
            raise error

        monkeypatch.setattr("launch.show.status.status_table", table)

    fail(OSError(errno.EDQUOT, "", "/data/x"))
    assert main(["status", str(harvested / "out")]) == 2
    assert "cannot use /data/x: the disk quota is used up" in capsys.readouterr().err
    fail(OSError(errno.ESTALE, ""))  # read from an open file, an error names none
    assert main(["status", str(harvested / "out")]) == 2
    assert "cannot use an open file: the file system it is on" in capsys.readouterr().err
    for error in (FileNotFoundError(errno.ENOENT, "", "/gone"), OSError(errno.ETIMEDOUT, "")):
        fail(error)
        with pytest.raises(OSError, match=r"\[Errno"):  # bugs, and what has no file
            main(["status", str(harvested / "out")])


def test_a_user_without_a_home_trains(
    harvested: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("jax.device_count", lambda: 1)  # with eight CPUs nothing is kept anyway
    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name)
    options = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    before = [getattr(jax.config, name) for name in options]
    jax.config.update(options[0], None)
    jax.config.update(options[1], True)
    try:
        train = ["train", str(harvested / "config.yaml"), f"output={harvested}/homeless"]
        assert main(train) == 0
    finally:
        for name, value in zip(options, before, strict=True):
            jax.config.update(name, value)
    told = capsys.readouterr().err
    assert told.count("compiled programs aren't kept, as this user has no home") == 1, told


def test_every_folder_may_be_a_link(harvested: Path, tmp_path: Path):
    """Weights, text, store, run, its checkpoints and its release lie on another disk."""
    disk, here = tmp_path / "disk", tmp_path / "here"
    for name in ("store", "run", "checkpoints", "release"):
        (disk / name).mkdir(parents=True)
    here.mkdir()
    for name in ("store", "run"):
        (here / name).symlink_to(disk / name)
    for name in ("checkpoints", "release"):
        (disk / "run" / name).symlink_to(disk / name)
    (here / "gemma").symlink_to(harvested / "gemma")
    (here / "text").symlink_to(harvested)
    (disk / "release" / "gemma_scope").mkdir()
    (disk / "release" / "mine.txt").write_text("mine")
    config = [str(harvested / "config.yaml"), f"cache.path={here}/store", f"output={here}/run",
              f"model.weights={here}/gemma", f"text.source=[{here}/text/*.txt]"]  # fmt: skip
    run = str(here / "run")
    for command in (["harvest", *config], ["train", *config], ["train", *config, "--fresh"],
                    ["evaluate", run], ["export", run], ["report", run], ["status", run],
                    ["inspect", f"{here}/store", "--verify"]):  # fmt: skip
        assert main(command) == 0, command
    links = [here / "store", here / "run", disk / "run" / "checkpoints", disk / "run" / "release"]
    assert all(link.is_symlink() for link in links)
    assert sorted(os.listdir(disk / "checkpoints")) == ["10", "20"]
    assert (disk / "release" / "mine.txt").read_text() == "mine"
    usual, linked = load_trained(harvested / "out"), load_trained(run)
    assert all((linked.params[name] == values).all() for name, values in usual.params.items())
    name = "release/gemma_scope/params.npz"
    files_of = [place / name for place in (harvested / "out", here / "run")]
    found = [next(one.parent.rglob("params.npz")).read_bytes() for one in files_of]
    assert found[0] == found[1]


def test_a_full_disk_under_any_file_is_one_message(
    harvested: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Evaluation, release and report find no room when their bytes go to the disk."""
    run = str(harvested / "out")

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    (harvested / "out" / "evaluation.json").unlink()
    logging.getLogger().setLevel(logging.INFO)
    for command in (["evaluate", run], ["export", run], ["report", run]):
        with monkeypatch.context() as patch:
            patch.setattr(files, "sync", full)
            assert main(command) == 2, command
        assert "the disk is full" in capsys.readouterr().err
        assert main(command) == 0, command

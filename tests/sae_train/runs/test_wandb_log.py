"""Weights & Biases: what is sent, under which id, and that nothing of it can end a run."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from activation_cache.runtime.errors import UserError
from launch.cli import main
from sae_train.config.file import write_config
from sae_train.config.run import Config
from sae_train.runs import wandb_log
from sae_train.runs.wandb_log import WandbSender, send, send_finished
from tests.support.configs import make_config


def make_run(folder: Path, *, wandb: dict[str, Any] | None = None) -> Config:
    """The folder of a run of five logged steps."""
    config = make_config(output=str(folder), wandb=wandb)
    write_config(config, folder)
    rows = [{"step": step, "tokens": 64 * step, "loss": step / 16, "fvu": None} for step in range(1, 6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config


class Board:
    """Stands for the package `wandb`: what it was given, or an error in place of anything."""

    def __init__(self, *, has_step: int = -1, error: Exception | None = None) -> None:
        self.starting_step, self.offline = has_step + 1, False
        self.error = error
        self.steps: list[int] = []
        self.ids: list[str] = []

    def init(self, *, id: str, **_: Any) -> Board:
        if self.error is not None:
            raise self.error
        self.ids.append(id)
        return self

    def log(self, row: dict[str, Any], *, step: int) -> None:
        self.steps.append(step)

    def finish(self) -> None:
        pass

    Settings = SimpleNamespace


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    board = Board()
    monkeypatch.setitem(sys.modules, "wandb", board)
    return board


@pytest.mark.slow
def test_the_real_package_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import wandb

    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    run = tmp_path / "run"
    config = make_run(run, wandb={"project": "saes", "mode": "offline", "tags": ["small"]})
    assert send(run, config=config) == 5
    wandb.teardown()  # as at a process's end: what is buffered is written
    own = json.loads((run / "wandb.json").read_text())["id"]
    [first] = run.glob(f"wandb/offline-run-*/run-{own}.wandb")
    written = first.read_bytes()
    for expected in (b"saes", b"small", own.encode(), b"fvu", b"0.3125"):
        assert expected in written
    time.sleep(1.1)  # W&B names the folder after the second
    assert send(run, config=config, from_step=3) == 2, "a resumed run has sent the others"
    wandb.teardown()
    assert len([*run.glob(f"wandb/offline-run-*/run-{own}.wandb")]) == 2


def test_rows_are_sent_once_under_the_id_of_the_folder(tmp_path: Path, board: Board):
    config = make_run(tmp_path, wandb={"project": "saes"})
    assert send(tmp_path, config=config, from_step=4) == 5, "the first time: none was sent before"
    board.starting_step = 4
    assert send(tmp_path, config=config) == 2, "the server says which it has"
    assert board.steps == [1, 2, 3, 4, 5, 4, 5]
    assert len({*board.ids}) == 1


def test_rows_are_sent_as_they_come(tmp_path: Path, board: Board):
    config = make_run(tmp_path, wandb={"project": "saes"})
    file = tmp_path / "metrics.jsonl"
    looks = iter([False, False, True])

    def wait() -> bool:
        is_last = next(looks)
        if is_last:
            with file.open("a") as rows:
                rows.write('{"step": 6, "tokens": 384}\n')
        return is_last

    assert send(tmp_path, config=config, wait=wait) == 6
    assert board.steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("error", [RuntimeError("no\nkey"), TimeoutError()])
def test_what_the_package_raises_is_told_in_a_line(
    tmp_path: Path,
    board: Board,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
):
    config = make_run(tmp_path, wandb={"project": "saes"})
    board.error = error
    with pytest.raises(UserError, match="W&B did not take its metrics"):
        send_finished(tmp_path, config=config)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(wandb_log.signal, "signal", lambda *_: None)
    assert wandb_log._main(str(tmp_path), "0") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "training goes on: " in line
    assert type(error).__name__ in line


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = make_run(tmp_path, wandb={"project": "saes"})
    with pytest.raises(UserError, match="install the extra 'wandb'"):
        send_finished(tmp_path, config=config)


def sender(folder: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> WandbSender:
    monkeypatch.setattr(wandb_log, "_command", lambda *_: command)
    return WandbSender(make_run(folder, wandb={"project": "saes"}))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        # -S -E: without `site` a Python starts in 10 ms.
        ([sys.executable, "-SEc", "import time; time.sleep(600)"], "did not take the last rows"),
        (["/no/such/python"], "nothing is sent to W&B"),
    ],
    ids=["hangs", "can't start"],
)
def test_training_does_not_wait_for_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    command: list[str],
    words: str,
):
    monkeypatch.setattr(wandb_log, "_SECONDS_FOR_THE_LAST_ROWS", 0.2)
    start = time.monotonic()
    with sender(tmp_path, monkeypatch, command) as sending:
        sending.start(from_step=0, anew=False)
    assert time.monotonic() - start < 300
    assert words in caplog.text


def test_it_ends_when_training_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = "import sys; sys.stdin.read(); open(sys.argv[1], 'w').close()"
    command = [sys.executable, "-SEc", script, str(tmp_path / "ended")]
    (tmp_path / "wandb.json").write_text('{"id": "old"}')
    with sender(tmp_path, monkeypatch, command) as sending:
        sending.start(from_step=0, anew=True)
        assert not (tmp_path / "ended").exists()
    assert (tmp_path / "ended").exists()
    assert not (tmp_path / "wandb.json").exists(), "a run begun anew has another id"


def test_the_command_sends_a_finished_run(
    tmp_path: Path, board: Board, capsys: pytest.CaptureFixture[str]
):
    make_run(tmp_path)
    log = ["log", str(tmp_path)]
    for arguments, words in (
        (log, "say where the metrics are to be sent"),
        ([*log, "--wandb"], "give train.wandb.project=NAME too"),
        ([*log, "--wandb", "train.seed=3"], "'train.seed=3' has no effect here"),
    ):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err
    assert main([*log, "--wandb", "train.wandb.project=saes"]) == 0
    assert board.steps == [1, 2, 3, 4, 5]
    assert "5 rows sent to W&B" in capsys.readouterr().out

"""The command: help, exit statuses, one message for a mistake, signals."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from activation_cache.runtime.errors import Interrupted, UserError
from launch import cli
from launch.cli import COMMANDS, main
from launch.config.job import load_job
from launch.processes.signals import StopFlag, stop_on_signals
from launch.targets import target_config
from tests.support.pipeline import ROOT, sae_process, write_pipeline

pytestmark = pytest.mark.slow

NAMES = [command.name for command in COMMANDS]


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config and its store."""
    folder = tmp_path_factory.mktemp("cli")
    config = write_pipeline(folder)
    assert main(["harvest", str(config)]) == 0
    return folder


def test_every_command_of_the_contract_is_there() -> None:
    contract = (
        "harvest rollout train evaluate latents probe browse explain export sweep report log plan "
        "status inspect check import"
    )
    assert sorted(NAMES) == sorted(contract.split())


@pytest.mark.parametrize("command", COMMANDS, ids=NAMES)
def test_help_has_an_example_that_parses(
    command: cli.Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command.name, "--help"]) == 0
    text = capsys.readouterr().out
    assert command.example in text
    words = shlex.split(command.example)
    assert words[:2] == ["sae", command.name]
    arguments = cli._parse(words[1:])
    assert arguments.command == command.name
    if words[2].endswith(".yaml"):
        load_job(ROOT / words[2], arguments.overrides)


def test_overview_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert command.summary in text
    assert main(["--version"]) == 0
    assert re.match(r"sae \S+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "required"),
        ("trian x.yaml", "invalid choice: 'trian'"),
        ("train", "required"),
        ("train x.yaml --frsh", "--frsh"),
        ("status runs a=b", "a=b"),
        ("train nowhere.yaml", "nowhere.yaml: no such config file"),
        ("report nowhere", "no such config file"),
        (f"plan {ROOT}/configs/dmeo.yaml", "no such config file; did you mean"),
        ("inspect nowhere", "does not exist"),
        (f"inspect {ROOT}/configs/demo.yaml", "is a config: give the store or the output folder"),
    ],
)
def test_mistakes_on_the_command_line_exit_2(
    line: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


def test_a_mistake_is_one_message(harvested: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(harvested / "config.yaml"), "train.batchsize=3"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "sae train: override 'train.batchsize=3': unknown key 'train.batchsize'; did you mean "
        "'train.batch_size'?\n"
    )


def test_train_without_a_store_names_the_remedy(
    harvested: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"cache.path={harvested}/none", f"output={harvested}/none-run"]
    assert main(["train", str(harvested / "config.yaml"), *overrides]) == 2
    assert "Run `sae harvest`" in capsys.readouterr().err
    assert not (harvested / "none").exists(), "a mistake leaves nothing behind"
    assert not (harvested / "none-run").exists(), "a mistake leaves nothing behind"


def test_train_refuses_a_sweep(harvested: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(harvested / "config.yaml")
    assert main(["train", config, "sweep.grid.train.seed=[0, 1]"]) == 2
    assert f"`sae sweep {config}`" in capsys.readouterr().err


def test_a_bad_sweep_is_refused_by_every_command(
    harvested: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(harvested / "config.yaml")
    assert main(["harvest", config, "sweep.grid.sae.width=[64, x]"]) == 2
    assert "sae.width: 'x' is not a whole number" in capsys.readouterr().err


def test_a_layer_the_model_lacks(harvested: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sites = "cache.sites=[{site: resid_post, layers: [1, 9]}]"
    other = f"cache.path={harvested}/layers"
    assert main(["harvest", str(harvested / "config.yaml"), sites, other]) == 2
    assert "9" in capsys.readouterr().err


def test_overrides_may_stand_around_options() -> None:
    arguments = cli._parse(["train", "c.yaml", "a=1", "--fresh", "b=2", "-q"])
    assert arguments.overrides == ["a=1", "b=2"]
    assert arguments.fresh
    assert arguments.quiet


def test_other_exceptions_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_with(error: Exception) -> None:
        def handler(arguments: object, stop: StopFlag) -> int:
            raise error

        broken = dataclasses.replace(COMMANDS[0], handler=handler)
        monkeypatch.setattr(cli, "COMMANDS", (broken,))

    fail_with(Interrupted("stopped"))
    assert main(["harvest", "x"]) == 75
    fail_with(UserError("wrong"))
    assert main(["harvest", "x"]) == 2
    fail_with(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["harvest", "x"])


def test_a_moved_run_is_found_where_it_is(harvested: Path, tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "config.yaml").write_text((harvested / "config.yaml").read_text())
    assert target_config(str(tmp_path / "moved")).output == str(tmp_path / "moved")


def test_inspect_and_status(harvested: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(harvested / "out" / "store"), "--verify"]) == 0
    text = capsys.readouterr().out
    assert "resid_post.1" in text
    assert "1,000" in text
    assert main(["status", str(harvested / "config.yaml")]) == 0
    assert "not started" in capsys.readouterr().out
    assert main(["inspect", str(harvested / "gemma"), "--verify"]) == 2
    assert "--verify is for an activation store" in capsys.readouterr().err


def test_verify_names_the_damaged_file(
    harvested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    shutil.copytree(harvested / "out" / "store", store)
    shard = next(p for p in sorted((store / "resid_post.1").rglob("*")) if p.stat().st_size > 5000)
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    assert main(["inspect", str(store), "--verify"]) == 2
    assert str(shard.relative_to(store)) in capsys.readouterr().err


def test_stop_signals(harvested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGTERM saves and exits 75; another config is refused; the same command continues."""
    output = tmp_path / "run"
    budget = ["train.tokens=128_000", "checkpoint.every_steps=1000"]
    command = ["train", str(harvested / "config.yaml"), f"output={output}", *budget]
    process = sae_process(*command)
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=600)
    assert process.returncode == 75, log
    assert "The same command continues." in log
    saved = max(int(path.name) for path in (output / "checkpoints").iterdir())
    assert 0 < saved < 2000

    assert main(["status", str(output)]) == 0
    assert f"stopped │ {saved}/2000" in re.sub(" +", " ", capsys.readouterr().out)
    assert main([*command, "train.tokens=64_000"]) == 2, "another budget is another run"
    assert "train.tokens was 128000 and is now 64000" in capsys.readouterr().err
    process = sae_process(*command)
    _, log = process.communicate(timeout=600)
    assert process.returncode == 0, log
    assert f"going on from the checkpoint at step {saved}" in log
    assert "2000" in {path.name for path in (output / "checkpoints").iterdir()}


def test_sigint_during_harvest(harvested: Path, tmp_path: Path) -> None:
    config = str(harvested / "config.yaml")
    command = ["harvest", config, f"cache.path={tmp_path}/store"]
    process = sae_process(*command)
    deadline = time.monotonic() + 300
    while not (tmp_path / "store").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, log = process.communicate(timeout=600)
    assert process.returncode == 75, log
    process = sae_process(*command)
    out, log = process.communicate(timeout=600)
    assert process.returncode == 0, log
    for line in log.splitlines():
        assert re.match(r"\d\d:\d\d:\d\d \S", line), f"not a line of ours: {line}"
    assert out == ""


_SECOND_SIGINT = """
import os, signal, time
from launch.processes.signals import stop_on_signals
with stop_on_signals() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)
    assert stop()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
"""


def test_a_second_sigint_ends_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SECOND_SIGINT], cwd=ROOT, capture_output=True, timeout=300
    )
    assert done.returncode == -signal.SIGINT
    assert b"saving and stopping" in done.stderr


def test_a_stage_that_saves_at_its_end_is_interrupted_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stop:
        with pytest.raises(Interrupted), stop.at_once():
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted), stop.at_once():
            pytest.fail("a signal that came before counts too")
        assert stop()
    assert signal.getsignal(signal.SIGTERM) is before


def test_help_is_quick_for_it_loads_no_jax() -> None:
    code = (
        "import sys, launch.cli; launch.cli.main(['--help']);"
        "sys.exit(bool({'jax', 'numpy', 'tensorstore', 'orbax', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=300)
    assert done.returncode == 0

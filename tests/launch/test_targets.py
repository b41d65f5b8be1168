"""Which runs a folder holds: one rule for status, evaluate, export and report."""

from __future__ import annotations

import io
import logging
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from launch.cli import main
from launch.config.job import Job
from launch.show.status import status_table
from launch.sweep.expand import expand
from launch.targets import check_sweep_folder, target_config, trained_folders
from sae_train.config.file import write_config
from sae_train.report.page import write_report
from sae_train.runs.folder import run_folders
from tests.support.configs import make_config
from tests.support.oracles.latents import write_latents_folder
from tests.support.run_folders import sweep_config, write_run

NAMES = {"coefficient_0.001-width_16", "coefficient_0.002-width_16"}
FIRST = {"coefficient_0.001-width_2048", "coefficient_0.004-width_2048"}


def write_sweep(folder: Path, *, coefficients: list[float], width: int, train: int = 99) -> Job:
    """A sweep's folder as `sae sweep` leaves it, the first `train` of its runs trained."""
    config = sweep_config(folder, coefficients=coefficients, widths=[width])
    write_config(config, folder)
    for run in expand(config)[:train]:
        write_run(run.config, l0=20)
    return config


@pytest.fixture
def two_sweeps(tmp_path: Path) -> Path:
    """A folder in which one sweep was made, then another, whose second run isn't trained yet."""
    folder = tmp_path / "out"
    write_sweep(folder, coefficients=[1e-3, 4e-3], width=2048)
    write_sweep(folder, coefficients=[1e-3, 2e-3], width=16, train=1)
    return folder


def shown(folder: Path, *, column: int = 0) -> list[str]:
    """The names in the table of `sae status`, in its order, or another column."""
    console = Console(file=io.StringIO(), width=300)
    console.print(status_table(target_config(str(folder))))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return [line.split("│")[1:-1][column].strip() for line in lines if line.startswith("│")]


def reported(folder: Path) -> int:
    """How many runs the report's table has."""
    return write_report(folder).read_text().count('<td class="left files">')


def test_an_earlier_config_s_runs_count_everywhere(two_sweeps: Path):
    trained = FIRST | {"coefficient_0.001-width_16"}
    assert shown(two_sweeps) == [*sorted(NAMES), *sorted(FIRST)]
    assert {run.name for run in trained_folders(target_config(str(two_sweeps)))} == trained
    assert {run.name for run in run_folders(two_sweeps)} == trained
    assert reported(two_sweeps) == len(trained)


def headings(folder: Path) -> list[str]:
    return [str(column.header) for column in status_table(target_config(str(folder))).columns]


def test_status_says_which_runs_have_latents(two_sweeps: Path):
    def latents(folder: Path) -> list[str]:
        return shown(folder, column=headings(folder).index("latents"))

    assert "latents" not in headings(two_sweeps)
    write_latents_folder(two_sweeps / "coefficient_0.001-width_16", F=4)
    assert latents(two_sweeps) == ["outdated", "-", "no", "no"]
    run = write_run(make_config(output=str(two_sweeps.parent / "one")), l0=20, steps=100)
    write_latents_folder(run, F=4)
    assert latents(run) == ["yes"]
    (run / "checkpoints" / "200").mkdir()
    assert latents(run) == ["outdated"]


def test_copies_renamed_runs_and_other_sweeps_are_named_and_left_out(two_sweeps: Path, caplog):
    before = shown(two_sweeps)
    shutil.copytree(two_sweeps / "coefficient_0.001-width_16", two_sweeps / "a copy")
    write_sweep(two_sweeps / "inner", coefficients=[1e-3], width=16)
    for look in (shown, reported, lambda folder: trained_folders(target_config(str(folder)))):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = look(two_sweeps)
        assert "left out, for the config inside was made for another place" in caplog.text
        assert "): a copy, inner. To count one" in caplog.text
        if look is shown:
            assert found == before
    assert reported(two_sweeps) == 3


@pytest.mark.parametrize("data", [b"- 1\n", b"3", b"", b"\xae: ["])
def test_a_run_s_config_that_is_none_is_named(two_sweeps: Path, data: bytes, capsys):
    damaged = two_sweeps / "coefficient_0.001-width_16/config.yaml"
    damaged.write_bytes(data)
    for command in ("status", "report", "export"):
        assert main([command, str(two_sweeps)]) == 2
        assert str(damaged) in capsys.readouterr().err


def test_a_moved_sweep_keeps_its_runs(two_sweeps: Path, caplog):
    moved = two_sweeps.rename(two_sweeps.parent / "elsewhere")
    with caplog.at_level(logging.WARNING):
        assert {run.name for run in run_folders(moved)} >= FIRST
    assert not caplog.records


def test_a_second_config_is_not_written_over_the_first_in_silence(two_sweeps: Path, caplog):
    with caplog.at_level(logging.WARNING):
        check_sweep_folder(target_config(str(two_sweeps)))
    assert "holds 2 runs that this sweep doesn't make: " + ", ".join(sorted(FIRST)) in caplog.text
    caplog.clear()
    first = sweep_config(two_sweeps, coefficients=[1e-3, 4e-3, 2e-3], widths=[2048, 16])
    chosen = {"sweep": first.sweep.model_copy(update={"only": ["*_0.004-width_16"]})}
    with caplog.at_level(logging.WARNING):
        check_sweep_folder(first.model_copy(update=chosen))
    assert not caplog.records, "what `only` leaves out is the sweep's own"


def test_a_sweep_and_a_run_do_not_share_a_folder(two_sweeps: Path, tmp_path: Path, capsys):
    config = two_sweeps / "config.yaml"
    before = config.read_bytes()
    assert main(["train", str(config), "sweep=null"]) == 2
    assert "is the folder of a sweep" in capsys.readouterr().err
    assert config.read_bytes() == before
    run = write_run(make_config(output=str(tmp_path / "run"), tokens=64 * 400), l0=20)
    assert main(["sweep", str(config), f"output={run}"]) == 2
    assert "give the sweep another `output`" in capsys.readouterr().err

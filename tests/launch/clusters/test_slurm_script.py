"""Batch scripts without a Slurm: what they say, what they refuse, how they are submitted."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_cache.runtime.errors import UserError
from launch.cli import main
from launch.clusters import slurm
from launch.clusters.slurm_script import render, sbatch_quote, script_folder
from launch.config.job import Job, load_job
from launch.config.slurm import time_seconds
from sae_train.config.file import with_values, write_config
from tests.support.servers.slurm_programs import NASTY, make, programs, script

ROLLING = {"cache.rolling": {"buckets": 4}, "cache.tokens": 10**6}


def sbatch_lines(text: str) -> list[str]:
    return [line[8:] for line in text.splitlines() if line.startswith("#SBATCH ")]


def test_a_sweep_is_four_jobs_and_what_is_asked_for_reaches_them() -> None:
    config = make(
        nodes=2,
        tasks_per_node=4,
        mesh=(2, 4),
        partition="gpu,long",
        account="p.123",
        qos="high@x",
        constraint="[a100*2&ib]|h100",
        gres="gpu:a100:4",
        time="1-12:00",
        cpus_per_task=8,
        memory="64G",
        at_once=2,
        sbatch=["--exclusive", "--mail-type=END,FAIL", '--comment="two words"'],
        setup=["module load cuda", "export A='b c'"],
        python="/opt/my env/bin/python",
        signal_seconds=300,
    )
    scripts = render(config, command="sweep")
    assert [one.stage for one in scripts] == ["harvest", "train", "evaluate", "report"]
    train = script(config).text
    assert sbatch_lines(train)[:4] == [
        "--job-name=sae-train-test",
        f"--chdir={sbatch_quote(os.getcwd())}",
        f"--output={sbatch_quote(os.path.abspath('run/slurm/train-%A_%a.log'))}",
        "--open-mode=append",
    ]
    assert set(sbatch_lines(train)[4:]) == {
        "--requeue",
        "--signal=B:USR1@300",
        "--array=0-1%2",
        "--partition=gpu,long",
        "--account=p.123",
        "--qos=high@x",
        "--constraint=[a100*2&ib]|h100",
        "--gres=gpu:a100:4",
        "--time=1-12:00",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--cpus-per-task=8",
        "--mem=64G",
        "--exclusive",
        "--mail-type=END,FAIL",
        '--comment="two words"',
    }
    assert "\nmodule load cuda\nexport A='b c'\nsae=('/opt/my env/bin/python' -m" in train
    assert "tasks=(--nodes=2 --ntasks=8 --cpus-per-task=8)" in train
    report = sbatch_lines(script(config, "report").text)
    assert {"--nodes=1", "--ntasks-per-node=1", "--partition=gpu,long"} <= set(report)
    assert not [line for line in report if line.startswith(("--gres", "--constraint", "--array"))]


def test_scripts_are_bash_and_configs_travel_as_local() -> None:
    config = make(NASTY, heartbeat_seconds=20)
    for one in render(config, command="sweep"):
        subprocess.run(["bash", "-n"], input=one.text, text=True, check=True)
        for name, text in one.files.items():
            if name.endswith(".yaml"):
                launch = yaml.safe_load(text)["launch"]
                assert (launch["on"], launch["heartbeat_seconds"]) == ("local", 20)
    train = script(config)
    assert train.cohorts == (("coefficient_0.001", "coefficient_0.01"), ("coefficient_0.1",))
    assert sorted(train.files)[1] == "runs/coefficient_0.01.yaml"
    assert f"{NASTY}/coefficient_0.01" in train.files["runs/coefficient_0.01.yaml"].replace(
        "''", "'"
    )


BAD = [
    ("partition", "two words", "one word"),
    ("partition", "a'b", "one word"),
    ("account", 'a"b', "one word"),
    ("qos", "a\nb", "one word"),
    ("gres", "gpu#1", "one word"),
    ("constraint", "a\\b", "one word"),
    ("partition", "--wrap=x", "starts with '-'"),
    ("partition", "", "one word"),
    ("time", "1h", "not one of Slurm's times"),
    ("time", "2", "asked to stop"),
    ("memory", "64 GB", "not an amount of memory"),
    ("setup", ["a\nb"], "must be one line"),
    ("setup", ["a\x00b"], "must be one line"),
    ("sbatch", ["exclusive"], "not an option of sbatch"),
    ("sbatch", ["--comment=a\n#SBATCH --wrap=x"], "must be one line"),
    ("sbatch", ["--array=0-3"], "--array is set by the scripts"),
    ("sbatch", ["-d afterok:1"], "-d is set by the scripts"),
    ("sbatch", ["--no-requeue"], "--no-requeue is set by the scripts"),
    ("sbatch", ["--comment=a # b"], "takes what follows '#'"),
    ("python", "a\nb", "must be one line"),
    ("nodes", 0, "1"),
    ("heartbeat_seconds", 4, "5"),
]


@pytest.mark.parametrize(("key", "value", "words"), BAD)
def test_what_a_script_cannot_hold_is_refused(
    tmp_path: Path, key: str, value: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(make(sweep=False), tmp_path)
    override = f"launch={json.dumps({'on': 'slurm', key: value})}"
    assert main(["train", str(tmp_path), override, "--dry-run"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert words in said
    assert f"launch.{key}" in said
    assert not (tmp_path / "slurm").exists()


def test_jobs_that_train_on_a_rolling_store_harvest_it_one_after_the_other() -> None:
    config = with_values(make(at_once=3), ROLLING, source="test")
    scripts = render(config, command="sweep")
    assert [one.stage for one in scripts] == ["train", "evaluate", "report"]
    assert re.search(r"#SBATCH --array=0-\d+%1\n", script(config).text)
    several = with_values(make(tasks_per_node=2, mesh=(2, 1)), ROLLING, source="test")
    with pytest.raises(UserError, match="one job of a single process, and launch starts 2"):
        render(several, command="sweep")


def test_a_harvest_has_a_mesh_of_its_own() -> None:
    config = make(nodes=2, mesh=(1, 2))
    config = with_values(config, {"cache.mesh": {"data": 4, "model": 3}}, source="test")
    assert "--nodes=2 --ntasks=2" in script(config, "harvest").text
    assert "JAX_NUM_CPU_DEVICES:-6}" in script(config, "harvest").text
    assert "JAX_NUM_CPU_DEVICES:-1}" in script(config, "train").text
    odd = with_values(config, {"cache.mesh": {"data": 3, "model": 1}}, source="test")
    with pytest.raises(UserError, match=r"mesh's 3 devices \(cache\.mesh\.data \* cache\.mesh"):
        script(odd)


def test_processes_must_share_mesh_and_gpus() -> None:
    with pytest.raises(UserError, match="4 processes, which do not divide the mesh's 2 devices"):
        script(make(nodes=4, mesh=(1, 2)))
    with pytest.raises(UserError, match="set tasks_per_node to 8"):
        make(nodes=2, gres="tmp:1,gpu:h100:8", mesh=(2, 1))
    make(nodes=1, gres="gpu:8")  # one process takes all
    for bad in ("a\nb", "a\\b", "a\tb"):
        with pytest.raises(UserError, match="can't be named in a batch script"):
            script(make(bad))


def test_times_are_read_as_slurm_does() -> None:
    cases = {"90": 5400, "90:30": 5430, "1:2:3": 3723, "1-2": 93600, "1-2:3": 93780}
    cases |= {"1-2:3:4": 93784, "0": 0, "1:": None, "1-": None, "1.5": None, "-1": None}
    assert {text: time_seconds(text) for text in cases} == cases
    assert make(time=90).launch.time == "90"


def read_sbatch_value(line: str) -> str:
    """One argument of a `#SBATCH` line, as sbatch's source reads it (src/sbatch/opt.c)."""
    value, quote, escaped = "", "", False
    for letter in line:
        if escaped:
            value, escaped = value + letter, False
        elif letter == "\\":
            escaped = True
        elif quote and letter == quote:
            quote = ""
        elif not quote and letter in "\"'":
            quote = letter
        elif not quote and (letter == "#" or letter.isspace()):
            break
        else:
            value += letter
    return value


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"])))
def test_quoted_values_come_back(text: str) -> None:
    if text:
        assert read_sbatch_value(sbatch_quote(text)) == text


def test_a_dry_run_writes_and_prints_and_submits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called = tmp_path / "called"
    programs(tmp_path / "bin", monkeypatch, **dict.fromkeys(PROGRAMS, f"touch {called}"))
    config = make(str(tmp_path / "out"))
    write_config(config, tmp_path)
    target = str(tmp_path / "config.yaml")
    assert main(["sweep", target, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for one in render(load_job(target), command="sweep"):
        assert one.text in printed
        for name, text in one.files.items():
            assert (script_folder(config) / name).read_text() == text
    assert not called.exists()
    assert not (tmp_path / "out" / "slurm" / slurm.RECORD).exists()
    assert main(["train", target, "sweep=null", "launch={on: local}", "--dry-run"]) == 2


PROGRAMS = ("sbatch", "squeue", "scancel", "scontrol", "srun")


def refused(config: Job, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    write_config(config, folder)
    assert main(["sweep", str(folder / "config.yaml")]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_a_slurm_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = refused(make(str(tmp_path / "out")), tmp_path, capsys)
    assert "sbatch was not found on the PATH: this machine has no Slurm" in said
    assert "Nothing was submitted" in said
    assert (tmp_path / "out" / "slurm" / "train.sbatch").exists()


FULL = "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying"


@pytest.mark.parametrize("end", ["exit 1", "exec sleep 600"])
def test_a_full_queue_says_what_is_in_it_and_goes_on_from_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    end: str,
) -> None:
    monkeypatch.setattr(slurm, "_PATIENCE_SECONDS", 5.0 if "sleep" in end else 300.0)
    calls, full = tmp_path / "calls", tmp_path / "full"
    sbatch = f'echo "$@" >>{calls}; n=$(wc -l <{calls})\n'
    sbatch += f'if [ -e {full} ] && [ "$n" -gt 1 ]; then echo "{FULL}" >&2; {end}; fi\n'
    sbatch += 'echo "4$n;cluster"'
    full.touch()
    programs(tmp_path / "bin", monkeypatch, sbatch=sbatch, squeue="echo '41|N/A|41|PENDING|None'")
    config = make(str(tmp_path / "out"))
    said = refused(config, tmp_path, capsys)
    assert "unable to accept job" in said
    assert "In the queue: harvest (job 41). Not submitted: train, evaluate, report." in said
    assert list(slurm.read_jobs(script_folder(config))) == ["harvest"]
    full.unlink()
    monkeypatch.setattr(slurm, "_PATIENCE_SECONDS", 300.0)
    assert main(["sweep", str(tmp_path / "config.yaml")]) == 0
    folder = script_folder(config)
    assert [line.split() for line in calls.read_text().splitlines()[2:]] == [
        [
            "--parsable",
            "--dependency=afterok:41",
            "--kill-on-invalid-dep=yes",
            str(folder / "train.sbatch"),
        ],
        ["--parsable", "--dependency=afterany:43", str(folder / "evaluate.sbatch")],
        ["--parsable", "--dependency=afterany:44", str(folder / "report.sbatch")],
    ]
    record = json.loads((folder / slurm.RECORD).read_text())["jobs"]
    assert [(job["stage"], job["number"], len(job["cohorts"])) for job in record] == [
        ("harvest", "41", 0),
        ("train", "43", 2),
        ("evaluate", "44", 0),
        ("report", "45", 0),
    ]


def test_jobs_of_another_config_in_the_queue_are_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    queue = tmp_path / "queue"
    queue.write_text("")
    programs(tmp_path / "bin", monkeypatch, sbatch="echo 7", squeue=f"cat {queue}")
    config = make(str(tmp_path / "out"))
    write_config(config, tmp_path)
    target = str(tmp_path / "config.yaml")
    assert main(["sweep", target]) == 0
    queue.write_text("7|0|8|COMPLETED|None\n7|1|9|RUNNING|None\n")
    before = (tmp_path / "out/slurm/train.sbatch").read_text()
    assert main(["sweep", target, "launch.nodes=1", "train.seed=1"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "from another config are in the queue" in said
    assert "`scancel 7" in said
    assert (tmp_path / "out/slurm/train.sbatch").read_text() == before
    queue.write_text("7|0|8|COMPLETED|None\n7|1|9|CANCELLED|None\n")
    assert main(["sweep", target, "train.seed=1"]) == 0
    (tmp_path / "out/slurm" / slurm.RECORD).write_text('{"jobs": [{"stage": "train"}]}')
    assert main(["sweep", target, "train.seed=1"]) == 2
    assert "slurm.json is damaged" in " ".join(capsys.readouterr().err.split())

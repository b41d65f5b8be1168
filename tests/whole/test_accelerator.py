"""The benchmark for whoever has an accelerator: it runs, here small, and needs few packages."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.accelerator import __main__ as accelerator
from benchmarks.accelerator.results import Clock, Results, Row
from tests.support.paths import ROOT

SCRIPT = ROOT / "benchmarks" / "accelerator.sh"
# Python's own modules, these packages and what they require; pydantic, gguf and others are refused.
BARE = """
import importlib.machinery, importlib.metadata, re, runpy, sys
wanted = ["jax", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy", "rich", "jaxtyping",
          "safetensors", "tokenizers"]
installed = set()
while wanted:
    name = re.sub("[-_.]+", "-", wanted.pop()).lower()
    if name in installed:
        continue
    try:
        needs = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        continue
    installed.add(name)
    wanted += [re.match("[A-Za-z0-9._-]+", need)[0] for need in needs if "extra ==" not in need]
homes = importlib.metadata.packages_distributions()
def allowed(module):
    if module in sys.stdlib_module_names or module in {"activation_cache", "sae_train", "launch",
                                                       "benchmarks", "tests"}:
        return True
    names = {re.sub("[-_.]+", "-", name).lower() for name in homes.get(module, [])}
    return not homes.get(module) or bool(names & installed)
class Bare(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if path is None and not allowed(name):
            path = [place for place in sys.path if place.endswith("stand_ins")]
        return super().find_spec(name, path, target)
machinery = importlib.machinery
sys.meta_path[:] = [machinery.BuiltinImporter, machinery.FrozenImporter, Bare]
import benchmarks.accelerator.__main__ as accelerator
for part in accelerator.PARTS:
    __import__(f"benchmarks.accelerator.{part}")
assert "stand_ins" in sys.modules["pydantic"].__file__
accelerator.main(["--small", "--only", "ceilings", "harvest", "--out", sys.argv[1]])
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"gguf", "pydantic_core", "sentencepiece", "pyarrow", "s3fs"}, loaded
"""


def test_it_needs_no_more_than_a_bare_machine_has(tmp_path: Path) -> None:
    out = tmp_path / "accelerator.json"
    told = subprocess.run(
        [sys.executable, "-c", BARE, str(out)], cwd=ROOT, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    kept = json.loads(out.read_text())
    assert {row["unit"] for row in kept["parts"]["ceilings"]} == {"GB/s", "TFLOP/s"}
    assert [row["unit"] for row in kept["parts"]["harvest"]] == ["tokens/s"] * 2
    assert "jax" in kept["versions"]
    assert "| ceilings | square product | bfloat16 | 64 | 64 |" in told.stdout


@pytest.mark.slow
def test_every_part_at_small_sizes(tmp_path: Path) -> None:
    results, most = Results(tmp_path / "accelerator.json"), {}
    for name in ("correctness", "steps", "kernels"):
        results.begin(name)
        part = importlib.import_module(f"benchmarks.accelerator.{name}")
        for row in part.rows(small=True, clock=Clock(100, group=0.0, groups=1)):
            results.add(name, row)
            if row.error is not None:
                most[name, row.what, row.precision] = row.error
    kept = json.loads(results.path.read_text())["parts"]
    right = [row["note"] for row in kept["correctness"]]
    assert all(note.startswith("right") for note in right), right
    assert most["correctness", "dense", "float32"] < 1e-4
    assert {row["what"] for row in kept["correctness"]} == {"dense", "sparse", "kernels"}
    steps = {(row["what"], row["precision"]): row for row in kept["steps"] + kept["kernels"]}
    for what in ("dense", "sparse", "kernels"):
        row = steps[what, "float32"]
        assert row["note"].startswith("L0 "), row
        flops = 12 * 64 * 64 * 512
        assert row["rate"] == pytest.approx(flops / (row["milliseconds"] * 1e9))
        assert row["gigabytes"] > 4 * 4 * 64 * 512 / 1e9
    for kernel in ("select", "decode", "touched"):
        assert steps[f"{kernel}, pure JAX", "float32"]["milliseconds"] > 0
        assert most["kernels", f"{kernel}, kernel", "float32"] < 1e-5


def test_no_time_and_no_memory_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.accelerator import steps

    (row, *_) = steps.rows(small=False, clock=Clock(-1.0))
    assert (row.note, row.width) == ("left out: no time", 16_384)
    program = steps.Program("dense", "float32", 64, 512, 64)
    monkeypatch.setattr(steps, "memory_limit", lambda: 1e9)
    monkeypatch.setattr(steps, "program_bytes", lambda compiled: 2 * 10**9)
    row = steps._measured(program, None, rows_BD=None, l0=8, clock=Clock(1.0))
    assert row.note == "left out: more than the 1 GB there are"
    assert row.gigabytes == 2


def test_a_killed_run_keeps_its_lines(tmp_path: Path) -> None:
    results = Results(tmp_path / "new" / "kept.json")
    results.begin("steps")
    results.add("steps", Row(what="dense", precision="tf32", milliseconds=1.25, mfu=0.5))
    again = Results(results.path)
    again.begin("kernels")
    again.add("kernels", Row(what="select", note="left out: no time"))
    table = Results(results.path).table()
    assert "| steps | dense | tf32 |  |  | 1.25 |  | 50.0% |" in table
    assert "| kernels | select |" in table


def test_the_script_gives_each_part_its_time(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {calls}\ncase "$*" in *steps*) exit 3;; esac\n')
    fake.chmod(0o755)
    told = subprocess.run(
        [str(SCRIPT), "--small"],
        env=os.environ | {"PYTHON": str(fake)},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = calls.read_text().splitlines()
    expected = [f"-m benchmarks.accelerator --only {name} --small" for name in accelerator.PARTS]
    assert lines == [*expected, "-m benchmarks.accelerator --small --only"]
    assert told.stderr == "accelerator: steps ended with status 3\n"
    limits = {name: int(limit) for name, limit in re.findall(r"(\w+):(\d+)", SCRIPT.read_text())}
    assert limits.keys() == accelerator.PARTS.keys()
    assert all(limits[name] >= 10 + own for name, own in accelerator.PARTS.items())
    assert sum(limits.values()) + 20 < 8 * 60

"""The pipeline on a file system without locks: Python, TensorStore and Orbax get none."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.children.processes import child_environment
from tests.support.file_system_faults import build, compiler
from tests.support.pipeline import write_pipeline

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler() is None, reason="no C compiler"),
]

_PROGRAM = """
import sys
from launch.cli import main
print([main([command, sys.argv[1]]) for command in ("harvest", "train", "status")])
"""


def test_harvest_and_training_need_no_locks(tmp_path: Path):
    config = write_pipeline(tmp_path)
    faults = {
        "LD_PRELOAD": str(build(tmp_path)),
        "FAULT": f"flock 1 {errno.ENOLCK} 1",  # from the first call on, every lock
        "FAULT_BELOW": str(tmp_path),
    }
    child = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(config)],
        env=child_environment() | faults,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert child.stdout.endswith("[0, 0, 0]\n"), child.stderr
    assert child.stderr.count("has no locks (No locks available): taking a lease") == 2
    meta = json.loads((tmp_path / "out" / "checkpoints" / "20" / "meta" / "metadata").read_text())
    assert "arrays" in meta, "not Orbax's"

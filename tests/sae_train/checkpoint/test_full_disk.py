"""A disk that is full when a checkpoint is saved, as the user of a real command sees it."""

from __future__ import annotations

import errno
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

_LIMIT = 900  # seconds: Orbax's own patience with processes that don't come is 1200


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config whose store is harvested."""
    folder = tmp_path_factory.mktemp("pipeline")
    config = write_pipeline(folder)
    assert _sae("harvest", str(config)).returncode == 0
    return config


def _sae(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *words],
        env=child_environment() | environment,
        capture_output=True,
        text=True,
        timeout=_LIMIT,
        check=False,
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_a_checkpoint_that_finds_no_room_is_one_message(
    pipeline: Path, tmp_path: Path, processes: int
):
    out = tmp_path / "out"
    words = ["train", str(pipeline), f"output={out}", f"mesh.data={processes}"]
    if processes > 1:
        words.append(f"launch.processes={processes}")
    child = _sae(
        *words,
        LD_PRELOAD=str(build(tmp_path)),
        FAULT=f"write 5 {errno.ENOSPC} 1",  # in the midst of the arrays
        FAULT_BELOW=str(out / "checkpoints"),
    )
    assert child.returncode == 2, child.stderr
    *_, last = child.stderr.splitlines()
    assert last.startswith(f"sae train: cannot save a checkpoint in {out}/checkpoints: the disk")
    assert "A checkpoint takes up to " in last
    assert last.endswith("free space and give the same command again.")
    # Threads of Orbax and of TensorStore know of the error too, and say nothing. Of two processes
    # the one that is left may say that process 0 has ended, if it isn't ended itself before.
    told = "\n".join(line for line in child.stderr.splitlines() if not line.startswith("[1] "))
    others = ["Traceback", "orbax", "tensorstore", "No space left"]
    assert [word for word in others if word in told] == [], child.stderr
    assert told.count("cannot save") == 1

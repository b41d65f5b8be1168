"""The log of a program that uses the Python API: our lines, and of Orbax's only warnings."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import orbax.checkpoint as ocp
import pytest

from sae_train.checkpoint.checkpoints import Checkpoints
from tests.support.children.processes import child_environment

pytestmark = pytest.mark.slow

_PROGRAM = """
import logging, sys
from pathlib import Path
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
from sae_train.checkpoint.trained import load_trained
from sae_train.release.export import export
from sae_train.train.loop import train
from tests.support.training import make_run

folder = Path(sys.argv[1])
config = make_run(folder, steps=2)
train(config)
train(config)
load_trained(config.output)
export(folder / "run")
"""


def test_a_program_that_logs_info_hears_only_us(tmp_path: Path):
    child = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(tmp_path)],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    lines = child.stderr.splitlines()
    assert any("is trained already: 2 steps" in line for line in lines), lines
    ours = ("INFO sae_train.", "INFO activation_cache.")
    assert [line for line in lines if not line.startswith(ours)] == []
    assert child.stdout == ""


def _log(level: int, message: str, *, file: str) -> None:
    absl = logging.getLogger("absl")
    absl.handle(absl.makeRecord("absl", level, file, 1, message, (), None))


def test_warnings_debugging_and_other_libraries_are_heard(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    with Checkpoints(tmp_path):
        caplog.clear()
        _log(logging.INFO, "narration", file=ocp.__file__)
        _log(logging.WARNING, "a warning", file=ocp.__file__)
        _log(logging.INFO, "another library", file=__file__)
        assert caplog.messages == ["a warning", "another library"]
        with caplog.at_level(logging.DEBUG):
            _log(logging.INFO, "to debug with", file=ocp.__file__)
    assert caplog.messages[2] == "to debug with"
    caplog.clear()
    _log(logging.INFO, "after us", file=ocp.__file__)
    assert caplog.messages == ["after us"]

"""Six kills at random instants of a harvest and a training run change no bit of the result."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.cli import main
from tests.support.children.processes import child_environment, children
from tests.support.pipeline import write_pipeline
from tests.support.stores import file_hashes
from tests.support.training import assert_same_run

pytestmark = pytest.mark.slow

WHOM = (0, 1, None)  # in each stage: one of two processes, the other, both and their supervisor
STEPS = 300
OVERRIDES = [
    "cache.tokens=2500",
    "cache.shuffle_rows=16",
    "cache.block_rows=16",
    "cache.sequences_per_batch=2",
    f"train.tokens={STEPS * 64}",
    "train.log_every_steps=1",
    "mesh.data=2",
    "launch={processes: 2, restarts: 30, restart_pause_seconds: 0, heartbeat_seconds: 60}",
]


class Victim:
    """`sae harvest`, then `sae train`, under the supervisor, started again when all are killed."""

    def __init__(self, config: Path) -> None:
        self.config, self.folder = config, config.parent / "out"
        self.stage = "harvest"
        self.output: list[str] = []
        self.start()

    def start(self) -> None:
        self.supervisor = subprocess.Popen(
            [sys.executable, "-m", "launch.cli", self.stage, str(self.config), *OVERRIDES],
            env=child_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def progress(self) -> int:
        """Buckets committed, or steps logged: both grow, and fall back when work is lost."""
        if self.stage == "harvest":
            return len(list(self.folder.glob("store/commits/bucket-*.json")))
        metrics = self.folder / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Poll until the condition holds or the stage ends; says which."""
        while self.supervisor.poll() is None:
            if condition():
                return True
            time.sleep(0.002)
        return False

    def kill(self, whom: int | None) -> None:
        """SIGKILL to one of the two processes, or to them and their supervisor."""
        victims = sorted(children(self.supervisor))
        if whom is None:
            self.supervisor.kill()
            self.output.append(self.supervisor.communicate()[0])
        for victim in victims if whom is None else victims[whom : whom + 1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        if whom is None:
            self.start()
            return
        self.wait_until(lambda: not set(victims) & set(children(self.supervisor)))

    def finish(self) -> None:
        self.output.append(self.supervisor.communicate(timeout=600)[0])
        assert self.supervisor.returncode == 0, "".join(self.output)


def disturb(victim: Victim, generator: random.Random, *, stride: int) -> int:
    """Kill again and again, early in a start or after some progress; returns how often."""
    done = 0
    for whom in generator.sample(WHOM, k=len(WHOM)):
        # Both processes are there: the supervisor starts them one after the other.
        if not victim.wait_until(lambda: len(children(victim.supervisor)) == 2):
            break
        # A moment of the start, or some progress; on a fast machine never more than `stride`.
        until = time.monotonic() + (generator.uniform(0, 5) if generator.random() < 0.4 else 600)
        goal = victim.progress() + generator.randint(1, stride)
        if not victim.wait_until(
            lambda goal=goal, until=until: victim.progress() >= goal or time.monotonic() > until
        ):
            break
        victim.kill(whom)
        done += 1
    return done


def test_six_kills_change_no_bit(tmp_path: Path):
    config = write_pipeline(tmp_path)
    # Undisturbed: one process, which has the same mesh for training.
    plain = [*OVERRIDES[:-1], f"cache.path={tmp_path}/plain/store", f"output={tmp_path}/plain"]
    for stage in ("harvest", "train"):
        assert main([stage, str(config), *plain]) == 0
    generator = random.Random(10)
    victim = Victim(config)
    kills = disturb(victim, generator, stride=20)
    victim.finish()
    assert kills == len(WHOM), "the harvest was over too soon"
    hashes = [file_hashes(tmp_path / where / "store") for where in ("out", "plain")]
    for one in hashes:
        del one["config.yaml"]  # it names the folder
    assert hashes[0] == hashes[1]
    victim.stage = "train"
    victim.start()
    assert disturb(victim, generator, stride=60) == len(WHOM)
    victim.finish()
    assert_same_run(tmp_path / "plain", tmp_path / "out", step=STEPS)

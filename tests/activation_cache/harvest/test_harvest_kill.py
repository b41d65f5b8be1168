"""`kill -9` at many instants of a harvest, the same command each time: the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.children import harvest_child
from tests.support.paths import ROOT
from tests.support.stores import file_hashes
from tests.support.tiny_gemma import write_tiny_gemma

pytestmark = pytest.mark.slow

BUCKETS = 19


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    folder = tmp_path / "inputs"
    write_tiny_gemma(folder / "gemma")
    for number in range(90):
        (folder / f"{number:02d}.txt").write_text(f"the {number}th state of the union " * 5)
    return folder


def run(inputs: Path, path: Path, kill: str = "") -> int:
    """Begin, or go on with, the harvest at `path` in a process of its own."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    module, given = harvest_child.__name__, json.dumps(sections(inputs, path))
    command = [sys.executable, "-m", module, given, kill]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def sections(inputs: Path, path: Path) -> dict[str, Any]:
    return {
        "model": {"weights": str(inputs / "gemma"), "dtype": "float32"},
        "text": {
            "source": [str(inputs / "*.txt")],
            "sequence_length": 16,
            "held_out_sequences": 4,
        },
        "cache": {
            "path": str(path),
            "sites": [
                {"site": "resid_post", "layers": [1, 2]},
                {"site": "mlp_out", "layers": [0]},
            ],
            "tokens": 2110,
            "shuffle_rows": 100,
            "block_rows": 16,
            "sequences_per_batch": 4,
        },
    }


def commits(path: Path) -> int:
    return len(list((path / "commits").glob("bucket-*.json")))


def kill_within_a_shard(inputs: Path, path: Path) -> None:
    assert run(inputs, path, "lock") == -signal.SIGKILL
    assert list(path.rglob("*.__lock"))


def test_killed_at_every_stage_the_store_ends_the_same(inputs: Path, tmp_path: Path):
    """One folder, killed again and again: random instants, half-written shards, every commit."""
    uninterrupted, path = tmp_path / "uninterrupted", tmp_path / "store"
    generator = random.Random()
    harvest_child.main(json.dumps(sections(inputs, uninterrupted)))

    def kill_before(name: str, *, committed: int) -> None:
        assert run(inputs, path, name) == -signal.SIGKILL
        assert commits(path) == committed
        assert list(path.rglob(".*.tmp"))  # the kill left something to tidy up

    def kill_at_random(*, latest: str) -> None:
        """Up to 150 ms after the first file; by itself, for nobody outside is as punctual."""
        assert run(inputs, path, f"{latest}:{generator.uniform(0, 0.15)}") == -signal.SIGKILL

    kill_at_random(latest="plan.json:1")  # while tokenising or soon after
    kill_before("plan.json:1", committed=0)
    kill_before("bucket:5", committed=4)  # the fifth bucket's shards are there, its commit is not
    kill_within_a_shard(inputs, path)
    kill_at_random(latest="bucket:10")
    assert commits(path) < BUCKETS
    kill_before("manifest.json:1", committed=BUCKETS)
    assert run(inputs, path) == 0
    assert commits(uninterrupted) == BUCKETS
    assert file_hashes(path) == file_hashes(uninterrupted)

"""Several processes harvest a store: the bytes of one process, whoever began, whoever ended."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from activation_cache.gemma.params import parameter_table
from activation_cache.storage.locks import folder_lock
from activation_cache.storage.safetensors_file import write_safetensors
from launch.cli import main
from tests.support.children.processes import Group, child_environment, start_group
from tests.support.pipeline import write_pipeline
from tests.support.stores import file_hashes
from tests.support.tiny_gemma import tiny_config, tiny_tensors, write_tiny_gemma
from tests.support.tiny_gguf import write_gguf

pytestmark = pytest.mark.slow

BUCKETS = 63  # of 16 rows
# Long: a busy machine may keep a healthy process from its heartbeats. One test has a short one.
HEARTBEAT = {"SAE_HEARTBEAT_SECONDS": "60"}
OVERRIDES = ["cache.shuffle_rows=16", "cache.block_rows=16", "cache.sequences_per_batch=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config and its inputs; the language model can be cut in four."""
    folder = tmp_path_factory.mktemp("harvest")
    write_pipeline(folder)
    write_tiny_gemma(folder / "gemma", num_kv_heads=4)
    return folder


def command(folder: Path, store: str, mesh: str, *overrides: str) -> list[str]:
    config, path = folder / "config.yaml", folder / store
    return ["harvest", str(config), f"cache.path={path}", f"cache.mesh={mesh}", *OVERRIDES,
            *overrides]  # fmt: skip


def start(
    folder: Path, processes: int, *arguments: str, devices: int = 4, **environment: str
) -> Group:
    return start_group(
        [["-m", "launch.cli", *arguments]] * processes,
        devices_each=devices // processes,
        environment=HEARTBEAT | environment,
    )


def commits(store: Path) -> int:
    return len(list(store.glob("commits/bucket-*.json")))


def rows_of(store: Path) -> dict[str, str]:
    """Hashes of all but the config, which names the mesh."""
    return {name: value for name, value in file_hashes(store).items() if name != "config.yaml"}


def test_begun_by_four_and_finished_by_two(folder: Path):
    """Each replica in two processes, then in one: in step with each other, then not."""
    mesh, shared, alone = "{data: 2, model: 2}", folder / "shared", folder / "alone"
    group = start(folder, 4, *command(folder, "shared", mesh))
    while group.alive() and commits(shared) < 5:
        time.sleep(0.005)
    group.processes[-1].send_signal(signal.SIGTERM)
    assert group.wait() == [75] * 4, "\n".join(group.logs)
    stopped_at = commits(shared)
    assert 5 <= stopped_at < BUCKETS
    assert all("Traceback" not in log for log in group.logs)
    kept = {path: path.stat().st_mtime_ns for path in (shared / "commits").iterdir()}
    group = start(folder, 2, *command(folder, "shared", mesh))
    assert group.wait() == [0] * 2, "\n".join(group.logs)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "not made again"
    assert main(command(folder, "alone", mesh)) == 0
    assert commits(alone) == BUCKETS
    assert rows_of(shared) == rows_of(alone)


def test_a_process_reads_only_its_part_of_the_weights(tmp_path: Path):
    """Two processes with two devices each, a replica over all four."""
    sizes = {"num_heads": 8, "num_kv_heads": 8, "d_ff": 32, "vocab_size": 408}
    weights = write_tiny_gemma(tmp_path / "gemma", **sizes)
    group = start_group(
        [["-m", "tests.support.children.weights_child", str(weights)]] * 2, devices_each=2
    )
    assert group.wait() == [0, 0], "\n".join(group.logs)
    table = parameter_table(tiny_config(**sizes))
    whole = sum(4 * math.prod(p.shape) for p in table if len(p.shape) == 1)
    cut = sum(4 * math.prod(p.shape) for p in table if len(p.shape) == 2)
    for log in group.logs:
        read, largest = map(int, re.search(r"read (\d+) (\d+)", log).groups())  # type: ignore[union-attr]
        assert read == whole + cut // 2
        assert largest == 4 * 408 * 20 // 4, "a quarter of the embedding"


def test_the_others_notice_a_lost_process_by_themselves(folder: Path):
    """Nothing watches these two; what was committed is gone on with."""
    arguments = command(folder, "noticed", "{data: 2, model: 1}")
    group = start(folder, 2, *arguments, devices=2, SAE_HEARTBEAT_SECONDS="10")
    while group.alive() and commits(folder / "noticed") < 3:
        time.sleep(0.005)
    os.kill(group.processes[1].pid, signal.SIGSTOP)  # as good as dead, but not seen to die
    begin = time.monotonic()
    while group.processes[0].poll() is None and time.monotonic() - begin < 60:
        time.sleep(0.1)
    # JAX's own heartbeat is 100 s; a busy machine adds to the 10 s.
    assert group.processes[0].poll() is not None, "the heartbeat was ours"
    group.processes[1].kill()
    assert group.wait()[0] not in (0, 2, 75), group.logs[0]
    assert main([*arguments, "cache.mesh.data=1"]) == 0


def test_more_processes_than_buckets(folder: Path):
    """Those without a bucket say so and wait."""
    few = ["cache.shuffle_rows=600", "cache.block_rows=32"]
    arguments = command(folder, "few", "{data: 4, model: 1}", *few)
    group = start(folder, 4, *arguments)
    assert group.wait() == [0] * 4, "\n".join(group.logs)
    idle = [log for log in group.logs if "has nothing to do: 2 buckets are left for 4" in log]
    assert len(idle) == 2
    assert main(["harvest", arguments[1], f"cache.path={folder / 'one'}", *OVERRIDES, *few]) == 0
    assert rows_of(folder / "few") == rows_of(folder / "one"), "nor does the mesh `data` matter"


def test_a_gguf_is_converted_by_one_process(folder: Path):
    weights = write_gguf(folder / "model.gguf")
    override = f"model.weights={weights}"
    arguments = command(folder, "converted/shared", "{data: 2, model: 1}", override)
    group = start(folder, 2, *arguments, devices=2)
    assert group.wait() == [0, 0], "\n".join(group.logs)
    assert ["converting " in log for log in group.logs] == [True, False]
    assert len(list((folder / "converted" / "weights").iterdir())) == 1
    assert main([*command(folder, "converted-alone/store", "{data: 1, model: 1}", override)]) == 0
    assert rows_of(folder / "converted" / "shared") == rows_of(folder / "converted-alone" / "store")


def test_refusals_reach_all_processes_in_words(folder: Path):
    """Another config in one process, a folder in use."""
    arguments = command(folder, "refused", "{data: 2, model: 1}")
    both = [["-m", "launch.cli", *arguments, f"cache.seed={seed}"] for seed in (0, 1)]
    group = start_group(both, environment=HEARTBEAT)
    assert group.wait() == [2, 2], "\n".join(group.logs)
    for log in group.logs:
        assert "process 1 was started with another config than process 0" in log
    with folder_lock(folder / "refused"):
        group = start(folder, 2, *arguments)
        assert group.wait() == [2, 2], "\n".join(group.logs)
    for log in group.logs:
        assert "is in use by another process" in log
    assert not (folder / "refused" / "tokens").exists()


@pytest.mark.parametrize("mesh", ["{data: 1, model: 2}", "{data: 2, model: 1}"])
def test_activations_that_are_not_finite_are_told_by_all(folder: Path, mesh: str):
    """Found by the one that writes: whether or not another computes in step with it."""
    broken = write_tiny_gemma(folder / "broken", num_kv_heads=4)
    tensors = tiny_tensors(tiny_config(num_kv_heads=4))
    next(value for name, value in tensors.items() if "layers.1" in name)[:] = np.nan
    with open(broken / "model.safetensors", "wb") as file:
        write_safetensors(file, {k: v.shape for k, v in tensors.items()}, tensors.items())
    group = start(folder, 2, *command(folder, "nan", mesh, f"model.weights={broken}"), devices=2)
    assert group.wait() == [2, 2], "\n".join(group.logs)
    words = {re.findall(r"sae harvest: bucket (\d+) .* holds NaN", log)[0] for log in group.logs}
    assert len(words) == 1, "the same in both"


def test_the_local_launcher_starts_the_group(folder: Path):
    """A stop through it is everybody's; tests/whole/test_kills.py has what it does about kills."""
    arguments = command(
        folder, "launched", "{data: 2, model: 1}", "cache.tokens=4000",
        "launch={processes: 2, restart_pause_seconds: 0.1, heartbeat_seconds: 60}",
    )  # fmt: skip
    supervisor = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *arguments],
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    store = folder / "launched"
    while supervisor.poll() is None and commits(store) < 3:
        time.sleep(0.005)
    supervisor.send_signal(signal.SIGTERM)
    output, _ = supervisor.communicate(timeout=600)
    assert supervisor.returncode == 75, output
    assert "Traceback" not in output
    assert 3 <= commits(store) < 4 * BUCKETS - 2
    assert main([*arguments[:-1], "cache.mesh.data=1"]) == 0
    assert commits(store) == 4 * BUCKETS - 2


@pytest.mark.parametrize(
    ("case", "ended"),
    [
        ("stopped_waiting", "Interrupted"),
        ("stopped_working", "Interrupted"),
        ("mistaken", "UserError: process 1 is mistaken"),
        ("main_mistaken", "UserError: process 0 is mistaken"),
    ],
)
def test_shared_work_ends_alike_everywhere(case: str, ended: str):
    group = start_group(
        [["-m", "tests.support.children.shared_child", case]] * 3,
        environment=HEARTBEAT | {"PATH": os.environ["PATH"]},
    )
    assert group.wait() == [0] * 3, "\n".join(group.logs)
    assert [re.findall("ended: (.*)", log) for log in group.logs] == [["finished by 0", ended]] * 3

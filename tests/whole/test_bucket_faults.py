"""Training and latents in a bucket whose server fails, in several processes, killed: the same."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.storage import lease
from activation_cache.storage.files import file_sizes, storage_path
from sae_train.config.file import write_config
from sae_train.config.run import Config
from sae_train.latents import schema
from sae_train.latents.compute import compute_jobs
from sae_train.latents.reader import has_latents, open_latents
from sae_train.runs.folder import newest_checkpoint
from sae_train.train.loop import train
from tests.sae_train.latents.support import S, make_job, make_world
from tests.support.children.processes import Group, start_group
from tests.support.servers.buckets import Server, run_in
from tests.support.training import assert_same_run, make_run, stop_after

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("own_garbage"),
]

MESH = (2, 1)


class Outages:
    """A server that answers 503 to the next `left` requests, whoever makes them."""

    def __init__(self, server: Server) -> None:
        self.left = 0
        server.proxy.fail = self

    def __call__(self, method: str, path: str) -> int | None:
        self.left -= 1
        return 503 if self.left >= 0 else None


def test_a_server_that_fails_for_a_while_is_waited_for(
    bucket_server: Server, finished_run: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SAE_STORAGE_SECONDS", "20")
    config = run_in(bucket_server, finished_run, "patient")
    outages, before, calls = Outages(bucket_server), bucket_server.proxy.refused, iter(range(1000))

    def two_bad_spells() -> bool:
        if next(calls) in (10, 27):  # the first falls on a save
            outages.left = 4
        return False

    assert train(config, stop=two_bad_spells).step == 40
    assert bucket_server.proxy.refused == before + 8
    assert_same_run(finished_run / "whole", storage_path(config.output), step=40)


def test_a_server_that_is_gone_stops_the_run_and_loses_nothing(
    bucket_server: Server, finished_run: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SAE_STORAGE_SECONDS", "2")
    config = run_in(bucket_server, finished_run, "cut")
    outages, before = Outages(bucket_server), stop_after(25)

    def gone_from_step_25() -> bool:
        if before():
            outages.left = 1_000_000
        return False

    with pytest.raises(UserError, match=r"failed again and again for 2 s"):
        train(config, stop=gone_from_step_25)
    outages.left = 0
    monkeypatch.setenv("SAE_STORAGE_SECONDS", "30")
    # The lease could not be returned, and this process, its holder, is still alive.
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.5)
    monkeypatch.setattr(lease, "_LOOK_SECONDS", 0.1)
    assert newest_checkpoint(storage_path(config.output)) in (10, 20)  # 20 may be unfinished
    assert train(config).step == 40
    assert_same_run(finished_run / "whole", storage_path(config.output), step=40)


def start_two(folder: Path, config: Config) -> Group:
    """Two processes that train a config on two devices."""
    write_config(config, folder)
    file = str(folder / "config.yaml")
    return start_group([["-m", "tests.support.children.train_child", file]] * 2)


# In one kind of bucket: what differs between the two is tried above and in
# tests/activation_cache/storage/test_bucket.py.
@pytest.mark.parametrize("bucket_server", ["gs"], indirect=True)
def test_two_killed_processes_go_on_from_what_they_saved(
    bucket_server: Server, finished_run: Path, tmp_path: Path
):
    # Undisturbed in this process, which has the mesh's two devices: sums of two have one order.
    on_disk = make_run(finished_run, output="two", mesh=MESH)
    train(on_disk)
    config = run_in(bucket_server, finished_run, "killed", mesh=MESH)
    group = start_two(tmp_path / "killed", config)
    deadline = time.monotonic() + 600
    while (newest_checkpoint(storage_path(config.output)) or 0) < 10:
        assert group.alive(), "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for process in group.processes:
        os.kill(process.pid, signal.SIGKILL)
    group.wait()
    group = start_two(tmp_path / "again", config)
    assert group.wait() == [0, 0], "\n".join(group.logs)
    assert_same_run(Path(on_disk.output), storage_path(config.output), step=40)


@pytest.mark.parametrize("bucket_server", ["gs"], indirect=True)
def test_latents_in_a_bucket_are_those_on_a_disk(
    bucket_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stopped, continued while the server fails for a moment, and read back."""
    monkeypatch.setenv("SAE_STORAGE_SECONDS", "20")
    monkeypatch.setattr(schema, "SHARD_TOKENS", 4 * 3 * S)
    monkeypatch.setattr(schema, "PART_FIRINGS", 2500)
    world = make_world(tmp_path)
    local, job = (
        make_job(world, storage_path(place) / "one")
        for place in (tmp_path, bucket_server.folder("latents"))
    )
    compute_jobs([local], world.models)
    with pytest.raises(Interrupted):
        compute_jobs([job], world.models, stop=stop_after(7))
    assert file_sizes(job.scratch)
    assert not has_latents(job.job.folder)
    outages, before, calls = Outages(bucket_server), bucket_server.proxy.refused, iter(range(1000))

    def bad_spell() -> bool:
        if next(calls) == 2:
            outages.left = 3
        return False

    compute_jobs([job], world.models, stop=bad_spell)
    assert bucket_server.proxy.refused == before + 3
    in_bucket, on_disk = (
        {file.name: file.read_bytes() for file in file_sizes(one.folder) if file.name != ".lock"}
        for one in (job, local)
    )
    assert in_bucket == on_disk
    found, expected = (open_latents(one.job.folder) for one in (job, local))
    assert found[7].to_dict() == expected[7].to_dict()
    assert found.summary.equals(expected.summary)

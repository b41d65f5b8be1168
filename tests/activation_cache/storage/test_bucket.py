"""Stores, runs and releases in gs:// and s3://, on real servers: the same bytes as on a disk."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
from pathlib import Path

import numpy as np
import pytest

from activation_cache import write_rows
from activation_cache.harvest.harvest import harvest
from activation_cache.runtime.errors import Interrupted, StorageError, UserError
from activation_cache.storage import bucket, bucket_client, guard, lease
from activation_cache.storage.bucket import BucketPath, files_below
from activation_cache.storage.files import storage_path, write_text
from activation_cache.storage.locks import folder_lock, is_locked
from activation_cache.store.store import open_store
from launch.cli import main
from sae_train.checkpoint.checkpoints import Checkpoints
from sae_train.checkpoint.trained import load_trained
from sae_train.config.file import load_config
from sae_train.inference.read_formats import load_sae
from sae_train.runs.folder import newest_checkpoint, read_run
from sae_train.train.loop import train
from tests.support.pipeline import write_pipeline
from tests.support.servers.buckets import Server, object_hashes, run_in
from tests.support.stores import file_hashes
from tests.support.training import assert_same_run, make_run, stop_after

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("own_garbage"),
]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of the whole pipeline, with its store made on the disk."""
    folder = tmp_path_factory.mktemp("pipeline")
    assert main(["harvest", "-q", str(write_pipeline(folder))]) == 0
    return folder


def test_rows_are_imported_into_a_bucket(bucket_server: Server, tmp_path: Path):
    """The bytes of an import into a folder; what comes one row after the other needs a disk."""
    url = bucket_server.folder("imported")
    rows = np.random.default_rng(0).standard_normal((300, 6)).astype(np.float32)
    how = {"shuffle_rows": 256, "block_rows": 8, "held_out": 20}
    write_rows(rows, to=tmp_path / "store", **how)
    with pytest.raises(UserError, match=r"name a folder with scratch \(--scratch\)"):
        write_rows(rows, to=url, **how)
    write_rows(rows, to=url, scratch=tmp_path / "scratch", **how)
    on_disk = file_hashes(tmp_path / "store")
    assert object_hashes(url).items() >= {k: v for k, v in on_disk.items() if k != ".lock"}.items()
    assert not list((tmp_path / "scratch").iterdir())


def test_the_whole_pipeline(
    bucket_server: Server, pipeline: Path, capsys: pytest.CaptureFixture[str]
):
    out, config = bucket_server.folder("out"), str(pipeline / "config.yaml")
    overrides = [f"cache.path={out}/store", f"output={out}", "-q"]
    for command in ("harvest", "train", "evaluate"):
        assert main([command, config, *overrides]) == 0
    for command in ("export", "report", "status", "inspect"):
        assert main([command, out, "-q"]) == 0
    shown = capsys.readouterr().out
    assert "trained" in shown and "20/20" in shown  # noqa: PT018
    ours = object_hashes(f"{out}/store")
    disk = file_hashes(pipeline / "out" / "store")
    own = {"config.yaml", ".lock"}
    assert {k: v for k, v in ours.items() if k not in own} == {
        k: v for k, v in disk.items() if k not in own
    }
    run = read_run(out)
    assert run.state == "trained"
    assert run.evaluation is not None
    assert len(run.release) == 7
    assert not is_locked(storage_path(out))
    page = (storage_path(out) / "report" / "index.html").read_bytes().decode()
    assert 'href="../release/sae_lens/sae_weights.safetensors"' in page
    sae = load_sae(out)
    assert np.array_equal(sae.W_enc, load_sae(f"{out}/release/gemma_scope").W_enc)
    assert not Path("gs:").exists() and not Path("s3:").exists()  # noqa: PT018


def test_a_harvest_goes_on_in_the_bucket(bucket_server: Server, pipeline: Path):
    config = load_config(pipeline / "config.yaml", [f"cache.path={bucket_server.folder('broken')}"])
    sections = {"model": config.model, "text": config.text, "cache": config.cache}
    with pytest.raises(Interrupted):
        harvest(**sections, stop=lambda: (storage_path(config.cache.path) / "commits" /
                                          "bucket-000000.json").exists())  # fmt: skip
    with pytest.raises(UserError, match="has not finished"):
        open_store(config.cache.path)
    harvest(**sections)
    disk = file_hashes(pipeline / "out" / "store")
    ours = object_hashes(config.cache.path)
    assert ours == {k: v for k, v in disk.items() if k not in ("config.yaml", ".lock")}


def test_a_run_stopped_and_gone_on_with_is_the_one_on_the_disk(
    bucket_server: Server, finished_run: Path
):
    config = run_in(bucket_server, finished_run, "stopped")
    with pytest.raises(Interrupted):
        train(config, stop=stop_after(25))
    assert newest_checkpoint(storage_path(config.output)) == 25
    assert train(config).step == 40
    with Checkpoints(config.output) as checkpoints:
        assert checkpoints.steps() == [30, 40]
    assert_same_run(finished_run / "whole", storage_path(config.output), step=40)
    assert read_run(config.output).restarts == 1


def test_the_checkpoint_before_is_gone_on_from(
    bucket_server: Server, finished_run: Path, caplog: pytest.LogCaptureFixture
):
    """Of one run, damaged again as soon as it is whole."""
    caplog.set_level(logging.INFO, logger="sae_train")
    config = run_in(bucket_server, finished_run, "stopped")
    train(config)  # the run of the test before, or a new one
    newest = storage_path(config.output) / "checkpoints" / "40"
    assert isinstance(newest, BucketPath)

    def half_uploaded() -> None:
        (newest / "meta" / "metadata").unlink()

    def flipped() -> None:
        file = largest_array(newest)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        bucket.write_object(file, bytes(data))

    def object_gone() -> None:
        largest_array(newest).unlink()

    for damage in (half_uploaded, flipped, object_gone):
        damage()
        caplog.clear()
        assert load_trained(config.output).step == 30, damage
        assert train(config).step == 40
        words = "half written" if damage is half_uploaded else "skipping the damaged"
        assert words in caplog.text, damage
        assert "going on from the checkpoint at step 30" in caplog.text, damage
        assert_same_run(finished_run / "whole", storage_path(config.output), step=40)


def largest_array(checkpoint: BucketPath) -> BucketPath:
    sizes = files_below(checkpoint / "state")
    return max(sizes, key=lambda file: sizes[file])


def test_a_run_copied_from_a_bucket_is_read_on_a_disk(
    bucket_server: Server, finished_run: Path, tmp_path: Path
):
    config = run_in(bucket_server, finished_run, "stopped")
    assert train(config).step == 40, "the run of the test before, or a new one"
    for file in files_below(BucketPath.parse(config.output)):
        target = tmp_path / "copy" / str(file)[len(config.output) + 1 :]
        target.parent.mkdir(parents=True, exist_ok=True)
        bucket.download(file, target)
    assert_same_run(finished_run / "whole", tmp_path / "copy", step=40)


@pytest.mark.parametrize("status", [403, 401])
def test_refused_credentials_are_told_at_once(
    bucket_server: Server, finished_run: Path, status: int
):
    config = run_in(bucket_server, finished_run, "denied")
    bucket_client._known_buckets.clear()
    bucket_server.proxy.fail = lambda method, path: status
    with pytest.raises(StorageError, match=r"refuses the credentials .*They come from"):
        train(config)
    # TensorStore's words, where gcsfs and s3fs still get through.
    bucket_server.proxy.fail = lambda method, path: status if "/c/" in path else None
    bucket_client._known_buckets.clear()
    with pytest.raises(StorageError, match="refuses the credentials"):
        open_store(config.cache.path).provenance(start=0, stop=8)


def test_a_missing_bucket_is_told(bucket_server: Server, pipeline: Path, capsys: object):
    elsewhere = f"{bucket_server.scheme}://no-such-bucket/store"
    with pytest.raises(
        StorageError, match=f"there is no bucket {bucket_server.scheme}://no-such-bucket"
    ):
        open_store(elsewhere)
    assert main(["harvest", "-q", str(pipeline / "config.yaml"), f"cache.path={elsewhere}"]) == 2


def test_one_process_holds_a_folder(bucket_server: Server, monkeypatch: pytest.MonkeyPatch):
    for name, seconds in (("LEASE_SECONDS", 30), ("_RENEW_SECONDS", 0.1), ("_LOOK_SECONDS", 0.1)):
        monkeypatch.setattr(lease, name, seconds)
    folder = storage_path(bucket_server.folder("held"))
    with folder_lock(folder):
        assert is_locked(folder)
        with (
            pytest.raises(UserError, match=f"in use by process {os.getpid()} on"),
            folder_lock(folder),
        ):
            pass  # fmt: skip
    assert not is_locked(folder)
    with folder_lock(folder):
        pass


def test_the_lease_of_a_dead_process_is_taken(
    bucket_server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(lease, "_LOOK_SECONDS", 0.1)
    folder = storage_path(bucket_server.folder("dead"))
    left = {"owner": "x", "host": platform.node(), "boot": lease._boot(), "process": os.getpid(),
            "started": "before", "renewals": 3}  # fmt: skip
    write_text(folder / ".lock", json.dumps(left))
    caplog.set_level(logging.INFO, logger="activation_cache")
    with folder_lock(folder):  # at once: its process is not there any more
        assert "waiting until" not in caplog.text
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.5)
    write_text(folder / ".lock", json.dumps(left | {"host": "elsewhere"}))
    with folder_lock(folder):  # once it has run out
        assert "waiting until" in caplog.text
        assert "is gone, taking its lease" in caplog.text


def test_who_lost_the_folder_writes_no_more(bucket_server: Server):
    folder = storage_path(bucket_server.folder("lost"))
    assert isinstance(folder, BucketPath)
    with folder_lock(folder):
        write_text(folder / "before", "ours")
        other = lease._Lease(folder)
        assert other._write(other._read())  # as if this process had been cut off for long
        guard._guards[str(folder)].__self__.renewed = 0.0  # type: ignore[attr-defined]
        with pytest.raises(UserError, match=r"is no longer this process's"):
            write_text(folder / "after", "not ours")
        assert not (folder / "after").exists()
    assert is_locked(folder), "the other's lease stays"
    other.give_back()


def test_of_two_that_take_a_lease_one_wins(bucket_server: Server):
    """Conditional writes: whoever writes on what it read earlier is refused."""
    folder = storage_path(bucket_server.folder("race"))
    assert isinstance(folder, BucketPath)
    first, second = lease._Lease(folder), lease._Lease(folder)
    nothing = second._read()
    assert first._write(first._read())
    assert not second._write(nothing)
    seen = second._read()
    assert first._write(first._read())
    assert not second._write(seen)
    first.give_back()
    assert not (folder / ".lock").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gs:/bucket/x", "nothing can be written to"),
        ("http://host/x", "nothing can be written to"),
        ("s3://", "nothing can be written to"),
        ("gs://bucket/a/../b", "have no meaning in a bucket"),
    ],
)
def test_what_is_neither_a_folder_nor_a_bucket_is_refused(text: str, words: str, tmp_path: Path):
    config = write_pipeline(tmp_path)
    for key in ("output", "cache.path"):
        with pytest.raises(UserError, match=words):
            load_config(config, [f"{key}={text}"])


def test_tensorboard_needs_a_disk(tmp_path: Path):
    with pytest.raises(UserError, match="event files"):
        load_config(write_pipeline(tmp_path), ["output=gs://acts/run", "train.tensorboard=true"])


def test_a_run_folder_that_vanishes_from_a_disk_is_told(finished_run: Path):
    config = make_run(finished_run, output="vanishing")
    before = stop_after(25)

    def vanish() -> bool:
        if before():
            shutil.rmtree(config.output, ignore_errors=True)
        return False

    with pytest.raises(UserError, match=r"is gone|has gone away"):
        train(config, stop=vanish)


def test_a_bucket_path_is_no_path_of_the_disk():
    path = BucketPath.parse("gs://bucket/a/b.txt")
    assert str(path / "c") == "gs://bucket/a/b.txt/c"
    assert (path.name, path.stem, path.suffix, str(path.parent)) == (
        "b.txt", "b", ".txt", "gs://bucket/a",
    )  # fmt: skip
    with pytest.raises(TypeError):
        Path(path)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        open(path)  # type: ignore[call-overload] # noqa: SIM115

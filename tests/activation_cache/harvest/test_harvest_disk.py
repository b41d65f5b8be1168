"""A harvest on disks that are full, limited or read-only."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from activation_cache.harvest.harvest import harvest
from activation_cache.runtime.errors import UserError
from activation_cache.store.store import Store
from tests.support.harvests import interrupted, sections
from tests.support.stores import file_hashes

pytestmark = pytest.mark.slow


def mounted(folder: Path, *options: str) -> bool:
    """Mount a tmpfs at `folder`, if this process may."""
    command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with no room for the whole store: a small file system, or else a limit on files."""
    folder = tmp_path / "small"
    folder.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    is_mounted = mounted(folder, "-o", "size=280k")
    if not is_mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, hard))
    yield folder
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    if is_mounted:
        # Lazily: a thread that still closes its file doesn't keep it.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


FILE_LIMIT = 9000  # bytes: less than a shard of resid_post, 128 rows of 20 float32


def make_room(folder: Path) -> None:
    if os.path.ismount(folder):
        subprocess.run(["mount", "-o", "remount,size=8m", str(folder)], check=True)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_full_disk_is_said_and_nothing_is_lost(finished: Store, gemma, corpus, small_disk):
    path = small_disk / "store"
    made = sections(gemma, corpus, path)
    with pytest.raises(UserError, match=r"cannot write .*(the disk is full|limit).* is intact"):
        harvest(**made, resolved_config_yaml="name: test\n")
    committed = {p: p.stat().st_mtime_ns for p in (path / "commits").glob("bucket*")}
    assert committed or not os.path.ismount(small_disk)
    make_room(small_disk)
    harvest(**made, resolved_config_yaml="name: test\n")
    assert {p: p.stat().st_mtime_ns for p in committed} == committed
    assert file_hashes(path) == file_hashes(finished.path)


def test_a_limit_on_file_size_is_said(gemma, corpus, tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*limit on the size of files"):
            harvest(**sections(gemma, corpus, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def world(gemma: Path, corpus: Path) -> Iterator[Path]:
    """A folder that every user may walk (pytest's are closed), with the inputs in it."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    shutil.copytree(gemma, folder / "gemma")
    shutil.copytree(corpus, folder / "text")
    (folder / "text").chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make everything under `folder` unwritable: root becomes nobody, others lose the w bit."""
    folders = [folder, *(p for p in folder.rglob("*") if p.is_dir())]
    root = os.geteuid() == 0
    for each in folders:
        each.chmod(0o555)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for each in folders:
            each.chmod(0o755)


def test_a_read_only_folder(finished: Store, world: Path):
    fresh, begun = world / "fresh" / "store", world / "begun"
    fresh.parent.mkdir()
    made = interrupted(world / "gemma", world / "text", begun)
    complete = world / "complete"
    wanted = harvest(**sections(world / "gemma", world / "text", complete))
    before = file_hashes(begun)
    with read_only(world):
        for sections_ in (sections(world / "gemma", world / "text", fresh), made):
            with pytest.raises(UserError, match=r"permission is denied.* fix the permission"):
                harvest(**sections_)
        # A finished store is only read: nothing to write, nothing to complain of.
        assert harvest(**sections(world / "gemma", world / "text", complete)) == wanted
    assert file_hashes(begun) == before

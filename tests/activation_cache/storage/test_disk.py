"""Disks as clusters have them: without locks, with files in use, with links, that refuse."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activation_cache.config import CacheConfig
from activation_cache.runtime.errors import UserError
from activation_cache.storage import files, guard, lease
from activation_cache.storage.arrays import ArrayLayout, array_errors, refused_number, write_shards
from activation_cache.storage.files import (
    append_line,
    disk_errors,
    make_folder,
    remove_tree,
    storage_path,
    user_cache,
    write_text,
)
from activation_cache.storage.locks import folder_lock, is_locked, locks_files

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def refusing(number: int, *, only: str = "") -> Any:
    """A system call that answers `number` for paths that end like `only`."""

    def call(path: Any = None, *_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), path if isinstance(path, str) else None)

    return call


@pytest.fixture(params=NO_LOCKS, ids=errno.errorcode.get)
def without_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file system has no locks, and leases run out fast."""
    monkeypatch.setattr(fcntl, "flock", refusing(request.param))
    monkeypatch.setattr(fcntl, "lockf", refusing(request.param))
    for name, seconds in (("_RENEW_SECONDS", 0.05), ("_LOOK_SECONDS", 0.05)):
        monkeypatch.setattr(lease, name, seconds)


@pytest.mark.usefixtures("without_locks")
def test_without_locks_a_lease_keeps_others_out(tmp_path: Path):
    folder = tmp_path / "run"
    assert not is_locked(folder)
    with folder_lock(folder):
        assert is_locked(folder)
        with (
            pytest.raises(UserError, match=f"in use by process {os.getpid()} on"),
            folder_lock(folder),
        ):
            pass
        write_text(folder / "ours", "x")
    assert not is_locked(folder)
    assert sorted(os.listdir(folder)) == [".lock", "ours"]
    with folder_lock(folder):
        pass
    assert not locks_files(folder)


def test_who_lost_a_lease_on_a_disk_writes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOLCK))
    layout = ArrayLayout(tmp_path / "array", (8, 2), "float32", chunk_rows=4, shard_rows=8)
    array = layout.open(create=True)
    with folder_lock(tmp_path):
        other = lease._Lease(tmp_path)
        assert other._write(other._read())  # as if this process had been cut off for long
        (check,) = guard._guards.values()
        check.__self__.renewed = 0.0  # type: ignore[attr-defined]
        writes = (
            lambda: write_text(tmp_path / "new", "x"),
            lambda: append_line(tmp_path / "new", "x"),
            lambda: write_shards(array, layout, start=0, rows=np.ones((8, 2), np.float32)),
            lambda: remove_tree(tmp_path / "array"),
        )
        for write in writes:
            with pytest.raises(UserError, match="is no longer this process's"):
                write()
    assert sorted(os.listdir(tmp_path)) == [".lease", ".lock", "array"], "the other's lease stays"
    other.give_back()


def test_of_two_that_take_a_lease_on_a_disk_one_wins(tmp_path: Path):
    first, second = lease._Lease(tmp_path), lease._Lease(tmp_path)
    nothing = second._read()
    assert first._write(first._read())
    assert not second._write(nothing)
    seen = second._read()
    assert first._write(first._read())
    assert not second._write(seen)
    first.give_back()


def test_a_process_killed_while_it_wrote_its_lease_blocks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lease, "_CREATING_SECONDS", 0.1)
    left = tmp_path / ".lease.__lock"
    left.touch()
    with pytest.raises(UserError, match=r"\.lease\.__lock"):
        lease._Lease(tmp_path).take()
    long_ago = time.time() - lease.LEASE_SECONDS - 1
    os.utime(left, (long_ago, long_ago))
    lease._Lease(tmp_path).take()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_sync_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    monkeypatch.setattr(os, "fsync", refusing(number))
    write_text(tmp_path / "file", "text")
    layout = ArrayLayout(tmp_path / "array", (8, 2), "float32", chunk_rows=4, shard_rows=8)
    array = layout.open(create=True)
    write_shards(array, layout, start=0, rows=np.ones((8, 2), np.float32))
    assert (tmp_path / "file").read_text() == "text"
    assert not locks_files(tmp_path)
    monkeypatch.setattr(os, "fsync", refusing(errno.EIO))
    with pytest.raises(UserError, match="the disk fails"):
        write_text(tmp_path / "file", "new")
    with pytest.raises(UserError, match="the disk fails"):
        write_shards(array, layout, start=0, rows=np.ones((8, 2), np.float32))
    assert (tmp_path / "file").read_text() == "text"
    assert os.listdir(tmp_path) == ["array", "file"] or os.listdir(tmp_path) == ["file", "array"]


@pytest.mark.parametrize("number", [errno.ENOTEMPTY, errno.EBUSY])
def test_what_another_process_uses_stays_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
):
    for name in ("a/one", "a/two", "b/three"):
        write_text(make_folder((tmp_path / "tree" / name).parent) / Path(name).name, name)
    real, caplog_level = os.unlink, logging.WARNING

    def unlink(path: Any, **rest: Any) -> None:
        if str(path).endswith("two"):
            raise OSError(number, os.strerror(number), str(path))
        real(path, **rest)

    monkeypatch.setattr(os, "unlink", unlink)
    with caplog.at_level(caplog_level):
        remove_tree(tmp_path / "tree")
    assert "isn't wholly deleted, as another process uses it" in caplog.text
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["two"]
    monkeypatch.setattr(os, "unlink", real)
    remove_tree(tmp_path / "tree")
    remove_tree(tmp_path / "tree")
    assert list(tmp_path.iterdir()) == []


def test_deleting_follows_no_link(tmp_path: Path):
    for name in ("mine", "theirs"):
        write_text(make_folder(tmp_path / name) / "file", name)
    (tmp_path / "mine" / "link").symlink_to(tmp_path / "theirs")
    (tmp_path / "mine" / "file_link").symlink_to(tmp_path / "theirs" / "file")
    (tmp_path / "linked").symlink_to(tmp_path / "mine")
    remove_tree(tmp_path / "linked")
    assert (tmp_path / "linked").is_symlink(), "the folder is still on the disk it was put on"
    assert list((tmp_path / "mine").iterdir()) == []
    assert (tmp_path / "theirs" / "file").read_text() == "theirs"


WORDS = {
    errno.ENOSPC: "the disk is full.*free space",
    errno.EDQUOT: "the disk quota is used up.*free space",
    errno.EFBIG: "limit on the size of files.*raise the limit",
    errno.EACCES: "permission is denied.*fix the permission",
    errno.EROFS: "read-only",
    errno.EEXIST: "a file, or a link that leads nowhere.*choose another path",
    errno.ENAMETOOLONG: "too long.*choose another path",
    errno.ELOOP: "round in a circle",
    errno.ESTALE: "has gone away",
    errno.ETIMEDOUT: "server doesn't answer",
    errno.EBUSY: "another process uses it",
    errno.ENOTEMPTY: "another process uses",
    errno.EINVAL: "can't do it",
}


@pytest.mark.parametrize("number", WORDS, ids=errno.errorcode.get)
def test_what_a_disk_refuses_is_said_in_words(number: int):
    words = rf"cannot write /x: .*{WORDS[number]}.* the same command again"
    with pytest.raises(UserError, match=words), disk_errors("/x", doing="write"):
        raise OSError(number, "")
    text = f"RESOURCE_EXHAUSTED: Error writing local file \"/x\": [os_error_code='{number}']"
    for error in (ValueError(text), NotImplementedError(text)):
        with pytest.raises(UserError, match=words), array_errors(Path("/y"), doing="write"):
            raise error


def test_the_refusal_is_found_in_whatever_orbax_makes_of_it():
    full = ValueError("RESOURCE_EXHAUSTED: [os_error_code='28']")
    caused = RuntimeError("commit failed")
    caused.__cause__ = OSError(errno.EDQUOT, "quota")
    for error, number in (
        (full, errno.ENOSPC),
        (caused, errno.EDQUOT),
        (ExceptionGroup("several", [full, caused]), errno.ENOSPC),
        (ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), None),
        (FileNotFoundError(errno.ENOENT, "gone"), None),
        (KeyError("a bug"), None),
    ):
        assert refused_number(error) == number
    caused.__cause__ = caused
    assert refused_number(caused) is None


def test_folders_that_cannot_be_made_are_said(tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing" / "there")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("file", "file/below", "nowhere", "loop", "n" * 300):
        with pytest.raises(UserError, match=r"cannot (create folder|write in) .*choose another"):
            make_folder(tmp_path / name)
    for make in (storage_path, lambda text: CacheConfig.model_fields and storage_path(text)):
        with pytest.raises(UserError, match="NUL"):
            make("a\0b")


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somewhere")
    assert user_cache() == Path("/somewhere/.cache/open-gemma-scope")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", refusing_user)
    assert user_cache() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert files.user_cache() == Path("/elsewhere/open-gemma-scope")


def refusing_user(number: int) -> None:
    """What libc says of a user number that nobody has."""
    raise KeyError(f"getpwuid(): uid not found: {number}")

"""One writer per folder where there are no locks: a lease, which its holder keeps renewing.

On most disks the kernel releases a dead process's lock; a bucket has no kernel, and some network
file systems have no locks. There the holder writes a small object or file every few seconds. A
lease that hasn't changed for `LEASE_SECONDS` is free, and so is one whose holder was a process of
this machine that has ended.

A lease is taken and renewed with conditional writes: the server writes only if the object is still
the one that was read. Google Cloud Storage and Amazon S3 offer that, so that of two processes one
wins. A holder that was cut off until another took over learns of it before its next write
(`guard`). On a server that ignores conditions, of two that begin in the same instant the last
wins, and the other stops at its next renewal. On a disk TensorStore makes the condition hold with a
file beside the lease, which only one process can create.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tensorstore as ts

from activation_cache.runtime.errors import UserError
from activation_cache.storage.arrays import array_errors
from activation_cache.storage.bucket import BucketPath
from activation_cache.storage.bucket_client import key_value_spec
from activation_cache.storage.files import StoragePath
from activation_cache.storage.guard import set_guard

logger = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
_RENEW_SECONDS = 10.0
_LOOK_SECONDS = 1.0
_CREATING_SECONDS = 5


@contextlib.contextmanager
def held(folder: StoragePath) -> Iterator[None]:
    """Hold a folder for this process alone, for as long as the block lasts.

    Where the last holder may be dead it waits up to `LEASE_SECONDS` for a renewal.

    Raises:
        UserError: another process holds it, or the bucket or the disk refuses.
    """
    lease = _Lease(folder)
    lease.take()
    renewing = threading.Thread(target=lease.keep, name="lease", daemon=True)
    renewing.start()
    set_guard(folder, lease.check)
    try:
        yield
    finally:
        set_guard(folder, None)
        lease.done.set()
        renewing.join()
        lease.give_back()


def file_name(folder: StoragePath) -> str:
    """The lease's name in a folder; on a disk `.lock` is the file that is locked."""
    return ".lock" if isinstance(folder, BucketPath) else ".lease"


def is_held(folder: StoragePath) -> bool:
    """Was the lease of this folder renewed in the last `LEASE_SECONDS`, by this machine's clock?"""
    try:
        changed = (folder / file_name(folder)).stat().st_mtime
    except FileNotFoundError:
        return False
    return time.time() - changed < LEASE_SECONDS


@dataclass
class _Lease:
    """The lease of one folder, which this process wants or holds.

    Attributes:
        owner: a random name, so that two leases of one process differ too.
        renewed: when it was last written, by the monotonic clock.
        lost: why it is no longer ours; empty while it is.
        lock: of the renewals, which come from a thread and from `check`.
    """

    folder: StoragePath
    owner: str = field(default_factory=lambda: uuid.uuid4().hex)
    renewals: int = 0
    renewed: float = 0.0
    lost: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def name(self) -> str:
        """The name of its object or file in the folder."""
        return file_name(self.folder)

    def take(self) -> None:
        """Take the lease; one that may have been left behind is given time to run out.

        Raises:
            UserError: another process renewed it meanwhile.
        """
        watched, since = b"", time.monotonic()
        while True:
            found = self._read()
            if not found.value or _is_dead(found.value):
                if self._write(found):
                    return
                continue  # another process was faster
            if found.value != watched and watched:
                break  # it was renewed while we watched
            if not watched:
                watched = found.value
                logger.info(
                    "%s is or was held by %s: waiting until its lease is renewed or runs out, at "
                    "most %.0f s", self.folder, _holder(watched), LEASE_SECONDS,
                )  # fmt: skip
            if time.monotonic() - since > LEASE_SECONDS:
                logger.warning("%s: %s is gone, taking its lease", self.folder, _holder(watched))
                if self._write(found):
                    return
                break
            time.sleep(_LOOK_SECONDS)
        raise UserError(
            f"{self.folder} is in use by {_holder(found.value)}: one process writes a folder at a "
            "time. Wait for it to end, stop it, or choose another folder."
        )

    def keep(self) -> None:
        """Renew until done; after a renewal that failed, the next one is tried as usual."""
        while not self.done.wait(_RENEW_SECONDS) and not self.lost:
            try:
                self._renew()
            except Exception as error:
                logger.warning("the lease of %s could not be renewed: %s", self.folder, error)

    def check(self) -> None:
        """Raises `UserError` once another process holds the folder; called before each write."""
        if time.monotonic() - self.renewed > LEASE_SECONDS / 2:
            self._renew()  # cut off or suspended for so long, another may have taken it
        if self.lost:
            raise UserError(
                f"{self.folder} is no longer this process's: {self.lost}, as the lease had not "
                f"been renewed for {LEASE_SECONDS:.0f} s. Nothing more was written. When the other "
                "process has ended, give the same command again."
            )

    def _renew(self) -> None:
        with self.lock:
            found = self._read()
            if not found.value:
                self.lost = f"its {self.name} was deleted"
            elif not self._is_ours(found):
                self.lost = f"{_holder(found.value)} took it"
            elif not self._write(found):
                self.lost = "another process took it in the same instant"

    def _is_ours(self, found: Any) -> bool:
        return self.owner.encode() in found.value

    def give_back(self) -> None:
        """Delete the object, if it is still ours."""
        with contextlib.suppress(UserError, OSError):  # it runs out without this
            found = self._read()
            if self._is_ours(found):
                (self.folder / self.name).unlink(missing_ok=True)

    def _read(self) -> Any:
        """What TensorStore reads: the object's generation and its value, empty if there is none."""
        return self._ask(lambda store: store.read(self.name).result(), doing="read the lease of")

    def _write(self, before: Any) -> bool:
        """Write our lease over the one that was read; False if that had changed by then."""
        self.renewals += 1
        content = {
            "owner": self.owner,
            "host": platform.node(),
            "boot": _boot(),
            "process": os.getpid(),
            "started": _started(os.getpid()),
            "renewals": self.renewals,
        }
        data = json.dumps(content).encode()
        # A missing object has a generation too; an emulator may give none, all zeros.
        condition = before.stamp.generation if before.stamp.generation.strip(b"\0") else None
        written = self._ask(
            lambda store: store.write(self.name, data, if_equal=condition).result(),
            doing="take the lease of",
        )
        if not written.generation:
            return False
        found = self._read()  # where a server ignores conditions, the last writer wins
        if found.value != data:
            return False
        self.renewed = time.monotonic()
        return True

    def _ask(self, call: Any, *, doing: str) -> Any:
        """Make a request of TensorStore, which retries what is transient."""
        try:
            with array_errors(self.folder, doing=doing):
                return call(ts.KvStore.open(self._spec()).result())
        except ValueError as error:
            if not str(error).startswith("DEADLINE_EXCEEDED"):
                raise
            raise UserError(
                f"cannot {doing} {self.folder}: another process is writing it, or was killed while "
                f"it did ({self.name}.__lock is there). Give the same command again in "
                f"{LEASE_SECONDS:.0f} s."
            ) from error

    def _spec(self) -> dict[str, Any]:
        if isinstance(self.folder, BucketPath):
            return key_value_spec(self.folder)
        creating = self.folder / f"{self.name}.__lock"  # TensorStore's, while it writes
        with contextlib.suppress(OSError):
            if time.time() - creating.stat().st_mtime > LEASE_SECONDS:
                creating.unlink()  # its process was killed in that moment
        locking = {"mode": "lockfile", "acquire_timeout": f"{_CREATING_SECONDS}s"}
        path = f"{self.folder.absolute()}/"
        return {"driver": "file", "path": path, "file_io_locking": locking, "file_io_sync": False}


def _holder(value: bytes) -> str:
    try:
        content = json.loads(value)
        return f"process {content['process']} on {content['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _is_dead(value: bytes) -> bool:
    """Was it written by a process of this machine, since it was started, that has ended?"""
    try:
        content = json.loads(value)
        here = (content["host"], content["boot"]) == (platform.node(), _boot())
        return here and content["started"] != _started(content["process"])
    except (ValueError, KeyError, TypeError):
        return True  # not a lease: nobody renews it


def _boot() -> str:
    """Names this start of this machine or container: process numbers mean nothing in another."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _started(process: int) -> str | None:
    """When a process began, in the kernel's ticks; None if no process has that number."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return None

"""Processes that work as one: how a process joins its group, and its number there.

JAX's distributed runtime connects the processes; its coordination service, in process 0, notices
when one is lost. In a command that runs as a single process, `join` does nothing and JAX is not
loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from activation_cache.runtime.errors import UserError

logger = logging.getLogger(__name__)

# Whatever starts a group sets these for each process: our launcher, a Kubernetes manifest.
COORDINATOR = "SAE_COORDINATOR"  # host:port of process 0
NUM_PROCESSES = "SAE_NUM_PROCESSES"
PROCESS_ID = "SAE_PROCESS_ID"
HEARTBEAT = "SAE_HEARTBEAT_SECONDS"
AUTO_JOIN = "SAE_AUTO_JOIN"  # 1: let JAX find a group that no other variable shows

_HEARTBEAT_SECONDS = 60
_JOIN_SECONDS = 300  # machines of one job start minutes apart


@dataclasses.dataclass
class _Group:
    """Whether this process has joined a group."""

    joined: bool = False


_group = _Group()


def join() -> None:
    """Join the group of processes this one was started in, if it was started in one.

    Called once per command, before any device is used. The variables above name a group; on Slurm
    (in a step of several tasks) and on TPU slices of several hosts JAX finds it.

    Raises:
        UserError: a variable is missing or wrong.
    """
    if _group.joined or not _started_in_a_group():
        return
    heartbeat = _integer(HEARTBEAT, minimum=5, default=_HEARTBEAT_SECONDS)
    # JAX counts a process as lost after `heartbeat_timeout_seconds`, and then tells the others.
    timings: dict[str, Any] = {
        "heartbeat_timeout_seconds": max(3, heartbeat - 5),
        "initialization_timeout": _JOIN_SECONDS,
        "shutdown_timeout_seconds": heartbeat,
    }
    with _own_signal_handlers():
        _initialize(timings)
    _group.joined = True
    if process_count() > 1:
        logger.info("joined: process %d of %d", process_index(), process_count())


def _initialize(timings: dict[str, Any]) -> None:
    import jax

    if os.environ.get(NUM_PROCESSES):
        count = _integer(NUM_PROCESSES, minimum=1)
        index = _integer(PROCESS_ID, minimum=0, maximum=count - 1)
        address = os.environ.get(COORDINATOR, "")
        if ":" not in address:
            raise UserError(f"{COORDINATOR} must be host:port of process 0; it is {address!r}")
        jax.distributed.initialize(address, count, index, **timings)
    else:
        jax.distributed.initialize(**timings)


@contextlib.contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Restore the signal handlers that JAX's runtime replaces as it joins.

    Its own notice of a SIGTERM reaches other processes up to seconds later; `agree_to_stop` does
    without it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        if handler is not None:
            signal.signal(number, handler)


def leave() -> None:
    """Leave the group once all work is done; waits for the other processes."""
    if _group.joined:
        import jax

        jax.distributed.shutdown()
        _group.joined = False


def _started_in_a_group() -> bool:
    environment = os.environ
    if environment.get(NUM_PROCESSES):
        return _integer(NUM_PROCESSES, minimum=1) > 1
    if environment.get(AUTO_JOIN) == "1":
        return True
    # A batch script has SLURM_PROCID too; only in a step of srun is the list of nodes set.
    slurm_step = "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment
    if slurm_step and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return True
    return "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def launched_index() -> int:
    """This process's number by the environment alone, without JAX; 0 for a single process."""
    if not _started_in_a_group():
        return 0
    names = (PROCESS_ID, "SLURM_PROCID", "TPU_WORKER_ID")
    numbers = (os.environ.get(name, "") for name in names)
    return next((int(number) for number in numbers if number.isdecimal()), 0)


def _integer(
    name: str, *, minimum: int, maximum: int | None = None, default: int | None = None
) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal() or int(text) < minimum:
        raise UserError(f"{name} must be a whole number of at least {minimum}; it is {text!r}")
    if maximum is not None and int(text) > maximum:
        raise UserError(f"{name} must be at most {maximum}; it is {text!r}")
    return int(text)


def process_index() -> int:
    """This process's number, from 0."""
    if not _group.joined:
        return 0
    import jax

    return jax.process_index()


def process_count() -> int:
    """The number of processes in the group; 1 if none was joined."""
    if not _group.joined:
        return 1
    import jax

    return jax.process_count()


def is_main() -> bool:
    """Is this process 0, which writes the files that only one process may write?"""
    return process_index() == 0


def code_version(*packages: Any) -> str:
    """One line with JAX's version, and one for each package with a hash of its source files."""
    import jax

    lines = [f"jax {jax.__version__}"]
    for package in packages:
        digest = hashlib.sha256()
        folder = Path(package.__file__).parent
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
        lines.append(f"{package.__name__} {digest.hexdigest()[:16]}")
    return "\n".join(lines)

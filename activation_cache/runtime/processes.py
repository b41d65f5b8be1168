"""Processes that work as one: how a process joins its group, and its number there.

JAX's distributed runtime connects the processes; its coordination service, in process 0, notices
when one is lost. In a command that runs as a single process, `join` does nothing and JAX is not
loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.runtime.waiting import Waiting

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


def join(*, stop: Callable[[], bool] = lambda: False) -> None:
    """Join the group of processes this one was started in, if it was started in one.

    Called once per command, before any device is used. The variables above name a group; on Slurm
    (in a step of several tasks) and on TPU slices of several hosts JAX finds it.

    Args:
        stop: asked while it waits for the others.

    Raises:
        UserError: a variable is missing or wrong.
        Interrupted: `stop` turned true.
        TimeoutError: the others haven't come.
    """
    if _group.joined or not _started_in_a_group():
        return
    heartbeat = _integer(HEARTBEAT, minimum=5, default=_HEARTBEAT_SECONDS)
    # JAX counts a process as lost after `heartbeat_timeout_seconds`, and then tells the others.
    timings: dict[str, Any] = {
        "heartbeat_timeout_seconds": max(3, heartbeat - 5),
        "initialization_timeout": 2 * _JOIN_SECONDS,  # when it ends the process: we do before
        "shutdown_timeout_seconds": heartbeat,
    }
    with _own_signal_handlers():
        _wait_for_others(functools.partial(_initialize, timings), stop=stop)
    _group.joined = True
    if process_count() > 1:
        logger.info("joined: process %d of %d", process_index(), process_count())


def _wait_for_others(connect: Callable[[], None], *, stop: Callable[[], bool]) -> None:
    """Connect, in a thread of its own, so that signals are heard and a long wait is explained."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            connect()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True, name="join")
    thread.start()
    remedy = f"To work alone set {NUM_PROCESSES}=1; Ctrl-C ends the wait"
    waiting = Waiting(_awaited(), remedy=remedy, level=logging.WARNING)
    while thread.is_alive():
        thread.join(0.1)
        if stop():
            raise Interrupted(f"stopped while it waited for {waiting.whom}")
        if waiting.seconds > _JOIN_SECONDS:
            raise TimeoutError(f"{waiting.whom} didn't come within {_JOIN_SECONDS} s. {remedy}")
        waiting.tell()
    if failed:
        raise failed[0]


def _awaited() -> str:
    """For whom this process waits, by the environment: `3 more processes of Slurm step 12.0`."""
    variables = os.environ
    if variables.get(NUM_PROCESSES):
        count, group = variables[NUM_PROCESSES], f"at {variables.get(COORDINATOR)}"
    elif "SLURM_STEP_NUM_TASKS" in variables:
        step = f"{variables.get('SLURM_JOB_ID')}.{variables.get('SLURM_STEP_ID')}"
        count, group = variables["SLURM_STEP_NUM_TASKS"], f"of Slurm step {step}"
    else:
        hosts = variables.get("TPU_WORKER_HOSTNAMES", "")
        count, group = str(hosts.count(",") + 1) if hosts else "", f"of the TPU slice {hosts}"
    others = f"{int(count) - 1} more" if count.isdecimal() else "the other"
    return f"{others} {'process' if others == '1 more' else 'processes'} {group}".strip()


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

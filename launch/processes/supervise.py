"""Several processes of one command on this machine: start them, watch them, restart them.

Used for `launch: {on: local, processes: N}`. Every process runs the same command and joins the
others (activation_cache/runtime/processes.py). When one is lost the others can't continue: all are
ended and restarted, and continue from what is saved.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from activation_cache.runtime import processes as processes_module
from activation_cache.runtime.errors import UserError
from launch import exit_codes
from launch.config.local import LocalLaunch

logger = logging.getLogger(__name__)

SUPERVISOR = "SAE_SUPERVISOR"  # id of the process that started this one: it stops when that ends

_POLL_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 600.0
_NOISE = re.compile(r"^\[Gloo\] Rank ")  # each process logs each group of devices
_TIME = re.compile(r"^\d\d:\d\d:\d\d ")


@dataclasses.dataclass
class _Output:
    """Merges what the processes write.

    Lines of process 0 are passed on as they are. Other processes log warnings only; their lines
    get the process's number, and are dropped if another process has just written the same.
    """

    write: Callable[[str], Any]
    recent: collections.deque[tuple[int, str]] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=200)
    )
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def take(self, index: int, line: str) -> None:
        text = _TIME.sub("", line.rstrip("\n"))
        if not text.strip() or _NOISE.match(text):
            return
        with self.lock:
            if any(written == text and other != index for other, written in self.recent):
                return
            self.recent.append((index, text))
            with contextlib.suppress(OSError):  # the terminal is gone; the work isn't
                self.write(line.rstrip("\n") + "\n" if index == 0 else f"[{index}] {text}\n")


def supervise(
    command: Sequence[str],
    *,
    launch: LocalLaunch,
    devices: int = 1,
    environment: Mapping[str, str] | None = None,
    gpus: Sequence[str] | None = None,
    progress: Callable[[], Any] = lambda: None,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Run `launch.processes` processes of a command until all have done their work.

    Args:
        command: what each process runs; its environment says which of them it is.
        devices: how many devices the mesh has, for CPUs made to look like several.
        environment: further variables for each.
        gpus: that they share; None: all that this process sees.
        progress: a value that changes when work has been saved; restarts are counted since the
            last change.
        stop: once it returns true, every process gets SIGTERM.

    Returns:
        0 all done; 2 the user's mistake, reported by the process; 75 stopped with everything
        saved; else the exit status of a lost process, after `launch.restarts` restarts in a row
        that saved nothing new.

    Raises:
        UserError: the processes can't share this machine's devices or the mesh.
    """
    own = _environments(launch, devices=devices, gpus=gpus)
    environments = [one | dict(environment or {}) for one in own]
    output = _Output(write=sys.stderr.write)
    failures, before = 0, progress()
    while True:
        code = _run_once(command, environments, output=output, stop=stop)
        if code in (exit_codes.DONE, exit_codes.MISTAKE, exit_codes.STOPPED):
            return code
        after = progress()
        failures = 1 if after != before else failures + 1
        before = after
        if failures > launch.restarts:
            logger.error(
                "giving up: %d starts in a row have saved nothing new (launch.restarts is %d)",
                failures,
                launch.restarts,
            )
            return code if 0 < code < 256 else 1
        pause = min(launch.restart_pause_seconds * 2 ** (failures - 1), _LONGEST_PAUSE_SECONDS)
        logger.warning(
            "restarting all %d processes in %.3g s, from what is saved (restart %d of %d)",
            launch.processes,
            pause,
            failures,
            launch.restarts,
        )
        if _paused(pause, stop=stop):
            return exit_codes.STOPPED


def _paused(seconds: float, *, stop: Callable[[], bool]) -> bool:
    """Wait; true if a stop was requested meanwhile."""
    until = time.monotonic() + seconds
    while not stop() and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, _POLL_SECONDS))
    return stop()


def _environments(
    launch: LocalLaunch, *, devices: int, gpus: Sequence[str] | None = None
) -> list[dict[str, str]]:
    """The environment of each process, without the coordinator's address."""
    count = launch.processes
    if devices % count:
        raise UserError(
            f"launch.processes {count} does not divide the mesh's {devices} devices (data * "
            "model): make one a multiple of the other"
        )
    shared = {
        processes_module.NUM_PROCESSES: str(count),
        processes_module.HEARTBEAT: str(launch.heartbeat_seconds),
        SUPERVISOR: str(os.getpid()),
        # Only CPUs read it: a process's CPUs look like its share of the mesh's devices.
        "JAX_NUM_CPU_DEVICES": os.environ.get("JAX_NUM_CPU_DEVICES", str(devices // count)),
    }
    gpus = visible_gpus() if gpus is None else gpus
    if gpus and len(gpus) % count:
        raise UserError(
            f"launch.processes {count} can't share {len(gpus)} GPUs evenly: use a number that "
            "divides them, or set JAX_PLATFORMS=cpu"
        )
    share = len(gpus) // count
    return [
        os.environ
        | shared
        | {processes_module.PROCESS_ID: str(index)}
        | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus[index * share :][:share])} if gpus else {})
        for index in range(count)
    ]


def visible_gpus() -> list[str]:
    """The GPUs that this process sees."""
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name]
    numbers = (re.fullmatch(r"nvidia(\d+)", path.name) for path in Path("/dev").glob("nvidia*"))
    return sorted((match[1] for match in numbers if match), key=int)


def _run_once(
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    *,
    output: _Output,
    stop: Callable[[], bool],
) -> int:
    """One start of all processes; returns how it ended, as one exit status."""
    address = f"127.0.0.1:{_free_port()}"
    with _started(command, environments, address=address, output=output) as processes:
        asked, lost = False, None
        while any(process.poll() is None for process in processes):
            if stop() and not asked:
                asked = True
                for process in processes:
                    process.send_signal(signal.SIGTERM)
            well = (None, exit_codes.DONE, exit_codes.STOPPED)
            lost = next((one for one in processes if one.poll() not in well), None)
            if lost is not None:
                break
            time.sleep(_POLL_SECONDS)
        codes = [process.poll() for process in processes]
    return _judge(codes, stopping=asked)


def _judge(codes: Sequence[int | None], *, stopping: bool) -> int:
    """One exit status for all; None means a process that was still running."""
    ended = [code for code in codes if code is not None]
    if exit_codes.MISTAKE in ended:
        return exit_codes.MISTAKE
    bad = [
        (index, code)
        for index, code in enumerate(codes)
        if code is not None and code not in (exit_codes.DONE, exit_codes.STOPPED)
    ]
    if bad and not stopping:
        # A process ended by a signal is the cause; one that lost its peer is a consequence.
        index, code = min(bad, key=lambda one: one[1] >= 0)
        how = signal.Signals(-code).name if code < 0 else f"status {code}"
        logger.warning("process %d was lost (%s): ending the others", index, how)
        return 128 - code if code < 0 else code
    # Stopped; the next start repeats what a process that was lost meanwhile had not saved.
    return exit_codes.STOPPED if bad or exit_codes.STOPPED in ended else exit_codes.DONE


@contextlib.contextmanager
def _started(
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    *,
    address: str,
    output: _Output,
) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes, each a session of its own so that Ctrl-C reaches them through us alone.

    On leaving, those still alive are killed, which damages nothing that was saved.
    """
    processes: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []
    try:
        for index, environment in enumerate(environments):
            process = subprocess.Popen(
                command,
                env={**environment, processes_module.COORDINATOR: address},
                stdout=subprocess.PIPE if index == 0 else subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            processes.append(process)
            streams = [(process.stderr, output)]
            if index == 0:
                streams.append((process.stdout, _Output(write=sys.stdout.write)))
            for stream, sink in streams:
                reader = threading.Thread(target=_read, args=(stream, index, sink), daemon=True)
                reader.start()
                readers.append(reader)
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for reader in readers:
            reader.join(timeout=5)


def _read(stream: IO[str] | None, index: int, output: _Output) -> None:
    assert stream is not None
    with stream:
        for line in stream:
            output.take(index, line)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stop_with_supervisor() -> None:
    """In a process of a group: stop, saving everything, when the supervisor is gone."""
    supervisor = os.environ.get(SUPERVISOR, "")
    if not supervisor.isdecimal():
        return

    def watch() -> None:
        while os.getppid() == int(supervisor):
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="supervisor watch").start()

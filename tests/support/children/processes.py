"""Groups of real processes on this machine: started, fed and waited for."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT

# The kernel gives ports from 32768 on to whoever asks for any: one of those may be taken between
# the choice and the start of who is to listen there, which takes seconds.
_PORTS = range(12_000, 32_000)
_WORKERS = 16  # of pytest-xdist; each has ports of its own
_asked = itertools.count(random.randrange(len(_PORTS)))


def free_port() -> int:
    """A port that nothing listens on, and that nobody else is given meanwhile."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % _WORKERS
    own = _PORTS[worker::_WORKERS]
    while True:
        port = own[next(_asked) % len(own)]
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def child_environment(**extra: str) -> dict[str, str]:
    """CPU, no devices but those asked for, strict arithmetic, our packages."""
    shared = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "PYTHONPATH": str(ROOT),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    return os.environ | shared | extra


@dataclass
class Group:
    """Processes of one command, as a cluster would start them: without our supervisor."""

    processes: list[subprocess.Popen[str]]

    def wait(self, timeout: float = 600) -> list[int]:
        """Exit statuses; afterwards `logs` has what each wrote."""
        self.logs = []
        try:
            for process in self.processes:
                self.logs.append(process.communicate(timeout=timeout)[0])
        finally:
            self.kill()
        return [process.returncode for process in self.processes]

    def alive(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def start_group(
    commands: Sequence[Sequence[str]],
    *,
    devices_each: int = 1,
    environment: Mapping[str, str] | None = None,
    of_process: Mapping[int, Mapping[str, str]] | None = None,
) -> Group:
    """One process per command; each command is what follows `python`."""
    port = free_port()
    processes = []
    for index, command in enumerate(commands):
        place = {
            "SAE_COORDINATOR": f"127.0.0.1:{port}",
            "SAE_NUM_PROCESSES": str(len(commands)),
            "SAE_PROCESS_ID": str(index),
            "JAX_NUM_CPU_DEVICES": str(devices_each),
        }
        own = dict(environment or {}) | dict((of_process or {}).get(index, {}))
        processes.append(
            subprocess.Popen(
                [sys.executable, *command],
                env=child_environment(**place, **own),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    return Group(processes)


def wait_for(
    condition: Callable[[], bool], alive: Callable[[], bool], *, pause: float = 0.01
) -> bool:
    """Poll until `condition()` or nobody is alive; says which."""
    while alive():
        if condition():
            return True
        time.sleep(pause)
    return False


def children(process: subprocess.Popen[str]) -> list[int]:
    """The processes a supervisor has started."""
    return [
        int(status.parent.name)
        for status in Path("/proc").glob("[0-9]*/stat")
        if _parent(status) == process.pid
    ]


def _parent(status: Path) -> int | None:
    try:
        return int(status.read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None

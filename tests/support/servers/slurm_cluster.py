"""A real Slurm on this host for tests: slurmctld, two slurmd and munge, in a folder of its own.

By hand: `python -m tests.support.servers.slurm_cluster FOLDER` starts one, says which SLURM_CONF to
export, and stops it on Ctrl-C. Debian's packages slurmctld, slurmd, slurm-client and munge are
needed, and root. Nodes of several names on one host work in Debian's build (`slurmd -N`); the names
must resolve, so that processes of one job find each other: /etc/hosts gets them at the start.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.children.processes import free_port

NODES = ("n1", "n2")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "squeue", "munged")

# Two partitions over the same nodes: jobs in `high` push those in `low` back into the queue.
# cred_expire bounds how long a requeued job has to wait; CPUs are more than the host's.
_CONF = """\
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=cred_expire=5,socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
ReturnToService=2
KillWait=10
MinJobAge=3600
JobRequeue=0
MaxArraySize=20
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
{nodes}
PartitionName=low Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=high Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=10
"""


@dataclass(frozen=True)
class Cluster:
    """A cluster at work; `environment` is what its commands need."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str) -> str:
        """Run one of Slurm's commands; returns what it says."""
        done = subprocess.run(
            command,
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """A job's state in one word, such as PENDING, RUNNING, COMPLETED."""
        return self.run("squeue", "--noheader", "--states=all", "-o", "%T", "-j", job)

    def logs(self) -> str:
        """The end of the daemons' logs, for a test that failed."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"{file.name}:\n{file.read_text()[-2000:]}" for file in files)


def is_installed() -> bool:
    """Are all programs here, and may this user start them?"""
    path = os.environ.get("PATH", "") + ":/usr/sbin"
    return os.geteuid() == 0 and all(shutil.which(name, path=path) for name in PROGRAMS)


@contextlib.contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """Start a cluster in a folder, which must be short: a socket's path has 108 bytes."""
    cluster = Cluster(folder)
    try:
        _start(cluster)
        yield cluster
    finally:
        _stop(folder)


def _start(cluster: Cluster) -> None:
    folder = cluster.folder
    (folder / "state").mkdir(parents=True)
    for node in NODES:
        (folder / f"spool.{node}").mkdir()
    _make_resolvable()
    ports = [free_port() for _ in range(1 + len(NODES))]
    lines = [
        f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=4 "
        "RealMemory=4000 State=UNKNOWN"
        for node, port in zip(NODES, ports[1:], strict=True)
    ]
    text = _CONF.format(
        port=ports[0], user=getpass.getuser(), folder=folder, nodes="\n".join(lines)
    )
    (folder / "slurm.conf").write_text(text)
    _start_munge(folder)
    _daemon(cluster, "slurmctld")
    for node in NODES:
        _daemon(cluster, "slurmd", "-N", node)
    deadline = time.monotonic() + 300
    while "idle" not in (states := _node_states(cluster)) or len(states) != 1:
        assert time.monotonic() < deadline, f"nodes are {states}\n{cluster.logs()}"
        time.sleep(0.1)


def _node_states(cluster: Cluster) -> set[str]:
    done = subprocess.run(
        ["sinfo", "--noheader", "-N", "-o", "%T"],
        env=os.environ | cluster.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return set(done.stdout.split())


def _start_munge(folder: Path) -> None:
    """A munge of our own: its key and socket are in the folder, open to this user alone."""
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    subprocess.run(
        [
            "/usr/sbin/munged",
            "--force",
            f"--key-file={key}",
            f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munged.pid",
            f"--log-file={folder}/munged.log",
            f"--seed-file={folder}/munge.seed",
        ],
        check=True,
    )


def _daemon(cluster: Cluster, name: str, *arguments: str) -> None:
    subprocess.run(
        [f"/usr/sbin/{name}", *arguments],
        env=os.environ | cluster.environment,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _make_resolvable() -> None:
    hosts = Path("/etc/hosts")
    known = hosts.read_text().split()
    missing = [node for node in NODES if node not in known]
    if missing:
        with hosts.open("a") as file:
            file.write("\n127.0.0.1 " + " ".join(missing) + "\n")


def _stop(folder: Path) -> None:
    """End the daemons, the controller first so that it starts nothing new."""
    files = ["slurmctld.pid", *(f"slurmd.{node}.pid" for node in NODES), "munged.pid"]
    for file in files:
        with contextlib.suppress(OSError, ValueError):
            process = int((folder / file).read_text())
            os.kill(process, signal.SIGTERM)
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline and Path(f"/proc/{process}").exists():
                time.sleep(0.05)
    _kill_leftovers(folder)


def _kill_leftovers(folder: Path) -> None:
    """Steps outlive their slurmd. All that this cluster started knows its configuration.

    They are gone when it returns: what still writes into the folder keeps it from being deleted.
    """
    mark = f"SLURM_CONF={folder}/slurm.conf\0".encode()
    deadline = time.monotonic() + 60
    while (left := _marked(mark)) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)


def _marked(mark: bytes) -> list[int]:
    """The processes but this one that have these bytes in their environment."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and int(process.name) != os.getpid():
            with contextlib.suppress(OSError):  # a process that has ended has no environment
                if mark in (process / "environ").read_bytes() + b"\0":
                    found.append(int(process.name))
    return found


if __name__ == "__main__":
    with running_cluster(Path(sys.argv[1]).resolve()) as started:
        sys.stderr.write(f"export {next('='.join(pair) for pair in started.environment.items())}\n")
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)

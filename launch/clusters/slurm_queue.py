"""The jobs of a folder in Slurm's queue, for `sae status`; no accounting (sacct) is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import storage_path
from launch.clusters.slurm import SubmittedJob, TaskState, read_jobs, task_states
from launch.clusters.slurm_script import script_folder
from launch.config.job import Job

FORGOTTEN = "not in the queue"


@dataclass(frozen=True)
class QueueView:
    """How Slurm sees a folder's jobs.

    Attributes:
        runs: by the run's name its number and state, such as `12_3 RUNNING`.
        others: a line for the jobs that are no runs; empty if there are none.
    """

    runs: Mapping[str, str] = field(default_factory=dict)
    others: str = ""

    def is_running(self, run: str) -> bool:
        """Does the queue say that the run of this name is running?"""
        return self.runs.get(run, "").endswith(" RUNNING")


def queue_view(config: Job) -> QueueView | None:
    """Ask the queue about the jobs recorded in the config's output; None if there are none.

    If Slurm can't be reached, from another machine for instance, the view says only that.
    """
    jobs = read_jobs(script_folder(config))
    if not jobs:
        return None
    try:
        states = task_states([job.number for job in jobs.values()])
    except UserError as error:
        return QueueView(others=f"Slurm's queue is unknown: {str(error).partition(chr(10))[0]}")
    runs: dict[str, str] = {}
    others: list[str] = []
    for job in jobs.values():
        if job.stage == "train":
            runs |= _runs(job, states, alone=storage_path(config.output).name)
        else:
            others.append(f"{job.stage}: job {_words(job.number, states)}")
    return QueueView(runs=runs, others="Slurm: " + "; ".join(others) if others else "")


def _runs(job: SubmittedJob, states: Mapping[str, TaskState], *, alone: str) -> dict[str, str]:
    if not job.cohorts:
        return {alone: _words(job.number, states)}
    names = {
        name: f"{job.number}_{index}" for index, cohort in enumerate(job.cohorts) for name in cohort
    }
    return {name: _words(number, states) for name, number in names.items()}


def _words(number: str, states: Mapping[str, TaskState]) -> str:
    if number not in states:
        return f"{number} {FORGOTTEN}"
    state = states[number]
    why = f" ({state.reason})" if state.state == "PENDING" and state.reason else ""
    return f"{number} {state.state}{why}"

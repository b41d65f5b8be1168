"""Submitting batch scripts to Slurm: harvest, then training as an array, evaluation, the report.

Slurm keeps their order, so the command can leave: runs wait for a harvest that succeeded,
evaluation for the end of all runs, failed or not, and the report for the end of evaluation.
The numbers of the jobs are kept in `slurm.json` next to the scripts. Run again, the command submits
what is neither done nor in the queue.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import make_folder, read_json, write_json, write_text
from launch import run_state
from launch.clusters.common import Command, Stage
from launch.clusters.slurm_script import Script, render, script_folder
from launch.config.job import Job
from launch.config.local import LocalLaunch
from launch.console import print_text
from launch.sweep.cohorts import cohorts_of
from launch.sweep.expand import expand
from launch.sweep.run import Run
from launch.sweep.suite_runs import stores
from sae_train.config.file import FILE_NAME, write_config

logger = logging.getLogger(__name__)

RECORD = "slurm.json"
# For one command: sbatch itself retries a full queue for two minutes.
_PATIENCE_SECONDS = 150.0
_ENDED = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "REVOKED",
    "TIMEOUT",
)


@dataclass(frozen=True)
class SubmittedJob:
    """A submitted job.

    Attributes:
        number: Slurm's, of the whole array where it is one.
        digest: of the script and the configs it was submitted with (`Script.digest`).
        cohorts: the names of runs that train together, by array index; empty where it is no
            array.
    """

    stage: Stage
    number: str
    digest: str
    cohorts: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class TaskState:
    """The state of a job or an array task in Slurm: a word such as RUNNING, and why it waits."""

    state: str
    reason: str = ""

    @property
    def has_ended(self) -> bool:
        """Is this a final state?"""
        return self.state in _ENDED


def submit(config: Job, *, command: Command, dry_run: bool) -> int:
    """Write a command's scripts and submit them, or, with `dry_run`, print them; returns 0.

    Raises:
        UserError: the config can't run there, Slurm isn't there or refuses, or jobs of another
            config are in the queue; it says what was submitted and what wasn't.
    """
    scripts = render(config, command=command)
    folder = script_folder(config)
    if dry_run:
        write_scripts(scripts, folder)
        for script in scripts:
            print_text(f"# {folder / script.file_name}\n{script.text}")
        logger.info("nothing was submitted; %d scripts are in %s", len(scripts), folder)
        return 0
    jobs = read_jobs(folder)
    queued = _queued(scripts, jobs=jobs, folder=folder)
    write_scripts(scripts, folder)
    runs = expand(config) if command == "sweep" else []
    if runs:
        _begin_folders(config, runs)
    wanted = _wanted(config, runs=runs) if runs else {script.stage: "" for script in scripts}
    _submit_all(scripts, wanted=wanted, queued=queued, jobs=jobs, folder=folder)
    return 0


def write_scripts(scripts: Sequence[Script], folder: Path) -> None:
    """Write scripts and their configs; raises `UserError` if the disk refuses."""
    for script in scripts:
        for name, text in script.files.items():
            make_folder((folder / name).parent)
            write_text(folder / name, text)


def read_jobs(folder: Path) -> dict[Stage, SubmittedJob]:
    """The jobs last submitted from a folder of scripts, by stage; none if there are none.

    Raises:
        UserError: the record is damaged.
    """
    path = folder / RECORD
    if not path.exists():
        return {}
    try:
        entries = read_json(path)["jobs"]
        jobs = [
            SubmittedJob(**{**entry, "cohorts": tuple(map(tuple, entry["cohorts"]))})
            for entry in entries
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error}): look with squeue for jobs of it, then delete the file"
        ) from error
    return {job.stage: job for job in jobs}


def task_states(numbers: Sequence[str]) -> dict[str, TaskState]:
    """How the queue sees jobs: by number, or `number_index` for tasks of an array.

    Jobs that Slurm has forgotten, some minutes after their end, are left out.

    Raises:
        UserError: Slurm isn't there or doesn't answer.
    """
    if not numbers:
        return {}
    wanted = set(numbers)
    # Given the number of a forgotten job squeue fails, so all jobs are listed.
    form = "%F|%K|%i|%T|%r"
    lines = _slurm(
        "squeue", "--me", "--noheader", "--states=all", "--array", "-o", form
    ).splitlines()
    states = {}
    for line in lines:
        base, index, _, state, reason = line.split("|", 4)
        if base in wanted:
            name = base if index == "N/A" else f"{base}_{index}"
            states[name] = TaskState(state, "" if reason == "None" else reason)
    return states


def _queued(
    scripts: Sequence[Script], *, jobs: Mapping[Stage, SubmittedJob], folder: Path
) -> set[Stage]:
    """The stages whose job from the same script is in the queue.

    Raises:
        UserError: one from another config is; nothing is submitted beside it.
    """
    states = task_states([job.number for job in jobs.values()])
    alive = {
        job.stage: job
        for job in jobs.values()
        for name, state in states.items()
        if name.partition("_")[0] == job.number and not state.has_ended
    }
    digests = {script.stage: script.digest for script in scripts}
    others = [job for job in alive.values() if digests.get(job.stage, job.digest) != job.digest]
    if others:
        words = ", ".join(f"{job.stage} (job {job.number})" for job in others)
        raise UserError(
            f"jobs of {folder} from another config are in the queue: {words}. Both would write to "
            "the same folder, so nothing was submitted: wait for them, or end them with "
            f"`scancel {' '.join(job.number for job in others)}`"
        )
    return set(alive)


def _wanted(config: Job, *, runs: Sequence[Run]) -> dict[Stage, str]:
    """The stages a sweep still needs; for training with the array indices of unfinished cohorts."""
    cohorts = cohorts_of(config, runs)
    missing = [
        index
        for index, cohort in enumerate(cohorts)
        if not all(run_state.is_trained(one) for one in cohort.configs)
    ]
    evaluating = missing or any(
        run_state.needs_evaluation(run.folder) or run_state.needs_release(run.folder)
        for run in runs
    )
    wanted: dict[Stage, str] = {}
    if evaluating and config.cache.rolling is None and not _has_stores(config):
        run_state.check_begun([run.config for run in runs])
        wanted["harvest"] = ""
    if missing:
        wanted["train"] = ",".join(map(str, missing)) if len(missing) < len(cohorts) else ""
    if evaluating:
        wanted["evaluate"] = ""
    return wanted | {"report": ""}


def _has_stores(config: Job) -> bool:
    from activation_cache.harvest.matching_store import open_matching_store

    try:
        for one in stores(config):
            open_matching_store(model=one.model, text=one.text, cache=one.cache)
    except UserError:
        return False  # the job itself reports what is wrong with it
    return True


def _begin_folders(config: Job, runs: Sequence[Run]) -> None:
    """Write each run's config, so that the report and `sae status` list runs not yet started."""
    write_config(config, config.output)
    for run in runs:
        if not (run.folder / FILE_NAME).exists():
            here = run.config.model_copy(update={"launch": LocalLaunch()})
            write_config(here, run.folder)


def _submit_all(
    scripts: Sequence[Script],
    *,
    wanted: Mapping[Stage, str],
    queued: set[Stage],
    jobs: dict[Stage, SubmittedJob],
    folder: Path,
) -> None:
    """Submit what is wanted and not queued, each after the one before it."""
    before: SubmittedJob | None = None
    for position, script in enumerate(scripts):
        if script.stage in queued:
            before = jobs[script.stage]
            logger.info("%s is in the queue already: job %s", script.stage, before.number)
            continue
        if script.stage not in wanted:
            continue
        options = _order(script.stage, before) + _indices(script, wanted[script.stage])
        try:
            number = _sbatch(folder / script.file_name, options)
        except UserError as error:
            left = [one.stage for one in scripts[position:] if one.stage in {*wanted} - queued]
            raise UserError(_told(error, jobs, [*scripts[:position]], left)) from error
        before = SubmittedJob(script.stage, number, digest=script.digest, cohorts=script.cohorts)
        jobs[script.stage] = before
        write_json(folder / RECORD, {"jobs": [asdict(job) for job in jobs.values()]})
        logger.info("%s: job %s", script.stage, number)


def _order(stage: Stage, before: SubmittedJob | None) -> list[str]:
    """A job's dependency: training needs a complete store, later stages take what is there."""
    if before is None:
        return []
    if stage == "train":
        # Otherwise it and the report would wait for ever after a failed harvest.
        return [f"--dependency=afterok:{before.number}", "--kill-on-invalid-dep=yes"]
    return [f"--dependency=afterany:{before.number}"]


def _indices(script: Script, indices: str) -> list[str]:
    """`--array` for some of the cohorts, with the script's own bound on how many run at once."""
    if not indices:
        return []
    bound = script.text.partition("#SBATCH --array=")[2].partition("\n")[0].partition("%")[2]
    return [f"--array={indices}%{bound}"]


def _told(
    error: UserError,
    jobs: Mapping[Stage, SubmittedJob],
    earlier: Sequence[Script],
    left: Sequence[Stage],
) -> str:
    done = [f"{one.stage} (job {jobs[one.stage].number})" for one in earlier if one.stage in jobs]
    if not done:
        return f"{error}\nNothing was submitted."
    return (
        f"{error}\nIn the queue: {', '.join(done)}. Not submitted: {', '.join(left)}. Fix the "
        "cause and run the same command again: it submits only these. Or cancel the others with "
        f"`scancel {' '.join(jobs[one.stage].number for one in earlier if one.stage in jobs)}`."
    )


def _sbatch(file: Path, options: Sequence[str]) -> str:
    said = _slurm("sbatch", "--parsable", *options, os.fspath(file))
    return said.strip().splitlines()[-1].partition(";")[0]


def _slurm(program: str, *arguments: str) -> str:
    """Run one of Slurm's commands and return its standard output.

    Raises:
        UserError: it isn't on the PATH, fails (with its message), or doesn't answer.
    """
    path = shutil.which(program)
    if path is None:
        raise UserError(
            f"{program} was not found on the PATH: this machine has no Slurm. Give the command on "
            "a login node of the cluster, or take the scripts there (`--dry-run` writes them) and "
            "give `sbatch FILE` for each"
        )
    shown = shlex.join([program, *arguments])
    try:
        done = subprocess.run(
            [path, *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=_PATIENCE_SECONDS,
        )
    except subprocess.TimeoutExpired as late:
        words = late.stderr.decode(errors="replace").strip() if late.stderr else "no word of it"
        raise UserError(f"`{shown}` had not ended after {_PATIENCE_SECONDS:g} s: {words}") from late
    if done.returncode != 0:
        words = done.stderr.strip() or f"exit status {done.returncode}"
        raise UserError(f"`{shown}` failed: {words}")
    return done.stdout

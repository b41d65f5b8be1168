"""Batch scripts from a config: one file per stage, plain and readable, `sbatch FILE` by hand.

What a script does when its command ends:

- 0 and 2 (done, the user's mistake) are the job's own end.
- 75 (saved, run me again): the job puts itself back into the queue. Slurm wouldn't: it counts a
  job that ends in order after a graceful preemption as completed. But when Slurm is ending the
  job, because its owner cancelled it or because Slurm requeues it anyway, nothing is done.
- Anything else is a lost process or a bug: the command is started again in the same allocation,
  with growing pauses, `launch.restarts` times without new progress. A lost node ends the job;
  `--requeue` makes Slurm start it again.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from activation_cache.runtime.errors import UserError
from launch.clusters.common import (
    Command,
    Stage,
    harvests_in_training,
    local_folder,
    mesh_of,
)
from launch.config.job import Job
from launch.config.local import LocalLaunch
from launch.config.slurm import SlurmLaunch
from launch.sweep.cohorts import Cohort, cohorts_of
from launch.sweep.expand import expand
from sae_train.config.file import resolved_yaml

RUNS = "runs"  # the configs of a sweep's runs, by name
_LONGEST_PAUSE_SECONDS = 600

# Bash, not a template of Python's: the values come before it, as variables.
_FUNCTIONS = r"""
asked=
# USR1 comes to this shell alone, before the time limit and as a notice of preemption. TERM comes
# when Slurm ends the job, which tells the steps as well. HUP and USR2 are other clusters' notices.
trap 'asked=yes' HUP USR1 USR2 TERM

# Ends this start of the job. It goes back into the queue, unless Slurm is ending it already:
# cancelled by its owner it stays so, and requeued or preempted it comes back anyway.
again() {
    if scontrol show job --oneliner "$SLURM_JOB_ID" | grep -q ' JobState=RUNNING '; then
        echo "sae: saved and stopped; job $SLURM_JOB_ID goes back into the queue"
        scontrol requeue "$SLURM_JOB_ID" || echo "sae: no requeue; submit this script again"
    fi
    exit 75
}

# Waits for a child and returns its status. A trapped signal ends `wait` early; then the steps are
# asked to stop, again and again in case they have only begun. (srun, sent a TERM, kills them.)
await() {
    wait "$1"
    while kill -0 "$1" 2>/dev/null; do
        scancel --signal=TERM "$SLURM_JOB_ID" 2>/dev/null
        sleep 10 &
        wait -n
    done
    wait "$1"
}

# `sae "$@"` in every task; returns its exit status once there is nothing to start again.
run() {
    local failures=0 pause=$restart_pause before status
    while true; do
        before=$(progress)
        [ -z "$asked" ] || again
        srun "${tasks[@]}" --kill-on-bad-exit=0 "${sae[@]}" "$@" &
        await $!
        status=$?
        case $status in 0 | 2) return $status ;; 75) again ;; esac
        [ -z "$asked" ] || again
        if [ "$(progress)" != "$before" ]; then failures=0 pause=$restart_pause; fi
        failures=$((failures + 1))
        if [ "$failures" -gt "$restarts" ]; then
            echo "sae: giving up: $failures starts in a row have saved nothing new"
            return $status
        fi
        echo "sae: lost (status $status); again in $pause s, restart $failures of $restarts"
        sleep "$pause" &
        wait $!
        pause=$((pause * 2 > longest_pause ? longest_pause : pause * 2))
    done
}
"""


@dataclass(frozen=True)
class Script:
    """One job as it is submitted.

    Attributes:
        files: contents by path relative to the folder of the scripts: the script's own file
            first, then the configs it reads.
        cohorts: the names of runs that train together, by array index; none where the job is no
            array.
    """

    stage: Stage
    files: dict[str, str]
    cohorts: tuple[tuple[str, ...], ...] = ()

    @property
    def file_name(self) -> str:
        """`<stage>.sbatch`."""
        return f"{self.stage}.sbatch"

    @property
    def text(self) -> str:
        """The script itself, without the configs it reads."""
        return self.files[self.file_name]

    @property
    def digest(self) -> str:
        """A hash of everything the job reads: is the queued job the one this config asks for?"""
        whole = "\0".join(f"{name}\0{text}" for name, text in sorted(self.files.items()))
        return hashlib.sha256(whole.encode()).hexdigest()[:16]


def slurm_launch(config: Job) -> SlurmLaunch:
    """The config's launch section, as the Slurm class that it is."""
    assert isinstance(config.launch, SlurmLaunch), config.launch
    return config.launch


def script_folder(config: Job) -> Path:
    """The folder here for scripts, logs and job numbers (`local_folder`)."""
    return local_folder(config, "slurm")


def render(config: Job, *, command: Command) -> list[Script]:
    """The scripts of a command, in the order in which their jobs run.

    Raises:
        UserError: a path that a batch script can't name, or a mesh the processes can't share.
    """
    for key, path in (("output", config.output), ("the folder you are in", os.getcwd())):
        if not path.isprintable() or "\\" in path:
            raise UserError(
                f"{key} {path!r} can't be named in a batch script: it has a line break, a control "
                "character or a backslash. Choose another name"
            )
    rolling = harvests_in_training(config, processes=slurm_launch(config).processes)
    if command != "sweep":
        _check_mesh(config, stage=command)
        return [_single_script(config, stage=command, config_name=f"{command}.yaml")]
    runs = expand(config)
    _check_mesh(config, stage="harvest")
    for run in runs:
        _check_mesh(run.config, stage="train")
    before = [] if rolling else [_single_script(config, stage="harvest", config_name="sweep.yaml")]
    return [
        *before,
        _train_script(config, cohorts_of(config, runs)),
        _evaluate_script(config),
        _report_script(config),
    ]


def _single_script(config: Job, *, stage: Stage, config_name: str) -> Script:
    """A single command on one config; its progress is the list of files it has saved."""
    folder = quote(_whole(config.cache.path if stage == "harvest" else config.output))
    body = (
        f"progress() {{ ls {folder}/checkpoints {folder}/commits 2>/dev/null; }}\n"
        f"run {stage} {quote(_absolute(config, config_name))}\n"
    )
    text = _script(config, stage=stage, body=body)
    return Script(stage, {f"{stage}.sbatch": text, config_name: _travelling(config)})


def _train_script(config: Job, cohorts: Sequence[Cohort]) -> Script:
    """An array with a task per cohort. (Names of runs contain no spaces.)"""
    names = "\n".join(f"    {quote(' '.join(cohort.names))}" for cohort in cohorts)
    body = (
        "# Runs that read the same batches train together: a cohort for each index.\n"
        f"cohorts=(\n{names}\n)\n"
        'read -ra runs <<<"${cohorts[SLURM_ARRAY_TASK_ID]}"\necho "sae: ${runs[*]}"\n'
        'configs=() saved=()\nfor name in "${runs[@]}"; do\n'
        f'    configs+=({quote(_absolute(config, RUNS))}/"$name".yaml)\n'
        f'    saved+=({quote(_whole(config.output))}/"$name"/checkpoints)\n'
        'done\nprogress() { ls "${saved[@]}" 2>/dev/null; }\n'
        'run train "${configs[@]}"\n'
    )
    count = len(cohorts)
    at_once = 1 if config.cache.rolling else slurm_launch(config).at_once  # they share one window
    bound = min(count, at_once or count)
    text = _script(config, stage="train", body=body, options=[f"--array=0-{count - 1}%{bound}"])
    files = {"train.sbatch": text}
    runs = [run for cohort in cohorts for run in cohort.runs]
    files |= {f"{RUNS}/{run.name}.yaml": _travelling(run.config) for run in runs}
    return Script("train", files, cohorts=tuple(cohort.names for cohort in cohorts))


def _evaluate_script(config: Job) -> Script:
    """Evaluation in all processes, then the release in one."""
    folder = quote(_whole(config.output))
    body = (
        f"progress() {{ ls -l {folder}/*/evaluation.json {folder}/*/release 2>/dev/null; }}\n"
        f"run evaluate {folder}\nevaluated=$?\n"
        f"tasks=(--nodes=1 --ntasks=1)\nrun export {folder}\nexported=$?\n"
        "exit $((evaluated ? evaluated : exported))\n"
    )
    text = _script(config, stage="evaluate", body=body)
    return Script("evaluate", {"evaluate.sbatch": text})


def _report_script(config: Job) -> Script:
    body = f"progress() {{ :; }}\nrun report {quote(_whole(config.output))}\n"
    return Script("report", {"report.sbatch": _script(config, stage="report", body=body)})


def _script(config: Job, *, stage: Stage, body: str, options: Sequence[str] = ()) -> str:
    launch = slurm_launch(config)
    lines = [*_options(config, stage=stage), *options, *_resources(launch, stage=stage)]
    several = stage != "report"
    processes = launch.processes if several else 1
    _, mesh = mesh_of(config, stage=stage)
    devices = mesh.data * mesh.model
    tasks = [f"--nodes={launch.nodes if several else 1}", f"--ntasks={processes}"]
    if launch.cpus_per_task and stage != "report":
        tasks.append(f"--cpus-per-task={launch.cpus_per_task}")  # srun doesn't inherit it
    python = launch.python or sys.executable
    variables = [
        f"sae=({quote(python)} -m launch.cli)",
        f"tasks=({' '.join(tasks)})",
        f"restarts={launch.restarts} restart_pause={round(launch.restart_pause_seconds)} "
        f"longest_pause={_LONGEST_PAUSE_SECONDS}",
        f"export SAE_HEARTBEAT_SECONDS={launch.heartbeat_seconds}",
        "# Only CPUs read it: a task's CPUs look like its share of the mesh's devices.",
        f"export JAX_NUM_CPU_DEVICES=${{JAX_NUM_CPU_DEVICES:-{max(1, devices // processes)}}}",
    ]
    parts = [
        "#!/bin/bash",
        f"# {_TITLES[stage]} By hand: sbatch {stage}.sbatch",
        *(f"#SBATCH {line}" for line in lines),
        _FUNCTIONS,
        *launch.setup,
        *variables,
        body,
    ]
    return "\n".join(parts)


_TITLES: dict[Stage, str] = {
    "harvest": "Writes the activation store.",
    "train": "Trains.",
    "evaluate": "Evaluates and releases what is trained.",
    "report": "Writes the report, whatever became of the runs.",
}


def _options(config: Job, *, stage: Stage) -> list[str]:
    launch = slurm_launch(config)
    sweep = config.sweep is not None
    log = f"{stage}-%A_%a.log" if sweep and stage == "train" else f"{stage}-%j.log"
    pattern = _absolute(config, "").replace("%", "%%") + f"/{log}"
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", config.name)
    return [
        f"--job-name=sae-{stage}-{name}",
        f"--chdir={sbatch_quote(os.getcwd())}",
        f"--output={sbatch_quote(pattern)}",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{launch.signal_seconds}",
    ]


def _resources(launch: SlurmLaunch, *, stage: Stage) -> list[str]:
    """Options for resources; the report is one process and needs no accelerator."""
    light = stage == "report"
    options: list[tuple[str, str | int | None]] = [
        ("partition", launch.partition),
        ("account", launch.account),
        ("qos", launch.qos),
        ("constraint", None if light else launch.constraint),
        ("gres", None if light else launch.gres),
        ("time", launch.time),
        ("nodes", 1 if light else launch.nodes),
        ("ntasks-per-node", 1 if light else launch.tasks_per_node),
        ("cpus-per-task", None if light else launch.cpus_per_task),
        ("mem", None if light else launch.memory),
    ]
    lines = [f"--{name}={sbatch_quote(str(value))}" for name, value in options if value is not None]
    return lines + launch.sbatch


def _travelling(config: Job) -> str:
    launch = LocalLaunch(heartbeat_seconds=slurm_launch(config).heartbeat_seconds)
    return resolved_yaml(config.model_copy(update={"launch": launch}))


def sbatch_quote(text: str) -> str:
    """A value quoted for a `#SBATCH` line, whose quotes and backslashes work as in a shell."""
    if re.fullmatch(r"[-A-Za-z0-9_./:=,%@+&|*()\[\]]+", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _whole(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


def _absolute(config: Job, name: str) -> str:
    return os.path.abspath(script_folder(config) / name)


def _check_mesh(config: Job, *, stage: Stage) -> None:
    launch, (key, mesh) = slurm_launch(config), mesh_of(config, stage=stage)
    devices = mesh.data * mesh.model
    if devices % launch.processes:
        raise UserError(
            f"{config.name}: launch.nodes {launch.nodes} x tasks_per_node {launch.tasks_per_node} "
            f"are {launch.processes} processes, which do not divide the mesh's {devices} devices "
            f"({key}.data * {key}.model): make one a multiple of the other"
        )

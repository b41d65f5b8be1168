"""`launch: {on: slurm}`: what a batch script needs that the rest of the config doesn't say.

Every value that goes into a script is checked here, so that none can be read as something else and
a mistake is reported with its key before anything is submitted.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from activation_cache.config import NonNegative, PositiveSmallCount, Section, SmallCount, expanded

# Options that the scripts set themselves; restarts and order depend on them.
_OURS = (
    "array",
    "chdir",
    "dependency",
    "error",
    "job-name",
    "kill-on-invalid-dep",
    "no-requeue",
    "nodes",
    "ntasks-per-node",
    "open-mode",
    "output",
    "parsable",
    "requeue",
    "signal",
    "wait",
    "wrap",
)
_OUR_LETTERS = "aDdeJNoW"
_FIRST_SIGNAL_SECONDS = 60  # Slurm may send it up to a minute early


def _word(text: str) -> str:
    if not text.isprintable() or re.search(r"[\s'\"\\#]", text) or not text:
        raise ValueError(f"{text!r} must be one word without spaces, quotes, '\\' and '#'")
    if text.startswith("-"):
        raise ValueError(f"{text!r} starts with '-', as an option does")
    return text


def _as_text(value: Any) -> Any:
    """`time: 90` is written as a number and means the text '90'."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if is_number else value


def _time(text: str) -> str:
    if time_seconds(text) is None:
        raise ValueError(
            f"{text!r} is not one of Slurm's times: minutes, minutes:seconds, "
            "hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds"
        )
    return text


def _memory(text: str) -> str:
    if not re.fullmatch(r"[0-9]+[KMGT]?", text):
        raise ValueError(f"{text!r} is not an amount of memory, such as 64G or 4000 (MB)")
    return text


def _one_line(text: str) -> str:
    if not text.strip() or not text.replace("\t", " ").isprintable():
        raise ValueError(f"{text!r} must be one line: give each line as an entry of the list")
    return text


def _sbatch_option(text: str) -> str:
    found = re.match(r"--([a-z][-a-z0-9]*)|-([A-Za-z])", text)
    if found is None:
        raise ValueError(f"{text!r} is not an option of sbatch, such as --exclusive")
    if found[1] in _OURS or (found[2] and found[2] in _OUR_LETTERS):
        raise ValueError(f"{found[0]} is set by the scripts themselves and can't be given here")
    if re.search(r"(?<!\\)#", text):
        raise ValueError(f"{text!r}: sbatch takes what follows '#' for a comment")
    return text


def time_seconds(text: str) -> int | None:
    """Seconds of one of Slurm's times; None if it isn't one."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if found is None:
        return None
    days, first, second, third = (int(part) if part else 0 for part in found.groups())
    if found[1] or found[4]:
        hours, minutes, seconds = first, second, third
    else:
        hours, minutes, seconds = 0, first, second
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


Word = Annotated[str, AfterValidator(_word)]
Line = Annotated[str, AfterValidator(_one_line)]


class SlurmLaunch(Section):
    """A Slurm cluster that sees this folder: each stage is a job, each run a task of an array."""

    on: Literal["slurm"]
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    gres: Word | None = None  # for each node, such as gpu:8
    time: Annotated[str, BeforeValidator(_as_text), AfterValidator(_time)] | None = None
    nodes: PositiveSmallCount = 1
    tasks_per_node: PositiveSmallCount = 1  # processes; with several, one per GPU
    cpus_per_task: PositiveSmallCount | None = None
    memory: Annotated[str, BeforeValidator(_as_text), AfterValidator(_memory)] | None = None
    sbatch: list[Annotated[Line, AfterValidator(_sbatch_option)]] = Field(default_factory=list)
    setup: list[Line] = Field(default_factory=list)  # shell lines before the command
    # Null: the one that submits.
    python: Annotated[Line, AfterValidator(expanded), Field(min_length=1)] | None = None
    at_once: PositiveSmallCount | None = None  # runs of a sweep; null: all
    signal_seconds: PositiveSmallCount = 120  # before the time limit: what a save may take
    restarts: SmallCount = 3  # of a stage in its allocation, since the last checkpoint
    restart_pause_seconds: Annotated[NonNegative, Field(le=86_400)] = 5.0
    heartbeat_seconds: Annotated[PositiveSmallCount, Field(ge=5)] = 60

    @model_validator(mode="after")
    def _coherent(self) -> SlurmLaunch:
        limit = time_seconds(self.time) if self.time is not None else None
        if limit and limit <= self.signal_seconds + _FIRST_SIGNAL_SECONDS:
            raise ValueError(
                f"launch.time {self.time} is {limit} s, and signal_seconds {self.signal_seconds} "
                f"before its end (or up to {_FIRST_SIGNAL_SECONDS} s earlier) the work is asked to "
                "stop: raise time or lower signal_seconds"
            )
        gpus = re.search(r"(?:^|,)gpu(?::[^:,]+)?:(\d+)", self.gres or "")
        if gpus and self.processes > 1 and int(gpus[1]) != self.tasks_per_node:
            raise ValueError(
                f"launch.gres {self.gres} gives {gpus[1]} GPUs to {self.tasks_per_node} processes "
                f"on each node, and JAX takes one for each: set tasks_per_node to {gpus[1]}"
            )
        return self

    @property
    def processes(self) -> int:
        """Of all nodes together."""
        return self.nodes * self.tasks_per_node

"""What a run's folder holds, read without a device: for `sae status`, the sweep and the report."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath, PurePosixPath
from typing import Any, Literal

from activation_cache.runtime.errors import UserError
from activation_cache.storage.bucket import BucketPath
from activation_cache.storage.files import (AnyPath, StoragePath, append_line, disk_errors, file_sizes, make_folder, storage_path, write_bytes, write_json)
from activation_cache.storage.locks import is_locked
from sae_train.config import strict_yaml
from sae_train.config.file import FILE_NAME, read_run_config
from sae_train.config.run import Config
from sae_train.runs.metrics_file import read_metrics
from sae_train.runs.recorded import read_evaluation_record, read_failure

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
EVALUATION = "evaluation.json"
FAILURE = "failure.json"
RELEASE = "release"
STARTS = "starts.jsonl"
_SUITE_DEPTH = 4  # res/layer_12/width_16k/coefficient_0.001
_COMMIT = "meta/metadata"  # of a checkpoint in a bucket, where it is written last

State = Literal["not started", "running", "stopped", "trained", "failed"]


@dataclass(frozen=True)
class RunFolder:
    """A snapshot of one run.

    Attributes:
        metrics: the rows of metrics.jsonl, rising by step.
        checkpoint_step: the step of the newest whole checkpoint.
        evaluation: evaluation.json, if there is one.
        extra_evaluations: by label, the results of `evaluation.also`: other models, other text.
        release: the files of the release tree, relative to the run's folder.
        failure: why the last attempt at the run failed, if it did.
        restarts: how often its training was taken up again.
    """

    path: StoragePath
    config: Config
    metrics: Sequence[dict[str, Any]]
    checkpoint_step: int | None
    evaluation: dict[str, Any] | None
    release: tuple[PurePath, ...]
    failure: str | None
    restarts: int = 0
    extra_evaluations: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.name

    @property
    def state(self) -> State:
        """How far the run has come; a finished one is `trained` whatever came after."""
        if self.checkpoint_step == self.config.train.steps:
            return "trained"
        if is_locked(self.path):
            return "running"
        if self.failure is not None:
            return "failed"
        return "stopped" if self.checkpoint_step or self.metrics else "not started"


def read_run(path: AnyPath) -> RunFolder:
    """Read a run's folder; raises `UserError` if it isn't one or a file in it is damaged."""
    folder = storage_path(path)
    config, metrics, step = read_run_config(folder), read_metrics(folder), newest_checkpoint(folder)
    if step is None and not metrics and sweep_section(folder) is not None:
        raise UserError(f"{folder} is a sweep's folder; its runs are the folders inside")
    evaluation, failure = folder / EVALUATION, folder / FAILURE
    return RunFolder(
        path=folder,
        config=config,
        metrics=metrics,
        checkpoint_step=step,
        evaluation=read_evaluation_record(evaluation) if evaluation.exists() else None,
        release=release_files(folder),
        failure=_failure(failure) if failure.exists() else None,
        restarts=max(0, count_starts(folder) - 1),
        extra_evaluations=_extra_evaluations(folder),
    )


def _failure(path: StoragePath) -> str:
    stage, reason = read_failure(path)
    return f"{reason} (in {stage})"


def labelled(name: str, label: str | None) -> str:
    """The name of an extra evaluation's file: `evaluation-gemma-2-9b-it.json`."""
    stem, dot, ending = name.rpartition(".")
    return name if label is None else f"{stem}-{label}{dot}{ending}"


def _extra_evaluations(folder: StoragePath) -> dict[str, dict[str, Any]]:
    before, after = labelled(EVALUATION, "*").split("*")
    names = sorted(path.name for path in folder.iterdir())
    return {
        name[len(before) : -len(after)]: read_evaluation_record(folder / name)
        for name in names
        if name.startswith(before) and name.endswith(after)
    }


def run_folders(folder: AnyPath) -> list[StoragePath]:
    """The runs in a folder: itself if it is one, else the runs of the sweep it is (`sweep_runs`).

    Raises:
        UserError: neither a run's folder nor a sweep's, or a sweep without any run yet.
    """
    root = storage_path(folder)
    read_run_config(root)  # says what is wrong with a folder that is neither
    sweep = sweep_section(root)
    if sweep is None:
        return [root]
    inside = sweep_runs(root, is_suite=bool(sweep.get("cells")))
    if not inside:
        raise UserError(f"{root} is a sweep without any run yet: start it with `sae sweep`")
    return inside


def sweep_runs(root: StoragePath, *, is_suite: bool) -> list[StoragePath]:
    """The runs of a sweep: all that were made in its folder, by its config or an earlier one.

    A folder counts if the `output` in its own config ends in its path below the sweep's, so the
    sweep may be moved. A warning names what doesn't count: copies, renamed runs, other sweeps.
    Every command that takes a sweep goes by this rule.
    """
    if not root.is_dir():
        return []
    found: list[StoragePath] = []
    strays: list[StoragePath] = []
    # A suite's runs lie as deep as the released suites' folders do.
    for path in _runs_below(root, depth=_SUITE_DEPTH if is_suite else 1):
        (found if _was_made_at(path, name=_relative(path, root)) else strays).append(path)
    if strays:
        logger.warning(
            "%s: left out, for the config inside was made for another place (a copy, a renamed "
            "run, a sweep of its own): %s. To count one, set `output` in its config.yaml to where "
            "it lies",
            root,
            ", ".join(sorted(_relative(path, root) for path in strays)),
        )
    return sorted(found, key=lambda path: [_natural(part) for part in path.parts])


def _was_made_at(path: StoragePath, *, name: str) -> bool:
    """Does the `output` of a run's config end in `name`? No for a sweep's config."""
    text = (path / FILE_NAME).read_bytes().decode(errors="replace")
    # What stands before is not parsed: a suite has thousands of configs.
    end = max(text.find("\noutput:"), 0)
    values = strict_yaml.parse(text[end:], name=str(path / FILE_NAME)).value
    if not isinstance(values, dict):
        read_run_config(path)  # says what is wrong
        return False
    output = PurePosixPath(str(values.get("output")).replace(os.sep, "/"))
    wanted = PurePosixPath(name.replace(os.sep, "/"))
    return not values.get("sweep") and output.parts[-len(wanted.parts) :] == wanted.parts


def sweep_section(folder: StoragePath) -> dict[str, Any] | None:
    """What the config of a sweep's folder says under `sweep`; None for the folder of a run.

    It is plain data here: only the command knows the rules of that section.
    """
    path = folder / FILE_NAME
    section = strict_yaml.parse(path.read_bytes().decode(), name=str(path)).value.get("sweep")
    return section if isinstance(section, dict) else None


def _runs_below(folder: StoragePath, *, depth: int) -> Iterator[StoragePath]:
    for path in folder.iterdir():
        # In a release lie config.yaml files that are circuit-tracer's.
        if path.name == RELEASE or _is_store(path) or not path.is_dir():
            continue
        if (path / FILE_NAME).is_file():
            yield path
        elif depth > 1:
            yield from _runs_below(path, depth=depth - 1)


def _is_store(path: StoragePath) -> bool:
    """An activation store inside the sweep's folder keeps a config too."""
    return any((path / name).exists() for name in ("manifest.json", "plan.json"))


def newest_checkpoint(folder: StoragePath) -> int | None:
    """The step of the newest whole checkpoint; None if there is none."""
    return next(checkpoint_steps(folder), None)


def checkpoint_steps(folder: StoragePath) -> Iterator[int]:
    """Steps that have a whole checkpoint, falling: one still being written has another name."""
    checkpoints = folder / CHECKPOINTS
    if not checkpoints.is_dir():
        return
    try:
        found = [path for path in checkpoints.iterdir() if path.name.isdecimal()]
    except FileNotFoundError:  # deleted meanwhile, as `--fresh` does
        return
    for path in sorted(found, key=lambda path: int(path.name), reverse=True):
        if not isinstance(path, BucketPath) or (path / _COMMIT).is_file():
            yield int(path.name)


def checkpoint_time(folder: StoragePath, step: int) -> float:
    """When a checkpoint was finished, in seconds since 1970."""
    path = folder / CHECKPOINTS / str(step)
    return (path / _COMMIT if isinstance(path, BucketPath) else path).stat().st_mtime


def release_files(folder: StoragePath) -> tuple[PurePath, ...]:
    """Every file of a run's release tree, relative to the run's folder."""
    files = (path for path in file_sizes(folder / RELEASE) if path.name[0] != ".")
    return tuple(sorted(PurePath(_relative(path, folder)) for path in files))


def _relative(path: StoragePath, folder: StoragePath) -> str:
    return str(path)[len(str(folder)) + 1 :]


def record_failure(folder: AnyPath, *, stage: str, reason: str) -> None:
    """Leave the reason of a failure in the run's folder, for `sae status` and the report.

    Where that is refused, as on a full disk, a warning says so: the failure itself must be told.
    """
    try:
        write_json(make_folder(folder) / FAILURE, {"stage": stage, "reason": reason})
    except UserError as error:
        logger.warning("the reason of the failure isn't kept: %s", error)


def clear_failure(folder: AnyPath) -> None:
    """A new attempt starts: forget why the last one failed.

    Raises:
        UserError: the disk refuses. It is the first write of a command in a run's folder.
    """
    file = storage_path(folder) / FAILURE
    with disk_errors(folder, doing="write in"):
        file.unlink(missing_ok=True)


def record_start(folder: AnyPath, *, step: int, from_scratch: bool = False) -> None:
    """Training starts at a step: one more line; `from_scratch` drops the earlier ones."""
    entry = {"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    path = storage_path(folder) / STARTS
    if from_scratch:
        write_bytes(path, b"")
    append_line(path, json.dumps(entry))


def count_starts(folder: StoragePath) -> int:
    """How often training was started in this folder."""
    path = folder / STARTS
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _natural(name: str) -> list[tuple[int, float, str]]:
    """Sort `width_2048` before `width_16384` and 0.0005 before 0.001."""
    number = r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)"
    return [
        (0, float(part), "") if index % 2 else (1, 0.0, part)
        for index, part in enumerate(re.split(number, name))
    ]

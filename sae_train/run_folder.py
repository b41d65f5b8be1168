"""What a run's folder holds, read without a device: for `sae status`, the sweep and the report."""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from activation_cache.errors import UserError
from activation_cache.storage import disk_errors, make_folder, read_json, write_json
from sae_train.config import Config
from sae_train.config_file import FILE_NAME, read_run_config
from sae_train.metrics import read_metrics

CHECKPOINTS = "checkpoints"
EVALUATION = "evaluation.json"
FAILURE = "failure.json"
RELEASE = "release"
STARTS = "starts.jsonl"
_SUITE_DEPTH = 4  # res/layer_12/width_16k/coefficient_0.001

State = Literal["not started", "running", "stopped", "trained", "failed"]


@dataclass(frozen=True)
class RunFolder:
    """A snapshot of one run.

    Attributes:
        metrics: the rows of metrics.jsonl, rising by step.
        checkpoint_step: the step of the newest whole checkpoint.
        evaluation: evaluation.json, if there is one.
        release: the files of the release tree, relative to the run's folder.
        failure: why the last attempt at the run failed, if it did.
        restarts: how often its training was taken up again.
    """

    path: Path
    config: Config
    metrics: Sequence[dict[str, Any]]
    checkpoint_step: int | None
    evaluation: dict[str, Any] | None
    release: tuple[Path, ...]
    failure: str | None
    restarts: int = 0

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def state(self) -> State:
        """Where the run stands; a finished one is `trained` whatever came after."""
        if self.checkpoint_step == self.config.train.steps:
            return "trained"
        if is_locked(self.path):
            return "running"
        if self.failure is not None:
            return "failed"
        return "stopped" if self.checkpoint_step or self.metrics else "not started"


def read_run(path: str | os.PathLike[str]) -> RunFolder:
    """Read a run's folder; raises `UserError` if it isn't one or a file in it is damaged."""
    folder = Path(path)
    config = read_run_config(folder)
    if config.sweep is not None:
        raise UserError(f"{folder} is a sweep's folder; its runs are the folders inside")
    evaluation, failure = folder / EVALUATION, folder / FAILURE
    return RunFolder(
        path=folder,
        config=config,
        metrics=read_metrics(folder),
        checkpoint_step=newest_checkpoint(folder),
        evaluation=read_json(evaluation) if evaluation.exists() else None,
        release=release_files(folder),
        failure="{reason} (in {stage})".format(**read_json(failure)) if failure.exists() else None,
        restarts=max(0, count_starts(folder) - 1),
    )


def run_folders(folder: str | os.PathLike[str]) -> list[Path]:
    """The runs in a folder: itself if it is one, else the runs of the sweep it is.

    Raises:
        UserError: neither a run's folder nor a sweep's, or a sweep without any run yet.
    """
    root = Path(folder)
    sweep = read_run_config(root).sweep
    if sweep is None:
        return [root]
    # A suite's runs lie as deep as the released suites' folders do.
    inside = list(_runs_below(root, depth=_SUITE_DEPTH if sweep.cells else 1))
    if not inside:
        raise UserError(f"{root} is a sweep without any run yet: start it with `sae sweep`")
    return sorted(inside, key=lambda path: [_natural(part) for part in path.parts])


def _runs_below(folder: Path, *, depth: int) -> Iterator[Path]:
    for path in folder.iterdir():
        if _is_store(path) or not path.is_dir():
            continue
        if (path / FILE_NAME).is_file():
            yield path
        elif depth > 1:
            yield from _runs_below(path, depth=depth - 1)


def _is_store(path: Path) -> bool:
    """An activation store inside the sweep's folder keeps a config too."""
    return any((path / name).exists() for name in ("manifest.json", "plan.json"))


def newest_checkpoint(folder: Path) -> int | None:
    """The step of the newest whole checkpoint: one still being written has another name."""
    checkpoints = folder / CHECKPOINTS
    if not checkpoints.is_dir():
        return None
    return max((int(p.name) for p in checkpoints.iterdir() if p.name.isdecimal()), default=None)


def release_files(folder: Path) -> tuple[Path, ...]:
    """Every file of a run's release tree, relative to the run's folder."""
    files = (path for path in (folder / RELEASE).rglob("*") if path.is_file())
    return tuple(sorted(path.relative_to(folder) for path in files if path.name[0] != "."))


def record_failure(folder: str | os.PathLike[str], *, stage: str, reason: str) -> None:
    """Leave the reason of a failure in the run's folder, for `sae status` and the report."""
    write_json(make_folder(folder) / FAILURE, {"stage": stage, "reason": reason})


def clear_failure(folder: str | os.PathLike[str]) -> None:
    """A new attempt starts: forget why the last one failed."""
    (Path(folder) / FAILURE).unlink(missing_ok=True)


def record_start(folder: str | os.PathLike[str], *, step: int, anew: bool = False) -> None:
    """Training starts at a step: one more line; `anew` forgets the earlier ones."""
    entry = {"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    path = Path(folder) / STARTS
    with disk_errors(path, doing="write"), path.open("w" if anew else "a") as file:
        file.write(json.dumps(entry) + "\n")


def count_starts(folder: Path) -> int:
    """How often training was started in this folder."""
    path = folder / STARTS
    return path.read_bytes().count(b"\n") if path.exists() else 0


def is_locked(folder: Path) -> bool:
    """Does a process hold this folder (`storage.folder_lock`)?

    Asks by taking a shared lock for an instant, which a writer starting in that very instant
    would take for another process: it says so and can be started again.
    """
    try:
        handle = os.open(folder / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _natural(name: str) -> list[tuple[int, float, str]]:
    """Sort `width_2048` before `width_16384` and 0.0005 before 0.001."""
    number = r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)"
    return [
        (0, float(part), "") if index % 2 else (1, 0.0, part)
        for index, part in enumerate(re.split(number, name))
    ]

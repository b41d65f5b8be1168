"""The stages a command or a sweep runs, each imported only when it runs.

JAX and Orbax take seconds to import; `sae --help` and `sae status` should not wait for them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sae_train.config import Config, EvaluationConfig
from sae_train.config_file import read_run_config, resolved_yaml
from sae_train.run_folder import (
    CHECKPOINTS,
    EVALUATION,
    RunFolder,
    newest_checkpoint,
    read_run,
)

if TYPE_CHECKING:
    from sae_train.loop import TrainResult

logger = logging.getLogger(__name__)


def harvest(config: Config, *, stop: Callable[[], bool]) -> None:
    """Make the activation store of `config.cache`, or finish one that was begun."""
    from activation_cache.harvest import harvest as run_harvest

    run_harvest(
        model=config.model,
        text=config.text,
        cache=config.cache,
        resolved_config_yaml=resolved_yaml(config),
        stop=stop,
    )


def train(config: Config, *, fresh: bool, stop: Callable[[], bool]) -> TrainResult:
    """Train the run of `config`, going on from its last checkpoint."""
    from sae_train.loop import train as run_train

    return run_train(config, fresh=fresh, stop=stop)


def evaluate(folders: Sequence[Path], *, settings: EvaluationConfig | None = None) -> None:
    """Evaluate trained runs in one pass of the model; `settings` replace those of the runs."""
    from sae_train.evaluate import evaluate as run_evaluate

    run_evaluate(folders, settings=settings)


def export(folders: Sequence[Path]) -> None:
    """Write and check the release of each run."""
    from sae_train.export import export as run_export

    for folder in folders:
        run_export(folder)


def report(folder: Path) -> Path:
    """Write the report of a run or a sweep; returns its page."""
    from sae_train.report import write_report

    return write_report(folder)


def is_trained(config: Config) -> bool:
    """Has the run of this config ended, under settings that give the same weights?"""
    folder = Path(config.output)
    if newest_checkpoint(folder) != config.train.steps:
        return False
    from sae_train.checkpoint import numeric_differences

    return not numeric_differences(read_run_config(folder), config)


def needs_evaluation(folder: Path) -> bool:
    """Is a trained run's evaluation missing, of another checkpoint or under other settings?

    Judged by the files' words and times, without loading anything; `evaluate` itself compares
    fingerprints.
    """
    run = read_run(folder)
    if run.evaluation is None or run.evaluation.get("step") != run.checkpoint_step:
        return True
    if run.evaluation.get("settings") != run.config.evaluation.model_dump():
        return True
    return _older_than_checkpoint(run, folder / EVALUATION)


def needs_release(folder: Path) -> bool:
    """Is a trained run's release missing, or older than its newest checkpoint?"""
    run = read_run(folder)
    return not run.release or any(_older_than_checkpoint(run, folder / f) for f in run.release)


def _older_than_checkpoint(run: RunFolder, file: Path) -> bool:
    checkpoint = run.path / CHECKPOINTS / str(run.checkpoint_step)
    return file.stat().st_mtime < checkpoint.stat().st_mtime

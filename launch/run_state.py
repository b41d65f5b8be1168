"""What a run still lacks, judged by its files: training, evaluation, release."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import StoragePath, storage_path
from launch.config.job import Job
from sae_train.config.file import read_run_config
from sae_train.runs.folder import (
    EVALUATION,
    RELEASE,
    RunFolder,
    checkpoint_time,
    labelled,
    newest_checkpoint,
    read_run,
)


def is_trained(config: Job) -> bool:
    """Has this config's run reached its last step, with settings that give the same weights?"""
    folder = storage_path(config.output)
    if newest_checkpoint(folder) != config.train.steps:
        return False
    from sae_train.checkpoint.same_run import numeric_differences

    return not numeric_differences(read_run_config(folder), config)


def needs_store(configs: Sequence[Job]) -> bool:
    """Is one of these runs still to be trained or evaluated?"""
    return not all(is_trained(config) for config in configs) or any(
        needs_evaluation(storage_path(config.output)) for config in configs
    )


def check_begun(configs: Sequence[Job]) -> None:
    """Before a sweep writes anything: can the runs that have a checkpoint go on as they are?

    Args:
        configs: of runs that read one store.

    Raises:
        UserError: a run was begun with another config; or a store is needed that isn't there, so
            that it has been moved or deleted.
    """
    begun = [one for one in configs if newest_checkpoint(storage_path(one.output)) is not None]
    if begun:
        from sae_train.checkpoint.same_run import refuse_other_config
    for config in begun:
        folder = storage_path(config.output)
        refuse_other_config(read_run_config(folder), config, folder=folder)
    if not needs_store(configs):
        return
    for config in begun:
        store = storage_path(config.cache.path)
        if not any((store / name).exists() for name in ("manifest.json", "plan.json")):
            raise UserError(
                f"{config.output} has been trained, and its activation store isn't at {store} any "
                "more. If it has moved, say where it is: cache.path=FOLDER. If it is gone, `sae "
                f"{'import' if config.cache.is_imported else 'harvest'}` as before makes it anew"
            )


def needs_evaluation(folder: StoragePath) -> bool:
    """Is a trained run's evaluation missing, of another checkpoint or under other settings?

    It compares settings and times of files and loads nothing; `evaluate` itself compares
    fingerprints of weights.
    """
    run = read_run(folder)
    if run.evaluation is None or run.evaluation.get("step") != run.checkpoint_step:
        return True
    settings = run.config.evaluation
    wanted: dict[str | None, dict[str, Any]] = {None: settings.recorded()}
    wanted |= {entry.called: settings.recorded(entry) for entry in settings.also}
    for label, record in wanted.items():
        found = run.evaluation if label is None else run.extra_evaluations.get(label)
        if found is None or found.get("settings") != record:
            return True
        if _older_than_checkpoint(run, folder / labelled(EVALUATION, label)):
            return True
    return False


def needs_release(folder: StoragePath) -> bool:
    """Is a trained run's release missing, or older than its newest checkpoint?"""
    run = read_run(folder)
    card = PurePath(RELEASE, "README.md")  # written last
    return card not in run.release or any(
        _older_than_checkpoint(run, folder / f) for f in run.release
    )


def _older_than_checkpoint(run: RunFolder, file: StoragePath) -> bool:
    assert run.checkpoint_step is not None
    return file.stat().st_mtime < checkpoint_time(run.path, run.checkpoint_step)

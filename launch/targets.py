"""The target of a command line: a config file, or a folder that a command wrote."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import StoragePath, storage_path
from launch.config.job import Job, load_job, read_job
from sae_train.config.file import FILE_NAME, write_config
from sae_train.runs.folder import newest_checkpoint, run_folders

logger = logging.getLogger(__name__)


def target_config(target: str, overrides: Sequence[str] = ()) -> Job:
    """The config a command line names: a file, or the resolved one of an output folder.

    A sweep is expanded, and so checked, whatever the command.

    Raises:
        UserError: no such file or folder, or a mistake in the config.
    """
    config = read_target_config(target, overrides)
    if config.sweep is not None:
        from launch.sweep.expand import expand

        expand(config)
    return config


def read_target_config(target: str, overrides: Sequence[str]) -> Job:
    """As `target_config`, but a sweep is not expanded."""
    if not storage_path(target).is_dir():
        return load_job(target, overrides)
    config = read_job(target, overrides)
    if any(override.startswith("output=") for override in overrides):
        return config
    return config.model_copy(update={"output": target})  # the folder may have been moved


def target_folder(target: str) -> StoragePath:
    """The output folder a command line names, itself or through a config file."""
    folder = storage_path(target)
    return folder if folder.is_dir() else storage_path(target_config(target).output)


def trained_folders(config: Job) -> list[StoragePath]:
    """The runs of a config that have a checkpoint; those without are left out with a warning.

    Raises:
        UserError: none has one.
    """
    folder = storage_path(config.output)
    if config.sweep is not None and not (folder / FILE_NAME).exists():
        from launch.sweep.expand import expand

        # A cluster trained the runs one by one, and wrote no config into the sweep's folder.
        runs = [run.folder for run in expand(config)]
    else:
        runs = run_folders(folder)
    trained = [run for run in runs if newest_checkpoint(run) is not None]
    if not trained:
        raise UserError(f"{folder} holds no trained run yet: start with `sae train` or `sae sweep`")
    for run in runs:
        if run not in trained:
            logger.warning("%s has no checkpoint yet and is left out", run)
    return trained


def released_or_trained(config: Job) -> list[StoragePath]:
    """`trained_folders`; of an untrained run with `sae.start_from`, its own folder.

    Evaluating that one measures the released SAE it would start from.
    """
    folder = storage_path(config.output)
    if (
        config.sae.start_from is None
        or config.sweep is not None
        or newest_checkpoint(folder) is not None
    ):
        return trained_folders(config)
    write_config(config, folder)
    return [folder]

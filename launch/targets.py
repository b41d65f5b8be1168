"""The target of a command line: a config file, or a folder that a command wrote."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import StoragePath, storage_path
from launch.config.job import Job, load_job, read_job
from sae_train.config.file import FILE_NAME, write_config
from sae_train.runs.folder import newest_checkpoint, run_folders, sweep_runs, sweep_section

if TYPE_CHECKING:
    from launch.sweep.run import Run

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
    return read_job(target, overrides)


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
    wanted: list[StoragePath] = []
    if config.sweep is None:
        runs = run_folders(folder)
    else:
        from launch.sweep.expand import expand

        # Where a cluster trains the runs one by one the sweep's folder has no config.
        runs = sweep_runs(folder, is_suite=config.is_suite)
        wanted = [run.folder for run in expand(config)]
    trained = [run for run in runs if newest_checkpoint(run) is not None]
    if not trained:
        raise UserError(f"{folder} holds no trained run yet: start with `sae train` or `sae sweep`")
    missing = dict.fromkeys(str(run) for run in (*wanted, *runs) if run not in trained)
    if missing:
        logger.warning("left out, for they have no checkpoint yet: %s", ", ".join(missing))
    return trained


def other_runs(config: Job, runs: Sequence[Run]) -> dict[str, StoragePath]:
    """By name, the runs in a sweep's folder that are none of `runs`: an earlier config's."""
    folder, names = storage_path(config.output), {run.name for run in runs}
    found = sweep_runs(folder, is_suite=config.is_suite)
    by_name = {str(path)[len(str(folder)) + 1 :]: path for path in found}
    return {name: path for name, path in by_name.items() if name not in names}


def check_sweep_folder(config: Job) -> None:
    """Say what a sweep's folder holds that isn't the sweep's.

    Runs of an earlier config are named in a warning; those that `sweep.only` leaves out are the
    sweep's own.

    Raises:
        UserError: the folder is a run's.
    """
    from launch.sweep.expand import expand

    assert config.sweep is not None
    if newest_checkpoint(storage_path(config.output)) is not None:
        raise UserError(
            f"{config.output} holds a trained run, and a sweep's folder holds runs in folders of "
            "their own: give the sweep another `output`, or move the run away"
        )
    whole = config.model_copy(update={"sweep": config.sweep.model_copy(update={"only": None})})
    others = other_runs(config, expand(whole)) if storage_path(config.output).is_dir() else {}
    if others:
        logger.warning(
            "%s holds %d runs that this sweep doesn't make: %s. They stay, and status, evaluate, "
            "export and report count them. To keep two sweeps apart give this one another `output`",
            config.output,
            len(others),
            ", ".join(others),
        )


def refuse_sweep_folder(config: Job) -> None:
    """Raise `UserError` where training one run would write over the config of a sweep."""
    folder = storage_path(config.output)
    if (folder / FILE_NAME).is_file() and sweep_section(folder) is not None:
        raise UserError(
            f"{folder} is the folder of a sweep, and training one run there would write over the "
            "sweep's config: add output=... with a folder of its own"
        )


def chosen_folders(config: Job, folders: Sequence[StoragePath]) -> list[StoragePath]:
    """Those of a sweep's runs that `sweep.only` chooses.

    Raises:
        UserError: it chooses none.
    """
    from launch.sweep.expand import expand

    chosen = {run.folder.absolute() for run in expand(config)}
    found = [folder for folder in folders if folder.absolute() in chosen]
    if not found:
        raise UserError(f"sweep.only chooses no trained run of {config.output}")
    return found


def store_of(config: Job, folder: StoragePath) -> str:
    """The store that a run of this config reads: a suite's has one below `cache.path`."""
    if not config.is_suite:
        return config.cache.path
    from launch.sweep.expand import expand

    stores = {run.folder.absolute(): run.config.cache.path for run in expand(config)}
    return stores.get(folder.absolute(), config.cache.path)


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

"""What each `sae` subcommand does: find the config or the folders, run the stage."""

from __future__ import annotations

import argparse
import logging
import re

from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.storage.files import StoragePath, storage_path
from launch import stages
from launch.clusters import submit
from launch.config.job import Job
from launch.processes.signals import StopFlag
from launch.targets import (
    check_sweep_folder,
    read_target_config,
    refuse_sweep_folder,
    released_or_trained,
    target_config,
    target_folder,
    trained_folders,
)
from sae_train.config.file import FILE_NAME, read_run_config, write_config
from sae_train.runs.folder import RELEASE, clear_failure
from sae_train.train.cohort import check_cohort

logger = logging.getLogger(__name__)


def harvest(arguments: argparse.Namespace, stop: StopFlag) -> int:
    """`sae harvest`: write the config's store, or a suite's, one after the other; returns 0."""
    config = target_config(arguments.target, arguments.overrides)
    if submit.is_on_cluster(config, dry_run=arguments.dry_run):
        return submit.submit(config, command="harvest", dry_run=arguments.dry_run, stop=stop)
    from launch.sweep.suite_runs import stores

    for store in stores(config):
        stages.harvest(store, stop=stop)
    return 0


def train(arguments: argparse.Namespace, stop: StopFlag) -> int:
    """`sae train`: train one SAE, or those of several configs on the same batches; returns 0.

    A failure is written into the runs' folders before it is raised.

    Raises:
        UserError: a mistake in a config or override, or the configs can't train together.
        Interrupted: stopped by a signal, everything saved.
    """
    configs = _training_configs(arguments)
    for config in configs:
        refuse_sweep_folder(config)
    if submit.is_on_cluster(configs[0], dry_run=arguments.dry_run):
        if arguments.fresh:
            raise UserError(
                "--fresh deletes what is in the run's folder: run it where the folder is"
            )
        if len(configs) > 1:
            raise UserError(
                f"{len(configs)} configs were given, and only a sweep is handed to a cluster as "
                "cohorts: make them one with `sweep:` and give `sae sweep`"
            )
        return submit.submit(configs[0], command="train", dry_run=arguments.dry_run, stop=stop)
    for config in configs:
        clear_failure(config.output)
    try:
        stages.train(configs, fresh=arguments.fresh, stop=stop)
    except Interrupted:
        raise
    except Exception as error:
        stages.training_failures(configs, error)
        raise
    return 0


def _training_configs(arguments: argparse.Namespace) -> list[Job]:
    """The configs of `sae train`: the target, and every further word that isn't `key=value`.

    Raises:
        UserError: a mistake in one, or they can't train together.
    """
    further = [word for word in arguments.overrides if not re.match(r"[A-Za-z_][\w.]*=", word)]
    for word in further:
        if not storage_path(word).exists():
            raise UserError(
                f"'{word}' is neither a config that exists nor an override: write overrides as "
                "key=value, e.g. train.batch_size=2048"
            )
    overrides = [word for word in arguments.overrides if word not in further]
    targets = [arguments.target, *further]
    configs = [target_config(target, overrides) for target in targets]
    for target, config in zip(targets, configs, strict=True):
        if config.sweep is not None:
            raise UserError(
                f"{target} has a sweep: `sae sweep {target}` runs all of it. To "
                "train one SAE with the config's own values add the override sweep=null"
            )
    check_cohort(configs)
    for target, config in zip(targets, configs, strict=True):
        if config.launch != configs[0].launch:
            raise UserError(
                f"{targets[0]} and {target} can't train together: their launch sections differ, "
                "and runs that share their reads run in the same processes. Give both the same "
                "section, or train them with two commands"
            )
    return configs


def evaluate(arguments: argparse.Namespace, stop: StopFlag) -> int:
    """`sae evaluate`: write evaluation.json of each trained run; returns 0.

    Each run is measured as its own config says, unless the command line sets a key of `evaluation`.
    """
    config = target_config(arguments.target, arguments.overrides)
    overridden = any(override.startswith("evaluation") for override in arguments.overrides)
    settings = config.evaluation if overridden else None
    by_store: dict[str, list[StoragePath]] = {}
    for folder in released_or_trained(config):
        by_store.setdefault(read_run_config(folder).cache.path, []).append(folder)
    for folders in by_store.values():  # a suite's runs are too many to be in memory together
        stages.evaluate(folders, config=config, settings=settings, stop=stop)
    return 0


def export(arguments: argparse.Namespace, stop: StopFlag) -> int:
    """`sae export`: write the release, or a sweep's tree of them; upload it if asked; returns 0.

    Raises:
        UserError: nothing is trained yet, no such repository, or --dry-run without --upload.
    """
    from launch.show.publish import check_repository, publish

    if arguments.dry_run and arguments.upload is None:
        raise UserError("--dry-run lists what --upload would send: give both")
    if arguments.upload is not None:
        check_repository(arguments.upload)
    config = target_config(arguments.target)
    with stop.at_once():
        folders = trained_folders(config)
        if config.sweep is None:
            stages.export(folders)
            release = folders[0] / RELEASE
        else:
            release = stages.export_tree(config, folders)
        if arguments.upload is not None:
            publish(release, repository=arguments.upload, dry_run=arguments.dry_run)
    return 0


def sweep(arguments: argparse.Namespace, stop: StopFlag) -> int:
    """`sae sweep`: train, evaluate and release all runs; returns the command's exit status."""
    from launch.sweep.expand import expand
    from launch.sweep.run_sweep import run_sweep
    from launch.sweep.table import show_runs

    config = target_config(arguments.target, arguments.overrides)
    if config.launch.on == "local" and arguments.dry_run:
        show_runs(config, expand(config))
        return 0
    check_sweep_folder(config)
    if submit.is_on_cluster(config, dry_run=arguments.dry_run):
        return submit.submit(config, command="sweep", dry_run=arguments.dry_run, stop=stop)
    return run_sweep(config, stop=stop)


def report(arguments: argparse.Namespace, stop: StopFlag) -> int:
    """`sae report`: write report/index.html and print where it is; returns 0."""
    from launch.console import print_line

    folder = target_folder(arguments.target)
    if not (folder / FILE_NAME).exists():
        config = target_config(arguments.target)
        if config.sweep is not None and folder.exists():
            write_config(config, folder)  # a cluster trained its runs one by one
    with stop.at_once():
        print_line(str(stages.report(folder)))
    return 0


def plan(arguments: argparse.Namespace, stop: StopFlag) -> int:
    """`sae plan`: print what the config, its sweep or its suite needs; returns 0."""
    from launch.show.plan_tables import show_plan

    with stop.at_once():
        # It expands a sweep itself, and a suite without asking what can be trained.
        show_plan(read_target_config(arguments.target, arguments.overrides), arguments)
    return 0


def status(arguments: argparse.Namespace, stop: StopFlag) -> int:
    """`sae status`: print how far each run has come; returns 0."""
    from launch.console import print_table
    from launch.show.status import status_table

    with stop.at_once():
        print_table(status_table(target_config(arguments.target)))
    return 0


def inspect(arguments: argparse.Namespace, stop: StopFlag) -> int:
    """`sae inspect`: print what a store, run or release holds, verified if asked; returns 0."""
    from launch.show.inspect import inspect_path

    with stop.at_once():
        inspect_path(storage_path(arguments.target), verify=arguments.verify)
    return 0

"""What each `sae` subcommand does: find the config or the folders, run the stage."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import re
from collections.abc import Sequence

from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.storage.files import StoragePath, storage_path
from launch import stages
from launch.clusters import submit
from launch.config.job import Job
from launch.processes import group
from launch.processes.signals import StopFlag
from launch.targets import (
    check_sweep_folder,
    chosen_folders,
    read_target_config,
    refuse_sweep_folder,
    released_or_trained,
    store_of,
    target_config,
    target_folder,
    trained_folders,
)
from sae_train.config.file import FILE_NAME, read_run_config, read_run_config_as, write_config
from sae_train.config.run import Config
from sae_train.runs.folder import RELEASE, clear_failure, newest_checkpoint, run_folders
from sae_train.train.cohort import check_cohort

logger = logging.getLogger(__name__)


def harvest(arguments: argparse.Namespace, stop: StopFlag) -> int:
    """`sae harvest`: write the config's store, or a suite's, one after the other; returns 0."""
    config = target_config(arguments.target, arguments.overrides)
    if submit.is_on_cluster(config, dry_run=arguments.dry_run):
        return submit.submit(config, command="harvest", dry_run=arguments.dry_run, stop=stop)
    from launch.sweep.suite_runs import stores

    if arguments.follow and config.cache.rolling is None:
        raise UserError(
            "--follow is for a rolling store, which is harvested while a trainer reads it, and the "
            "config has no cache.rolling: leave it out"
        )
    for store in stores(config):
        stages.harvest(store, stop=stop, follow=arguments.follow)
    return 0


def rollout(arguments: argparse.Namespace, stop: StopFlag) -> int:
    """`sae rollout`: write the model's continuations of prompts; returns 0."""
    config = target_config(arguments.target, arguments.overrides)
    if config.launch.on != "local":
        raise UserError(
            f"launch.on is {config.launch.on}, and rollouts are made where the command runs: start "
            "it in a job of yours, with launch=null"
        )
    stages.rollout(config, stop=stop)
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

    Each run is measured as its own config says. The command line may set keys of `evaluation` and
    `launch`, choose runs, and say where stores and weights lie.

    Raises:
        UserError: an override of another key, which the runs were trained with.
    """
    config = target_config(arguments.target, arguments.overrides)
    keys = [override.partition("=")[0] for override in arguments.overrides]
    folders = released_or_trained(config)
    if any(newest_checkpoint(folder) is not None for folder in folders):
        _refuse_overrides(arguments.overrides, config, command="evaluate")
    only = any(key.startswith("sweep.only") for key in keys)
    if only:
        folders = chosen_folders(config, folders)
    settings = config.evaluation if any(key.startswith("evaluation") for key in keys) else None
    weights = [one for one in arguments.overrides if one.startswith("model.weights=")]
    told = any(key in ("cache", "cache.path") for key in keys)
    by_store: dict[str, list[StoragePath]] = {}
    for folder in folders:
        store = store_of(config, folder) if told else read_run_config(folder).cache.path
        by_store.setdefault(store, []).append(folder)
    for store, readers in by_store.items():  # a suite's runs are too many to be in memory together
        places = [*weights, *([f"cache.path={json.dumps(store)}"] if told else [])]
        # A group of processes is given a sweep's folder or a run's, and would take the whole sweep.
        parts = [[one] for one in readers] if only and group.starts_here(config) else [readers]
        for part in parts:
            stages.evaluate(part, config=config, settings=settings, places=places, stop=stop)
    return 0


def latents(arguments: argparse.Namespace, stop: StopFlag) -> int:
    """`sae latents`: write what is known of every latent beside each trained run; returns 0.

    The command line may set keys of `latents` and `launch`, choose runs, and say where stores and
    weights lie.

    Raises:
        UserError: an override of another key, which the runs were trained with.
    """
    config = target_config(arguments.target, arguments.overrides)
    folders = released_or_trained(config)
    if any(newest_checkpoint(folder) is not None for folder in folders):
        _refuse_overrides(arguments.overrides, config, command="latents")
    if any(one.startswith("sweep.only") for one in arguments.overrides):
        folders = chosen_folders(config, folders)
    if group.starts_here(config):
        stages.latents_in_group(
            folders, config=config, target=arguments.target, options=arguments.overrides, stop=stop
        )
        return 0
    weights = [one for one in arguments.overrides if one.startswith("model.weights=")]
    told = any(one.startswith(("cache=", "cache.path=")) for one in arguments.overrides)
    by_store: dict[str, list[StoragePath]] = {}
    for folder in folders:
        store = store_of(config, folder) if told else read_run_config(folder).cache.path
        by_store.setdefault(store, []).append(folder)
    for store, readers in by_store.items():  # a suite's runs are too many to be in memory together
        places = [*weights, *([f"cache.path={json.dumps(store)}"] if told else [])]
        stages.latents(readers, config=config, places=places, stop=stop)
    return 0


def probe(arguments: argparse.Namespace, stop: StopFlag) -> int:
    """`sae probe`: write probe.json beside each trained run; returns 0.

    The command line may set keys of `probe` and `launch`, choose runs, and say where stores and
    weights lie. It is one process, whatever `launch.processes` says.

    Raises:
        UserError: an override of another key, which the runs were trained with.
    """
    config = target_config(arguments.target, arguments.overrides)
    folders = released_or_trained(config)
    if any(newest_checkpoint(folder) is not None for folder in folders):
        _refuse_overrides(arguments.overrides, config, command="probe")
    if any(one.startswith("sweep.only") for one in arguments.overrides):
        folders = chosen_folders(config, folders)
    told = ("model.weights=", "cache.path=")
    places = [one for one in arguments.overrides if one.startswith(told)]
    stages.probe(folders, config=config, places=places, stop=stop)
    return 0


_MEASURING_KEYS = ("output", "launch", "cache.path", "model.weights", "sweep.only")


def _refuse_overrides(overrides: Sequence[str], config: Job, *, command: str) -> None:
    """Raise `UserError` for overrides that a command on trained runs can't follow."""
    keys = ("evaluation" if command == "evaluate" else command, *_MEASURING_KEYS)
    for override in overrides:
        key = override.partition("=")[0]
        known = any(key == one or key.startswith(f"{one}.") for one in keys)
        if not known and not (key == "sweep" and config.sweep is None):
            raise UserError(
                f"override {override}: each run is measured as it was trained, so this has no "
                f"effect here. What can be overridden: {', '.join(keys)}"
                + (
                    "; other models and texts are entries of evaluation.also"
                    if key.startswith(("model", "text")) and command == "evaluate"
                    else ""
                )
            )
        if key.startswith("launch") and config.launch.on != "local":
            raise UserError(
                f"override {override}: `sae {command}` runs on this machine"
                + (
                    "; on a cluster `sae sweep` evaluates what it has trained"
                    if command == "evaluate"
                    else ""
                )
            )


def export(arguments: argparse.Namespace, stop: StopFlag) -> int:
    """`sae export`: write the release, or a sweep's tree of them; upload it if asked; returns 0.

    Raises:
        UserError: nothing is trained yet, no such repository, or --dry-run without --upload.
    """
    from launch.show import neuronpedia
    from launch.show.publish import check_repository, publish

    if arguments.dry_run and arguments.upload is None:
        raise UserError("--dry-run lists what --upload would send: give both")
    to_neuronpedia = arguments.upload == neuronpedia.FOLDER
    if arguments.upload is not None and not to_neuronpedia:
        check_repository(arguments.upload)
    config = target_config(arguments.target)
    if arguments.circuit_tracer and config.sweep is None:
        raise UserError(
            f"--circuit-tracer writes a transcoder of every layer and {arguments.target} is one "
            "run: give the config or the folder of a sweep over the layers"
        )
    if arguments.batches and not arguments.neuronpedia:
        raise UserError("--batches adds to what --neuronpedia writes: give both")
    if arguments.neuronpedia or to_neuronpedia:
        neuronpedia.export(config, released_or_trained(config), arguments, stop)
        return 0
    with stop.at_once():
        folders = trained_folders(config)
        if config.sweep is None:
            stages.export(folders)
            release = folders[0] / RELEASE
        else:
            release = stages.export_tree(config, folders)
            if arguments.circuit_tracer:
                stages.export_transcoder_sets(config, folders)
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


def log(arguments: argparse.Namespace, stop: StopFlag) -> int:
    """`sae log`: send the metrics of a run, or of a sweep's runs, to W&B; returns 0.

    Raises:
        UserError: no service was named, an override isn't of `train.wandb`, or W&B failed.
    """
    from launch.console import print_text
    from sae_train.runs.wandb_log import send_finished

    if not arguments.wandb:
        raise UserError("say where the metrics are to be sent: `sae log RUN --wandb`")
    stray = [one for one in arguments.overrides if not one.startswith("train.wandb")]
    if stray:
        raise UserError(f"'{stray[0]}' has no effect here: give keys of train.wandb")
    with stop.at_once():
        for folder in run_folders(target_folder(arguments.target)):
            config = read_run_config_as(Config, folder, arguments.overrides)
            print_text(f"{folder}: {send_finished(folder, config=config)} rows sent to W&B")
    return 0


def report(arguments: argparse.Namespace, stop: StopFlag) -> int:
    """`sae report`: write report/index.html and print where it is; returns 0."""
    from launch.console import print_text

    folder = target_folder(arguments.target)
    if not (folder / FILE_NAME).exists():
        config = target_config(arguments.target)
        if config.sweep is not None and folder.exists():
            write_config(config, folder)  # a cluster trained its runs one by one
    with stop.at_once():
        print_text(str(stages.report(folder)))
    return 0


def plan(arguments: argparse.Namespace, stop: StopFlag) -> int:
    """`sae plan`: print what the config, its sweep or its suite needs; returns 0."""
    from launch.show.plan_tables import show_plan

    with stop.at_once():
        # It expands a sweep itself, and a suite without asking what can be trained.
        show_plan(read_target_config(arguments.target, arguments.overrides), arguments)
    return 0


def status(arguments: argparse.Namespace, stop: StopFlag) -> int:
    """`sae status`: print how far each run has come, with `--watch` until a signal; returns 0."""
    from launch.console import print_table, watch
    from launch.show.status import status_table

    with stop.at_once():
        if arguments.watch is None:
            print_table(status_table(target_config(arguments.target)))
            return 0
        with contextlib.suppress(Interrupted):
            watch(lambda: status_table(target_config(arguments.target)), seconds=arguments.watch)
    return 0


def inspect(arguments: argparse.Namespace, stop: StopFlag) -> int:
    """`sae inspect`: print what a store, run or release holds, verified if asked; returns 0."""
    from launch.show.inspect import inspect_path

    with stop.at_once():
        inspect_path(storage_path(arguments.target), verify=arguments.verify)
    return 0

"""The stages that a command or a sweep runs, each imported only when it runs.

JAX and Orbax take seconds to import; `sae --help` and `sae status` must not wait for them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from activation_cache.runtime import processes
from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import StoragePath, file_sizes, remove_tree, storage_path
from activation_cache.storage.locks import folder_lock
from launch.config.job import Job
from launch.config.local import LocalLaunch
from launch.processes import group
from launch.processes.allocator import keep_freed_memory
from launch.processes.beside import harvest_beside
from launch.processes.compile_cache import keep_programs
from launch.processes.devices import check_devices
from launch.processes.signals import StopFlag
from launch.processes.supervise import stop_with_supervisor
from launch.run_state import is_trained
from sae_train.config.evaluation import EvaluationConfig
from sae_train.config.file import FILE_NAME, resolved_yaml
from sae_train.runs.folder import (
    CHECKPOINTS,
    FAILURE,
    newest_checkpoint,
    record_failure,
)
from sae_train.runs.recorded import read_failure

if TYPE_CHECKING:
    from activation_cache.store.store import Store

logger = logging.getLogger(__name__)


def _prepare_process() -> None:
    keep_freed_memory()
    check_devices()
    keep_programs()


def harvest(config: Job, *, stop: Callable[[], bool], follow: bool = False) -> None:
    """Make the activation store of `config.cache`, or finish one that was started.

    Of a rolling store that is its first window, and with `follow` all that a trainer reads next.
    One that was imported must be finished: nothing here can make it.
    """
    if config.cache.is_imported:
        store = open_imported(config)
        logger.info("%s was imported: nothing is harvested", store.path)
        return
    _, mesh = config.harvest_mesh
    if group.starts_here(config):
        path = storage_path(config.cache.path)
        group.run_stage(
            "harvest",
            config,
            devices=mesh.data * mesh.model,
            options=["--follow"] if follow else [],
            progress=lambda: _saved(path),
            stop=stop,
        )
        return
    group.join(config, stop=stop)
    _prepare_process()
    work: dict[str, Any] = {
        "model": config.model,
        "text": config.text,
        "cache": config.cache,
        "mesh": mesh,
        "resolved_config_yaml": resolved_yaml(config),
        "stop": stop,
    }
    if config.cache.rolling is None:
        from activation_cache.harvest.harvest import harvest as run_harvest

        run_harvest(**work)
        return
    from activation_cache.harvest.rolling import RollingHarvest

    if follow:
        stop_with_supervisor()  # before the text is tokenised, which may take hours
    with RollingHarvest(**work) as rolling:
        if follow:
            rolling.follow()
        else:
            rolling.make_store()


def open_imported(config: Job) -> Store:
    """The imported store that a config names; raises `UserError` where it isn't one, finished."""
    from activation_cache.harvest.matching_store import open_matching_store

    return open_matching_store(model=config.model, text=config.text, cache=config.cache)


def rollout(config: Job, *, stop: Callable[[], bool]) -> None:
    """Write the continuations that `config.rollout` asks for, or finish those that were begun.

    Raises:
        UserError: there is no such section, or it is to run on a cluster.
    """
    settings = config.rollout
    if settings is None:
        raise UserError(
            "the config has no section rollout: it says whose prompts are continued, and where "
            "the continuations go (docs/rollout.md)"
        )
    _, mesh = config.harvest_mesh
    if group.starts_here(config):
        path = storage_path(settings.path)
        group.run_stage(
            "rollout",
            config,
            devices=mesh.data * mesh.model,
            progress=lambda: sum(1 for _ in path.iterdir()) if path.is_dir() else 0,
            stop=stop,
        )
        return
    group.join(config, stop=stop)
    _prepare_process()
    from activation_cache.rollout.rollout import rollout as run_rollout

    run_rollout(model=config.model, settings=settings, mesh=mesh, stop=stop)


def _saved(store: StoragePath) -> int:
    """A number that grows with what a harvest has saved: its tokens, then its buckets."""
    finished_tokens = (store / "tokens" / "tokens.json").exists()
    commits = store / "commits"
    return finished_tokens + (sum(1 for _ in commits.iterdir()) if commits.is_dir() else 0)


def train(configs: Sequence[Job], *, fresh: bool, stop: Callable[[], bool]) -> None:
    """Train runs side by side (one, or a cohort), each continuing from its last checkpoint.

    Raises:
        Interrupted: a signal came; everything is saved.
        UserError: runs failed by the user's mistake; the others ran to their end.
    """
    if group.starts_here(configs[0]):
        with harvest_beside(configs[0], stop=stop) as stop_both:
            _train_in_group(configs, fresh=fresh, stop=stop_both)
        return
    group.join(*configs, stop=stop)
    with harvest_beside(configs[0], stop=stop) as stop_both:
        _prepare_process()
        from sae_train.train.loop import train_cohort

        train_cohort(configs, fresh=fresh, stop=stop_both)


def _train_in_group(configs: Sequence[Job], *, fresh: bool, stop: Callable[[], bool]) -> None:
    first, *beside = configs
    folders = [storage_path(config.output) for config in configs]
    if fresh:
        # Here, not in the group's processes: restarted after a crash they must not delete again.
        from activation_cache.harvest.matching_store import open_matching_store

        if first.cache.rolling is None:
            open_matching_store(model=first.model, text=first.text, cache=first.cache)
        for folder in folders:
            with folder_lock(folder):
                remove_tree(folder / CHECKPOINTS)
    group.run_stage(
        "train",
        first,
        beside=beside,
        devices=first.mesh.data * first.mesh.model,
        progress=lambda: [newest_checkpoint(folder) for folder in folders],
        stop=stop,
    )


def training_failures(configs: Sequence[Job], error: Exception) -> dict[str, str]:
    """After a failed training: the reason, by output folder, for each run that isn't trained.

    A run that failed on its own has left its reason in its folder. For the others `error` is the
    reason, and is written there if the folder exists.
    """
    reasons: dict[str, str] = {}
    for config in configs:
        folder = storage_path(config.output)
        if is_trained(config):
            continue
        if not (folder / FAILURE).exists() and (folder / FILE_NAME).exists():
            record_failure(folder, stage="train", reason=reason_of(error))
        own = folder / FAILURE
        reasons[config.output] = read_failure(own)[1] if own.exists() else reason_of(error)
    return reasons


def reason_of(error: Exception) -> str:
    """The message of a mistake; for a bug the exception's type comes first."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def evaluate(
    folders: Sequence[StoragePath],
    *,
    config: Job,
    settings: EvaluationConfig | None = None,
    places: Sequence[str] = (),
    stop: StopFlag,
) -> None:
    """Evaluate trained runs in one pass of the model.

    Args:
        config: its `launch` says where it runs; the rest is read from the runs' folders.
        settings: instead of those of the runs.
        places: overrides of the runs' configs that say where their store and their weights lie.

    Raises:
        Interrupted: a signal came; runs that are not evaluated yet are unchanged.
    """
    if group.starts_here(config):
        assert isinstance(config.launch, LocalLaunch)
        parents = {folder.parent for folder in folders}
        if len(folders) > 1 and not (
            len(parents) == 1 and (folders[0].parent / FILE_NAME).exists()
        ):
            for folder in folders:  # a suite's: no folder holds these runs and no others
                evaluate([folder], config=config, settings=settings, places=places, stop=stop)
            return
        # Several runs are those of one sweep; evaluations that are up to date are skipped.
        target = folders[0] if len(folders) == 1 else folders[0].parent
        options = [f"evaluation={json.dumps(settings.model_dump())}"] if settings else []
        options += places
        group.run_stage(
            "evaluate",
            config,
            devices=config.launch.processes,  # each measures its batches on one device
            target=target,
            options=options,
            stop=stop,
        )
        return
    group.join(config, stop=stop)
    _prepare_process()
    from sae_train.evaluate.evaluate import evaluate as run_evaluate

    with stop.at_once() if processes.process_count() == 1 else nullcontext():
        run_evaluate(folders, settings=settings, places=places, stop=stop)


def latents(
    folders: Sequence[StoragePath], *, config: Job, places: Sequence[str] = (), stop: StopFlag
) -> None:
    """Write the latents of trained runs, in one walk of the model.

    Args:
        config: its `latents` and `launch` count; the rest is read from the runs' folders.
        places: overrides of the runs' configs that say where their store and their weights lie.

    Raises:
        Interrupted: a signal came; the same command continues.
    """
    group.join(config, stop=stop)
    _prepare_process()
    from sae_train.latents.compute import compute_latents

    compute_latents(folders, settings=config.latents, places=places, stop=stop)


def latents_in_group(
    folders: Sequence[StoragePath],
    *,
    config: Job,
    target: str,
    options: Sequence[str],
    stop: StopFlag,
) -> None:
    """The same in several processes, each with the words of this command."""
    from sae_train.latents.schema import FOLDER

    assert isinstance(config.launch, LocalLaunch)
    group.run_stage(
        "latents",
        config,
        devices=config.launch.processes,  # each walks its shards on one device
        target=storage_path(target),
        options=options,
        progress=lambda: [len(file_sizes(folder / FOLDER)) for folder in folders],
        stop=stop,
    )


def probe(
    folders: Sequence[StoragePath], *, config: Job, places: Sequence[str] = (), stop: StopFlag
) -> None:
    """Probe the SAEs of trained runs, those of one model in one pass of each data set.

    Args:
        config: its `probe` counts; the rest is read from the runs' folders.
        places: overrides of the runs' configs that say where their store and their weights lie.

    Raises:
        Interrupted: a signal came; the same command continues.
    """
    _prepare_process()
    from sae_train.probe.probe import probe as run_probe

    run_probe(folders, settings=config.probe, places=places, stop=stop)


def export(folders: Sequence[StoragePath]) -> None:
    """Write and check the release of each run."""
    from sae_train.release.export import export as run_export

    check_devices()
    for folder in folders:
        run_export(folder)


def export_tree(config: Job, folders: Sequence[StoragePath]) -> StoragePath:
    """Release a sweep's runs, and gather them in the tree of a suite; returns its folder."""
    from sae_train.release.tree import export_tree as run_export_tree

    check_devices()
    tree = config.sweep.tree if config.sweep is not None and config.is_suite else None
    return run_export_tree(storage_path(config.output), config, folders, suite=tree)


def export_transcoder_sets(config: Job, folders: Sequence[StoragePath]) -> None:
    """Add sets of a sweep's transcoders for circuit-tracer to its release."""
    from activation_cache.language_model.shape import read_gemma_config
    from sae_train.release.transcoder_sets import export_sets

    export_sets(
        storage_path(config.output),
        folders,
        is_suite=config.is_suite,
        num_layers=read_gemma_config(config.model).num_layers,
    )


def report(folder: StoragePath) -> StoragePath:
    """Write the report of a run or a sweep; returns its page."""
    from sae_train.report.page import write_report

    return write_report(folder)

"""A suite's cells as runs: each a whole config, reading the store that its cell reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from activation_cache.language_model.published_sizes import config_for_planning
from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import storage_path
from launch.config.job import Job
from launch.sweep.run import Run
from launch.sweep.suite_cells import Cell, all_cells, cache_of, cells_of
from sae_train.config.file import with_values
from sae_train.config.sparsity import L0Penalty


def suite_runs(config: Job) -> Iterator[Run]:
    """Each run that `sweep.cells` names and `only` and `kinds` choose.

    A name is the run's folder below the suite's.

    Raises:
        UserError: a layer the model lacks or the store isn't harvested at, a sparsity that isn't
            the penalty's, or nothing chosen.
    """
    gemma, _ = config_for_planning(config.model)
    cells, chosen = all_cells(config, gemma), cells_of(config, gemma)
    base = config.model_copy(update={"sweep": None})
    caches: dict[Any, Any] = {}
    for cell in chosen:
        _check_penalty(cell, config)
        name, settings = cell.folder, cell.settings()
        own: dict[str, Any] = {
            "name": f"{config.name}-{name.replace('/', '-')}",
            "output": str(storage_path(config.output) / name),
        }
        if config.sweep is not None and config.sweep.start_from is not None:
            own["sae.start_from"] = config.sweep.start_from.replace("{folder}", name)
        if cell.kind == "embedding":  # no tap of the model's, so `cache.sites` needn't have it
            own["cache.sites"] = [{"site": "embedding", "layers": [0]}]
        run = with_values(base, {**settings, **own}, source=f"sweep.cells, {name}")
        if cell.taps not in caches:
            caches[cell.taps] = cache_of(cell, config, cells, gemma=gemma)
        whole = run.model_copy(update={"cache": caches[cell.taps]})
        yield Run(name=name, settings=settings, config=whole)


def stores(config: Job) -> list[Job]:
    """A config for each store to harvest: itself, or of a suite the first run that reads each.

    A suite's stores are those that the chosen runs read.

    Raises:
        UserError: as `suite_runs`.
    """
    if not config.is_suite:
        return [config]
    first: dict[str, Job] = {}
    for run in suite_runs(config):
        first.setdefault(run.config.cache.path, run.config)
    return list(first.values())


def _check_penalty(cell: Cell, config: Job) -> None:
    penalty = config.train.sparsity
    if isinstance(penalty, L0Penalty) != (cell.target is None):
        what, fitting = (
            ("coefficients are", "l0")
            if cell.target is None
            else ("targets are", "target_l0 or match_l0")
        )
        raise UserError(
            f"sweep.cells, {cell.folder}: {what} for train.sparsity.penalty {fitting}, and it is "
            f"{penalty.penalty}: change the penalty or the cells"
        )

"""One config to the configs of a sweep's runs, with a name for each."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from typing import Any

from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import storage_path
from launch.config.job import Job
from launch.sweep.run import Run
from launch.sweep.suite_cells import is_chosen
from launch.sweep.suite_runs import suite_runs
from sae_train.config.file import with_values

_SWEPT_SECTIONS = ("sae", "train", "mesh", "checkpoint", "evaluation")
_LONGEST_NAME = 100  # file systems allow 255 bytes; the rest is room for people's eyes


def expand(config: Job) -> list[Run]:
    """The runs of a sweep: every combination of `grid`, for every position of `zip`; or `cells`.

    Each has its own output folder below the sweep's and has passed the config's checks.

    Raises:
        UserError: no sweep section, a key that can't be swept, a value the checks refuse, or two
            runs that are the same.
    """
    if config.sweep is None:
        raise UserError(
            f"{config.name} has no `sweep:` section: add one, e.g. "
            "`sweep: {grid: {sae.width: [2048, 4096]}}`, or use `sae train` for a single run"
        )
    if config.sweep.cells:
        return list(suite_runs(config))
    combinations = _combinations(config)
    keys = list(combinations[0])
    _check_keys(keys)
    names = _run_names(combinations, labels=_short_labels(keys))
    runs = [
        _make_run(config, name=name, settings=settings)
        for name, settings in zip(names, combinations, strict=True)
        if is_chosen(name, config.sweep.only)
    ]
    if not runs:
        raise UserError(f"sweep.only chooses none of the runs; they are called {', '.join(names)}")
    _check_distinct(runs)
    return runs


def _combinations(config: Job) -> list[dict[str, Any]]:
    assert config.sweep is not None
    grid, zipped = config.sweep.grid, config.sweep.zip
    if not grid and not zipped:
        raise UserError(
            "the sweep section is empty: give sweep.grid or sweep.zip a key with values"
        )
    columns = [[{key: value} for value in values] for key, values in grid.items()]
    if zipped:
        rows = zip(*zipped.values(), strict=True)
        columns.append([dict(zip(zipped, row, strict=True)) for row in rows])
    product = itertools.product(*columns)
    return [{key: value for part in parts for key, value in part.items()} for parts in product]


def _check_keys(keys: list[str]) -> None:
    for key in keys:
        section = key.partition(".")[0]
        if section in ("model", "text", "cache"):
            raise UserError(
                f"sweep: {key} can't be swept, for all runs of a sweep share one activation "
                f"store. Make one config for each value, with its own cache.path and output"
            )
        if section in ("name", "output", "sweep", "launch"):
            raise UserError(
                f"sweep: {key} can't be swept; sections that can are {', '.join(_SWEPT_SECTIONS)}"
            )
    for key in keys:
        inside = [other for other in keys if other.startswith(key + ".")]
        if inside:
            raise UserError(f"sweep: {inside[0]} lies inside {key}, which is swept as a whole")


def _short_labels(keys: list[str]) -> dict[str, str]:
    """The shortest ending of each dotted key that no other swept key shares."""
    labels = {}
    for key in keys:
        parts = key.split(".")
        endings = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        labels[key] = next(
            ending
            for ending in endings
            if sum(f".{other}".endswith(f".{ending}") for other in keys) == 1
        )
    return labels


def _make_run(config: Job, *, name: str, settings: Mapping[str, Any]) -> Run:
    own = {"name": f"{config.name}-{name}", "output": str(storage_path(config.output) / name)}
    run_config = with_values(
        config.model_copy(update={"sweep": None}),
        {**settings, **own},
        source="sweep, " + ", ".join(f"{key}={value}" for key, value in settings.items()),
    )
    return Run(name=name, settings=settings, config=run_config)


def _check_distinct(runs: list[Run]) -> None:
    seen: dict[str, str] = {}
    for run in runs:
        same = run.config.model_copy(update={"name": "", "output": ""}).model_dump_json()
        if same in seen:
            raise UserError(f"sweep: {seen[same]} and {run.name} are the same run: leave one out")
        seen[same] = run.name


def _run_names(combinations: list[dict[str, Any]], *, labels: Mapping[str, str]) -> list[str]:
    names: list[str] = []
    for settings in combinations:
        parts = (f"{labels[key]}_{value_text(value)}" for key, value in settings.items())
        name = re.sub(r"[^A-Za-z0-9.+_-]+", "_", "-".join(parts)).strip("_.")
        if len(name) > _LONGEST_NAME or name.lower() in {other.lower() for other in names}:
            digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
            name = f"{name[:_LONGEST_NAME]}-{digest[:8]}"
        names.append(name)
    return names


def value_text(value: Any) -> str:
    """A value, short and readable: 0.001, 7e-05, target_l0, penalty_target_l0-target_80."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, dict):
        return "-".join(f"{key}_{value_text(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return "_".join(value_text(inner) for inner in value)
    return str(value)

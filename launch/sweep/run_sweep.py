"""`sae sweep`: one config into many runs, and every stage of each on this machine.

All runs share one activation store, so the text, the model and the store are not for sweeping.
Started again, a sweep does only what is missing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rich.table import Table

from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.storage.files import Place, folder_lock, place
from launch import stages
from launch.processes.signals import StopFlag
from launch.sweep.cohorts import cohort_lines, cohort_table, cohorts_of
from launch.sweep.suite_cells import is_chosen
from launch.sweep.suite_runs import suite_runs
from sae_train.config.file import FILE_NAME, with_values, write_config
from sae_train.config.run import Config
from sae_train.runs.folder import clear_failure, record_failure

logger = logging.getLogger(__name__)

_SWEPT_SECTIONS = ("sae", "train", "mesh", "checkpoint", "evaluation")
_LONGEST_NAME = 100  # file systems allow 255 bytes; the rest is room for people's eyes


@dataclass(frozen=True)
class Run:
    """One member of a sweep: `settings` are the dotted keys in which it differs from the base."""

    name: str
    settings: Mapping[str, Any]
    config: Config

    @property
    def folder(self) -> Place:
        """Its output folder."""
        return place(self.config.output)


@dataclass
class _Failures:
    """What failed and why; a mistake of the user's is told apart from a bug."""

    reasons: dict[str, str] = field(default_factory=dict)
    bug: bool = False

    def add(self, name: str, error: Exception) -> str:
        reason = stages.reason_of(error)
        self.reasons[name] = reason
        self.bug = self.bug or not isinstance(error, UserError)
        return reason


def expand(config: Config) -> list[Run]:
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
        return [
            Run(name=name, settings=settings, config=run_config)
            for name, settings, run_config in suite_runs(config)
        ]
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


def run_sweep(config: Config, *, stop: StopFlag) -> int:
    """Harvest if needed, then train, evaluate and export each run, and write the report.

    A run that fails is told at once and again at the end; the others go on.

    Returns:
        0, or 1 if a run failed for a reason that isn't the user's mistake.

    Raises:
        UserError: harvesting failed, or runs failed and each was the user's mistake.
        Interrupted: a signal came; the same command goes on.
    """
    runs = expand(config)
    show_runs(config, runs)
    with folder_lock(config.output):
        write_config(config, config.output)
        failures = _Failures()
        for run in runs:
            clear_failure(run.folder)
        for part in _by_store(runs):
            _run_on_one_store(config, part, stop=stop, failures=failures)
        with stop.at_once():
            report = stages.report(place(config.output))
    logger.info("report: %s", report)
    return _conclude(runs, failures)


def _by_store(runs: list[Run]) -> list[list[Run]]:
    """A sweep's runs read one store, a suite's several: those of each together."""
    parts: dict[str, list[Run]] = {}
    for run in runs:
        parts.setdefault(run.config.cache.path, []).append(run)
    return list(parts.values())


def _run_on_one_store(
    config: Config, runs: list[Run], *, stop: StopFlag, failures: _Failures
) -> None:
    """Every stage of the runs that read one store, before the next is harvested."""
    untrained = [run for run in runs if not stages.is_trained(run.config)]
    if untrained or any(stages.needs_evaluation(run.folder) for run in runs):
        same = config.cache == runs[0].config.cache
        stages.harvest(config if same else runs[0].config, stop=stop)
    _train_all(config, runs, stop=stop, failures=failures)
    trained = [run for run in runs if run.name not in failures.reasons]
    with stop.at_once():
        _evaluate_and_export(trained, stop=stop, failures=failures)


def show_runs(config: Config, runs: list[Run]) -> None:
    """Print the table of runs, and which of them train together."""
    from launch.console import print_table

    table = Table(title=f"{config.name}: {len(runs)} runs in {config.output}", title_justify="left")
    table.add_column("run", overflow="fold")
    cohorts = cohorts_of(config, runs)
    places = {name: str(at) for at, cohort in enumerate(cohorts, 1) for name in cohort.names}
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    for key in keys:
        table.add_column(key, justify="right")
    table.add_column("steps", justify="right")
    table.add_column("cohort", justify="right")
    for run in runs:
        values = [_value_text(run.settings.get(key)) for key in keys]
        table.add_row(run.name, *values, f"{run.config.train.steps:,}", places[run.name])
    print_table(table)
    print_table(cohort_table(cohorts))


def _train_all(config: Config, runs: list[Run], *, stop: StopFlag, failures: _Failures) -> None:
    cohorts = cohorts_of(config, runs)
    for cohort, line in zip(cohorts, cohort_lines(cohorts), strict=True):
        trained = [run for run in cohort.runs if stages.is_trained(run.config)]
        for run in trained:
            logger.info("%s is trained already", run.name)
            write_config(run.config, run.folder)  # its evaluation's settings may be new
        missing = [run for run in cohort.runs if run not in trained]
        if missing:
            logger.info("%s", line)
            _train(missing, stop=stop, failures=failures)


def _train(runs: list[Run], *, stop: StopFlag, failures: _Failures) -> None:
    for run in runs:
        if not (run.folder / FILE_NAME).exists():
            write_config(run.config, run.folder)  # so that one that fails at once can be reported
    configs = [run.config for run in runs]
    try:
        stages.train(configs, fresh=False, stop=stop)
    except Interrupted:
        raise
    except Exception as error:
        _tell(", ".join(run.name for run in runs), "train", error)
        reasons = stages.training_failures(configs, error)
        failed = {
            run.name: reasons[run.config.output] for run in runs if run.config.output in reasons
        }
        failures.reasons |= failed
        failures.bug = failures.bug or not isinstance(error, UserError)


def _evaluate_and_export(runs: list[Run], *, stop: StopFlag, failures: _Failures) -> None:
    """One pass of the model serves every run that lacks its evaluation."""
    waiting = [run for run in runs if stages.needs_evaluation(run.folder)]
    if waiting:
        logger.info("evaluating %d of %d runs", len(waiting), len(runs))
        _evaluate(waiting, stop=stop, failures=failures)
    for run in runs:
        if stages.needs_release(run.folder):
            _attempt(run, "export", partial(stages.export, [run.folder]), failures=failures)


def _evaluate(runs: list[Run], *, stop: StopFlag, failures: _Failures) -> None:
    """Evaluate all in one pass, or, where that fails, each for itself to find the one at fault."""
    try:
        folders = [run.folder for run in runs]
        stages.evaluate(folders, config=runs[0].config, stop=stop)
    except Interrupted:
        raise
    except Exception as error:
        logger.warning("evaluating %d runs at once failed, trying each: %s", len(runs), error)
        for run in runs:
            work = partial(stages.evaluate, [run.folder], config=run.config, stop=stop)
            _attempt(run, "evaluate", work, failures=failures)


def _attempt(run: Run, stage: str, work: Callable[[], Any], *, failures: _Failures) -> None:
    try:
        work()
    except Interrupted:
        raise
    except Exception as error:
        reason = failures.add(run.name, error)
        _tell(run.name, stage, error)
        record_failure(run.folder, stage=stage, reason=reason)


def _tell(name: str, stage: str, error: Exception) -> None:
    if isinstance(error, UserError):
        logger.error("%s failed in %s: %s", name, stage, error)
    else:
        logger.error("%s failed in %s", name, stage, exc_info=error)


def _conclude(runs: list[Run], failures: _Failures) -> int:
    if not failures.reasons:
        logger.info("all %d runs are trained, evaluated and released", len(runs))
        return 0
    lines = "\n".join(f"  {name}: {reason}" for name, reason in failures.reasons.items())
    message = f"{len(failures.reasons)} of {len(runs)} runs failed:\n{lines}"
    if failures.bug:
        logger.error("%s", message)
        return 1
    raise UserError(f"{message}\nMend the cause and give the same command: it does only these.")


def _combinations(config: Config) -> list[dict[str, Any]]:
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


def _make_run(config: Config, *, name: str, settings: Mapping[str, Any]) -> Run:
    own = {"name": f"{config.name}-{name}", "output": str(place(config.output) / name)}
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
        parts = (f"{labels[key]}_{_value_text(value)}" for key, value in settings.items())
        name = re.sub(r"[^A-Za-z0-9.+_-]+", "_", "-".join(parts)).strip("_.")
        if len(name) > _LONGEST_NAME or name.lower() in {other.lower() for other in names}:
            digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
            name = f"{name[:_LONGEST_NAME]}-{digest[:8]}"
        names.append(name)
    return names


def _value_text(value: Any) -> str:
    """A value, short and readable: 0.001, 7e-05, target_l0, penalty_target_l0-target_80."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, dict):
        return "-".join(f"{key}_{_value_text(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return "_".join(_value_text(inner) for inner in value)
    return str(value)

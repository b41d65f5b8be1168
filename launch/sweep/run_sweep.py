"""`sae sweep`: one config into many runs, and every stage of each on this machine.

All runs of a grid share one activation store, so text, model and store can't be swept. Run again,
a sweep does only what is missing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.storage.files import storage_path
from activation_cache.storage.locks import folder_lock
from launch import exit_codes, run_state, stages
from launch.config.job import Job
from launch.processes.signals import StopFlag
from launch.sweep.cohorts import cohort_lines, cohorts_of
from launch.sweep.expand import expand
from launch.sweep.run import Run
from launch.sweep.table import show_runs
from sae_train.config.file import FILE_NAME, write_config
from sae_train.runs.folder import clear_failure, record_failure

logger = logging.getLogger(__name__)


@dataclass
class _Failures:
    """What failed and why; `bug` is false while all are the user's mistakes."""

    reasons: dict[str, str] = field(default_factory=dict)
    bug: bool = False

    def add(self, name: str, error: Exception) -> str:
        reason = stages.reason_of(error)
        self.reasons[name] = reason
        self.bug = self.bug or not isinstance(error, UserError)
        return reason


def run_sweep(config: Job, *, stop: StopFlag) -> int:
    """Harvest if needed, then train, evaluate and export each run, and write the report.

    A run that fails is reported at once and again at the end; the others continue.

    Returns:
        0, or 1 if a run failed for a reason that isn't the user's mistake.

    Raises:
        UserError: harvesting failed, or runs failed and each was the user's mistake.
        Interrupted: a signal came; the same command continues.
    """
    runs = expand(config)
    show_runs(config, runs)
    parts = _by_store(runs)
    for part in parts:
        run_state.check_begun([run.config for run in part])
    with folder_lock(config.output):
        write_config(config, config.output)
        failures = _Failures()
        for run in runs:
            clear_failure(run.folder)
        for part in parts:
            _run_on_one_store(config, part, stop=stop, failures=failures)
        with stop.at_once():
            report = stages.report(storage_path(config.output))
    logger.info("report: %s", report)
    return _conclude(runs, failures)


def _by_store(runs: list[Run]) -> list[list[Run]]:
    """The runs grouped by the store they read: of a sweep one group, of a suite several."""
    parts: dict[str, list[Run]] = {}
    for run in runs:
        parts.setdefault(run.config.cache.path, []).append(run)
    return list(parts.values())


def _run_on_one_store(config: Job, runs: list[Run], *, stop: StopFlag, failures: _Failures) -> None:
    """All stages of the runs that read one store, before the next store is harvested."""
    rolling = runs[0].config.cache.rolling is not None  # harvested by training, bucket by bucket
    if not rolling and run_state.needs_store([run.config for run in runs]):
        same = config.cache == runs[0].config.cache
        stages.harvest(config if same else runs[0].config, stop=stop)
    _train_all(config, runs, stop=stop, failures=failures)
    trained = [run for run in runs if run.name not in failures.reasons]
    with stop.at_once():
        _evaluate_and_export(trained, stop=stop, failures=failures)


def _train_all(config: Job, runs: list[Run], *, stop: StopFlag, failures: _Failures) -> None:
    cohorts = cohorts_of(config, runs)
    if len(cohorts) > 1 and runs[0].config.cache.rolling is not None:
        logger.warning(
            "%d cohorts train on a rolling store, one after the other, and each has the text "
            "harvested anew: runs of one tap, batch size and data_seed share a harvest",
            len(cohorts),
        )
    for cohort, line in zip(cohorts, cohort_lines(cohorts), strict=True):
        trained = [run for run in cohort.runs if run_state.is_trained(run.config)]
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
    waiting = [run for run in runs if run_state.needs_evaluation(run.folder)]
    if waiting:
        logger.info("evaluating %d of %d runs", len(waiting), len(runs))
        _evaluate(waiting, stop=stop, failures=failures)
    for run in runs:
        if run_state.needs_release(run.folder):
            _attempt(run, "export", partial(stages.export, [run.folder]), failures=failures)


def _evaluate(runs: list[Run], *, stop: StopFlag, failures: _Failures) -> None:
    """Evaluate all in one pass; if that fails, one by one, to find the run at fault."""
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
        return exit_codes.DONE
    lines = "\n".join(f"  {name}: {reason}" for name, reason in failures.reasons.items())
    message = f"{len(failures.reasons)} of {len(runs)} runs failed:\n{lines}"
    if failures.bug:
        logger.error("%s", message)
        return exit_codes.BUG
    raise UserError(f"{message}\nFix the cause and run the same command again: it does only these.")

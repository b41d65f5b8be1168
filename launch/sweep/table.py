"""The runs of a sweep as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from launch.config.job import Job
from launch.console import print_table
from launch.sweep.cohorts import Cohort, activations_read, cohorts_of
from launch.sweep.expand import value_text
from launch.sweep.run import Run
from sae_train.train.cohort import step_key


def show_runs(config: Job, runs: list[Run]) -> None:
    """Print the table of runs, and which of them train together."""
    table = Table(title=f"{config.name}: {len(runs)} runs in {config.output}", title_justify="left")
    table.add_column("run", overflow="fold")
    cohorts = cohorts_of(config, runs)
    cohort_of = {name: str(at) for at, cohort in enumerate(cohorts, 1) for name in cohort.names}
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    for key in keys:
        table.add_column(key, justify="right")
    table.add_column("steps", justify="right")
    table.add_column("cohort", justify="right")
    for run in runs:
        values = [value_text(run.settings.get(key)) for key in keys]
        table.add_row(run.name, *values, f"{run.config.train.steps:,}", cohort_of[run.name])
    print_table(table)
    print_table(cohort_table(cohorts))


def cohort_table(cohorts: Sequence[Cohort]) -> Table:
    """What each cohort reads, once for all of its runs, and how much that saves."""
    table = Table(title="cohorts: their runs train together", title_justify="left")
    for heading in ("cohort", "runs", "batches read", "instead of", "compiled steps"):
        table.add_column(heading, justify="right")
    table.add_column("reads", overflow="fold")
    for number, cohort in enumerate(cohorts, 1):
        steps = [config.train.steps for config in cohort.configs]
        compiled = {step_key(config) for config in cohort.configs}
        table.add_row(
            str(number),
            str(len(cohort.runs)),
            f"{max(steps):,}",
            f"{sum(steps):,}",
            str(len(compiled)),
            activations_read(cohort),
        )
    return table

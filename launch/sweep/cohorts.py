"""The cohorts of a sweep: which runs train together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.config.job import Job
from launch.sweep.run import Run
from sae_train.train.cohort import group_cohorts


@dataclass(frozen=True)
class Cohort:
    """Runs of a sweep that train together, in one group of processes, on the same batches."""

    runs: tuple[Run, ...]

    @property
    def configs(self) -> list[Job]:
        """Those of its runs, in order."""
        return [run.config for run in self.runs]

    @property
    def names(self) -> tuple[str, ...]:
        """Those of its runs, in order."""
        return tuple(run.name for run in self.runs)


def cohorts_of(config: Job, runs: Sequence[Run]) -> list[Cohort]:
    """The cohorts of a sweep's runs: always the same, whichever runs are trained already."""
    assert config.sweep is not None
    most = config.sweep.cohort.max_members
    grouped = group_cohorts([(run, run.config) for run in runs], max_members=most)
    return [Cohort(runs) for runs in grouped]


def cohort_lines(cohorts: Sequence[Cohort]) -> list[str]:
    """A log line for each cohort."""
    return [
        f"cohort {number} of {len(cohorts)}: {', '.join(cohort.names)}; {activations_read(cohort)}"
        for number, cohort in enumerate(cohorts, 1)
    ]


def activations_read(cohort: Cohort) -> str:
    config = cohort.configs[0]
    return (
        f"{config.sae.site}.{config.sae.layer}, {config.train.batch_size} rows a batch, seed "
        f"{config.train.order_seed}, mesh {config.mesh.data} x {config.mesh.model}"
    )

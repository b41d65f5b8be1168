"""Which back end runs a command: this machine, or the cluster it is submitted to.

A back end renders a stage (`harvest`, `train`) or the whole (`sweep`) into files that anybody can
read and submit by hand, and submits them. The copy of the config that travels with them says
`launch: {on: local}`, so that the same command, run there, does the work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from activation_cache.runtime.errors import UserError
from launch.clusters.common import Command
from launch.config.job import Job

logger = logging.getLogger(__name__)


def is_on_cluster(config: Job, *, dry_run: bool) -> bool:
    """Does a cluster run this config's stages?

    Raises:
        UserError: a dry run was asked for where nothing is submitted.
    """
    if config.launch.on != "local":
        return True
    if dry_run:
        raise UserError(
            "--dry-run shows what would be submitted to a cluster, and launch.on is local: leave "
            "it out, or choose a cluster in the launch section (docs/clusters.md)"
        )
    return False


def submit(config: Job, *, command: Command, dry_run: bool, stop: Callable[[], bool]) -> int:
    """Render, write and (unless `dry_run`) submit a command; returns the exit status.

    Raises:
        UserError: the config can't run there, or the cluster's own command is missing or refuses.
        Interrupted: a signal came while following the stages, which continue there.
    """
    if command == "sweep":
        from launch.sweep.cohorts import cohort_lines, cohorts_of
        from launch.sweep.expand import expand

        for line in cohort_lines(cohorts_of(config, expand(config))):
            logger.info("%s", line)
    if config.launch.on == "slurm":
        from launch.clusters import slurm

        return slurm.submit(config, command=command, dry_run=dry_run)
    from launch.clusters import kubectl

    return kubectl.submit(config, command=command, dry_run=dry_run, stop=stop)

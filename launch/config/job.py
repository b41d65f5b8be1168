"""`Job`: the whole YAML, a run's config with the sections `sweep`, `launch` and `rollout`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from activation_cache.config import RolloutConfig
from activation_cache.storage.files import AnyPath
from launch.config.kubernetes import KubernetesLaunch
from launch.config.local import LocalLaunch
from launch.config.slurm import SlurmLaunch
from launch.config.sweep import SweepConfig
from sae_train.config.file import load_config_as, read_run_config_as
from sae_train.config.run import Config


def _default_local(section: Any) -> Any:
    """A section without `on` means this machine."""
    if isinstance(section, dict) and "on" not in section:
        return {"on": "local", **section}
    return section


# A further back end joins the union.
Launch = Annotated[
    LocalLaunch | SlurmLaunch | KubernetesLaunch,
    Field(discriminator="on"),
    BeforeValidator(_default_local),
]


class Job(Config):
    """What a command reads: a run or a sweep of runs, where stages are started, rollouts.

    Every stage takes it for the run's config that it also is.
    """

    sweep: SweepConfig | None = None
    launch: Launch = LocalLaunch()
    rollout: RolloutConfig | None = None

    @property
    def is_suite(self) -> bool:
        """Does its sweep name the cells of a suite?"""
        return self.sweep is not None and bool(self.sweep.cells)


def load_job(path: AnyPath, overrides: Sequence[str] = ()) -> Job:
    """Read a config file with all its sections; arguments and errors are `load_config_as`'s."""
    return load_config_as(Job, path, overrides)


def read_job(folder: AnyPath, overrides: Sequence[str] = ()) -> Job:
    """The resolved config of an output folder, with all its sections.

    Where training was started from Python the file has none of a command's sections, and means a
    run on this machine.

    Raises:
        UserError: it isn't an output folder, or its config is damaged.
    """
    return read_run_config_as(Job, folder, overrides)

"""The `launch` section: where the stages run, one class per back end, told apart by `on`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from activation_cache.config import Count, NonNegative, PositiveCount, Section
from launch.config.kubernetes import KubernetesLaunch
from launch.config.slurm import SlurmLaunch


class LocalLaunch(Section):
    """This machine: `processes` copies of a stage that share the work, started anew when one dies.

    The number of restarts starts from nothing again whenever a checkpoint was saved in between.
    """

    on: Literal["local"] = "local"
    processes: PositiveCount = 1
    restarts: Count = 3
    restart_pause_seconds: NonNegative = 5.0  # before the first restart; doubles with each
    # A lost process is noticed by the others within this time.
    heartbeat_seconds: Annotated[PositiveCount, Field(ge=5)] = 60


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

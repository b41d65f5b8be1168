"""`Job`: the whole YAML, which is a run's config, perhaps a sweep, and where the stages run."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from launch.config.kubernetes import KubernetesLaunch
from launch.config.local import LocalLaunch
from launch.config.slurm import SlurmLaunch


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

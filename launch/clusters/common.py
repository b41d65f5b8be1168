"""What Slurm and Kubernetes share: the names of stages, and where local files go."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from activation_cache.config import MeshConfig
from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import storage_path
from launch.config.job import Job

Command = Literal["harvest", "train", "sweep"]
Stage = Literal["harvest", "train", "evaluate", "report"]


def local_folder(config: Job, kind: str) -> Path:
    """The folder on this machine for scripts or manifests.

    It is inside the output folder, or, if that is in a bucket, `<kind>/<name>` in the folder where
    the command is run.
    """
    output = storage_path(config.output)
    if isinstance(output, Path):
        return output / kind
    return Path(kind) / re.sub(r"[^A-Za-z0-9._-]+", "_", config.name)


def harvests_in_training(config: Job, *, processes: int) -> bool:
    """Is the store a rolling one, so that the jobs that train harvest too, one at a time?

    Raises:
        UserError: it is, and a job has several processes.
    """
    if config.cache.rolling is None:
        return False
    if processes > 1:
        raise UserError(
            f"{config.name}: a rolling store is harvested and read in one job of a single process, "
            f"and launch starts {processes}: start one (with as many devices as it needs), or "
            "leave cache.rolling out"
        )
    return True


def mesh_of(config: Job, *, stage: Stage) -> tuple[str, MeshConfig]:
    """The mesh of a stage's processes, and its key in the config."""
    return config.harvest_mesh if stage == "harvest" else ("mesh", config.mesh)

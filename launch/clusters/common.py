"""What Slurm and Kubernetes share: which stages there are, and where local files go."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from activation_cache.storage.files import storage_path
from launch.config.job import Job

Command = Literal["harvest", "train", "sweep"]


def local_folder(config: Job, kind: str) -> Path:
    """Where what is submitted is kept on this machine: in the output folder, or, where that is in
    a bucket, in `<kind>/<name>` of the folder the command is given in.
    """
    output = storage_path(config.output)
    if isinstance(output, Path):
        return output / kind
    return Path(kind) / re.sub(r"[^A-Za-z0-9._-]+", "_", config.name)


Stage = Literal["harvest", "train", "evaluate", "report"]

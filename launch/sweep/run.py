"""One run of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from activation_cache.storage.files import StoragePath, storage_path
from launch.config.job import Job


@dataclass(frozen=True)
class Run:
    """One member of a sweep: `settings` are the dotted keys in which it differs from the base."""

    name: str
    settings: Mapping[str, Any]
    config: Job

    @property
    def folder(self) -> StoragePath:
        """Its output folder."""
        return storage_path(self.config.output)

"""The small pipeline whose files are broken: every kind of file that a command reads, once."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_SETTLE_SECONDS = 60.0
_RANDOM = re.compile("[0-9a-f]{32}")  # names that TensorStore gives at random


@dataclass
class World:
    """A folder, and how its files were before any was changed."""

    folder: Path
    files: dict[str, bytes] = field(default_factory=dict)
    _stamps: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    _folders: set[str] = field(default_factory=set)

    def remember(self) -> None:
        """Take the files as they are now for the state to come back to."""
        for path in self.folder.rglob("*"):
            name = str(path.relative_to(self.folder))
            if path.is_dir():
                self._folders.add(name)
            else:
                self.files[name] = path.read_bytes()
                self._stamps[name] = _stamp(path.lstat())

    def change(self, files: Mapping[str, bytes | None]) -> None:
        """Write files, or delete those that are None."""
        for name, data in files.items():
            path = self.folder / name
            if data is None:
                path.unlink()
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)

    def restore(self) -> None:
        """Bring back what a command or an input has changed.

        A write that a command has begun in TensorStore's threads outlives its failure: a folder
        may get a file while it is deleted.
        """
        until = time.monotonic() + _SETTLE_SECONDS
        while True:
            try:
                return self._restore()
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)

    def _restore(self) -> None:
        seen = set()
        for root, folders, names in os.walk(self.folder):
            inside = Path(root)
            for name in list(folders):
                path = inside / name
                if path.is_symlink() or str(path.relative_to(self.folder)) not in self._folders:
                    folders.remove(name)
                    path.unlink() if path.is_symlink() else shutil.rmtree(path)
            for name in names:
                path = inside / name
                own = str(path.relative_to(self.folder))
                if own not in self.files or not path.is_file():
                    path.unlink()
                elif self._stamps[own] == _stamp(path.lstat()):
                    seen.add(own)
        for own in self.files.keys() - seen:
            path = self.folder / own
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.files[own])
            self._stamps[own] = _stamp(path.lstat())

    def matching(self, *ends: str) -> list[str]:
        """The names of files with one of these in them, in an order that each world has."""

        def key(name: str) -> tuple[str, int]:
            return _RANDOM.sub("", name), len(self.files[name])

        return sorted((name for name in self.files if any(end in name for end in ends)), key=key)


def _stamp(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_mtime_ns, found.st_size, found.st_ino

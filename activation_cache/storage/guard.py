"""Guards of folders: what the holder of a lease checks before each write below its folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from activation_cache.runtime.addresses import Address

_guards: dict[str, Callable[[], None]] = {}


def set_guard(folder: Path | Address, check: Callable[[], None] | None) -> None:
    """Have `check` called before each write below a folder; None ends that.

    A lease sets it: `check` raises `UserError` once another process holds the folder.
    """
    if check is None:
        _guards.pop(_name(folder), None)
    else:
        _guards[_name(folder)] = check


def guard(path: Path | Address) -> None:
    """Raises `UserError` if another process has taken a folder that `path` is in."""
    if not _guards:
        return
    name = _name(path)
    for folder, check in list(_guards.items()):
        if name == folder or name.startswith(f"{folder}/"):
            check()


def _name(path: Path | Address) -> str:
    return os.path.abspath(path) if isinstance(path, Path) else str(path)

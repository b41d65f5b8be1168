"""Where the paths in a folder's config lead now: runs and sweeps may be moved, copied and renamed.

A resolved config has the paths of the day it was written. A store that lay in or beside the output
folder is looked for there first, seen from where that folder is now, and then at its old path.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from activation_cache.storage.files import StoragePath, storage_path


def moved_places(values: Mapping[str, Any], folder: StoragePath) -> dict[str, str]:
    """By dotted key, the paths of a folder's config that have moved along with the folder.

    Args:
        values: the config as it was written into the folder.
        folder: where that folder is now.

    Returns:
        `output`, `cache.path` and `model.weights`, those that lead elsewhere now.
    """
    output, store = _text(values, "output"), _text(values, "cache", "path")
    if output is None or storage_path(output).absolute() == folder.absolute():
        return {}
    moved = {"output": str(folder)}
    for place in _beside(store, output, folder):
        if _is_store(storage_path(place)) or not storage_path(store or "").is_dir():
            moved["cache.path"] = place
            break
    weights = _text(values, "model", "weights")
    if weights is not None and not Path(weights).expanduser().exists():
        for place in _beside(weights, output, folder):
            moved.setdefault("model.weights", place)
    return moved


def _text(values: Any, *keys: str) -> str | None:
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values if isinstance(values, str) else None


def _beside(path: str | None, output: str, folder: StoragePath) -> Iterator[str]:
    """`path`, as it lay seen from `output`, seen from `folder`: the places that exist."""
    if path is None or len({text.rpartition("://")[0] for text in (path, output, str(folder))}) > 1:
        return
    scheme, mark, here = str(folder).rpartition("://")
    relative = os.path.relpath(path.rpartition("://")[2], output.rpartition("://")[2])
    # Seen through a link, what lies beside the folder may be beside the link or what it points to.
    for start in dict.fromkeys([here] if mark else [here, os.path.realpath(here)]):
        place = scheme + mark + os.path.normpath(os.path.join(start, relative))
        if place != path and storage_path(place).exists():
            yield place


def _is_store(folder: StoragePath) -> bool:
    return any((folder / name).exists() for name in ("manifest.json", "plan.json"))

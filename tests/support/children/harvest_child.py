"""`python -m tests.support.children.harvest_child SECTIONS [KILL]`: a harvest that may kill itself.

KILL is `name:n` (before the n-th small file whose name begins with `name` gets its name, say
`bucket:3`), `name:n:SECONDS` (so long after the first small file, there at the latest) or `lock`
(with half of a shard of a new bucket written).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np

from activation_cache.config import CacheConfig, ModelConfig, TextConfig
from activation_cache.harvest.harvest import harvest
from activation_cache.storage import files
from activation_cache.storage.arrays import ArrayLayout
from activation_cache.store import writer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_before_replacing(name: str, number: int, *, seconds: float | None = None) -> None:
    replace, seen, begun = os.replace, 0, False

    def counted(source, target) -> None:
        nonlocal seen, begun
        if seconds is not None and not begun:
            begun = True
            threading.Timer(seconds, die).start()
        seen += os.path.basename(target).startswith(name)
        if seen == number:
            die()
        replace(source, target)

    files.os.replace = counted


def kill_within_a_shard() -> None:
    """Die with half of the first shard under TensorStore's temporary name, as in mid-write."""

    def half(array: object, layout: ArrayLayout, *, start: int, rows: np.ndarray) -> None:
        shard = Path(str(layout.shard_file(start)))
        shard.parent.mkdir(parents=True, exist_ok=True)
        written = rows.tobytes()[: rows.nbytes // 2]
        shard.with_name(f"{shard.name}_0123abcd.__lock").write_bytes(written)
        die()

    writer.write_shards = half


def main(sections: str, kill: str = "") -> None:
    given = json.loads(sections)
    if kill == "lock":
        kill_within_a_shard()
    elif kill:
        name, number, *seconds = kill.split(":")
        after = float(seconds[0]) if seconds else None
        kill_before_replacing(name, int(number), seconds=after)
    harvest(
        model=ModelConfig(**given["model"]),
        text=TextConfig(**given["text"]),
        cache=CacheConfig(**given["cache"]),
        resolved_config_yaml="name: test\n",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

"""`python -m tests.support.children.harvest_child SECTIONS [KILL]`: a harvest that may kill itself.

KILL is `name:n` (before the n-th small file whose name begins with `name` gets its name, say
`bucket:3`) or `lock` (as soon as TensorStore has begun to write a shard of a new bucket).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

from activation_cache.config import CacheConfig, ModelConfig, TextConfig
from activation_cache.harvest.harvest import harvest
from activation_cache.storage import files


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_before_replacing(name: str, number: int) -> None:
    replace, seen = os.replace, 0

    def counted(source, target) -> None:
        nonlocal seen
        seen += os.path.basename(target).startswith(name)
        if seen == number:
            die()
        replace(source, target)

    files.os.replace = counted


def kill_within_a_shard(folder: Path) -> None:
    def watch() -> None:
        while True:
            for shards in folder.glob("*.*/c"):
                for shard in os.scandir(shards):
                    if os.path.exists(f"{shard.path}/0.__lock"):
                        die()

    threading.Thread(target=watch, daemon=True).start()


def main(sections: str, kill: str = "") -> None:
    given = json.loads(sections)
    folder = Path(given["cache"]["path"])
    if kill == "lock":
        kill_within_a_shard(folder)
    elif kill:
        name, number = kill.split(":")
        kill_before_replacing(name, int(number))
    harvest(
        model=ModelConfig(**given["model"]),
        text=TextConfig(**given["text"]),
        cache=CacheConfig(**given["cache"]),
        resolved_config_yaml="name: test\n",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A small run with a rolling store, and what of the store is on the disk."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from activation_cache.harvest import worker
from activation_cache.store import writer
from launch.config.job import Job, load_job

# 40 buckets of 32 rows, a window of four, 80 steps of 16 rows.
BUCKETS, WINDOW, STEPS = 40, 4, 80
OVERRIDES = [
    f"cache.tokens={BUCKETS * 32}",
    "cache.shuffle_rows=32",
    "cache.block_rows=4",
    f"train.tokens={STEPS * 16}",
    "train.batch_size=16",
    "train.log_every_steps=1",
    "checkpoint={every_steps: 7, keep: 2}",
]


def overrides(folder: Path, *more: str, beside: bool = False) -> list[str]:
    """Overrides of `write_pipeline`'s config for a run in `folder`."""
    rolling = f"cache.rolling={{buckets: {WINDOW}, beside: {str(beside).lower()}}}"
    places = [f"cache.path={folder}/store", f"output={folder}/run"]
    return [*OVERRIDES, rolling, *places, *more]


def rolling_job(config: Path, folder: Path, *more: str) -> Job:
    """The config of a run in `folder`."""
    return load_job(config, overrides(folder, *more))


def load_the_model_once(patched: pytest.MonkeyPatch) -> None:
    """The runs of this process share one language model, and its compiled programs."""
    load, kept = worker.load_replicas, []

    def load_once(*arguments: Any, **options: Any) -> Any:
        if not kept:
            kept.append(load(*arguments, **options))
        return kept[0]

    patched.setattr(worker, "load_replicas", load_once)


def committed(store: Path) -> list[int]:
    """The buckets on the disk that have a record."""
    return sorted(int(file.stem[-6:]) for file in store.glob("commits/bucket-*.json"))


def shards(store: Path, tap: str = "resid_post.1") -> list[int]:
    """The buckets on the disk that have rows."""
    return sorted(int(file.parent.name) for file in store.glob(f"{tap}/c/*/0"))


def begun(store: Path) -> list[int]:
    """The buckets of which the disk has any file, those that are being written included."""
    numbers = set()
    for name in ("resid_post.1", "sequence", "position"):
        folder = store / name / "c"
        for entry in folder.iterdir() if folder.is_dir() else []:
            holds = entry.is_file() or (entry.is_dir() and any(entry.iterdir()))
            if holds and (number := re.match(r"\d+", entry.name)):
                numbers.add(int(number[0]))
    return sorted(numbers)


class Disk:
    """Notes how many buckets a store holds whenever this process has just written one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: list[int] = []
        write = writer.write_record

        def watched(path: Path, record: Any) -> None:
            write(path, record)
            store = path.parent.parent
            self.held.append(max(len(committed(store)), len(shards(store))))

        monkeypatch.setattr(writer, "write_record", watched)


class Watch:
    """Looks at a store all the while, from a thread: a context manager.

    Attributes:
        most: buckets that were on the disk at once: those that two looks in a row have seen, since
            while one look goes through the folders, buckets go and others come.
        newest: the last bucket that was ever there.
        written: buckets that came, those that came again included.
        looks: how often it has looked.
    """

    def __init__(self, store: Path, *, pause: float = 0.004) -> None:
        self.most, self.newest, self.written, self.looks = 0, -1, 0, 0
        self._store, self._pause = store, pause
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch")

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        before: set[int] = set()
        while not self._over.is_set():
            try:
                found = set(begun(self._store))
            except FileNotFoundError:
                continue  # deleted between two looks
            self.looks += 1
            self.most = max(self.most, len(found & before))
            self.newest = max([self.newest, *found])
            self.written += len(found - before)
            before = found
            time.sleep(self._pause)

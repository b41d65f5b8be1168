"""The harvest of a rolling store: the window that training reads is kept full, the rest deleted.

`RollingHarvest` has the language model at hand and makes buckets when they are wanted. In the
trainer's own process the two take turns: `supply` makes the buckets that the next step needs. In
a process of its own it follows the trainer (`follow`): it harvests one bucket beyond the window
while training reads, and learns from `reading.json` where the trainer is. A trainer beside it waits
with `waiting_supply`.

Buckets are deleted as soon as the trainer has read past them, whatever its last checkpoint is, so
that the disk never holds more than the window and one bucket. A run that goes on from an older
checkpoint has the buckets since then harvested again.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack

from activation_cache.config import CacheConfig, MeshConfig, ModelConfig, TextConfig
from activation_cache.gemma.replicas import place_replicas
from activation_cache.harvest.fill_bucket import BucketFiller
from activation_cache.harvest.harvest import PlannedHarvest
from activation_cache.harvest.matching_store import open_matching_store
from activation_cache.runtime import exchange
from activation_cache.runtime.closing import Closing
from activation_cache.runtime.errors import Interrupted
from activation_cache.runtime.waiting import Waiting
from activation_cache.storage.files import StoragePath, storage_path
from activation_cache.storage.locks import folder_lock, is_locked
from activation_cache.store.manifest import Manifest
from activation_cache.store.rolling import (
    Reading,
    Supply,
    buckets_on_disk,
    delete_bucket,
    is_kept,
    is_there,
    read_reading,
    write_kept,
)
from activation_cache.store.store import MANIFEST_FILE, Store

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
# A harvest whose trainer was killed ends a second later, after the forward pass under way.
_LOCK_SECONDS = 60.0


class RollingHarvest(Closing):
    """Makes and deletes the buckets of a rolling store, whose folder it holds.

    A context manager. All processes of a group call everything here in the same order.
    """

    def __init__(
        self,
        *,
        model: ModelConfig,
        text: TextConfig,
        cache: CacheConfig,
        mesh: MeshConfig | None = None,
        resolved_config_yaml: str | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Take the folder, tokenise the text and plan, or go on with what was planned.

        Args:
            mesh: of the language model; None is `cache.mesh`, or else one device.
            stop: asked before each forward pass.

        Raises:
            UserError: what `harvest` raises.
            Interrupted: `stop` turned true.
        """
        assert cache.rolling is not None
        mesh = mesh or cache.mesh or MeshConfig()
        self._job = PlannedHarvest(storage_path(cache.path), model, text, cache, mesh, stop)
        self._stack = ExitStack()
        self._filler: BucketFiller | None = None
        try:
            place_replicas(mesh)
            exchange.run_on_main_and_broadcast("lock", self._take_folder)
            # Before anything is planned: a finished store that isn't this one stays as it is.
            exchange.run_on_main_and_broadcast("same store", self._check_manifest)
            self._share = self._job.share(resolved_config_yaml)
        except BaseException:
            self._stack.close()
            raise

    def close(self) -> None:
        """Give back the folder."""
        self._filler = None
        self._stack.close()

    @property
    def path(self) -> StoragePath:
        """The store's folder."""
        return self._job.path

    @property
    def plan(self) -> Manifest:
        """The store's plan."""
        return self._share.plan

    def _take_folder(self) -> None:
        waiting = Waiting(f"the process that harvests to {self.path} to end")
        while is_locked(self.path) and waiting.seconds < _LOCK_SECONDS:
            waiting.tell()
            time.sleep(_POLL_SECONDS)
            self._stop_if_asked()
        self._stack.enter_context(folder_lock(self.path))

    def _check_manifest(self) -> None:
        if (self.path / MANIFEST_FILE).exists():
            job = self._job
            open_matching_store(model=job.model, text=job.text, cache=job.cache)

    def make_store(self) -> Store:
        """Harvest the first window, unless that was done: its norms make the folder a store.

        Raises:
            UserError: a disk that refuses, rows that aren't finite.
            Interrupted: `stop` turned true; every finished bucket is committed.
        """
        if not exchange.run_on_main_and_broadcast("begun", (self.path / MANIFEST_FILE).exists):
            missing = exchange.run_on_main_and_broadcast(
                "first window", functools.partial(self._tidy, self.plan.first_window)
            )
            logger.info("harvesting the first window: %d buckets are missing", len(missing))
            self._fill(missing, shown=True)
            exchange.run_on_main_and_broadcast("manifest", self._finish)
        job = self._job
        return open_matching_store(model=job.model, text=job.text, cache=job.cache)

    def _finish(self) -> None:
        self._job.finish(self.plan)

    def supply(self, reading: Reading, stop: Callable[[], bool]) -> None:
        """Make the buckets that the trainer's next step needs; delete those it needs no more.

        Raises:
            UserError, Interrupted: as of `make_store`.
        """
        missing = self._tidy(reading.wanted(self._window))
        self._fill([bucket for bucket in missing if bucket in reading.needed], stop=stop)

    def follow(self) -> None:
        """Harvest ahead of a trainer in another process, until it has read all that it wants.

        Raises:
            UserError, Interrupted: as of `make_store`.
        """
        self.make_store()
        while True:
            missing = exchange.run_on_main_and_broadcast(
                "buckets", self._next_missing, stop=self._job.stop
            )
            if not missing:
                return
            self._fill(missing[:1])

    def _next_missing(self) -> list[int]:
        """Wait until buckets are wanted that aren't there; none once the trainer is at its end."""
        waiting = Waiting(f"the trainer that reads {self.path}", level=logging.DEBUG)
        before: Reading | None = None
        while True:
            reading = read_reading(self.path)
            if reading is not None and reading != before:
                wanted = reading.wanted(self._window)
                write_kept(self.path, wanted)
                if read_reading(self.path) != reading:
                    continue  # the trainer has moved, and back perhaps: nothing is deleted
                before, missing = reading, self._tidy(wanted)
                if missing or reading.is_over:
                    return missing
            waiting.tell()
            self._stop_if_asked()
            time.sleep(_POLL_SECONDS)

    @property
    def _window(self) -> int:
        assert self.plan.window is not None
        return self.plan.window

    def _tidy(self, wanted: range) -> list[int]:
        """Delete the buckets that aren't wanted; returns those that are and aren't there."""
        for bucket in buckets_on_disk(self.path, self.plan):
            if bucket not in wanted:
                delete_bucket(self.path, self.plan, bucket)
        return [bucket for bucket in wanted if not is_there(self.path, bucket)]

    def _fill(
        self,
        buckets: list[int],
        *,
        stop: Callable[[], bool] | None = None,
        shown: bool = False,
    ) -> None:
        if not buckets:
            return
        self._filler = self._filler or self._share.filler()
        share = dataclasses.replace(self._share, missing=buckets, committed=0)
        began = time.monotonic()
        stop = stop or self._job.stop
        compute = functools.partial(share.compute, stop=stop, filler=self._filler, shown=shown)
        exchange.shared("buckets", compute, finish=lambda: None, stop=stop)
        numbers = " and ".join(map(str, sorted({buckets[0] + 1, buckets[-1] + 1})))
        logger.info(
            "harvested bucket %s of %d in %.1f s",
            numbers if len(buckets) < 3 else numbers.replace("and", "to"),
            self.plan.num_buckets,
            time.monotonic() - began,
        )

    def _stop_if_asked(self) -> None:
        if exchange.stop_asked(self._job.stop):
            raise Interrupted(f"harvest stopped: the finished buckets of {self.path} are committed")


def waiting_supply(store: StoragePath) -> Supply:
    """The supply of a trainer beside whom a store is harvested: waits for what its next step needs.

    Raises:
        Interrupted: `stop` turned true.
    """

    def supply(reading: Reading, stop: Callable[[], bool]) -> None:
        waiting = Waiting(f"the harvest of bucket {reading.through + 1}")
        needed = reading.needed
        while needed and not (
            is_kept(store, needed) and all(is_there(store, bucket) for bucket in needed)
        ):
            waiting.tell()
            if stop():
                raise Interrupted(f"stopped while waiting for the harvest of {store}")
            time.sleep(_POLL_SECONDS)

    return supply


def wait_for_store(
    *, model: ModelConfig, text: TextConfig, cache: CacheConfig, stop: Callable[[], bool]
) -> Store:
    """Wait until the first window is harvested, and open the store.

    Raises:
        UserError: the store is another one.
        Interrupted: `stop` turned true.
    """
    path = storage_path(cache.path)

    def wait() -> None:
        waiting = Waiting(f"the harvest of the first window of {path}")
        while not (path / MANIFEST_FILE).exists():
            waiting.tell()
            if exchange.stop_asked(stop):
                raise Interrupted(f"stopped while waiting for the harvest of {path}")
            time.sleep(_POLL_SECONDS)

    exchange.run_on_main_and_broadcast("first window", wait, stop=stop)
    return open_matching_store(model=model, text=text, cache=cache)

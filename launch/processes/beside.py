"""The harvest of a rolling store beside the trainer: a process of its own on devices of its own.

The two know of each other through files alone (`activation_cache.store.rolling`). A harvest that is
lost is started again, as `launch.restarts` allows, while the trainer waits; if it can't go on, the
trainer is asked to stop, saves everything, and the reason is the command's. A harvest whose trainer
is gone stops by itself (`supervise.stop_with_supervisor`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator

from activation_cache.runtime import processes
from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.runtime.waiting import Waiting
from activation_cache.storage.files import StoragePath, storage_path
from activation_cache.storage.locks import is_locked
from launch.config.job import Job
from launch.config.local import LocalLaunch
from launch.processes import group
from launch.processes.supervise import SUPERVISOR, visible_gpus

logger = logging.getLogger(__name__)

_GPUS = "CUDA_VISIBLE_DEVICES"
_POLL_SECONDS = 0.1
_BUSY_SECONDS = 60.0  # in which a harvest whose trainer was killed ends
_LAST_SECONDS = 60.0  # in which a harvest that is done deletes the last window


@contextlib.contextmanager
def harvest_beside(config: Job, *, stop: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    """Harvest ahead of the trainer in the block, if the config asks for it.

    Gives the trainer's `stop`, which also says yes when the harvest can't go on.

    Raises:
        UserError: the harvest failed by the user's mistake, the devices don't suffice, or another
            trainer reads the store.
        Interrupted: the harvest was stopped, or the trainer.
        RuntimeError: it was lost again and again.
    """
    rolling = config.cache.rolling
    if rolling is None or not rolling.beside or os.environ.get(SUPERVISOR):
        yield stop  # in a group it is the supervisor's
        return
    if processes.process_count() > 1:
        raise UserError(
            "cache.rolling.beside is true, and the trainer is "
            f"{processes.process_count()} processes that a cluster started: there a rolling store "
            "is harvested beside a single task only. Start one task, or set launch.processes on "
            "one machine"
        )
    store = storage_path(config.cache.path)
    _forget_reading(store, stop=stop)
    seen = os.environ.get(_GPUS)
    gpus = _harvest_gpus(config)
    harvest = _Harvest(config, store=store, gpus=gpus, stop=stop)
    harvest.thread.start()
    try:
        yield lambda: stop() or harvest.failure is not None
    except Interrupted:
        if harvest.failure is not None:
            raise harvest.failure from None
        raise
    else:
        harvest.thread.join(_LAST_SECONDS)
    finally:
        harvest.leaving.set()
        harvest.thread.join()
        if gpus and seen is None:
            del os.environ[_GPUS]
        elif gpus and seen is not None:
            os.environ[_GPUS] = seen
    if harvest.failure is not None:
        raise harvest.failure


def _forget_reading(store: StoragePath, *, stop: Callable[[], bool]) -> None:
    """Delete what an earlier trainer has told, once its harvest has ended.

    A living trainer's must stay: by another's its harvest would delete what it reads.
    """
    # Imported here because it loads TensorStore, which a command that starts nothing does without.
    from activation_cache.store.rolling import READING_FILE

    waiting = Waiting(f"the process that harvests to {store} to end")
    while is_locked(store):
        if waiting.seconds >= _BUSY_SECONDS:
            raise UserError(
                f"{store} is in use by another harvest: one trainer at a time reads a rolling "
                "store. Wait for it to end, stop it, or choose another cache.path"
            )
        waiting.tell()
        if stop():
            raise Interrupted(f"stopped while waiting for the harvest to {store} to end")
        time.sleep(_POLL_SECONDS)
    (store / READING_FILE).unlink(missing_ok=True)


class _Harvest:
    """`sae harvest --follow` under a supervisor, watched by a thread."""

    def __init__(
        self, config: Job, *, store: StoragePath, gpus: list[str], stop: Callable[[], bool]
    ) -> None:
        rolling, launch = config.cache.rolling, config.launch
        assert rolling is not None
        kept = launch if isinstance(launch, LocalLaunch) else LocalLaunch()
        own = kept.model_copy(update={"processes": 1})
        self.config = config.model_copy(update={"launch": own})
        self.leaving = threading.Event()
        self.failure: Exception | None = None
        self.thread = threading.Thread(target=self._run, name="harvest beside")
        self._store, self._gpus, self._stop = store, gpus, stop

    def _run(self) -> None:
        _, mesh = self.config.harvest_mesh
        try:
            group.run_stage(
                "harvest",
                self.config,
                devices=mesh.data * mesh.model,
                options=["--follow"],
                gpus=self._gpus,
                progress=lambda: _buckets(self._store),
                stop=lambda: self._stop() or self.leaving.is_set(),
            )
        except Interrupted as stopped:
            if not (self._stop() or self.leaving.is_set()):
                self.failure = stopped  # a signal to the harvest alone: the trainer would wait
        except Exception as error:
            self.failure = error


def _buckets(store: StoragePath) -> list[str]:
    commits = store / "commits"
    return sorted(file.name for file in commits.iterdir()) if commits.is_dir() else []


def _harvest_gpus(config: Job) -> list[str]:
    """The GPUs of the harvest; those of the trainer become all that this process sees.

    Raises:
        UserError: there are too few for both.
    """
    gpus = visible_gpus()
    if not gpus:
        return []
    key, mesh = config.harvest_mesh
    training, harvesting = config.mesh.data * config.mesh.model, mesh.data * mesh.model
    if training + harvesting > len(gpus):
        raise UserError(
            f"mesh takes {training} GPUs, the harvest beside it ({key}) {harvesting}, and there "
            f"are {len(gpus)}: make the meshes smaller, or set cache.rolling.beside to false, so "
            "that the two take turns on the same devices"
        )
    os.environ[_GPUS] = ",".join(gpus[:training])
    return gpus[training : training + harvesting]

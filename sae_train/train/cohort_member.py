"""One run of a cohort: its folder and lock, its state, its checkpoints, its metrics.

A cohort feeds its members (`loop`); whatever belongs to one run alone is here. With several
processes all of them call everything here for the same members in the same order.

Legend: B rows of a batch, D model width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import jax
import numpy as np

from activation_cache.language_model.model import precision_on as model_precision_on
from activation_cache.precision import Precision
from activation_cache.runtime import exchange, processes
from activation_cache.runtime.closing import Closing
from activation_cache.storage.files import storage_path
from activation_cache.storage.locks import folder_lock
from activation_cache.store.store import Store
from sae_train.checkpoint.checkpoints import Checkpoints
from sae_train.checkpoint.same_run import (
    THRESHOLDS,
    checkpoint_meta,
    refuse_difference,
    refuse_model_precision,
    refuse_precision,
)
from sae_train.config.file import FILE_NAME, write_config
from sae_train.config.run import Config
from sae_train.runs.folder import record_failure, record_start
from sae_train.runs.metrics_file import MetricsLog, read_metrics
from sae_train.runs.wandb_log import WandbSender
from sae_train.step.path_choice import precision_on
from sae_train.step.schedule import Scheduled, scheduled
from sae_train.step.state import TrainState, abstract_state, init_state
from sae_train.train.initial_state import HostBatch, prepare_start
from sae_train.train.latent_thresholds import as_text, latent_thresholds
from sae_train.train.step_log import InputClock, StepLog
from sae_train.train.train_step import StepMetrics

logger = logging.getLogger(__name__)


class Member(Closing):
    """A run that trains on a stream of batches; a context manager that closes what it opened.

    Attributes:
        done: optimiser steps given to the devices; their metrics are read one step late.
        failure: why it stopped, if it failed.
    """

    def __init__(
        self, config: Config, *, store: Store, mesh: jax.sharding.Mesh, clock: InputClock
    ) -> None:
        self.config, self.folder = config, storage_path(config.output)
        self.done, self.steps = 0, config.train.steps
        self.failure: str | None = None
        self.step_log = StepLog(config, clock)
        self._store, self._mesh = store, mesh
        self._precision: Precision = "float32"
        self._meta: Mapping[str, Any] = {}
        self._stack = ExitStack()
        self._sender = WandbSender(config)
        self._checkpoints: Checkpoints | None = None
        self._state: TrainState | None = None
        self._pending: tuple[int, StepMetrics] | None = None
        self._unread: tuple[int, StepMetrics] | None = None

    def _look_at_store(self) -> None:
        config, store = self.config, self._store
        infos = {tap: store.tap_info(tap) for tap in config.sae.taps}
        scales = {tap: float(np.sqrt(info.mean_squared_norm)) for tap, info in infos.items()}
        scaled_like = "target_tap" if config.sae.target_scale == "own" else "tap"
        self._precision = precision_on(config, self._mesh)
        model_precision = None
        if config.train.end_to_end is not None:
            model_precision = model_precision_on(config.model, self._mesh)
        self._meta = checkpoint_meta(
            config,
            input_scale=scales[config.sae.tap],
            target_scale=scales[getattr(config.sae, scaled_like)],
            d_model=infos[config.sae.tap].width,
            store=store.identity,
            precision=self._precision,
            model_precision=model_precision,
        )

    @property
    def at_work(self) -> bool:
        """Does it want further batches?"""
        return self.failure is None and self.done < self.steps

    @property
    def is_save_due(self) -> bool:
        """Is a checkpoint due at this step?

        By its cadence, or before the last step of a run whose thresholds are then found on rows
        that a rolling store may have to harvest again: a stop meanwhile costs that step alone.
        """
        config = self.config
        looks_back = config.sae.threshold_per_latent and config.cache.rolling is not None
        return self.done % config.checkpoint.every_steps == 0 or (
            looks_back and self.done == self.steps - 1
        )

    @property
    def scales(self) -> Mapping[str, float]:
        """C of x = x_raw / C, and what a target is divided by, as the step takes them."""
        return {key: self._meta[key] for key in ("input_scale", "target_scale")}

    @property
    def checkpoints(self) -> Checkpoints:
        """The run's checkpoints, once `begin` has taken its folder."""
        assert self._checkpoints is not None, "begin() comes first"
        return self._checkpoints

    def begin(self, *, fresh: bool) -> None:
        """Take the folder; initialise the state, or restore the newest checkpoint's.

        Raises:
            UserError: the folder is in use or holds another run, its checkpoints are damaged, or
                the devices lack the products that the config asks for.
        """
        config, folder = self.config, self.folder
        self._look_at_store()
        self._stack.enter_context(self._sender)  # the last to close: its rows may take a while
        exchange.run_on_main_and_broadcast(
            "lock", lambda: self._stack.enter_context(folder_lock(folder))
        )
        self._checkpoints = self._stack.enter_context(
            Checkpoints(folder, keep=config.checkpoint.keep)
        )
        if fresh:
            self.checkpoints.delete_all()
        newest = self.checkpoints.newest(self._load)
        if newest is None:
            self._state = init_state(
                config.sae,
                d_model=self._meta["d_model"],
                seed=config.train.seed,
                mesh=self._mesh,
                momentum=config.train.has_momentum,
            )
        else:
            self.done, self._state = newest
            if self.at_work:
                logger.info("%s: going on from the checkpoint at step %d", folder, self.done)
        exchange.run_on_main_and_broadcast("config", lambda: write_config(config, folder))
        if not self.at_work:
            logger.info("%s is trained already: %d steps", folder, self.done)
            rows = read_metrics(folder)
            self.step_log.last_row = rows[-1] if rows else {}
            self.close()

    def _load(self, step: int) -> TrainState:
        earlier = self.checkpoints.read_meta(step)
        refuse_difference(self.config, earlier, store=self._store.identity, folder=self.folder)
        if step < self.steps:
            refuse_precision(
                self.config, earlier, step=step, precision=self._precision, folder=self.folder
            )
            own = self._meta["model_precision"]
            refuse_model_precision(self.config, earlier, precision=own, folder=self.folder)
        abstract = abstract_state(
            self.config.sae,
            d_model=self._meta["d_model"],
            mesh=self._mesh,
            momentum=self.config.train.has_momentum,
        )
        return self.checkpoints.restore(abstract, step=step)

    def prepare(self, batch: Callable[[int], HostBatch]) -> None:
        """Make the state that a new run starts from; `batch` gives whole batches."""
        assert self.done == 0, self.done
        assert self._state is not None
        self._state = prepare_start(self.config, state=self._state, batch=batch, **self.scales)

    def start(self, *, anew: bool) -> None:
        """Open the metrics and write down that training starts."""
        exchange.run_on_main_and_broadcast("metrics", lambda: self._open_log(anew=anew))
        exchange.run_on_main_and_broadcast(
            "start", lambda: record_start(self.folder, step=self.done, from_scratch=anew)
        )

    def _open_log(self, *, anew: bool) -> None:
        train = self.config.train
        log = MetricsLog(self.config.output, from_step=self.done, tensorboard=train.tensorboard)
        self.step_log.log = self._stack.enter_context(log)
        self._sender.start(from_step=self.done, anew=anew)

    def give(self) -> tuple[TrainState, Scheduled]:
        """The state to step from, which the step may consume, and the scalars of the step."""
        assert self._state is not None
        self.step_log.begin()
        return self._state, scheduled(self.config.train, step=self.done)

    def take(self, state: TrainState, metrics: StepMetrics) -> None:
        """The state and the metrics of the step that is now on the devices."""
        self._state = state
        self.done += 1
        self._unread, self._pending = self._pending, (self.done, metrics)

    def judge(self) -> bool:
        """Read the metrics of the step before the last one given; was a row due?

        Only with the next step on the devices: reading waits for them.

        Raises:
            Diverged: they are not finite.
        """
        unread, self._unread = self._unread, None
        return unread is not None and self.step_log.record(*unread)

    def save(self) -> None:
        """Save the state, unless nothing was done since it was saved or restored.

        Raises:
            Diverged: the state isn't finite, and so isn't saved.
        """
        if self._pending is None:
            return
        # Judged before it is saved: a state that isn't finite never reaches a checkpoint.
        pending, self._pending = self._pending, None
        self.step_log.record(*pending)
        self.step_log.flush()
        assert self._state is not None
        self.checkpoints.save(self._state, step=self.done, meta=self._meta)

    def find_thresholds(self, batch: Callable[[int], HostBatch]) -> None:
        """After the last step: what the checkpoint to come says of each latent's threshold.

        Before that checkpoint, so that a run which is trained has them, whenever it was killed.
        """
        assert self.done == self.steps, (self.done, self.steps)
        assert self._state is not None
        threshold_F = latent_thresholds(
            self.config,
            params=self._state.params,
            single=float(self._state.selection_threshold),
            batch=batch,
            input_scale=self._meta["input_scale"],
        )
        self._meta = {**self._meta, THRESHOLDS: as_text(threshold_F)}

    def fail(self, error: Exception) -> None:
        """Take no further part, and leave the reason in the folder if it is a run's."""
        self.failure = str(error)
        self.close()
        if processes.is_main() and (self.folder / FILE_NAME).exists():
            record_failure(self.folder, stage="train", reason=self.failure)

    def close(self) -> None:
        """Return when what was saved is on the disk; give back folder and memory."""
        self._state = None
        self._stack.close()

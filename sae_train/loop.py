"""The training loop: next batch, step, read the previous step's metrics, write, save.

A run is a pure function of its config and its store: the batch of a step depends on the step
number alone, so a checkpoint needs no data state and a resumed run is bit-identical.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from activation_cache import distributed
from activation_cache.errors import Interrupted, UserError
from activation_cache.progress import ProgressMeter
from activation_cache.reader import ActivationReader
from activation_cache.storage import folder_lock
from activation_cache.store import Store, open_store
from activation_cache.taps import Tap
from sae_train.checkpoint import Checkpoints, checkpoint_meta, refuse_difference
from sae_train.config import Config
from sae_train.config_file import write_config
from sae_train.metrics import MetricsLog, read_metrics
from sae_train.prepare import prepare_start
from sae_train.run_folder import record_start
from sae_train.schedule import scheduled
from sae_train.sharding import make_mesh, place_batch, rows_here
from sae_train.state import TrainState, abstract_state, init_state
from sae_train.step import StepMetrics, make_train_step

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: optimiser steps done and the last row of its metrics."""

    folder: Path
    step: int
    metrics: Mapping[str, Any]


@dataclass
class _Clock:
    """Splits the time since the last logged step into waiting for input and all else."""

    start: float = field(default_factory=time.monotonic)
    waited: float = 0.0
    steps: int = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        before = time.monotonic()
        yield
        self.waited += time.monotonic() - before

    def lap(self, batch_size: int) -> dict[str, float]:
        elapsed = max(time.monotonic() - self.start, 1e-9)
        rates = {
            "tokens_per_second": round(self.steps * batch_size / elapsed, 1),
            "input_wait_fraction": round(self.waited / elapsed, 4),
        }
        self.start, self.waited, self.steps = time.monotonic(), 0.0, 0
        return rates


@dataclass
class _Journal:
    """Judges every step's metrics, in every process, and in the main one writes those due."""

    config: Config
    log: MetricsLog | None = None
    meter: ProgressMeter | None = None
    last_finite: tuple[int, StepMetrics] | None = None
    last_row: Mapping[str, Any] = field(default_factory=dict)
    clock: _Clock = field(default_factory=_Clock)

    def record(self, step: int, metrics: StepMetrics) -> None:
        """Take the metrics of the step that made `step` steps done; waits for the device.

        Raises:
            UserError: they are not finite.
        """
        if not bool(metrics.finite):
            raise UserError(self._diverged(step, metrics))
        self.last_finite = (step, metrics)
        self.clock.steps += 1
        train = self.config.train
        if step % train.log_every_steps and step != train.steps:
            return
        row = self._row(step, metrics) | self.clock.lap(train.batch_size)
        self.last_row = row
        if self.log is None or self.meter is None:
            return
        self.log.write(row)
        self.meter.update(
            step * train.batch_size,
            note=f"step {step}/{train.steps} loss {row['loss']:.4f} "
            f"L0 {row['l0']:.1f} FVU {row['fvu']:.3f}",
        )

    def flush(self) -> None:
        """Return when every row is on the disk."""
        if self.log is not None:
            self.log.flush()

    def _row(self, step: int, metrics: StepMetrics) -> dict[str, Any]:
        scalars = scheduled(self.config.train, step=step - 1)
        return {
            "step": step,
            "tokens": step * self.config.train.batch_size,
            "loss": float(metrics.loss),
            "mse": float(metrics.mse),
            "fvu": float(metrics.fvu),
            "l0": float(metrics.l0),
            "dead_fraction": float(metrics.dead_fraction),
            "threshold_mean": float(metrics.threshold_mean),
            "gradient_norm": float(metrics.gradient_norm),
            "learning_rate": float(scalars.learning_rate),
            "sparsity_coefficient": float(scalars.sparsity_coefficient),
        }

    def _diverged(self, step: int, metrics: StepMetrics) -> str:
        before = "no step before it was finite"
        if self.last_finite is not None:
            good_step, good = self.last_finite
            row = {name: f"{value:.6g}" for name, value in self._row(good_step, good).items()}
            before = f"the last finite metrics, of step {good_step}, were {row}"
        return (
            f"training stopped at step {step}: its loss ({float(metrics.loss)}) or gradient norm "
            f"({float(metrics.gradient_norm)}) is not finite; {before}. Nothing of this step was "
            "saved. Lower train.learning_rate.peak, set train.gradient_clip, or check the store "
            "with `sae inspect`; then start anew with --fresh or another output."
        )


def train(
    config: Config, *, fresh: bool = False, stop: Callable[[], bool] = lambda: False
) -> TrainResult:
    """Train one SAE, going on from the newest checkpoint of its folder if there is one.

    Args:
        fresh: delete what an earlier run left in the folder and start anew.
        stop: asked before every step; when it says yes the state is saved and the loop left.

    Several processes that have joined (`distributed.join`) train as one: each holds its devices'
    part, all stop at the same step, and only the main one writes config and metrics.

    Raises:
        Interrupted: `stop` said yes; everything is saved.
        UserError: the store is missing or another one, the folder holds another run or is in
            use, the mesh doesn't fit, or the loss stopped being finite.
    """
    folder = Path(config.output)
    store = open_store(config.cache.path)
    store.check_matches(model=config.model, text=config.text, cache=config.cache)
    with ExitStack() as stack:
        distributed.told_by_main("lock", lambda: stack.enter_context(folder_lock(folder)))
        checkpoints = stack.enter_context(Checkpoints(folder, keep=config.checkpoint.keep))
        if fresh:
            checkpoints.delete_all()
        run = _begin(config, store=store, checkpoints=checkpoints)
        distributed.told_by_main("config", lambda: write_config(config, folder))
        if run.done >= config.train.steps:
            logger.info("%s is trained already: %d steps", folder, run.done)
            rows = read_metrics(folder)
            return TrainResult(folder=folder, step=run.done, metrics=rows[-1] if rows else {})
        if run.done == 0:
            run = _prepared(run, store)
        reader = ActivationReader(
            store,
            run.tap,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            start_step=run.done,
            rows=rows_here(run.mesh, batch_size=config.train.batch_size),
        )
        stack.enter_context(reader)
        journal = _Journal(config)
        distributed.told_by_main("metrics", lambda: _open_log(journal, stack, done=run.done))
        distributed.told_by_main("start", lambda: record_start(folder, step=run.done, anew=fresh))
        _steps(run, reader=reader, journal=journal, checkpoints=checkpoints, stop=stop)
    distributed.barrier("trained")
    return TrainResult(folder=folder, step=config.train.steps, metrics=journal.last_row)


def _open_log(journal: _Journal, stack: ExitStack, *, done: int) -> None:
    """Open metrics and progress, for as long as the stack stands."""
    config = journal.config
    log = MetricsLog(config.output, from_step=done, tensorboard=config.train.tensorboard)
    meter = ProgressMeter(
        config.name,
        total=config.train.steps * config.train.batch_size,
        unit="tokens",
        initial=done * config.train.batch_size,
    )
    journal.log, journal.meter = stack.enter_context(log), stack.enter_context(meter)


@dataclass(frozen=True)
class _Run:
    """Where a start of a run stands: the state it goes on from and `done` steps behind it."""

    config: Config
    tap: Tap
    mesh: jax.sharding.Mesh
    meta: Mapping[str, Any]
    state: TrainState
    done: int

    @property
    def input_scale(self) -> float:
        """C of x = x_raw / C."""
        return self.meta["input_scale"]


def _begin(config: Config, *, store: Store, checkpoints: Checkpoints) -> _Run:
    """Initialise, or restore the newest checkpoint."""
    tap = Tap(site=config.sae.site, layer=config.sae.layer)
    info = store.tap_info(tap)
    mesh = make_mesh(config.mesh)
    meta = checkpoint_meta(
        config,
        input_scale=float(np.sqrt(info.mean_squared_norm)),
        d_model=info.width,
        store=store.identity,
    )

    def load(step: int) -> TrainState:
        earlier = checkpoints.read_meta(step)
        refuse_difference(config, earlier, store=store.identity, folder=Path(config.output))
        abstract = abstract_state(config.sae, d_model=info.width, mesh=mesh)
        return checkpoints.restore(abstract, step=step)

    newest = checkpoints.newest(load, drop_damaged=True)
    if newest is None:
        state = init_state(config.sae, d_model=info.width, seed=config.train.seed, mesh=mesh)
        return _Run(config=config, tap=tap, mesh=mesh, meta=meta, state=state, done=0)
    done, state = newest
    logger.info("%s: going on from the checkpoint at step %d", config.output, done)
    return _Run(config=config, tap=tap, mesh=mesh, meta=meta, state=state, done=done)


def _prepared(run: _Run, store: Store) -> _Run:
    """The run with the state it starts from; every process looks at the same whole batches."""
    train = run.config.train
    with ActivationReader(
        store, run.tap, batch_size=train.batch_size, seed=train.seed, read_ahead=1
    ) as whole:
        state = prepare_start(
            run.config, state=run.state, batch=whole.batch, input_scale=run.input_scale
        )
    return dataclasses.replace(run, state=state)


def _steps(
    run: _Run,
    *,
    reader: ActivationReader,
    journal: _Journal,
    checkpoints: Checkpoints,
    stop: Callable[[], bool],
) -> None:
    """The loop: save if due, next batch, step, read the metrics of the step before."""
    config, state, batch_size = run.config, run.state, run.config.train.batch_size
    train_step = make_train_step(config, input_scale=run.input_scale, mesh=run.mesh)
    span = rows_here(run.mesh, batch_size=batch_size)
    pending: tuple[int, StepMetrics] | None = None
    for step in range(run.done, config.train.steps):
        stopping = distributed.agree_to_stop(stop)
        if pending and (stopping or step % config.checkpoint.every_steps == 0):
            # Judged before it is saved: a state that isn't finite never reaches a checkpoint.
            journal.record(*pending)
            pending = None
            journal.flush()
            checkpoints.save(state, step=step, meta=run.meta)
        if stopping:
            checkpoints.wait()
            raise Interrupted(
                f"{config.output}: stopped by a signal at step {step} of {config.train.steps}; "
                "everything is saved, the same command goes on"
            )
        with journal.clock.waiting():
            rows_BD = reader.batch(step)
        batch_BD = place_batch(rows_BD, mesh=run.mesh, batch_size=batch_size, span=span)
        state, metrics = train_step(state, batch_BD, scheduled(config.train, step=step))
        if pending:
            # Only now, with the next step dispatched: reading waits for the device.
            journal.record(*pending)
        pending = (step + 1, metrics)
    if pending:
        journal.record(*pending)
    journal.flush()
    checkpoints.save(state, step=config.train.steps, meta=run.meta)

"""A run's step log: every step's metrics checked, those that are due written to metrics.jsonl."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from activation_cache.runtime.errors import UserError
from sae_train.config.run import Config
from sae_train.runs.metrics_file import MetricsLog
from sae_train.step.schedule import scheduled
from sae_train.train.train_step import StepMetrics


class Diverged(UserError):
    """The loss of a run stopped being finite; the runs beside it can go on."""


@dataclass
class InputClock:
    """The seconds that the runs of a cohort have waited together for their input."""

    waited: float = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time that the block takes."""
        before = time.monotonic()
        yield
        self.waited += time.monotonic() - before


@dataclass
class _Lap:
    """The clocks when a run's last row was written, and its steps since."""

    start: float
    waited: float
    steps: int = 0


@dataclass
class StepLog:
    """Checks every step's metrics, in every process; the process with a `log` writes those due."""

    config: Config
    clock: InputClock
    log: MetricsLog | None = None
    last_finite: tuple[int, StepMetrics] | None = None
    last_row: Mapping[str, Any] = field(default_factory=dict)
    _lap: _Lap | None = None

    def begin(self) -> None:
        """The run's first step of this process begins: rates count from here."""
        if self._lap is None:
            self._lap = _Lap(start=time.monotonic(), waited=self.clock.waited)

    def record(self, step: int, metrics: StepMetrics) -> bool:
        """Take the metrics of the step that made `step` steps done; waits for the device.

        Returns:
            Was a row due?

        Raises:
            Diverged: they are not finite.
        """
        if not bool(metrics.finite):
            raise Diverged(self._diverged(step, metrics))
        assert self._lap is not None, "begin() comes first"
        self.last_finite = (step, metrics)
        self._lap.steps += 1
        train = self.config.train
        if step % train.log_every_steps and step != train.steps:
            return False
        self.last_row = self._row(step, metrics) | self._rates(self._lap)
        if self.log is not None:
            self.log.write(self.last_row)
        return True

    def flush(self) -> None:
        """Return when every row is on the disk."""
        if self.log is not None:
            self.log.flush()

    def _rates(self, lap: _Lap) -> dict[str, float]:
        """The run's own pace since its last row; the wait is the whole cohort's."""
        now, waited = time.monotonic(), self.clock.waited
        elapsed = max(now - lap.start, 1e-9)
        self._lap = _Lap(start=now, waited=waited)
        return {
            "tokens_per_second": round(lap.steps * self.config.train.batch_size / elapsed, 1),
            "input_wait_fraction": round((waited - lap.waited) / elapsed, 4),
        }

    def _row(self, step: int, metrics: StepMetrics) -> dict[str, Any]:
        measured = {name: value.item() for name, value in vars(metrics).items() if name != "finite"}
        scalars = scheduled(self.config.train, step=step - 1)
        tokens = step * self.config.train.batch_size
        rate = {"learning_rate": scalars.learning_rate.item()}
        return {"step": step, "tokens": tokens} | measured | rate

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

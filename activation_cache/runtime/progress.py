"""Progress of long work: a bar on a terminal, a line every 15 s in a log."""

from __future__ import annotations

import logging
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

LOG_INTERVAL_SECONDS = 15.0


def _amount(value: int | float) -> str:
    """1234567 -> '1.23M'."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def _duration(seconds: int | float) -> str:
    whole = int(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s"


class ProgressMeter:
    """Counts `unit`s towards `total`, showing rate and time left.

    On a terminal it draws a bar; elsewhere it logs a line every `LOG_INTERVAL_SECONDS`. `initial`
    is what an earlier run has done, which counts for the bar and not for the rate. `total` is None
    if it isn't known, as with a stream of text.
    """

    def __init__(self, label: str, *, total: int | None, unit: str, initial: int = 0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self.initial = initial
        self.start = self._last_line = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> ProgressMeter:
        console = Console(file=sys.stderr)
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}% {task.fields[rate]} {task.fields[note]}"),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console, refresh_per_second=4)
            self._task = self._bar.add_task(
                self.label, total=self.total, completed=self.done, rate="", note=""
            )
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._log("")

    @property
    def rate(self) -> float:
        """Units per second since this meter was made."""
        return (self.done - self.initial) / max(time.monotonic() - self.start, 1e-9)

    def update(self, done: int, *, note: str = "") -> None:
        """Set the number of units done; `note` is shown beside the rate (a loss, an L0)."""
        self.done = done
        if self._bar is not None:
            self._bar.update(
                self._task, completed=done, rate=f"{_amount(self.rate)} {self.unit}/s", note=note
            )
        elif time.monotonic() - self._last_line >= LOG_INTERVAL_SECONDS:
            self._last_line = time.monotonic()
            self._log(note)

    def _log(self, note: str) -> None:
        done, eta = _amount(self.done), ""
        if self.total is not None:
            percent = 100 * self.done / max(self.total, 1)
            done = f"{percent:3.0f}% {done}/{_amount(self.total)}"
            left = _duration((self.total - self.done) / self.rate) if self.rate > 0 else "unknown"
            eta = f", eta {left}"
        rate = f"{_amount(self.rate)} {self.unit}/s"
        note = f", {note}" if note else ""
        logger.info("%s %s %s, %s%s%s", self.label, done, self.unit, rate, eta, note)

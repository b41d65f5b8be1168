"""Waiting for other processes: it is said for whom, once it takes long."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger(__name__)

TELL_SECONDS = 10.0


class Waiting:
    """One wait. `tell` is called again and again while it lasts.

    Args:
        whom: for whom or what, as in "waiting for {whom}".
        remedy: what to do if they don't come.
        level: of the log lines, after 10, 20, 40, ... seconds.
    """

    def __init__(self, whom: str, *, remedy: str = "", level: int = logging.INFO) -> None:
        self.whom, self.remedy, self.level = whom, remedy, level
        self._began, self._next = time.monotonic(), TELL_SECONDS

    @property
    def seconds(self) -> float:
        """How long it has lasted."""
        return time.monotonic() - self._began

    def tell(self) -> None:
        """Say for whom this process waits, if it is time to."""
        if self.seconds >= self._next:
            self._next *= 2
            words = f". {self.remedy}" if self.remedy else ""
            logger.log(self.level, "waiting for %s, %.0f s now%s", self.whom, self.seconds, words)

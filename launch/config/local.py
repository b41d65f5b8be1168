"""The `launch` section: where the stages run, one class per back end, chosen by `on`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from activation_cache.config import Count, NonNegative, PositiveCount, Section


class LocalLaunch(Section):
    """This machine: `processes` processes share a stage's work, and all restart when one dies.

    The count of restarts returns to zero whenever work was saved in between.
    """

    on: Literal["local"] = "local"
    processes: PositiveCount = 1
    restarts: Count = 3
    restart_pause_seconds: NonNegative = 5.0  # before the first restart; doubles with each
    # Within this time the others notice that a process is gone.
    heartbeat_seconds: Annotated[PositiveCount, Field(ge=5)] = 60

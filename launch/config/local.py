"""The `launch` section: where the stages run, one class per back end, told apart by `on`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from activation_cache.config import Count, NonNegative, PositiveCount, Section


class LocalLaunch(Section):
    """This machine: `processes` copies of a stage that share the work, started anew when one dies.

    The number of restarts starts from nothing again whenever a checkpoint was saved in between.
    """

    on: Literal["local"] = "local"
    processes: PositiveCount = 1
    restarts: Count = 3
    restart_pause_seconds: NonNegative = 5.0  # before the first restart; doubles with each
    # A lost process is noticed by the others within this time.
    heartbeat_seconds: Annotated[PositiveCount, Field(ge=5)] = 60

"""The `launch` section: where the stages run, one class per back end, chosen by `on`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from activation_cache.config import NonNegative, PositiveSmallCount, Section, SmallCount


class LocalLaunch(Section):
    """This machine: `processes` processes share a stage's work, and all restart when one dies.

    The count of restarts returns to zero whenever work was saved in between.
    """

    on: Literal["local"] = "local"
    processes: PositiveSmallCount = 1
    restarts: SmallCount = 3
    # Before the first restart; doubles with each.
    restart_pause_seconds: Annotated[NonNegative, Field(le=86_400)] = 5.0
    # Within this time the others notice that a process is gone.
    heartbeat_seconds: Annotated[PositiveSmallCount, Field(ge=5)] = 60

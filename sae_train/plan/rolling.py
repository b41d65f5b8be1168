"""How harvest and training of a rolling store share the hours of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Sides:
    """The two sides of a rolling store.

    Attributes:
        beside: they have devices of their own; else they take turns.
        slower: which of them takes longer: side by side the other one waits for it.
        hours: from the beginning to the end.
        waiting_hours: of them, those in which the trainer waits for rows.
    """

    beside: bool
    slower: Literal["the model", "the trainer"]
    hours: float
    waiting_hours: float


def shared_hours(harvest: float, trained: Sequence[float], *, beside: bool) -> Sides:
    """The hours of cohorts that follow one another.

    Args:
        harvest: of the whole text, which is harvested for each cohort.
        trained: for each cohort the hours of its steps.
    """
    waits = [max(0.0, harvest - own) if beside else harvest for own in trained]
    return Sides(
        beside=beside,
        slower="the model" if harvest * len(trained) > sum(trained) else "the trainer",
        hours=sum(trained) + sum(waits),
        waiting_hours=sum(waits),
    )

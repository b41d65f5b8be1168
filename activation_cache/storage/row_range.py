"""A contiguous run of a store's rows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """`count` consecutive rows of the store from row `start`, all in one block."""

    start: int
    count: int

"""A contiguous run of a store's rows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """`count` consecutive rows of the store, from row `start`; never crosses a block."""

    start: int
    count: int

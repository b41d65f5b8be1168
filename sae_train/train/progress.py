"""One progress line for the runs of a cohort, however many they are."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from activation_cache.runtime import processes
from activation_cache.runtime.progress import ProgressMeter
from sae_train.train.cohort_member import Member


class CohortProgress:
    """Counts the rows of the stream, and shows where the members' last rows lie.

    Only the main process shows anything, until `stack` closes.
    """

    def __init__(self, members: Sequence[Member], *, stack: ExitStack) -> None:
        self._members = list(members)
        self._batch_size = members[0].config.train.batch_size
        left = steps_to_read([(member.done, member.steps) for member in members])
        self._total = max(member.steps for member in members)
        self._read = self._total - left
        self._shown: dict[int, Any] = {}
        self._meter: ProgressMeter | None = None
        if processes.is_main():
            meter = ProgressMeter(
                label([member.config.name for member in self._members]),
                total=self._total * self._batch_size,
                unit="tokens",
                initial=self._read * self._batch_size,
            )
            self._meter = stack.enter_context(meter)

    def show(self, step: int) -> None:
        """A batch was read, that of the step that makes `step` steps done."""
        self._read += 1
        if self._meter is None:
            return
        rows = {id(one): one.step_log.last_row for one in self._members if one.step_log.last_row}
        if rows != self._shown:
            self._shown = rows
            self._meter.update(self._read * self._batch_size, note=self._note(step))

    def _note(self, step: int) -> str:
        rows = [one.step_log.last_row for one in self._members if one.step_log.last_row]
        if len(self._members) == 1:
            (row,) = rows
            return (
                f"step {row['step']}/{self._members[0].steps} loss {row['loss']:.4f} "
                f"L0 {row['l0']:.1f} FVU {row['fvu']:.3f}"
            )
        at_work = sum(member.at_work for member in self._members)
        failed = sum(member.failure is not None for member in self._members)
        return (
            f"step {step}/{self._total} {at_work} of {len(self._members)} runs"
            f"{f' ({failed} failed)' if failed else ''} "
            f"L0 {_range(rows, 'l0', '.1f')} FVU {_range(rows, 'fvu', '.3f')}"
        )


def _range(rows: Sequence[Any], key: str, form: str) -> str:
    low, high = min(row[key] for row in rows), max(row[key] for row in rows)
    return f"{low:{form}} to {high:{form}}"


def label(names: Sequence[str]) -> str:
    """What the names of runs have in common, without the number they differ in."""
    if len(names) == 1:
        return names[0]
    alike = itertools.takewhile(lambda letters: len({*letters}) == 1, zip(*names, strict=False))
    common = "".join(letters[0] for letters in alike)
    return re.sub(r"[-_.+0-9]+$", "", common) or names[0]


def steps_to_read(spans: Sequence[tuple[int, int]]) -> int:
    """How many steps lie in at least one of the spans (first, end)."""
    total = reached = 0
    for first, end in sorted(spans):
        total += max(0, end - max(first, reached))
        reached = max(reached, end)
    return total

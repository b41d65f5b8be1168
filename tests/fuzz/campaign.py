"""Many inputs of many kinds, and the failures among them, one of each sort."""

from __future__ import annotations

import logging
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.fuzz import configs, faults, models, runs, saes, stores, texts
from tests.fuzz.outcome import Input, Outcome, run
from tests.fuzz.values import Random
from tests.fuzz.world import World

logger = logging.getLogger("fuzz")


@dataclass(frozen=True)
class Kind:
    """A way to break things; `share` of a hundred inputs are of it."""

    make: Callable[[Random, World], Input]
    share: int


KINDS = {
    "config": Kind(configs.broken_config, 18),
    "override": Kind(configs.broken_overrides, 10),
    "stage": Kind(configs.stage_overrides, 9),
    "model": Kind(models.broken_model, 15),
    "store": Kind(stores.broken_store, 9),
    "run": Kind(runs.broken_run, 14),
    "checkpoint": Kind(runs.broken_checkpoint, 5),
    "sae": Kind(saes.broken_sae, 9),
    "text": Kind(texts.broken_text, 6),
    "fault": Kind(faults.failing_file_system, 5),
}


@dataclass(frozen=True)
class Failure:
    """An input that ended wrongly."""

    kind: str
    number: int
    given: Input
    outcome: Outcome

    @property
    def sort(self) -> tuple[str, ...]:
        """Failures of one sort are most likely one fault."""
        what = self.outcome.wrong.partition(":")[0]
        return (what, self.outcome.place) if self.outcome.place else (what, self.given.words[0])


@dataclass
class Findings:
    """What a campaign found: inputs by kind, exit statuses, and failures by sort."""

    inputs: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int | None] = field(default_factory=Counter)
    failures: dict[tuple[str, ...], list[Failure]] = field(default_factory=dict)
    seconds: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, number: int, given: Input, outcome: Outcome) -> None:
        """Count an input."""
        self.inputs[kind] += 1
        self.statuses[outcome.status] += 1
        if outcome.wrong:
            failure = Failure(kind, number, given, outcome)
            self.failures.setdefault(failure.sort, []).append(failure)


def make(kind: str, number: int, *, seed: int, world: World) -> Input:
    """The input of a kind with this number; nothing else decides what it is."""
    own = sum(ord(letter) << 8 * place for place, letter in enumerate(kind))
    return KINDS[kind].make(np.random.default_rng([seed, own, number]), world)


def plan(inputs: int, kinds: Sequence[str], *, first: int = 0) -> Iterator[tuple[str, int]]:
    """Kind and number of so many inputs, the kinds mixed as their shares say."""
    done = dict.fromkeys(kinds, 0)
    for _ in range(inputs):
        kind = min(kinds, key=lambda one: (done[one] + 1) / KINDS[one].share)
        yield kind, first + done[kind]
        done[kind] += 1


def campaign(
    world: World, *, inputs: int, seed: int, kinds: Sequence[str] = tuple(KINDS), first: int = 0,
    until: float = float("inf"),
) -> Findings:  # fmt: skip
    """Run so many inputs, or as many as fit until a time of the monotonic clock."""
    found = Findings()
    for kind, number in plan(inputs, kinds, first=first):
        begun = time.monotonic()
        if begun > until:
            break
        given = make(kind, number, seed=seed, world=world)
        outcome = run(given, world)
        found.add(kind, number, given, outcome)
        found.seconds[kind] += time.monotonic() - begun  # type: ignore[assignment]
        if sum(found.inputs.values()) % 500 == 0:
            logger.info("%d inputs, %d sorts of failures", sum(found.inputs.values()),
                        len(found.failures))  # fmt: skip
    return found


def described(failure: Failure, *, seed: int, folder: Path | None = None) -> str:
    """What went wrong, with the command that makes the input again; its files into `folder`."""
    again = f"make fuzz KINDS={failure.kind} FIRST={failure.number} N=1 SEED={seed}"
    words = shlex.join(("sae", *failure.given.words))
    lines = [f"{failure.outcome.wrong}", f"  at {failure.outcome.place}", f"  again: {again}",
             f"  words: {words[:600]}", f"  fault: {failure.given.fault}"]  # fmt: skip
    if folder is not None:
        own = folder / f"{failure.kind}-{seed}-{failure.number}"
        for name, data in failure.given.changes.items():
            path = own / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data or b"")
        own.mkdir(parents=True, exist_ok=True)
        (own / "words.txt").write_text(words + "\n", encoding="utf-8", errors="backslashreplace")
        (own / "printed.txt").write_text(
            failure.outcome.printed, encoding="utf-8", errors="backslashreplace"
        )
        lines.append(f"  files: {own}")
    return "\n".join(lines)

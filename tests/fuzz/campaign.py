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
from tests.fuzz.replay import save
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
    seconds: dict[str, float] = field(default_factory=dict)

    def add(
        self, kind: str, number: int, given: Input, outcome: Outcome, *, seconds: float
    ) -> None:
        """Count an input."""
        self.inputs[kind] += 1
        self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds
        self.statuses[outcome.status] += 1
        if outcome.wrong:
            failure = Failure(kind, number, given, outcome)
            self.failures.setdefault(failure.sort, []).append(failure)
            if len(self.failures[failure.sort]) == 1:
                logger.info("%s %d: %s", kind, number, outcome.wrong[:200])


def make(kind: str, number: int, *, seed: int, world: World) -> Input:
    """The input of a kind with this number; nothing else decides what it is."""
    own = sum(ord(letter) << 8 * place for place, letter in enumerate(kind))
    return KINDS[kind].make(np.random.default_rng([seed, own, number]), world)


def plan(inputs: int, kinds: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Kind and number of so many inputs, the kinds mixed as their shares say."""
    done = dict.fromkeys(kinds, 0)
    for _ in range(inputs):
        kind = min(kinds, key=lambda one: (done[one] + 1) / KINDS[one].share)
        yield kind, done[kind]
        done[kind] += 1


def campaign(
    world: World, *, inputs: int, seed: int, kinds: Sequence[str], until: float
) -> Findings:
    """Run so many inputs, or as many as fit until a time of the monotonic clock."""
    found = Findings()
    for kind, number in plan(inputs, kinds):
        begun = time.monotonic()
        if begun > until:
            break
        given = make(kind, number, seed=seed, world=world)
        outcome = run(given, world)
        found.add(kind, number, given, outcome, seconds=time.monotonic() - begun)
        if found.inputs.total() % 500 == 0:
            logger.info(
                "%d inputs, %d sorts of failures", found.inputs.total(), len(found.failures)
            )
    return found


def described(failures: Sequence[Failure], *, seed: int, folder: Path) -> str:
    """What goes wrong, how often, and how to see the first of them again; its files in `folder`."""
    first = failures[0]
    own = folder / f"{first.kind}-{seed}-{first.number}"
    save(first.given, first.outcome, own)
    words = shlex.join(("sae", *first.given.words))
    lines = [f"{len(failures)} x {first.outcome.wrong}", f"  words: {words[:600]}"]
    if first.outcome.place:
        lines.append(f"  at {first.outcome.place}")
    if first.given.fault is not None:
        lines.append(f"  file system: {first.given.fault}")
    return "\n".join([*lines, f"  again: make fuzz REPLAY={own}"])

"""The order of runs: settings are searched on one tap, then all taps, texts and L0s by seeds."""

from __future__ import annotations

import itertools
import json
import logging
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.measure import HeldOut
from benchmarks.quality.methods import MIDDLE, Method
from benchmarks.quality.results import Phase, Record, Results, Settings
from benchmarks.quality.stores import TAPS, Rows, harvested

logger = logging.getLogger("quality")

TARGETS = (20, 50, 100)
ROUNDS = ((20, 50), (100,))  # of a seed: the highest L0 comes when all taps have the others
# FVU falls about as L0 to this power. Only the choice of settings, whose runs differ a little in
# L0, leans on it.
SLOPE = 0.4
NEAR, FAR = 1.5, 1e6


def worth(record: Record) -> float:
    """What settings are chosen by: the geometric mean of FVU and delta loss, as at `MIDDLE`.

    Both count alike, so that nobody is chosen by the one and judged by the other. An L0 far off is
    worse than all others, the further the worse, and no number is no choice.
    """
    score = record.score
    both = score.fvu * score.delta_loss
    if not (math.isfinite(both) and both > 0 and score.l0 > 0):
        return math.inf
    distance = abs(math.log(score.l0 / MIDDLE))
    far = FAR * distance if distance > math.log(NEAR) else 0.0
    return far + math.sqrt(both) * (score.l0 / MIDDLE) ** SLOPE


def chosen(results: Results, trainer: str) -> Settings | None:
    """The best settings of a trainer's search so far; None before it began."""
    tried = results.of(phase="search", trainer=trainer)
    return min(tried, key=worth).settings if tried else None


def table_records(results: Results, trainer: str) -> list[Record]:
    """A trainer's SAEs with the settings that were chosen, those of its search included."""
    return results.of(trainer=trainer, settings=chosen(results, trainer))


class Study:
    """A folder of stores, SAEs and results, which goes on where it was left."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.results = folder, Results(folder)
        self._held_out: dict[str, HeldOut] = {}
        self._rows: Rows | None = None

    def run(
        self, methods: Sequence[Method], seeds: Sequence[int], taps: Sequence[tuple[str, str]]
    ) -> None:
        """Train and measure what isn't there: by seeds, rounds, taps and trainers."""
        for seed, targets, (site, text) in itertools.product(seeds, ROUNDS, taps):
            for method in methods:
                self.search(method)
                self._cells(method, site, text, seed, targets)

    def search(self, method: Method) -> None:
        """One change after the other, kept if better, at the middle L0 of the first tap."""
        done = self.results.of(phase="search", trainer=method.name)
        for number, change in enumerate(({}, *method.trials)):
            if number < len(done):
                continue
            best = chosen(self.results, method.name) or method.start
            settings = _plain({**best, **change})
            self._train(method, *TAPS[0], settings, (MIDDLE,), seed=0, phase="search")

    def _cells(
        self, method: Method, site: str, text: str, seed: int, targets: Sequence[int]
    ) -> None:
        """Some targets of a trainer on a tap, ours as one cohort."""
        settings = chosen(self.results, method.name)
        assert settings is not None
        own = {"trainer": method.name, "site": site, "text": text, "seed": seed}
        done = {record.target for record in self.results.of(**own, settings=settings)}
        waiting = [target for target in targets if target not in done]
        together = len(TARGETS) if method.make is None else 1
        for at in range(0, len(waiting), together):
            some = waiting[at : at + together]
            self._train(method, site, text, settings, some, seed=seed, phase="grid")

    def _train(
        self,
        method: Method,
        site: str,
        text: str,
        settings: Settings,
        targets: Sequence[int],
        *,
        seed: int,
        phase: Phase,
    ) -> None:
        rows = self._rows_of(site, text)
        aims = [_plain(method.aim(target)) for target in targets]
        runs, start = self.folder / "runs", time.process_time()
        saes = method.train(rows, settings, aims, seed=seed, folder=runs)
        seconds = (time.process_time() - start) / len(saes)
        shutil.rmtree(runs, ignore_errors=True)
        for target, aim, sae in zip(targets, aims, saes, strict=True):
            score = self._held_out_of(text, rows).score(sae, rows)
            record = Record(
                phase, method.name, site, text, seed, target, settings, aim, score, seconds
            )
            self.results.add(record, sae)
            logger.info("%s, %s, %s, seed %d, %s, %s", method.name, site, text, seed, settings, aim)
            logger.info("    %.0f s, %s", seconds, score)

    def _rows_of(self, site: str, text: str) -> Rows:
        if self._rows is None or (self._rows.site, self._rows.text) != (site, text):
            self._rows = harvested(site, text, self.folder)
        return self._rows

    def _held_out_of(self, text: str, rows: Rows) -> HeldOut:
        if text not in self._held_out:
            self._held_out[text] = HeldOut(rows)
            logger.info("%s: the model's own loss is %.4f", text, self._held_out[text].base)
        return self._held_out[text]


def _plain(settings: Settings) -> Settings:
    """As it is read back from results.jsonl."""
    plain: Settings = json.loads(json.dumps(dict(settings)))
    return plain

"""Which settings suit which budget: the runs behind the formulas of `train.recipe`.

    python -m launch.demo demo-data                  # model and text
    python -m benchmarks.recipe runs/recipe          # all parts, in their order
    python -m benchmarks.recipe runs/recipe --parts rate bandwidth

Two stores (the demo's text at layer 5, Python's standard library at layer 12, of Gemma 3 270M),
`match_l0`. Every part varies one setting or two around a common one; FVU is of 24 held-out
sequences, brought to the target L0 by FVU falling as L0 to the power -0.4. The folder keeps
results.jsonl, and what is there isn't trained again.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.precision.quality import base_config
from benchmarks.recipe.runs import Cell, Score, Study
from benchmarks.support.measure import markdown, prepare
from launch.processes.compile_cache import keep_programs

SLOPE = 0.4
STORES = ("python", "demo")
RATE, BANDWIDTH, INIT = "train.learning_rate.peak", "sae.bandwidth", "sae.threshold.init"
CLIP, WHITENING, REVIVE = "train.gradient_clip", "sae.whitening", "sae.revive_coefficient"


def _each(cell: Cell, key: str, values: Iterable[Any]) -> list[Cell]:
    return [replace(cell, settings={**cell.settings, key: value}) for value in values]


def _on_both(cells: Sequence[Cell]) -> list[Cell]:
    return [replace(cell, store=store) for store in STORES for cell in cells]


def _rates(*, steps: int, rates: Sequence[float], **size: Any) -> list[Cell]:
    return _each(Cell("python", steps=steps, **size), RATE, rates)


def _whitened(store: str, target: int, pairs: Sequence[tuple[float, float]]) -> list[Cell]:
    return [
        Cell(store, target=target, settings={RATE: 3e-3, WHITENING: p, REVIVE: c}) for p, c in pairs
    ]


BASE = Cell("python", settings={RATE: 3e-3})
PARTS: dict[str, list[Cell]] = {
    "rate": _on_both(_rates(steps=600, rates=(3e-3, 1.5e-3, 6e-3))),
    "whitening": [
        *_whitened("python", 20, ((0.25, 0.0), (0.25, 1.0), (0.5, 1.0))),
        *_whitened("python", 50, ((0.25, 1.0), (0.5, 1.0))),
        *_whitened("demo", 50, ((0.25, 1.0), (0.5, 1.0))),
    ],
    "bandwidth": _on_both(_each(BASE, BANDWIDTH, (0.003, 0.03))),
    "rate_300": _on_both(_rates(steps=300, rates=(4.2e-3, 2.1e-3, 8.4e-3))),
    "clip": _on_both(_each(BASE, CLIP, (None, 1.0))),
    "rate_1200": _on_both(_rates(steps=1200, rates=(2.1e-3, 1.05e-3, 4.2e-3))),
    "rows": _rates(steps=600, rates=(3e-3, 1.5e-3, 6e-3), rows=512),
    "widths": [
        *_rates(steps=600, rates=(3e-3, 1.5e-3, 6e-3), width=1024),
        *_rates(steps=600, rates=(3e-3, 1.5e-3, 6e-3), width=4096),
    ],
    "seeds": _on_both([replace(BASE, seed=1)]),
    "start": _each(BASE, INIT, (0.003, 0.03)),
    "rate_2400": _rates(steps=2400, rates=(1.5e-3, 0.75e-3, 3e-3)),
}


def table(cells: Sequence[Cell], scores: dict[str, Score]) -> str:
    """A line for each cell, in the order of the part."""
    head = ["store", "steps", "rows", "width", "seed", "settings", "L0", "FVU", "FVU at target L0"]
    head += ["without outlying rows", "delta loss", "alive", "CPU s"]
    lines = []
    for cell in cells:
        one = scores[cell.key]
        equal = (one.l0 / cell.target) ** SLOPE
        own = ", ".join(f"{key.split('.')[-1]} {value}" for key, value in cell.settings.items())
        line = [cell.store, str(cell.steps), str(cell.rows), str(cell.width), str(cell.seed), own]
        line += [f"{one.l0:.1f}", f"{one.fvu:.4f}", f"{one.fvu * equal:.4f}"]
        line += [f"{one.typical_fvu * equal:.4f}"]
        line += ["-" if one.delta_loss is None else f"{one.delta_loss:.3f}"]
        lines.append([*line, f"{one.alive:.1%}", f"{one.seconds:.0f}"])
    return markdown(head, lines)


def main() -> int:
    """Train and measure what isn't there, and print a table for each part."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="for the numbers; goes on")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--stores", type=Path, help="a folder of benchmarks.precision.quality")
    arguments = parser.parse_args()
    prepare()
    keep_programs()
    logging.getLogger("recipe").setLevel(logging.INFO)
    root = arguments.stores or arguments.folder
    study = Study(arguments.folder, {name: base_config(name, root) for name in STORES})
    for part in arguments.parts:
        found = study.scores(PARTS[part])
        sys.stdout.write(f"{part}\n\n{table(PARTS[part], found)}\n\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

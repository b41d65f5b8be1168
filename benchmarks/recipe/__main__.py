"""Which settings suit which budget: the runs behind the formulas of `train.recipe`.

    python -m launch.demo demo-data                  # model and text
    python -m benchmarks.recipe runs/recipe          # all parts, in their order
    python -m benchmarks.recipe runs/recipe --parts momentum check

Two stores (the demo's text at layer 5, Python's standard library at layer 12, of Gemma 3 270M),
`match_l0`. Every part varies one setting or two around a common one; FVU is of 24 held-out
sequences, brought to the target L0 by FVU falling as L0 to the power -0.4. `check` holds the recipe
against settings searched by hand on three other stores; of one the site's rate was found by. The
folder keeps results.jsonl, and what is there isn't trained again.
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
from sae_train.config.file import load_config, with_values
from sae_train.config.run import Config

SLOPE = 0.4
STORES = ("python", "demo")  # whose runs the formulas were found by
# Text, site and layer for `check`. By rows of the second the rate at its site was found.
OTHERS = {
    "mlp, sotu": ("demo", "mlp_out", 12),
    "att, sotu": ("demo", "attn_out_prelinear", 12),
    "att 5, sotu": ("demo", "attn_out_prelinear", 5),
}
SITES = ("resid_post", "mlp_out", "attn_out_prelinear")
RATE, BANDWIDTH = "train.learning_rate.peak", "sae.bandwidth"
RECIPE = "train.recipe"
WHITENING, REVIVE = "sae.whitening", "sae.revive_coefficient"
BETA1, BIASES = "train.adam.beta1", "train.learning_rate.bias_multiplier"
DECAY = "train.learning_rate.decay_steps"


def base_of(store: str, root: Path, others: Path) -> Config:
    """The demo's config, which has a recipe, at a store's text and tap."""
    text, site, layer = OTHERS.get(store, (store, "resid_post", None))
    at = base_config(text, root)
    own: dict[str, Any] = {
        "text": at.text.model_dump(),
        "cache": at.cache.model_dump(),
        "sae.site": site,
        "sae.layer": at.sae.layer,
        "train.log_every_steps": 50,
        "checkpoint": {"every_steps": 100_000, "keep": 1},
    }
    if store in OTHERS:
        own |= {
            "cache.path": str(others / "stores" / "sotu"),
            "cache.sites": [{"site": one, "layers": [12]} for one in SITES],
            "cache.tokens": 100_000,
            "sae.layer": layer,
        }
    if layer == 5:
        own |= {
            "cache.path": str(root / "att_5" / "store"),
            "cache.sites": [{"site": site, "layers": [layer]}],
        }
    return with_values(load_config("configs/demo.yaml"), own, source="benchmark")


def _each(cell: Cell, key: str, values: Iterable[Any]) -> list[Cell]:
    return [replace(cell, settings={**cell.settings, key: value}) for value in values]


def _rates(*rates: float, stores: Sequence[str] = STORES, **size: Any) -> list[Cell]:
    return [cell for store in stores for cell in _each(Cell(store, **size), RATE, rates)]


def _rates(*rates: float, stores: Sequence[str] = STORES, **size: Any) -> list[Cell]:
    return [cell for store in stores for cell in _each(Cell(store, **size), RATE, rates)]


def _with_momentum(store: str, *changes: dict[str, Any], **size: Any) -> list[Cell]:
    """Around what `short` has: momentum, slow biases, a decay over nine tenths, revival."""
    cell = Cell(store, loss=True, **size)
    own = {BETA1: 0.9, BIASES: 0.04, DECAY: 9 * cell.steps // 10, RATE: 6e-3, REVIVE: 1.0}
    return [replace(cell, settings=own | change) for change in changes]


def _whitened(store: str, target: int, *pairs: tuple[float, float]) -> list[Cell]:
    return [
        Cell(store, target=target, settings={RATE: 2e-3, WHITENING: p, REVIVE: c}) for p, c in pairs
    ]


def _checks(store: str) -> list[Cell]:
    """The recipe, the recipe without what lowers other losses, and settings changed by hand.

    The second is also the middle of the search by hand: its rate is 6e-3, its bandwidth 0.01.
    """
    plain = {RECIPE: "auto", WHITENING: 0.0, REVIVE: 0.0, RATE: 6e-3}
    by_hand = [{RATE: 3e-3}, {RATE: 1.2e-2}, {BANDWIDTH: 0.03}]
    settings = [{RECIPE: "auto"}, plain, *(plain | one for one in by_hand)]
    return [Cell(store, width=1024, settings=own) for own in settings]


PARTS: dict[str, list[Cell]] = {
    "momentum": [
        Cell("python", settings={RATE: 2e-3, REVIVE: 1.0}, loss=True),
        *_with_momentum("python", {}, {RATE: 3e-3}, {RATE: 1.2e-2}, {BETA1: 0.0}),
        *_with_momentum("python", {BIASES: 1.0}, {DECAY: 120}),
        *_with_momentum("python", {WHITENING: 0.25}, {WHITENING: 0.5}),
    ],
    "demo": _with_momentum("demo", {}, {RATE: 3e-3}, {RATE: 1.2e-2}, {WHITENING: 0.25}),
    "steps": [
        *_with_momentum("python", {}, {RATE: 3e-3}, {RATE: 1.2e-2}, width=1024, steps=300),
        *_with_momentum("python", {}, {RATE: 3e-3}, width=1024, steps=1200),
    ],
    "check": [cell for store in OTHERS for cell in _checks(store)],
    # Without momentum.
    "rate": _rates(3e-3, 1.5e-3, 6e-3),
    "rate_300": _rates(2.8e-3, 1.4e-3, 5.6e-3, width=1024, steps=300),
    "whitening": [
        *_whitened("python", 20, (0.25, 0.0), (0.25, 1.0), (0.5, 1.0)),
        *_whitened("python", 50, (0.25, 1.0), (0.0, 0.0)),
    ],
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
    parser.add_argument("--others", type=Path, help="a folder with the stores python and sotu")
    arguments = parser.parse_args()
    prepare()
    keep_programs()
    logging.getLogger("recipe").setLevel(logging.INFO)
    root = arguments.stores or arguments.folder
    others = arguments.others or root / "others"
    bases = {name: base_of(name, root, others) for name in (*STORES, *OTHERS)}
    study = Study(arguments.folder, bases)
    for part in arguments.parts:
        found = study.scores(PARTS[part])
        sys.stdout.write(f"{part}\n\n{table(PARTS[part], found)}\n\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

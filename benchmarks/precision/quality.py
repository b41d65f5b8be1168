"""What products in fewer bits do to an SAE: L0, FVU, delta loss and alive latents by precision.

    python -m launch.demo demo-data                  # model and text
    python -m benchmarks.precision.quality runs/precision

The same runs at float32, bfloat16_3x, tf32 and bfloat16, all on the CPU (`emulation`). The step is
dense, as it is on accelerators. Evaluation stays at float32.

Two stores (the demo's text at layer 5; Python's standard library at layer 12), three sparsities by
`match_l0`, two seeds, which also order the batches: 48 SAEs, about two hours of one core. The
folder keeps stores, runs and results.jsonl; what is there is not done again.

**Equal L0.** `match_l0` ends near its target, not on it. So float32's three SAEs of a seed make a
curve over the logarithm of L0 (FVU in its logarithm too), and another precision's SAE of that seed
is compared with the curve at its own L0; the table has the mean over seeds. The spread is the
standard deviation over seeds, from the SAEs of one seed against the curve of the other at the same
precision, over all targets and precisions of a store. The mean of two differences of two SAEs
scatters by as much if a precision does no more than start the run anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from activation_cache.harvest.harvest import harvest
from activation_cache.precision import Precision
from activation_cache.storage.files import storage_path
from benchmarks.precision.emulation import emulation
from benchmarks.support.measure import markdown, prepare
from sae_train.config.file import load_config, resolved_yaml, with_values
from sae_train.config.run import Config
from sae_train.evaluate.job import Job
from sae_train.evaluate.jobs import Models, jobs_of
from sae_train.evaluate.result import headline
from sae_train.evaluate.text_pass import Pass
from sae_train.runs.folder import newest_checkpoint
from sae_train.train.loop import train_cohort

logger = logging.getLogger("precision")

# In the order in which they train: what the default depends on comes first.
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "tf32", "bfloat16_3x")
TARGETS = (20, 50, 100)
SEEDS = (0, 1)
SEQUENCES, LOSS_SEQUENCES = 24, 4

# 600 steps of 256 rows. The settings are the demo's before it had a recipe.
COMMON = {
    "train.recipe": None,
    "train.learning_rate": {"peak": 1e-3, "warmup_steps": 50, "decay_steps": 120},
    "train.gradient_clip": 0.1,
    "train.dead_after_tokens": 200_000,
    "sae.bandwidth": 0.01,
    "sae.threshold": {"init": 0.01, "parametrisation": "direct"},
    "sae.b_dec_init": "mean",
    "train.step": "dense",
    "train.batch_size": 256,
    "train.tokens": 153_600,
    "train.log_every_steps": 50,
    "checkpoint": {"every_steps": 100_000, "keep": 1},
}
STORES: dict[str, dict[str, Any]] = {
    "demo": {},
    # The learning rate that docs/results.md's search chose for this tap.
    "python": {
        "name": "python",
        "cache.sites": [{"site": "resid_post", "layers": [12]}],
        "cache.tokens": 100_000,
        "sae.layer": 12,
        "train.learning_rate.peak": 3e-3,
    },
}


@dataclass(frozen=True)
class Cell:
    """One SAE of the study."""

    store: str
    precision: Precision
    seed: int
    target: int

    def folder(self, root: Path) -> Path:
        """Its run folder."""
        return root / self.store / self.precision / f"seed_{self.seed}" / f"l0_{self.target}"

    def config(self, base: Config, root: Path) -> Config:
        """Its config, from that of its store."""
        sparsity = {
            "penalty": "match_l0",
            "target": self.target,
            "coefficient": 1e-4,
            "warmup_steps": 100,
        }
        own = {
            "train.seed": self.seed,
            "train.precision": self.precision,
            "train.sparsity": sparsity,
            "output": str(self.folder(root)),
        }
        return with_values(base, own, source="benchmark")


def base_config(store: str, root: Path) -> Config:
    """The config that the SAEs of a store share."""
    own = COMMON | STORES[store] | {"cache.path": str(root / store / "store")}
    if store == "python":
        own |= {"text.source": [str(library_as_text(root / store / "text") / "*.txt")]}
    return with_values(load_config("configs/demo.yaml"), own, source="benchmark")


def library_as_text(folder: Path) -> Path:
    """Python's standard library, its modules as text files."""
    folder.mkdir(parents=True, exist_ok=True)
    for module in Path(os.__file__).parent.glob("*.py"):
        shutil.copy(module, folder / f"{module.stem}.txt")
    return folder


def train(cells: Sequence[Cell], root: Path) -> None:
    """Train what isn't trained, SAEs of one seed and precision as a cohort."""
    for store, of_store in itertools.groupby(cells, key=lambda cell: cell.store):
        base = base_config(store, root)
        harvest(
            model=base.model,
            text=base.text,
            cache=base.cache,
            mesh=base.mesh,
            resolved_config_yaml=resolved_yaml(base),
        )
        alike = itertools.groupby(of_store, key=lambda cell: (cell.precision, cell.seed))
        for (precision, seed), cohort in alike:
            waiting = [cell for cell in cohort if not _is_trained(cell, root, base.train.steps)]
            if waiting:
                logger.info("%s, %s, seed %d", store, precision, seed)
                train_cohort([cell.config(base, root) for cell in waiting])


def _is_trained(cell: Cell, root: Path, steps: int) -> bool:
    return newest_checkpoint(storage_path(cell.folder(root))) == steps


@dataclass(frozen=True)
class Row:
    """What was measured of one SAE on held-out text."""

    cell: Cell
    l0: float
    fvu: float
    delta_loss: float
    alive: float


def read_rows(path: Path) -> list[Row]:
    """The rows that are there."""
    if not path.exists():
        return []
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [Row(**(row | {"cell": Cell(**row["cell"])})) for row in found]


def measure(cells: Sequence[Cell], root: Path) -> list[Row]:
    """Evaluate what isn't measured, the SAEs of a store in one pass of the model; all rows."""
    path = root / "results.jsonl"
    rows = read_rows(path)
    measured = {row.cell for row in rows}
    models = Models(given=None)
    for _, of_store in itertools.groupby(cells, key=lambda cell: cell.store):
        waiting = [cell for cell in of_store if cell not in measured]
        if not waiting:
            continue
        jobs = [_job(cell, root, models) for cell in waiting]
        one = Pass(jobs, models.load(jobs[0]))
        one.run()
        for index, cell in enumerate(waiting):
            row = _row(cell, one, index)
            rows.append(row)
            with path.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
    return rows


def _job(cell: Cell, root: Path, models: Models) -> Job:
    """The evaluation of one SAE: L0, FVU and the loss with its reconstruction, no more."""
    folder = storage_path(cell.folder(root))
    (job,) = jobs_of(folder, settings=None, models=models, stop=lambda: False)
    settings = job.settings.model_copy(
        update={
            "sequences": SEQUENCES,
            "loss_sequences": LOSS_SEQUENCES,
            "importance_sequences": 0,
            "sequences_per_batch": 4,
        }
    )
    return dataclasses.replace(job, settings=settings, compared=True)


def _row(cell: Cell, one: Pass, index: int) -> Row:
    sae = one.saes[index]
    found = headline(
        site=one.sites[one.jobs[index].target],
        sae=sae,
        base=one.base,
        spliced=one.spliced[index, False],
    )
    return Row(
        cell=cell,
        l0=found["l0"],
        fvu=found["fvu"],
        delta_loss=found["delta_loss"],
        alive=float((sae.fired_F > 0).mean()),
    )


def curve_at(rows: Sequence[Row], l0: float) -> tuple[float, float]:
    """(FVU, delta loss) of a curve of SAEs at an L0, straight between its two nearest SAEs."""
    rows = sorted(rows, key=lambda row: row.l0)
    logs = np.log([row.l0 for row in rows])
    right = int(np.clip(np.searchsorted(logs, np.log(l0)), 1, len(rows) - 1))
    share = (np.log(l0) - logs[right - 1]) / (logs[right] - logs[right - 1])
    a, b = rows[right - 1], rows[right]
    fvu = np.exp((1 - share) * np.log(a.fvu) + share * np.log(b.fvu))
    return float(fvu), float((1 - share) * a.delta_loss + share * b.delta_loss)


@dataclass(frozen=True)
class Change:
    """An SAE's FVU, as a ratio less 1, and delta loss against a curve at the same L0."""

    fvu: float
    delta_loss: float


def change(row: Row, curve: Sequence[Row]) -> Change:
    """What an SAE's numbers are above those of a curve of other SAEs at its L0."""
    fvu, delta_loss = curve_at(curve, row.l0)
    return Change(row.fvu / fvu - 1, row.delta_loss - delta_loss)


@dataclass(frozen=True)
class Measured:
    """All SAEs of a store."""

    rows: Sequence[Row]

    def curve(self, precision: Precision, seed: int) -> list[Row]:
        """The SAEs of a precision and a seed, for all targets or fewer."""
        own = precision, seed
        return [row for row in self.rows if (row.cell.precision, row.cell.seed) == own]

    def changes(self, precision: Precision, target: int) -> Change:
        """Of a precision's SAEs against float32's curves of their seeds, mean over seeds."""
        found = [
            change(row, self.curve("float32", seed))
            for seed in SEEDS
            for row in self.curve(precision, seed)
            if row.cell.target == target
        ]
        return Change(
            float(np.mean([one.fvu for one in found])),
            float(np.mean([one.delta_loss for one in found])),
        )

    @property
    def spread(self) -> Change:
        """The standard deviation over seeds: of all precisions that have whole curves."""
        first, second = SEEDS
        found = [
            change(row, curve)
            for precision in PRECISIONS
            if len(curve := self.curve(precision, first)) == len(TARGETS)
            for row in self.curve(precision, second)
        ]
        # The difference of two seeds scatters by the square root of 2 times as much as one.
        return Change(
            float(np.sqrt(np.mean([one.fvu**2 for one in found]) / 2)),
            float(np.sqrt(np.mean([one.delta_loss**2 for one in found]) / 2)),
        )


def table(rows: Sequence[Row]) -> str:
    """The Markdown of docs/numerics.md: means over seeds."""
    head = ["store", "precision", "L0", "FVU", "delta loss", "alive"]
    head += ["FVU at equal L0", "delta loss at equal L0"]
    lines = []
    stores = dict.fromkeys(row.cell.store for row in rows)
    for store, target, precision in itertools.product(stores, TARGETS, get_args(Precision)):
        measured = Measured([row for row in rows if row.cell.store == store])
        own = [
            (row.l0, row.fvu, row.delta_loss, row.alive)
            for row in measured.rows
            if (row.cell.precision, row.cell.target) == (precision, target)
        ]
        if not own:
            continue
        l0, fvu, delta_loss, alive = np.mean(own, axis=0)
        cells = [store, precision, f"{l0:.1f}", f"{fvu:.4f}", f"{delta_loss:.3f}", f"{alive:.1%}"]
        if precision == "float32":
            spread = measured.spread
            cells += [f"spread {spread.fvu:.2%}", f"spread {spread.delta_loss:.3f}"]
        else:
            found = measured.changes(precision, target)
            cells += [f"{found.fvu:+.2%}", f"{found.delta_loss:+.3f}"]
        lines.append(cells)
    return markdown(head, lines)


def main() -> int:
    """Train, measure, print the table of all that was measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="for stores, runs and numbers; they go on")
    parser.add_argument("--stores", nargs="+", choices=list(STORES), default=list(STORES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--targets", nargs="+", type=int, choices=TARGETS, default=TARGETS)
    arguments = parser.parse_args()
    prepare()
    logger.setLevel(logging.INFO)
    cells = [
        Cell(store, precision, seed, target)
        for store in arguments.stores
        for precision in arguments.precisions
        for seed in SEEDS
        for target in arguments.targets
    ]
    with emulation():
        train(cells, arguments.folder)
    sys.stdout.write(table(measure(cells, arguments.folder)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""SAEs of one store that differ in settings: train them, measure them on held-out text, keep that.

A cell is trained from scratch, measured and thrown away; its numbers are a line of results.jsonl,
and a cell that has one isn't trained again. Cells that read the same batches train as one cohort.

Legend: N rows, B sequences, S position, D model width, F latents.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from activation_cache.harvest.harvest import harvest
from activation_cache.language_model.model import conversion_folder, load_model
from activation_cache.store.store import open_store
from benchmarks.loss.__main__ import apply, centred
from benchmarks.loss.text import Text
from sae_train.checkpoint.trained import load_trained
from sae_train.config.file import resolved_yaml, with_values
from sae_train.config.run import Config
from sae_train.inference.fold import fold
from sae_train.inference.sae import Sae
from sae_train.train.loop import train_cohort

logger = logging.getLogger("recipe")

HELD_OUT_SEQUENCES, LOSS_SEQUENCES = 24, 12
ALIVE_ROWS = 20_000
TOGETHER = 5  # SAEs of a cohort


@dataclass(frozen=True)
class Cell:
    """One SAE: its store, budget and size, and the settings that differ from the study's own."""

    store: str
    steps: int = 600
    rows: int = 256
    width: int = 2048
    target: int = 50
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    loss: bool = False  # is delta loss measured too?

    @property
    def key(self) -> str:
        """What it is called in results.jsonl."""
        return json.dumps(asdict(self) | {"loss": False}, sort_keys=True)

    def config(self, base: Config, folder: Path) -> Config:
        """Its config, from that of its store."""
        sparsity = {
            "penalty": "match_l0",
            "target": self.target,
            "coefficient": 1e-4,
            "warmup_steps": self.steps // 6,
        }
        own = {
            "sae.width": self.width,
            "train.batch_size": self.rows,
            "train.tokens": self.rows * self.steps,
            "train.seed": self.seed,
            "train.step": "auto",
            "train.sparsity": sparsity,
            "output": str(folder),
        }
        if "train.recipe" not in self.settings:
            own |= self._by_hand()
        else:
            del sparsity["warmup_steps"]
        return with_values(base, own | dict(self.settings), source="benchmark")

    def _by_hand(self) -> dict[str, Any]:
        """The settings around which the study varies one or two."""
        return {
            "train.recipe": None,
            "sae.whitening": 0.0,
            "sae.revive_coefficient": 0.0,
            "sae.bandwidth": 0.01,
            "sae.threshold": {"init": 0.01, "parametrisation": "direct"},
            "sae.b_dec_init": "mean",
            "train.learning_rate": {
                "peak": 3e-3,
                "warmup_steps": self.steps // 12,
                "decay_steps": self.steps // 5,
            },
            "train.gradient_clip": 0.1,
            "train.dead_after_tokens": self.rows * self.steps // 12,
        }


@dataclass(frozen=True)
class Score:
    """What an SAE does on held-out text.

    Attributes:
        typical_fvu: of rows of at most three times the median norm.
        alive: the share of latents that fire in the store's first rows.
        delta_loss: nats; None where it wasn't measured.
    """

    l0: float
    fvu: float
    typical_fvu: float
    alive: float
    delta_loss: float | None
    seconds: float


class Measure:
    """Held-out rows of a store, kept in a file, and its first rows."""

    def __init__(self, config: Config, *, kept: Path) -> None:
        self.config = config
        store = open_store(config.cache.path)
        if not kept.exists():
            np.save(kept, _held_out_rows(config))
        self.rows_ND = np.load(kept)
        self.first_ND = store.read(config.sae.tap, start=0, stop=ALIVE_ROWS).astype(np.float32)

    @functools.cached_property
    def text(self) -> Text:
        """The same sequences, for delta loss."""
        config = self.config
        store = open_store(config.cache.path)
        model = load_model(config.model, converted=conversion_folder(config.cache.path))
        held_out = store.tokens.held_out[:LOSS_SEQUENCES]
        return Text(model, store, config.sae.tap, sequences=held_out)

    def score(self, sae: Sae, *, loss: bool, seconds: float) -> Score:
        """All numbers of one SAE."""
        decoded_ND, active_N, _ = apply(sae, self.rows_ND)
        _, _, fired_F = apply(sae, self.first_ND)
        delta_loss = None
        if loss:
            decoded = apply(sae, self.text.rows_ND)[0]
            delta_loss = self.text.delta(decoded).mean
        norms_N = np.linalg.norm(self.rows_ND, axis=1)
        usual_N = norms_N < 3 * np.median(norms_N)
        return Score(
            l0=float(active_N.mean()),
            fvu=_fvu(self.rows_ND, decoded_ND),
            typical_fvu=_fvu(self.rows_ND[usual_N], decoded_ND[usual_N]),
            alive=float(fired_F.mean()),
            delta_loss=delta_loss,
            seconds=seconds,
        )


def _harvested(config: Config) -> None:
    harvest(
        model=config.model,
        text=config.text,
        cache=config.cache,
        mesh=config.mesh,
        resolved_config_yaml=resolved_yaml(config),
    )


def _held_out_rows(config: Config) -> Float[np.ndarray, "N D"]:
    store, tap = open_store(config.cache.path), config.sae.tap
    model = load_model(config.model, converted=conversion_folder(config.cache.path))
    held_out = store.tokens.held_out[:HELD_OUT_SEQUENCES]
    tokens_BS = store.tokens.read(held_out)
    parts = [tokens_BS[at : at + 4] for at in range(0, len(tokens_BS), 4)]
    acts = [np.asarray(model.activations(part, (tap,))[tap]) for part in parts]
    usable_BS = store.tokens.usable(tokens_BS, held_out)
    return np.concatenate(acts).astype(np.float32)[usable_BS]


def _fvu(rows_ND: Float[np.ndarray, "N D"], decoded_ND: Float[np.ndarray, "N D"]) -> float:
    error = np.square(decoded_ND - rows_ND).sum(dtype=np.float64)
    return float(error / np.square(centred(rows_ND)).sum(dtype=np.float64))


class Study:
    """A folder with the numbers of all cells, and what trains those that have none."""

    def __init__(self, folder: Path, bases: Mapping[str, Config]) -> None:
        self.folder, self.bases = folder, bases
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "results.jsonl"
        self._measures: dict[str, Measure] = {}
        self.known: dict[str, Score] = {}
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                row = json.loads(line)
                self.known[row["cell"]] = Score(**row["score"])

    def scores(self, cells: Iterable[Cell]) -> dict[str, Score]:
        """The numbers of cells by their keys; those without are trained."""
        cells = list(cells)
        waiting = [cell for cell in cells if not self._is_known(cell)]
        for _, alike in itertools.groupby(waiting, key=_batches):
            group = list(alike)
            for start in range(0, len(group), TOGETHER):
                self._train(group[start : start + TOGETHER])
        return {cell.key: self.known[cell.key] for cell in cells}

    def _is_known(self, cell: Cell) -> bool:
        score = self.known.get(cell.key)
        return score is not None and not (cell.loss and score.delta_loss is None)

    def _train(self, cells: Sequence[Cell]) -> None:
        names = "".join(cell.key for cell in cells)
        place = self.folder / "at_work" / hashlib.sha256(names.encode()).hexdigest()[:12]
        base = self.bases[cells[0].store]
        configs = [cell.config(base, place / str(at)) for at, cell in enumerate(cells)]
        _harvested(base)
        started = time.process_time()
        train_cohort(configs)
        seconds = (time.process_time() - started) / len(cells)
        if cells[0].store not in self._measures:
            kept = self.folder / f"held_out_{cells[0].store}.npy"
            self._measures[cells[0].store] = Measure(base, kept=kept)
        measure = self._measures[cells[0].store]
        for cell, config in zip(cells, configs, strict=True):
            sae = fold(load_trained(Path(config.output)))
            score = measure.score(sae, loss=cell.loss, seconds=seconds)
            self.known[cell.key] = score
            logger.info("%s %s", cell, score)
            with self.path.open("a") as file:
                file.write(json.dumps({"cell": cell.key, "score": asdict(score)}) + "\n")
        shutil.rmtree(place, ignore_errors=True)
        jax.clear_caches()


def _batches(cell: Cell) -> tuple[str, int, int, int, int]:
    return cell.store, cell.steps, cell.rows, cell.width, cell.seed

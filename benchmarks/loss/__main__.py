"""Which part of an SAE's error costs loss, and what training by the loss's own metric gives.

    python -m benchmarks.precision.quality runs/precision --stores python --precisions float32 \
        --targets 50                              # the store, for this and that
    python -m benchmarks.loss runs/precision                        # both tables
    python -m benchmarks.loss runs/precision --beside NAME=PATH     # and another library's SAE

The store is the one of Python's standard library at layer 12 of Gemma 3 270M. Gradients are those
of sequences that were trained on, losses those of held-out ones, the same for all SAEs.

**Where the loss reads.** With g the gradient of the loss at the tap and G = E[g gᵀ], G's
eigenvectors are the directions in which a small change of activations changes the loss most. They
are cut into blocks; of each the table has its share of g's energy, of the activations' variance,
each SAE's error against the activations' variance there, and the delta loss when only that block's
part of the error is put into the model.

**Trained by another metric.** SAEs of one budget that differ in what weighs their error
(`benchmarks.loss.metric`), at equal L0 by `match_l0`, by seeds.

What was trained and measured stays in the folder and isn't done again.

Legend: N rows, D model width.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from activation_cache.gemma.taps import Tap
from activation_cache.language_model.model import conversion_folder, load_model
from activation_cache.store.store import Store, open_store
from benchmarks.loss.metric import Metric, second_moment, train
from benchmarks.loss.text import Text
from benchmarks.precision.quality import base_config
from benchmarks.support.measure import markdown, prepare
from sae_train.config.file import with_values
from sae_train.config.run import Config
from sae_train.inference.read_formats import load_sae
from sae_train.inference.sae import TENSORS, Sae

logger = logging.getLogger("loss")

GRADIENT_SEQUENCES, HELD_OUT_SEQUENCES = 24, 24
BLOCKS = ((0, 30), (30, 100), (100, 300), (300, None))
ALIVE_ROWS = 20_000
BATCH, STEPS, WIDTH = 512, 600, 2048
METRICS = (
    Metric(),
    Metric("loss", 0.9),
    Metric("whitened", 0.25),
    Metric("whitened", 0.5),
)


@dataclass(frozen=True)
class Cell:
    """One SAE of the study."""

    metric: Metric
    target: int
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.metric.kind}_{self.metric.share:g}_l0_{self.target}_seed_{self.seed}"


@dataclass(frozen=True)
class Score:
    """What an SAE does on held-out text."""

    l0: float
    fvu: float
    delta_loss: float
    standard_error: float
    alive: float


class Study:
    """The store, the text, the gradients and the folder of what was trained."""

    def __init__(self, root: Path) -> None:
        self.config: Config = base_config("python", root)
        self.store: Store = open_store(self.config.cache.path)
        self.tap: Tap = self.config.sae.tap
        self.folder = root / "loss"
        self.folder.mkdir(exist_ok=True)
        model = load_model(self.config.model, converted=conversion_folder(self.config.cache.path))
        tokens = self.store.tokens
        held_out = tokens.held_out[:HELD_OUT_SEQUENCES]
        self.text = Text(model, self.store, self.tap, sequences=held_out)
        read = Text(model, self.store, self.tap, sequences=range(GRADIENT_SEQUENCES))
        self.read_ND, self.gradients_ND = read.rows_ND, read.gradients_ND()
        self.rows_ND = self.store.read(self.tap, start=0, stop=self.store.rows).astype(np.float32)

    def sae(self, cell: Cell) -> Sae:
        """The SAE of a cell, trained unless it is there."""
        path = self.folder / f"{cell.name}.npz"
        if not path.exists():
            logger.info("training %s", cell.name)
            typical_ND = typical(self.read_ND)
            root_DD = cell.metric.root(gradients_ND=self.gradients_ND, rows_ND=typical_ND)
            sae = train(config_of(cell, self.config), self.rows_ND, root_DD=root_DD)
            np.savez(path, **{name: getattr(sae, name) for name in TENSORS})
        with np.load(path) as file:
            return Sae(**{name: file[name] for name in TENSORS})

    def error(self, sae: Sae) -> tuple[Float[np.ndarray, "N D"], float]:
        """x̂ - x of the held-out rows, and L0."""
        reconstruction_ND, active_N, _ = apply(sae, self.text.rows_ND)
        return reconstruction_ND - self.text.rows_ND, float(active_N.mean())

    def score(self, sae: Sae) -> Score:
        """L0, FVU, delta loss and, on rows of the store, the share of latents that fire."""
        error_ND, l0 = self.error(sae)
        delta = self.text.delta(self.text.rows_ND + error_ND)
        _, _, fired_F = apply(sae, self.rows_ND[:ALIVE_ROWS])
        spread = np.square(centred(self.text.rows_ND)).sum(dtype=np.float64)
        return Score(
            l0=l0,
            fvu=float(np.square(error_ND).sum(dtype=np.float64) / spread),
            delta_loss=delta.mean,
            standard_error=delta.standard_error,
            alive=float(fired_F.mean()),
        )


def typical(rows_ND: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """The rows without those of more than three times the median norm, which outweigh others."""
    norms_N = np.linalg.norm(rows_ND, axis=1)
    return rows_ND[norms_N < 3 * np.median(norms_N)]


def centred(rows_ND: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """The rows less their mean."""
    return rows_ND - rows_ND.mean(axis=0, keepdims=True, dtype=np.float64).astype(np.float32)


def config_of(cell: Cell, base: Config) -> Config:
    """The config of a cell: the store's with this study's budget."""
    sparsity = {
        "penalty": "match_l0",
        "target": cell.target,
        "coefficient": 1e-4,
        "warmup_steps": 100,
    }
    own = {
        "sae.width": WIDTH,
        "train.step": "auto",
        "train.batch_size": BATCH,
        "train.tokens": BATCH * STEPS,
        "train.seed": cell.seed,
        "train.sparsity": sparsity,
    }
    return with_values(base, own, source="benchmark")


@jax.jit
def _apply(sae: Sae, x_ND: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    latents_NF = sae.encode(x_ND)
    active_NF = latents_NF > 0
    return sae.decode(latents_NF), active_NF.sum(axis=1), active_NF.any(axis=0)


def apply(sae: Sae, rows_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reconstructions, L0 of every row, and which latents fire in any."""
    starts = range(0, len(rows_ND), 2048)
    found = [_apply(sae, rows_ND[start : start + 2048]) for start in starts]
    decoded, active, fired = (
        [np.asarray(one) for one in part] for part in zip(*found, strict=True)
    )
    return np.concatenate(decoded), np.concatenate(active), np.any(fired, axis=0)


def where_the_loss_reads(study: Study, saes: dict[str, Sae]) -> str:
    """Three tables: by eigenvectors of G, by those of the covariance, and each error's length."""
    errors = {name: study.error(sae)[0] for name, sae in saes.items()}
    covariance_DD = np.cov(typical(study.read_ND).astype(np.float64).T)
    of_G = _by_blocks(study, errors, second_moment(study.gradients_ND), alone=True)
    of_C = _by_blocks(study, errors, covariance_DD, alone=False)
    return "\n\n".join([of_G, of_C, _lengths(study, saes)])


def _by_blocks(
    study: Study,
    errors: dict[str, Float[np.ndarray, "N D"]],
    matrix_DD: Float[np.ndarray, "D D"],
    *,
    alone: bool,
) -> str:
    """By blocks of a matrix's eigenvectors; `alone`: with the delta loss of each block's error."""
    vectors_DD = np.linalg.eigh(matrix_DD)[1][:, ::-1].astype(np.float32)
    rows_ND, spread_ND = study.text.rows_ND, centred(typical(study.read_ND))
    head = ["directions", "share of g²", "share of variance"]
    for name in errors:
        head += [f"{name}: error / variance", *(["delta loss of it alone"] if alone else [])]
    lines = []
    for start, stop in BLOCKS:
        block_DK = vectors_DD[:, start:stop]
        line = [f"{start + 1} to {stop or len(vectors_DD)}"]
        for all_ND in (study.gradients_ND, spread_ND):
            line.append(f"{_energy(all_ND, block_DK) / np.square(all_ND).sum():.2%}")
        for error_ND in errors.values():
            part = _energy(error_ND, block_DK) / _energy(centred(rows_ND), block_DK)
            line.append(f"{part:.3f}")
            if alone:
                alone_ND = rows_ND + (error_ND @ block_DK) @ block_DK.T
                line.append(f"{study.text.delta(alone_ND).mean:.3f}")
        lines.append(line)
    return markdown(head, lines)


def _lengths(study: Study, saes: dict[str, Sae]) -> str:
    """Each SAE's scores, what of its error lies along x, and how long its reconstructions are."""
    head = ["SAE", "L0", "FVU", "delta loss", "alive", "error along x", "median length"]
    lines, rows_ND = [], study.text.rows_ND
    lengths_N = np.linalg.norm(rows_ND, axis=1)
    for name, sae in saes.items():
        score, (error_ND, _) = study.score(sae), study.error(sae)
        along = np.square((error_ND * rows_ND).sum(axis=1) / lengths_N).sum()
        length = np.median(np.linalg.norm(rows_ND + error_ND, axis=1) / lengths_N)
        line = [name, f"{score.l0:.1f}", f"{score.fvu:.4f}"]
        line += [f"{score.delta_loss:.3f} ± {score.standard_error:.3f}", f"{score.alive:.1%}"]
        lines.append([*line, f"{along / np.square(error_ND).sum():.1%}", f"{length:.3f}"])
    return markdown(head, lines)


def _energy(rows_ND: np.ndarray, block_DK: np.ndarray) -> float:
    return float(np.square(rows_ND @ block_DK).sum(dtype=np.float64))


def scores(study: Study, cells: Iterable[Cell]) -> dict[Cell, Score]:
    """Of all cells; what is in the folder's scores.jsonl isn't measured again."""
    path = study.folder / "scores.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    known: dict[str, Any] = {}
    for line in lines:
        known |= json.loads(line)
    found = {}
    for cell in cells:
        if cell.name not in known:
            known[cell.name] = asdict(study.score(study.sae(cell)))
            with path.open("a") as file:
                file.write(json.dumps({cell.name: known[cell.name]}) + "\n")
        found[cell] = Score(**known[cell.name])
        logger.info("%s %s", cell.name, found[cell])
    return found


def trained_by_metrics(found: dict[Cell, Score]) -> str:
    """The second table: means over seeds, and the largest distance of a seed from them."""
    head = ["error weighed by", "L0", "FVU", "delta loss", "alive", "seeds"]
    lines = []
    for metric, target in dict.fromkeys((cell.metric, cell.target) for cell in found):
        own = [one for cell, one in found.items() if (cell.metric, cell.target) == (metric, target)]
        values = np.array([[one.l0, one.fvu, one.delta_loss, one.alive] for one in own])
        (l0, fvu, delta, alive), far = (
            values.mean(axis=0),
            np.abs(values - values.mean(axis=0)).max(axis=0),
        )
        line = [
            str(metric),
            f"{l0:.1f}",
            f"{fvu:.4f} ± {far[1]:.4f}",
            f"{delta:.3f} ± {far[2]:.3f}",
        ]
        lines.append([*line, f"{alive:.1%}", str(len(own))])
    return markdown(head, lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and measure what isn't there, and print both tables."""
    parser = argparse.ArgumentParser(prog="benchmarks.loss", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of benchmarks.precision.quality")
    parser.add_argument("--targets", nargs="+", type=int, default=[25, 50, 100])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--metrics", nargs="+", default=[str(one) for one in METRICS])
    parser.add_argument("--beside", nargs="*", default=[], metavar="NAME=PATH")
    chosen = parser.parse_args(arguments)
    prepare()
    logger.setLevel(logging.INFO)
    study = Study(chosen.folder)
    metrics = [one for one in METRICS if str(one) in chosen.metrics]
    cells = [Cell(m, t, s) for m in metrics for t in chosen.targets for s in chosen.seeds]
    found = scores(study, cells)
    sys.stdout.write(trained_by_metrics(found) + "\n\n")
    first = chosen.targets[0], chosen.seeds[0]
    saes = {str(one): study.sae(Cell(one, *first)) for one in (metrics[0], metrics[-1])}
    for name, _, path in (entry.partition("=") for entry in chosen.beside):
        saes[name] = load_sae(path)
        logger.info("%s %s", name, study.score(saes[name]))
    sys.stdout.write(where_the_loss_reads(study, saes) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

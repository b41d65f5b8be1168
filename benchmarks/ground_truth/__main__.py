"""How much of a known truth each recipe finds: SAEs on synthetic activations.

    python -m benchmarks.ground_truth [--beside] --features 512 --d-model 128 --width 256

writes a store of rows made of known features (`benchmarks.ground_truth.synthetic`), trains a cohort
of one SAE per recipe on it, does so for each seed (of features, rows and initial weights alike),
and prints a table: means over the seeds, ± their standard deviation. Each recipe has the one of the
rates that gave the lower FVU at seed 0. With `--beside` other libraries' trainers read the same
batches at the same rates, in an environment with the extra `bench`. With the defaults a recipe
takes 2,000 steps of 1,024 rows; 300 steps of 256 rows find next to nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ground_truth.synthetic import Found, Truth, draw, make_truth, rows_of, score
from sae_train.checkpoint.trained import load_trained
from sae_train.config.run import Config
from sae_train.inference.fold import fold
from sae_train.inference.sae import Sae
from sae_train.train.loop import train_cohort
from tests.support.configs import make_config
from tests.support.stores import make_manifest, write_store

_SCORED_ROWS = 4096  # after those of the store
_BUCKET = 4096
_RATES = (1e-3, 3e-3)
_COLUMNS = ("found", "mcc", "uniqueness", "precision", "recall", "f1", "l0", "true_l0", "fvu")


def recipes(l0: float) -> dict[str, dict[str, Any]]:
    """Each recipe's sections; all aim at the truth's own L0, but the plain penalty."""
    none, k = {"penalty": "none"}, max(1, round(l0))
    return {
        "jumprelu, l0": {"sparsity": {"coefficient": 0.003, "warmup_steps": 100}},
        "jumprelu, match_l0": {
            "sparsity": {"penalty": "match_l0", "target": l0, "warmup_steps": 100}
        },
        "jumprelu, target_l0": {
            "sparsity": {"penalty": "target_l0", "target": l0, "warmup_steps": 100}
        },
        "jumprelu, revived": {
            "sparsity": {"penalty": "match_l0", "target": l0, "warmup_steps": 100},
            "sae": {"revive_coefficient": 1.0},
        },
        "jumprelu, revived, whitened by 0.5": {
            "sparsity": {"penalty": "match_l0", "target": l0, "warmup_steps": 100},
            "sae": {"revive_coefficient": 1.0, "whitening": 0.5},
        },
        "jumprelu, revived, whitened by 0.25, momentum": {
            "sparsity": {"penalty": "match_l0", "target": l0, "warmup_steps": 100},
            "sae": {"revive_coefficient": 1.0, "whitening": 0.25},
            "adam": {"beta1": 0.9},
            "learning_rate": {"bias_multiplier": 0.04, "decay_share": 0.9},
        },
        "topk": {"sparsity": none, "sae": {"architecture": "topk", "k": k}},
        "batch_topk": {"sparsity": none, "sae": {"architecture": "batch_topk", "k": k}},
        "batch_topk, matryoshka": {
            "sparsity": none,
            "sae": {"architecture": "batch_topk", "k": k, "matryoshka": [0.125, 0.25, 0.5]},
        },
    }


Scores = dict[str, float]
RateOf = Callable[[str], float]


def run(sizes: argparse.Namespace, *, seed: int, rate_of: RateOf) -> dict[str, Scores]:
    """Scores of every recipe on one truth, each at its rate."""
    truth = make_truth(features=sizes.features, width=sizes.d_model, seed=seed)
    held = draw(truth, start=sizes.rows, stop=sizes.rows + _SCORED_ROWS)
    x, l0 = rows_of(truth, held), float((held > 0).sum(axis=1).mean())
    saes: dict[str, Sae] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _write(truth, sizes, folder / "store", norm=float(np.square(x).sum(axis=1).mean()))

        def config_of(name: str, own: dict[str, Any]) -> Config:
            return _config(sizes, own, seed, folder, name, rate=rate_of(name))

        configs = {name: config_of(name, own) for name, own in recipes(l0).items()}
        train_cohort(list(configs.values()))
        for name, config in configs.items():
            saes[name] = fold(load_trained(config.output))
        if sizes.beside:
            from benchmarks.ground_truth import theirs

            for name in theirs.THEIRS:
                saes[name] = theirs.train(name, config_of(name, {}), l0=l0)
    return {name: _scores(sae, x, truth, held) for name, sae in saes.items()}


def _scores(sae: Sae, x: np.ndarray, truth: Truth, held: np.ndarray) -> Scores:
    latents = np.asarray(sae.encode(x))
    error = np.square(x - np.asarray(sae.predict(x, latents=latents))).sum()
    fvu = float(error / np.square(x - x.mean(axis=0)).sum())
    found: Found = score(sae.tensors["W_dec"], latents > 0, truth.direction_GD, held > 0)
    return dataclasses.asdict(found) | {"fvu": fvu}


def _write(truth: Truth, sizes: argparse.Namespace, folder: Path, *, norm: float) -> None:
    manifest = make_manifest(
        rows=sizes.rows, width=sizes.d_model, shuffle_rows=_BUCKET, mean_squared_norm=norm
    )

    def rows(start: int, stop: int, width: int, dtype: Any) -> np.ndarray:
        return rows_of(truth, draw(truth, start=start, stop=stop))

    write_store(folder, manifest, make_rows=rows)


def _config(
    sizes: argparse.Namespace,
    own: dict[str, Any],
    seed: int,
    folder: Path,
    name: str,
    *,
    rate: float,
) -> Config:
    learning_rate = own.get("learning_rate", {})
    decay_steps = round(sizes.steps * learning_rate.get("decay_share", 0.2))
    config = make_config(
        width=sizes.width,
        bandwidth=0.05,
        parametrisation="direct",
        threshold_init=0.02,
        batch_size=sizes.batch,
        tokens=sizes.batch * sizes.steps,
        rows=sizes.rows,
        cache_path=str(folder / "store"),
        output=str(folder / name.replace(", ", "-")),
        learning_rate={
            "peak": rate,
            "warmup_steps": 50,
            "decay_steps": decay_steps,
            "bias_multiplier": learning_rate.get("bias_multiplier", 1.0),
        },
        dead_after_tokens=sizes.batch * sizes.steps // 5,
        log_every_steps=100,
        seed=seed,
        checkpoint={"every_steps": sizes.steps},
        **{key: value for key, value in own.items() if key != "learning_rate"},
    )
    values = config.model_dump()
    values["cache"]["shuffle_rows"] = _BUCKET
    values["sae"]["b_dec_init"] = "mean"  # the bias holds a good part of the mean square
    return Config.model_validate(values)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("features", 2048),
        ("d-model", 256),
        ("width", 1024),
        ("rows", 2**18),
        ("batch", 1024),
        ("steps", 2000),
        ("seeds", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--beside", action="store_true", help="other libraries' trainers as well")
    sizes = parser.parse_args()
    tried = {rate: run(sizes, seed=0, rate_of=lambda _, rate=rate: rate) for rate in _RATES}
    rates = {
        name: min(_RATES, key=lambda rate, name=name: tried[rate][name]["fvu"])
        for name in tried[_RATES[0]]
    }
    every = [{name: tried[rate][name] for name, rate in rates.items()}]
    every += [run(sizes, seed=seed, rate_of=rates.__getitem__) for seed in range(1, sizes.seeds)]
    lines = [f"| recipe | rate | {' | '.join(_COLUMNS)} |", "| --- " * (len(_COLUMNS) + 2) + "|"]
    for name in every[0]:
        cells = []
        for column in _COLUMNS:
            values = np.array([one[name][column] for one in every])
            spread = values.std(ddof=1) if len(values) > 1 else 0.0
            digits = 1 if column.endswith("l0") else 3
            cells.append(f"{values.mean():.{digits}f} ± {spread:.{digits}f}")
        lines.append(f"| {name} | {rates[name]:g} | {' | '.join(cells)} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

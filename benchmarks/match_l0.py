"""How near each way of aiming at an L0 comes to it, on a harvested store.

    python -m benchmarks.match_l0 configs/demo.yaml runs/match_l0

trains one SAE for each target and penalty with the config's own settings and prints a table. L0 is
that of the trained SAE over every row of the store. docs/recipes.md has what it printed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from activation_cache.gemma.taps import Tap
from activation_cache.store.store import Store, open_store
from sae_train.checkpoint.trained import Trained, load_trained
from sae_train.config.file import load_config, with_values
from sae_train.config.run import Config
from sae_train.runs.metrics_file import read_metrics
from sae_train.train.loop import train

TARGETS = (20, 50, 100)
PENALTIES: dict[str, dict[str, Any]] = {
    "match_l0": {"penalty": "match_l0", "coefficient": 1e-4},
    "target_l0, batch_mean": {"penalty": "target_l0"},
    "target_l0, per_token": {"penalty": "target_l0", "form": "per_token", "coefficient": 5e-3},
}
_ROWS = 20_000  # at a time: 160 MB of pre-activations for the demo's 2,048 latents


def l0_of(trained: Trained, store: Store) -> float:
    """Mean active latents of an SAE over every row of the store it was trained on."""
    params, tap = trained.params, Tap(trained.config.sae.site, trained.config.sae.layer)
    active = 0
    for start in range(0, store.rows, _ROWS):
        rows = store.read(tap, start=start, stop=min(start + _ROWS, store.rows))
        x = rows.astype(np.float32) / np.float32(trained.input_scale)
        if trained.config.sae.pre_encoder_bias:
            x = x - params["b_dec"]
        pre = x @ params["W_enc"].T + params["b_enc"]
        active += int((pre > params["threshold"]).sum())
    return active / store.rows


def run(config: Config, *, folder: Path, sparsity: dict[str, Any]) -> str:
    """Train one SAE; returns its row of the table."""
    values = {"output": str(folder), "train.sparsity": sparsity}
    own = with_values(config, values, source="benchmark")
    train(own, fresh=True)
    last = read_metrics(folder)[-1]
    l0 = l0_of(load_trained(folder), open_store(own.cache.path))
    off = l0 / sparsity["target"] - 1
    return (
        f"| {sparsity['target']} | {l0:.2f} | {off:+.1%} | {last['sparsity_coefficient']:.1e} | "
        f"{last['dead_fraction']:.1%} |"
    )


def main() -> int:
    """Train with each penalty to each target and print the table row by row; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config")
    parser.add_argument("folder", type=Path, help="for the runs")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    warmup = config.train.sparsity.warmup_steps
    sys.stdout.write(
        "| penalty | target | L0 | off by | last λ | dead |\n|---|---|---|---|---|---|\n"
    )
    for name, penalty in PENALTIES.items():
        for target in TARGETS:
            sparsity = penalty | {"target": target, "warmup_steps": warmup}
            folder = arguments.folder / f"{name.replace(', ', '-')}-{target}"
            row = run(config, folder=folder, sparsity=sparsity)
            sys.stdout.write(f"| {name} {row}\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What keeps latents alive in short runs, and what it costs: L0, FVU, delta loss, alive.

    python -m launch.demo demo-data                  # the model
    python -m benchmarks.dead_latents runs/dead_latents

Layer 12 of Gemma 3 270M reads Python's standard library. 2,048 latents, 600 steps of 256 rows,
`match_l0`. The folder keeps stores, runs and results.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np

from activation_cache.harvest.harvest import harvest
from activation_cache.storage.files import storage_path
from benchmarks.dead_latents.variants import VARIANTS, using
from benchmarks.precision.quality import base_config
from benchmarks.support.measure import markdown, prepare
from sae_train.config.file import resolved_yaml, with_values
from sae_train.config.run import Config
from sae_train.evaluate.job import Job
from sae_train.evaluate.jobs import Models, jobs_of
from sae_train.evaluate.result import headline
from sae_train.evaluate.text_pass import Pass
from sae_train.runs.folder import newest_checkpoint
from sae_train.train.loop import train_cohort

logger = logging.getLogger("dead latents")

TAPS = ("resid_post", "attn_out_prelinear", "mlp_out")
STEPS_UNTIL_DEAD = 50
_MEASURED = {
    "sequences": 48,
    "loss_sequences": 8,
    "importance_sequences": 0,
    "sequences_per_batch": 4,
}


def config_of(tap: str, variant: str, *, seed: int, target: int, root: Path) -> Config:
    """One run; a variant that is a number is `sae.revive_coefficient`."""
    base = base_config("python", root)
    own: dict[str, Any] = {
        "cache.path": str(root / "store"),
        "cache.tokens": 100_000,
        "cache.sites": [{"site": site, "layers": [12]} for site in TAPS],
        "sae.site": tap,
        "train.seed": seed,
        "train.dead_after_tokens": STEPS_UNTIL_DEAD * base.train.batch_size,
        "train.sparsity": {
            "penalty": "match_l0",
            "target": target,
            "coefficient": 1e-4,
            "warmup_steps": 100,
        },
        "output": str(root / f"{tap}_{target}" / f"{variant}_{seed}"),
    }
    if variant not in ("plain", *VARIANTS):
        own["sae.revive_coefficient"] = float(variant)
    return with_values(base, own, source="benchmark")


def measure(configs: list[tuple[str, Config]], *, path: Path) -> None:
    """Evaluate runs of one tap in one pass over held-out text; rows go to the file."""
    models = Models(given=None)
    jobs = [_job(config, models) for _, config in configs]
    one = Pass(jobs, models.load(jobs[0]))
    one.run()
    for index, (variant, config) in enumerate(configs):
        sae = one.saes[index]
        site, spliced = one.sites[jobs[index].target], one.spliced[index, False]
        found = headline(site=site, sae=sae, base=one.base, spliced=spliced)
        row = {
            "tap": config.sae.site,
            "variant": variant,
            "seed": config.train.seed,
            "L0": found["l0"],
            "FVU": found["fvu"],
            "delta loss": found["delta_loss"],
            "alive": float((sae.fired_F > 0).mean()),
        }
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _job(config: Config, models: Models) -> Job:
    (job,) = jobs_of(storage_path(config.output), settings=None, models=models, stop=lambda: False)
    settings = job.settings.model_copy(update=_MEASURED)
    return dataclasses.replace(job, settings=settings, compared=True)


def table(path: Path) -> str:
    """Means over the seeds of the file by tap and variant, ± their standard deviation."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    head = ["tap", "variant", "seeds", "L0", "FVU", "delta loss", "alive"]
    forms = {"L0": "{:.1f}", "FVU": "{:.4f}", "delta loss": "{:.3f}", "alive": "{:.1%}"}
    kinds = sorted({(row["tap"], row["variant"]) for row in rows}, key=_place)
    lines = []
    for tap, variant in kinds:
        own = [row for row in rows if (row["tap"], row["variant"]) == (tap, variant)]
        cells = [tap, variant, str(len(own))]
        for name, form in forms.items():
            values = np.array([row[name] for row in own])
            spread = f" ± {form.format(values.std(ddof=1))}" if len(values) > 1 else ""
            cells.append(form.format(values.mean()) + spread)
        lines.append(cells)
    return markdown(head, lines)


def _place(kind: tuple[str, str]) -> tuple[int, int, str]:
    tap, variant = kind
    order = ("plain", *VARIANTS)
    return TAPS.index(tap), order.index(variant) if variant in order else len(order), variant


def main() -> int:
    """Harvest, train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="for the store, runs and numbers; they go on")
    parser.add_argument("--taps", nargs="+", choices=TAPS, default=TAPS)
    parser.add_argument("--variants", nargs="+", default=["plain", *VARIANTS, "1"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--target", type=int, default=20, help="L0")
    arguments = parser.parse_args()
    prepare()
    logger.setLevel(logging.INFO)
    root: Path = arguments.folder
    for tap in arguments.taps:
        configs = [
            (variant, config_of(tap, variant, seed=seed, target=arguments.target, root=root))
            for seed in arguments.seeds
            for variant in arguments.variants
        ]
        first = configs[0][1]
        harvest(
            model=first.model,
            text=first.text,
            cache=first.cache,
            mesh=first.mesh,
            resolved_config_yaml=resolved_yaml(first),
        )
        with using({config.output: variant for variant, config in configs}):
            for seed in arguments.seeds:
                waiting = [
                    config
                    for _, config in configs
                    if config.train.seed == seed
                    and newest_checkpoint(storage_path(config.output)) != config.train.steps
                ]
                if waiting:
                    train_cohort(waiting)
        measure(configs, path=root / "results.jsonl")
    sys.stdout.write(table(root / "results.jsonl") + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a short phase through the language model does to a trained SAE: delta loss at equal L0.

    python -m launch.demo demo-data                  # model and text
    python -m benchmarks.end_to_end runs/end_to_end --seeds 0 1

An SAE of the store `python` of `benchmarks.precision.quality` (Python's standard library at layer
12 of Gemma 3 270M, width 2,048) is trained for 600 steps of 1,024 rows with L0 steered to 50, and
released. From the release go on, on the same sequences: a phase through the model
(`train.end_to_end`), and as many steps without it. L0 stays at 50 by `match_l0`. The folder keeps
what is done.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any

from activation_cache.harvest.harvest import harvest
from activation_cache.storage.files import storage_path
from benchmarks.precision.quality import base_config
from benchmarks.support.measure import markdown, prepare
from sae_train.checkpoint.trained import load_trained
from sae_train.config.file import with_values
from sae_train.config.run import Config
from sae_train.evaluate.jobs import Models, jobs_of
from sae_train.evaluate.result import headline
from sae_train.evaluate.text_pass import Pass
from sae_train.inference.fold import fold
from sae_train.inference.write_formats import write_gemma_scope
from sae_train.runs.metrics_file import read_metrics
from sae_train.train.loop import train_cohort

logger = logging.getLogger("end_to_end")

TARGET, STEPS, ROWS = 50, 600, 1024
SEQUENCES, LOSS_SEQUENCES = 48, 12


def first_run(root: Path, *, seed: int) -> Config:
    """The SAE that the others start from."""
    own = {
        "train.batch_size": ROWS,
        "train.tokens": STEPS * ROWS,
        "train.seed": seed,
        "train.sparsity": _penalty(1e-4, warmup_steps=100),
        "output": str(root / f"seed_{seed}" / "first"),
    }
    return with_values(base_config("python", root), own, source="benchmark")


def _penalty(coefficient: float, **own: Any) -> dict[str, Any]:
    return {"penalty": "match_l0", "target": TARGET, "coefficient": coefficient, **own}


def released(first: Config) -> Path:
    """Its release."""
    folder = Path(first.output).parent / "released"
    folder.mkdir(exist_ok=True)
    write_gemma_scope(fold(load_trained(first.output)), folder)
    return folder


def going_on(first: Config, arguments: argparse.Namespace, *, beta: float | None) -> Config:
    """A run from the release: through the model, or on the store's rows for as many steps."""
    tokens = arguments.steps * arguments.rows
    coefficient = read_metrics(first.output)[-1]["sparsity_coefficient"]
    own = {
        "sae.start_from": str(released(first)),
        "train.batch_size": arguments.rows,
        "train.tokens": tokens,
        "train.sparsity": _penalty(coefficient, warmup_steps=0, settle_steps=20),
        "train.learning_rate": {
            "peak": arguments.peak,
            "warmup_steps": 5,
            "decay_steps": arguments.steps // 2,
        },
        "train.end_to_end": None if beta is None else {"beta": beta, "tokens": tokens},
        "train.log_every_steps": 5,
        "checkpoint": {"every_steps": 10, "keep": 1},
        "output": str(Path(first.output).parent / ("plain" if beta is None else f"beta_{beta:g}")),
    }
    return with_values(first, own, source="benchmark")


def measured(configs: list[Config]) -> list[list[str]]:
    """A line of the table for each run, all measured in one pass of the model."""
    models = Models(given=None)
    jobs = []
    for config in configs:
        folder = storage_path(config.output)
        (job,) = jobs_of(folder, settings=None, models=models, stop=lambda: False)
        own = {"sequences": SEQUENCES, "loss_sequences": LOSS_SEQUENCES}
        own |= {"importance_sequences": 0, "sequences_per_batch": 4}
        settings = job.settings.model_copy(update=own)
        jobs.append(dataclasses.replace(job, settings=settings, compared=True))
    one = Pass(jobs, models.load(jobs[0]))
    one.run()
    lines = []
    for index, config in enumerate(configs):
        found = headline(
            site=one.sites[jobs[index].target],
            sae=one.saes[index],
            base=one.base,
            spliced=one.spliced[index, False],
        )
        alive = (one.saes[index].fired_F > 0).mean()
        numbers = [f"{found['l0']:.1f}", f"{found['fvu']:.4f}", f"{found['delta_loss']:.3f}"]
        lines.append([str(config.train.seed), config.output.rsplit("/", 1)[1], *numbers])
        lines[-1].append(f"{alive:.1%}")
    return lines


def main() -> int:
    """Train, go on, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="for the store and the runs; they go on")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--betas", nargs="+", type=float, default=[3.0])
    parser.add_argument("--rows", type=int, default=256, help="of a step that goes on")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--peak", type=float, default=4e-4, help="learning rate of these steps")
    arguments = parser.parse_args()
    prepare()
    logger.setLevel(logging.INFO)
    lines = []
    for seed in arguments.seeds:
        first = first_run(arguments.folder, seed=seed)
        harvest(model=first.model, text=first.text, cache=first.cache, mesh=first.mesh)
        train_cohort([first])
        runs = [going_on(first, arguments, beta=beta) for beta in (None, *arguments.betas)]
        train_cohort(runs)
        lines += measured([first, *runs])
        logger.info("%s", lines[-len(runs) - 1 :])
    head = ["seed", "run", "L0", "FVU", "delta loss", "alive"]
    sys.stdout.write(markdown(head, lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a Matryoshka loss costs and gives: SAEs with it beside plain ones, and the time of a step.

    python -m launch.demo demo-data                  # model and text
    python -m benchmarks.loss.matryoshka train runs/matryoshka
    python -m benchmarks.loss.matryoshka step

`train` makes 3 x 2 SAEs of `resid_post.12` on Python's standard library: width 2,048, 600 steps of
256 rows, `match_l0` at 50, two seeds, plain (those of `benchmarks.precision.quality`) or with
prefixes of 1/16, 1/8, 1/4 and 1/2 of the latents, at weights of 1 or ("light") of 0.1. It prints a
line for every prefix. `step` lets the steps of both take turns on the same random rows.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from activation_cache.harvest.harvest import harvest
from activation_cache.storage.files import storage_path
from benchmarks.precision.quality import Cell, base_config
from benchmarks.step import StepProgram, config_of, unit_rows
from benchmarks.support.measure import interleaved, markdown, prepare
from sae_train.config.evaluation import EvaluationConfig
from sae_train.config.file import resolved_yaml, with_values
from sae_train.config.matryoshka import MatryoshkaConfig
from sae_train.config.run import Config
from sae_train.evaluate.evaluate import evaluate
from sae_train.evaluate.result import Evaluation
from sae_train.runs.folder import newest_checkpoint
from sae_train.train.loop import train as train_loop

PREFIXES = [1 / 16, 1 / 8, 1 / 4, 1 / 2]
KINDS: dict[str, dict[str, list[float]] | None] = {
    "plain": None,
    "matryoshka": {"prefixes": PREFIXES},
    "light": {"prefixes": PREFIXES, "weights": [0.1, 0.1, 0.1, 0.1, 1.0]},
}
TIMED = ("plain", "matryoshka")
SEEDS = (0, 1)
MEASURED = EvaluationConfig(
    sequences=24, loss_sequences=4, importance_sequences=0, sequences_per_batch=4
)


def configs(root: Path) -> dict[tuple[str, int], Config]:
    """The runs by kind and seed."""
    base = base_config("python", root)
    found = {}
    for kind, seed in itertools.product(KINDS, SEEDS):
        config = Cell("python", "float32", seed, target=50).config(base, root)
        if KINDS[kind] is not None:
            own = {
                "sae.matryoshka": KINDS[kind],
                "checkpoint.every_steps": 100,
                "output": str(root / "python" / kind / f"seed_{seed}"),
            }
            config = with_values(config, own, source="benchmark")
        found[kind, seed] = config
    return found


def train(root: Path) -> dict[tuple[str, int], Evaluation]:
    """Harvest, train and evaluate what isn't there yet."""
    runs = configs(root)
    first = next(iter(runs.values()))
    harvest(
        model=first.model,
        text=first.text,
        cache=first.cache,
        mesh=first.mesh,
        resolved_config_yaml=resolved_yaml(first),
    )
    for config in runs.values():
        if newest_checkpoint(storage_path(config.output)) != config.train.steps:
            train_loop(config)
    found = evaluate([config.output for config in runs.values()], settings=MEASURED)
    return dict(zip(runs, found, strict=True))


def prefix_table(found: dict[tuple[str, int], Evaluation]) -> str:
    """Markdown: a line for each SAE and for each prefix, means over seeds and their range."""
    names = ("l0", "fvu", "delta_loss", "alive_fraction")
    lines = []
    for kind in KINDS:
        own = [found[kind, seed] for seed in SEEDS]
        alone = [
            {"latents": one.width} | {name: getattr(one, name) for name in names} for one in own
        ]
        rows = [one.by_prefix or [alone[number]] for number, one in enumerate(own)]
        for of_seeds in zip(*rows, strict=True):
            cells = [kind, f"{of_seeds[0]['latents']:,}"]
            for name, form in zip(names, (".1f", ".4f", ".3f", ".1%"), strict=True):
                values = [row[name] for row in of_seeds]
                shown = " / ".join(format(value, form) for value in values)
                cells.append(f"{format(float(np.mean(values)), form)} ({shown})")
            lines.append(cells)
    return markdown(["SAE", "latents", "L0", "FVU", "delta loss", "alive"], lines)


def step_table(*, widths: Sequence[int], l0: float, batch_size: int, rounds: int) -> str:
    """Markdown: seconds of a step, plain and with prefixes, dense and sparse, taking turns."""
    lines = []
    d_model = 640
    for width in widths:
        rows_BD = unit_rows(batch_size, d_model, seed=2)
        programs: dict[str, StepProgram] = {}
        kinds: tuple[Literal["dense", "sparse"], ...] = ("dense", "sparse")
        for step, name in itertools.product(kinds, TIMED):
            config = config_of(width=width, batch_size=batch_size, step=step)
            if name == "matryoshka":
                matryoshka = MatryoshkaConfig(prefixes=PREFIXES)
                sae = config.sae.model_copy(update={"matryoshka": matryoshka})
                config = config.model_copy(update={"sae": sae})
            programs[f"{step} {name}"] = StepProgram(config, rows_BD=rows_BD, l0=l0)
        times = interleaved(programs, rounds=rounds)
        for step in kinds:
            plain, nested = (times[f"{step} {name}"] for name in TIMED)
            memory = [programs[f"{step} {name}"].temporary_bytes / 1e6 for name in TIMED]
            lines.append(
                [
                    f"{width:,}",
                    step,
                    str(plain),
                    str(nested),
                    f"{nested.median / plain.median:.2f}",
                    f"{memory[0]:.0f} / {memory[1]:.0f} MB",
                ]
            )
    head = ["width", "step", "plain", "matryoshka", "ratio", "temporaries"]
    return markdown(head, lines)


def main() -> None:
    """Print one of the two tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train").add_argument("folder", type=Path, help="for stores and runs")
    timed = commands.add_parser("step")
    timed.add_argument("--widths", type=int, nargs="+", default=(2048, 16_384))
    timed.add_argument("--l0", type=float, default=50.0)
    timed.add_argument("--batch-size", type=int, default=1024)
    timed.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    prepare()
    if arguments.command == "train":
        text = prefix_table(train(arguments.folder))
    else:
        text = step_table(
            widths=arguments.widths,
            l0=arguments.l0,
            batch_size=arguments.batch_size,
            rounds=arguments.rounds,
        )
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()

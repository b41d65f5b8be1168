"""Prints the table of docs/suites.md: what each suite costs.

    python -m docs.suite_costs [--accelerator h200] [--mfu 0.4] [--price 2.5]

A row is what `sae plan CONFIG` says; its last cell is what it says with `train.precision=float32`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from activation_cache.runtime.amounts import bytes_text
from launch.config.job import load_job
from launch.show.units import flops_text
from launch.sweep.expand import expand
from sae_train.config.run import Config
from sae_train.plan.accelerators import accelerator
from sae_train.plan.suite import make_suite_plan
from sae_train.plan.verdict import Assumptions, total

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# As the page tells them: bases before the models tuned from them, but for the second generation.
SUITES = [
    *(f"gemma_scope/{name}" for name in ("2b-pt", "9b-pt", "9b-it", "27b-pt")),
    *(
        f"gemma_scope_2/{size}-{kind}"
        for size in ("270m", "1b", "4b", "12b", "27b")
        for kind in ("it", "pt")
    ),
]


def row(suite: str, *, chip: str, assumptions: Assumptions) -> str:
    """A suite's line of the table."""
    config = load_job(CONFIGS / f"{suite}.yaml")
    runs = [run.config for run in expand(config)]
    plan, plan_float32 = (
        make_suite_plan(
            config, runs=some, accelerators=[accelerator(chip)], assumptions=assumptions
        )
        for some in (runs, [_in_float32(run) for run in runs])
    )
    (on,), (on_float32,) = plan.accelerators, plan_float32.accelerators
    cells = [
        f"`{suite}`",
        f"{sum(group.stores for group in plan.stores):,}",
        bytes_text(max(group.bytes_each for group in plan.stores)),
        bytes_text(plan.store_bytes),
        flops_text(sum(group.flops for group in plan.stores)),
        flops_text(sum(group.flops for group in plan.groups)),
        f"{on.harvest_hours:,.0f}",
        _whole(total([on.harvest_hours, on.train_hours])),
        _whole(on.total_cost),
        _whole(total([on_float32.harvest_hours, on_float32.train_hours])),
    ]
    return f"| {' | '.join(cells)} |"


def _in_float32(run: Config) -> Config:
    return run.model_copy(update={"train": run.train.model_copy(update={"precision": "float32"})})


def _whole(number: float | None) -> str:
    return "-" if number is None else f"{number:,.0f}"


def table(*, chip: str, assumptions: Assumptions) -> Iterator[str]:
    """The lines of the table."""
    yield (
        "| config | stores | the largest | all | FLOPs to harvest | FLOPs to train "
        "| hours to harvest | all hours | cost | all hours, float32 |"
    )
    yield "|---" * 10 + "|"
    for suite in SUITES:
        yield row(suite, chip=chip, assumptions=assumptions)


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--accelerator", default="h200")
    parser.add_argument("--mfu", type=float, default=0.4)
    parser.add_argument("--price", type=float, default=2.5)
    told = parser.parse_args()
    assumptions = Assumptions(mfu=told.mfu, price=told.price)
    for line in table(chip=told.accelerator, assumptions=assumptions):
        sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    main()

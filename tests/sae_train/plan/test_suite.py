"""The plan of a suite counts every cell, each as the plan of its own run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cli import main
from launch.config.job import load_job
from launch.sweep.expand import expand
from sae_train.plan.accelerators import accelerator
from sae_train.plan.plan import make_plan
from sae_train.plan.suite import make_suite_plan
from sae_train.plan.verdict import Assumptions
from tests.launch.sweep.test_suites import GEMMA_SCOPE, write
from tests.support.paths import ROOT


def test_the_plan_of_a_suite_counts_every_cell() -> None:
    flops, cells = 0.0, 0
    for path in GEMMA_SCOPE:
        config = load_job(path)
        plan = make_suite_plan(
            config,
            runs=[run.config for run in expand(config)],
            accelerators=[accelerator("h200")],
            assumptions=Assumptions(),
        )
        flops += sum(group.flops for group in plan.groups if group.kind != "embedding")
        cells += plan.cells
    assert cells == 2430
    # "Over 20% of GPT-3's compute": 6.95e22 by the paper's 12 B D F; ours are 10.
    assert flops == pytest.approx(6.95e22 * 10 / 12, rel=1e-3)


def test_the_plan_of_one_cell_is_that_of_its_run(tmp_path: Path) -> None:
    chips, assumptions = [accelerator("h200")], Assumptions(price=2.0)
    only = "sweep.only=['res/layer_3/width_128/*_0.001']"
    config = load_job(write(tmp_path), [only, "sweep.stores=per_layer"])
    (run,) = expand(config)
    suite_plan = make_suite_plan(
        config, runs=[run.config], accelerators=chips, assumptions=assumptions
    )
    plan = make_plan(
        run.config,
        runs=[(run.name, run.config)],
        max_members=1,
        accelerators=chips,
        assumptions=assumptions,
    )
    (group,), (store,), (chip,) = suite_plan.groups, suite_plan.stores, suite_plan.accelerators
    assert (group.cells, group.steps) == (1, plan.runs[0].steps)
    assert group.memory == plan.runs[0].memory
    assert group.flops == plan.runs[0].flops_per_step * plan.runs[0].steps
    assert (store.stores, store.bytes_each) == (1, plan.store.total_bytes)
    assert store.flops == plan.harvest.flops
    assert chip.train_hours == pytest.approx(plan.accelerators[0].train_hours)
    assert chip.harvest_hours == pytest.approx(plan.accelerators[0].harvest_hours)
    assert chip.total_cost == pytest.approx(plan.accelerators[0].total_cost)


def test_plan_tables_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(ROOT / "configs" / "gemma_scope" / "9b-it.yaml")
    assert main(["plan", path, "--accelerator", "v5e"]) == 0
    table = capsys.readouterr().out
    assert "30 cells" in table
    assert "1 x 2 does" in table, "131k latents of 3,584 don't fit a v5e"
    assert main(["plan", path, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["cells"] == 30
    assert record["stores"] == [
        {
            "stores": 3,
            "taps": 1,
            "rows": 8_000_000_000,
            "bytes_each": record["store_bytes"] // 3,
            "flops": record["stores"][0]["flops"],
        }
    ]
    assert 3 * 8e9 * 3584 * 4 < record["store_bytes"] < 3.02 * 8e9 * 3584 * 4

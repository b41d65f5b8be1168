"""`sae plan` of a suite: the totals of its stores, widths and accelerators, as tables."""

from __future__ import annotations

from rich.table import Table

from activation_cache.runtime.amounts import bytes_text
from launch.show.recipe_tables import recipe_tables
from launch.show.units import (
    READER,
    flops_text,
    hours_text,
    mesh_text,
    money_text,
    peaks_text,
    plan_table,
    products_text,
    rate_text,
)
from sae_train.plan.suite import CellGroup, SuiteAccelerator, SuitePlan


def suite_tables(plan: SuitePlan) -> list[Table]:
    """What a recipe chose, stores, then the work of each kind of cell, then the accelerators."""
    return [*recipe_tables(plan.recipes), _stores(plan), _work(plan), _accelerators(plan)]


def _stores(plan: SuitePlan) -> Table:
    title = f"{plan.name}: {plan.cells:,} cells, reading {plan.model_from}"
    table = plan_table(title, "stores", "taps", "rows", "each", "together", "FLOPs to harvest")
    for group in plan.stores:
        table.add_row(
            f"{group.stores:,}",
            f"{group.taps:,}",
            f"{group.rows:,}",
            bytes_text(group.bytes_each),
            bytes_text(group.stores * group.bytes_each),
            flops_text(group.flops),
        )
    flops = sum(group.flops for group in plan.stores)
    stores = sum(group.stores for group in plan.stores)
    row = (f"{stores:,} in all", "", "", "", bytes_text(plan.store_bytes), flops_text(flops))
    table.add_row(*row, style="bold")
    return table


def _work(plan: SuitePlan) -> Table:
    one = plan.accelerators[0] if len(plan.accelerators) == 1 else None
    last = ["fits", "reads", "device-hours"] if one else []
    table = plan_table(
        "training, for each kind of cell (mesh: data x model)",
        "cells of", "width", "D", "cells", "tokens each", "mesh", "memory", "weights", "FLOPs",
        *last,
    )  # fmt: skip
    order = sorted(range(len(plan.groups)), key=lambda n: (plan.groups[n].shape.width, n))
    for number in order:
        group = plan.groups[number]
        ending = _ending(one, number) if one else []
        table.add_row(*_cells(group, plan), *ending)
    total = [f"{plan.cells:,}", "", "", "", bytes_text(sum(g.weight_bytes for g in plan.groups))]
    total.append(flops_text(sum(group.flops for group in plan.groups)))
    if one:
        total += ["", "", hours_text(one.train_hours)]
        if any(verdict.above_reader for verdict in one.verdicts):
            table.caption = f"reads: of one cell that trains alone\n{READER}"
    table.add_row("in all", "", "", *total, style="bold")
    return table


def _cells(group: CellGroup, plan: SuitePlan) -> list[str]:
    return [
        group.what,
        f"{group.shape.width:,}",
        f"{group.shape.d_model:,}",
        f"{group.cells:,}",
        f"{group.steps * group.shape.batch_size / 1e9:.3g} G",
        mesh_text(group.shape.mesh),
        bytes_text(group.memory.total),
        bytes_text(group.weight_bytes),
        flops_text(group.flops),
    ]


def _ending(on: SuiteAccelerator, number: int) -> list[str]:
    verdict = on.verdicts[number]
    if verdict.mesh is None:
        return ["no mesh does", "-", "-"]
    fits = "yes" if verdict.fits else f"no, {mesh_text(verdict.mesh)} does"
    rate = rate_text(verdict.read_bytes_per_second, above=verdict.above_reader)
    return [fits, rate, hours_text(verdict.device_hours)]


def _accelerators(plan: SuitePlan) -> Table:
    table = plan_table(
        f"hours of one device at {plan.assumptions.mfu:.0%} of its peak",
        "accelerator", "memory to use", "harvest", "train", "together", "cost",
    )  # fmt: skip
    for on in plan.accelerators:
        train = on.train_hours
        table.add_row(
            on.accelerator.title,
            bytes_text(on.usable_bytes),
            hours_text(on.harvest_hours),
            hours_text(train),
            hours_text(None if train is None else train + on.harvest_hours),
            money_text(on.total_cost),
        )
    table.caption = products_text(plan.accelerators)
    if len(plan.accelerators) == 1:
        table.caption += f"\npeaks of products, {peaks_text(plan.accelerators[0].accelerator)}"
    table.caption += "\ncells that don't fit their mesh are computed on the nearest that they fit"
    return table

"""`sae plan`: the plan of a config as tables, or as JSON."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from rich.table import Table

from activation_cache.config import NO_MODEL
from activation_cache.runtime.amounts import bytes_text
from activation_cache.storage.files import json_text, storage_path
from launch.config.job import Job
from launch.console import print_table, print_text
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
    seconds_text,
)
from launch.sweep.expand import expand
from sae_train.config.run import Config
from sae_train.plan.accelerators import ACCELERATORS, Accelerator, accelerator
from sae_train.plan.memory import STATE_ITEMS
from sae_train.plan.plan import Plan, make_plan, plan_record
from sae_train.plan.verdict import AcceleratorPlan, Assumptions, CohortVerdict, Verdict

_FRACTION = "* more than JAX takes of a GPU by itself: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"


def show_plan(config: Job, arguments: argparse.Namespace) -> None:
    """Print the plan of `config` under the command line's assumptions.

    Raises:
        UserError: an accelerator, share, price or number of devices that can't be, or a model
            whose shape is neither at hand nor known.
    """
    if config.is_suite:
        _show_suite(config, arguments)
        return
    members = [(config.name, config)]
    if config.sweep is not None:
        members = [(run.name, run.config) for run in expand(config)]
    plan = make_plan(
        config,
        runs=members,
        max_members=config.sweep.cohort.max_members if config.sweep is not None else 1,
        accelerators=_accelerators(arguments, [one for _, one in members]),
        assumptions=_assumptions(arguments),
    )
    if arguments.json:
        print_text(json_text(plan_record(plan), indent=2))
        return
    for table in [*tables(plan), *_centring_tables(config)]:
        print_table(table)


def _centring_tables(config: Config) -> list[Table]:
    """γ of the taps of a config's store, if there is one: its harvest has finished."""
    path = storage_path(config.cache.path)
    if not (path / "manifest.json").exists():
        return []
    from activation_cache.store.centring import gamma_of
    from activation_cache.store.store import open_store

    store = open_store(path)
    if store.manifest.window is not None:
        return []  # its first rows, of which γ is taken, may be gone
    table = plan_table(f"how far from zero, in the store at {path}", "tap", "γ", "sae.b_dec_init")
    for tap in store.taps:
        found = gamma_of(store, tap)
        advice = "mean (or auto)" if found > 1 else "zeros will do"
        table.add_row(tap.name, f"{found:.2f}", advice)
    return [table]


def _show_suite(config: Job, arguments: argparse.Namespace) -> None:
    from launch.show.suite_tables import suite_tables
    from sae_train.plan.suite import make_suite_plan

    runs = [run.config for run in expand(config)]
    plan = make_suite_plan(
        config,
        runs=runs,
        accelerators=_accelerators(arguments, runs),
        assumptions=_assumptions(arguments),
    )
    if arguments.json:
        print_text(json_text(plan_record(plan), indent=2))
        return
    for table in suite_tables(plan):
        print_table(table)


def _accelerators(arguments: argparse.Namespace, runs: Sequence[Config]) -> list[Accelerator]:
    """The one that is asked for, else all that have the precisions of the config."""
    if arguments.accelerator:
        return [accelerator(arguments.accelerator)]
    chosen = {one.train.precision for one in runs}
    chosen |= {one.model.precision for one in runs if one.model.dtype == "float32"}
    return [chip for chip in ACCELERATORS.values() if all(chip.has(one) for one in chosen)]


def _assumptions(arguments: argparse.Namespace) -> Assumptions:
    return Assumptions(mfu=arguments.mfu, devices=arguments.devices, price=arguments.price)


def tables(plan: Plan) -> list[Table]:
    """The recipe, store and harvest, work and memory of each run, then the accelerators."""
    on = plan.accelerators
    last = _accelerator_table(plan, on[0]) if len(on) == 1 else _comparison_table(plan)
    cohorts = [_cohort_table(plan)] if any(len(one.runs) > 1 for one in plan.cohorts) else []
    through = [_end_to_end_table(plan)] if any(run.end_to_end for run in plan.runs) else []
    needs = [_store_table(plan), _work_table(plan), _memory_table(plan), *through, *cohorts, last]
    return [*recipe_tables(plan.recipes), *needs]


def alike(plan: Plan) -> list[list[int]]:
    """The indices of the runs, grouped by equal needs."""
    groups: dict[str, list[int]] = {}
    for number, run in enumerate(plan.runs):
        groups.setdefault(repr(replace(run, name="")), []).append(number)
    return list(groups.values())


def _label(plan: Plan, group: list[int]) -> str:
    name = plan.runs[group[0]].name
    return name if len(group) == 1 else f"{name} and {len(group) - 1} like it, each"


def _store_table(plan: Plan) -> Table:
    store, harvest = plan.store, plan.harvest
    table = plan_table(f"{plan.name}, reading {plan.model_from}", "store", "bytes", "how much")
    for name, size in store.tap_bytes.items():
        rows = f"{store.rows_on_disk:,} rows of {bytes_text(store.row_bytes[name])}"
        table.add_row(name, bytes_text(size), rows)
    provenance = bytes_text(store.provenance_bytes)
    table.add_row("where rows came from", provenance, f"{store.rows_on_disk:,} rows")
    if store.token_bytes:
        read = f"{harvest.positions:,} read" if harvest.positions else "of every row"
        table.add_row("tokens, at least", bytes_text(store.token_bytes), read)
    buckets = f"{store.buckets:,} buckets"
    if store.window is not None:
        buckets = f"a window of {store.window:,}, and one more, of {buckets}"
    table.add_row("in all", bytes_text(store.total_bytes), buckets, style="bold")
    if plan.model == NO_MODEL:
        return table
    table.add_section()
    table.add_row("host memory to harvest", bytes_text(store.host_bytes), "buckets in flight")
    layers = f"{harvest.layers} layers in {plan.model_dtype}, {flops_text(harvest.flops)}"
    table.add_row("language model", bytes_text(harvest.weight_bytes), layers)
    return table


def _work_table(plan: Plan) -> Table:
    headings = ["run", "tap", "B×D×F", "mesh", "steps", "a step,\n10BDF", "or\n12BDF"]
    headings += ["all steps", "all-reduced\na step", "sent"]
    table = plan_table("work of training (mesh: data x model)", *headings, words=2)
    for group in alike(plan):
        run = plan.runs[group[0]]
        shape = run.shape
        parts = [f"{axis} {bytes_text(size)}" for axis, size in run.collectives.items()]
        table.add_row(
            _label(plan, group),
            run.tap,
            f"{shape.batch_size}×{shape.d_model}×{shape.width}",
            mesh_text(shape.mesh),
            f"{run.steps:,}",
            flops_text(run.flops_per_step),
            flops_text(run.paper_flops_per_step),
            flops_text(float(run.flops_per_step) * run.steps),
            "\n".join(parts) or "nothing",
            bytes_text(run.sent_per_step),
        )
    return table


def _memory_table(plan: Plan) -> Table:
    items = list(plan.runs[0].memory.items)
    # Headings of two words take two lines, so that the runs' names have room.
    headings = [name.replace(" ", "\n") for name in (*items, "next batch", "in all")]
    headings = ["run", "steps", *headings, "on\nCPUs", "steps\nthere"]
    table = plan_table("memory of each device while training", *headings, words=2)
    for group in alike(plan):
        run = plan.runs[group[0]]
        memory = run.memory
        sizes = {name: bytes_text(memory.items[name]) for name in items}
        sizes[memory.biggest] = f"[bold]{sizes[memory.biggest]}[/]"
        table.add_row(
            _label(plan, group),
            _path(run.sparse_path),
            *sizes.values(),
            bytes_text(memory.next_batch),
            bytes_text(memory.total),
            bytes_text(run.memory_cpu.total),
            _path(run.sparse_path_cpu),
        )
    return table


def _end_to_end_table(plan: Plan) -> Table:
    """Steps through the language model: how many, their work, and one device's memory in them."""
    phases = {index: run.end_to_end for index, run in enumerate(plan.runs) if run.end_to_end}
    items = list(next(iter(phases.values())).memory.items)
    headings = [name.replace(" ", "\n") for name in items]
    headings = ["run", "steps", "sequences\na step", "a step", *headings, "in all"]
    table = plan_table("through the language model, memory of each device", *headings, words=3)
    for group in alike(plan):
        if (phase := phases.get(group[0])) is None:
            continue
        table.add_row(
            _label(plan, group),
            f"{phase.steps:,}",
            str(phase.sequences),
            flops_text(float(phase.model_flops + phase.sae_flops)),
            *(bytes_text(size) for size in phase.memory.items.values()),
            bytes_text(phase.memory.total),
        )
    return table


def _path(may_be_sparse: bool) -> str:
    return "sparse" if may_be_sparse else "dense"


def _cohort_table(plan: Plan) -> Table:
    """Runs that train together: one device's memory for all of them, and what they read once."""
    headings = ("cohort", "runs", "a batch", "batches", "instead of", "states", "in all", "on CPUs")
    table = plan_table("runs that train together, each batch read once", *headings, "fits", "reads")
    for number, cohort in enumerate(plan.cohorts):
        runs = [plan.runs[index] for index in cohort.runs]
        memory = cohort.memory
        verdicts = [(on, on.cohorts[number]) for on in plan.accelerators]
        rate = verdicts[0][1].read_bytes_per_second if len(verdicts) == 1 else None
        table.add_row(
            runs[0].name if len(runs) == 1 else f"{runs[0].name} and {len(runs) - 1} more",
            str(len(runs)),
            bytes_text(cohort.batch_bytes),
            f"{cohort.batches:,}",
            f"{sum(run.steps for run in runs):,}",
            bytes_text(sum(memory.items[name] for name in STATE_ITEMS)),
            bytes_text(memory.total),
            bytes_text(cohort.memory_cpu.total),
            "\n".join(
                _cohort_fits(on, verdict, alone=len(verdicts) == 1) for on, verdict in verdicts
            ),
            rate_text(rate, above=verdicts[0][1].above_reader),
        )
    if not all(verdict.fits for on in plan.accelerators for verdict in on.cohorts):
        table.caption = "where only some fit, set sweep.cohort.max_members to their number"
    return table


def _cohort_fits(on: AcceleratorPlan, verdict: CohortVerdict, *, alone: bool) -> str:
    words = "yes" if verdict.fits else f"no, {verdict.at_once} do" if verdict.at_once else "no"
    return words if alone else f"{on.accelerator.name}: {words}"


def _accelerator_table(plan: Plan, on: AcceleratorPlan) -> Table:
    chip = on.accelerator
    table = plan_table(
        f"{chip.title} at {plan.assumptions.mfu:.0%} of its peak",
        "stage", "products", "fits", "a step", "bound by", "reads", "hours", "cost",
    )  # fmt: skip
    hours, cost = hours_text(on.harvest_hours), money_text(on.harvest_cost)
    table.add_row("harvest", on.harvest_precision, "", "", "", "", hours, cost)
    for group in alike(plan):
        verdict = on.verdicts[group[0]]
        table.add_row(
            _label(plan, group),
            verdict.precision,
            _fits(verdict),
            seconds_text(verdict.step_seconds) if verdict.fits else "-",
            verdict.bound if verdict.fits else "-",
            rate_text(verdict.read_bytes_per_second, above=verdict.above_reader),
            hours_text(verdict.hours),
            money_text(verdict.cost),
        )
    hours, cost = hours_text(on.total_hours), money_text(on.total_cost)
    table.add_row("in all", "", "", "", "", "", hours, cost, style="bold")
    table.caption = (
        f"{bytes_text(on.usable_bytes)} of memory to use\npeaks of products, {peaks_text(chip)}"
    )
    if any(verdict.above_default for verdict in on.verdicts):
        table.caption += f"\n{_FRACTION}"
    rates = [one.above_reader for one in on.verdicts] + [one.above_reader for one in on.cohorts]
    if any(rates):
        table.caption += f"\n{READER}"
    if (sides := on.sides) is not None:
        words = "side by side" if sides.beside else "in turns"
        table.caption += (
            f"\nharvest and training {words}: the slower side is {sides.slower}; the trainer waits "
            f"{hours_text(sides.waiting_hours)} of {hours_text(sides.hours)} hours"
        )
    return table


def _comparison_table(plan: Plan) -> Table:
    table = plan_table(
        f"{plan.name} at {plan.assumptions.mfu:.0%} of each accelerator's peak",
        "accelerator", "memory to use", "fits", "harvest hours", "train hours", "hours", "cost",
    )  # fmt: skip
    for on in plan.accelerators:
        misfits = [verdict for verdict in on.verdicts if not verdict.fits]
        table.add_row(
            on.accelerator.title,
            bytes_text(on.usable_bytes),
            "\n".join(dict.fromkeys(_fits(verdict) for verdict in misfits or on.verdicts)),
            hours_text(on.harvest_hours),
            hours_text(on.train_hours),
            hours_text(on.total_hours),
            money_text(on.total_cost),
        )
    table.caption = products_text(plan.accelerators)
    if any(verdict.above_default for on in plan.accelerators for verdict in on.verdicts):
        table.caption += f"\n{_FRACTION}"
    return table


def _fits(verdict: Verdict) -> str:
    if verdict.fits:
        return "yes*" if verdict.above_default else "yes"
    return "no mesh does" if verdict.mesh is None else f"no, {mesh_text(verdict.mesh)} does"

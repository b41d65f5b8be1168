"""`sae plan`: what a config needs, said before anything is spent.

Everything here follows from the config, the language model's shape and a table of accelerators:
no store is opened, no device asked, nothing allocated. docs/plan.md says how to read the result
and how good it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from activation_cache.errors import UserError
from activation_cache.gemma_config import GemmaConfig
from activation_cache.known_models import config_for_planning
from activation_cache.taps import check_tap, tap_width
from sae_train.accelerators import Accelerator
from sae_train.adaptive_step import may_go_by_pairs
from sae_train.cohort import group_cohorts
from sae_train.config import Config, MeshConfig
from sae_train.plan_memory import Shape, StepMemory, cohort_memory, nearest_mesh, step_memory
from sae_train.plan_work import (
    HarvestWork,
    StorePlan,
    collective_bytes,
    harvest_work,
    paper_step_flops,
    sent_bytes,
    step_flops,
    step_traffic,
    store_plan,
)
from sae_train.sparse_step import capacity_per_row

# The runtime's own share, compiled programs, collectives' buffers, fragmentation.
USABLE_MEMORY = 0.92
# XLA_PYTHON_CLIENT_MEM_FRACTION's default (JAX documentation, "GPU memory allocation").
GPU_DEFAULT_SHARE = 0.75
MOST_DEVICES = 4096


@dataclass(frozen=True)
class Assumptions:
    """What a plan takes as given.

    Attributes:
        mfu: the share of an accelerator's peak that products reach, 0 to 1.
        devices: how many there are; None: as many as each mesh has places.
        price: of one device for one hour, in any currency; None leaves cost out. The mesh's
            places are paid for, not devices it leaves idle.
    """

    mfu: float = 0.4
    devices: int | None = None
    price: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.mfu <= 1:
            raise UserError(
                f"--mfu is {self.mfu:g}: it is a share of the peak, above 0 and up to 1"
            )
        if self.devices is not None and self.devices < 1:
            raise UserError(f"--devices is {self.devices}: at least 1 is needed")
        if self.price is not None and not (self.price >= 0 and math.isfinite(self.price)):
            raise UserError(f"--price is {self.price:g}: it can't be negative or infinite")


@dataclass(frozen=True)
class RunPlan:
    """One SAE: sizes, memory of a device, work per step. Independent of the accelerator.

    `by_pairs` and `by_pairs_cpu` say whether steps may go by pairs of row and active latent;
    `memory` and `memory_cpu` are theirs then. Work and collectives are always those of products.
    """

    name: str
    tap: str
    shape: Shape
    steps: int
    memory: StepMemory
    memory_cpu: StepMemory
    by_pairs: bool
    by_pairs_cpu: bool
    flops_per_step: int
    paper_flops_per_step: int
    traffic_per_step: int
    collectives: Mapping[str, int]
    sent_per_step: float
    batch_bytes: int

    @property
    def devices(self) -> int:
        """Places of the mesh."""
        return self.shape.mesh.data * self.shape.mesh.model


@dataclass(frozen=True)
class CohortPlan:
    """Runs that train together: what a device holds for all of them, and what they read once.

    Attributes:
        runs: numbers of the runs, counted from 0.
        batches: read for all of them, as many as the longest run has steps.
    """

    runs: tuple[int, ...]
    memory: StepMemory
    memory_cpu: StepMemory
    batches: int
    batch_bytes: int


@dataclass(frozen=True)
class CohortVerdict:
    """One cohort on one accelerator.

    Attributes:
        fits: memory and number of devices both suffice.
        at_once: how many of its runs fit together, the widest first.
        read_bytes_per_second: for all its runs; None where it doesn't fit.
    """

    fits: bool
    at_once: int
    step_seconds: float
    read_bytes_per_second: float | None


@dataclass(frozen=True)
class Verdict:
    """One run on one accelerator.

    Attributes:
        fits: memory and number of devices both suffice.
        mesh: the run's own if it fits, else the nearest that does; None when none does.
        hours, cost, read_bytes_per_second: on the run's own mesh, and None where it doesn't fit.
        bound: `compute`, or `memory` where traffic takes longer than products.
        above_default: it fits, but not into what JAX takes of a GPU's memory by itself.
    """

    run: str
    fits: bool
    mesh: MeshConfig | None
    step_seconds: float
    bound: str
    hours: float | None
    cost: float | None
    read_bytes_per_second: float | None
    above_default: bool


@dataclass(frozen=True)
class AcceleratorPlan:
    """All of a config on one accelerator; totals are None if a run doesn't fit."""

    accelerator: Accelerator
    usable_bytes: int
    harvest_hours: float
    harvest_cost: float | None
    verdicts: tuple[Verdict, ...]
    cohorts: tuple[CohortVerdict, ...]
    train_hours: float | None
    total_hours: float | None
    total_cost: float | None


@dataclass(frozen=True)
class Plan:
    """What `sae plan` prints."""

    name: str
    model: str
    model_from: str
    model_dtype: str
    assumptions: Assumptions
    store: StorePlan
    harvest: HarvestWork
    runs: tuple[RunPlan, ...]
    cohorts: tuple[CohortPlan, ...]
    accelerators: tuple[AcceleratorPlan, ...]


def make_plan(
    config: Config,
    *,
    runs: Sequence[tuple[str, Config]],
    accelerators: Sequence[Accelerator],
    assumptions: Assumptions,
) -> Plan:
    """Reckon a config through.

    Args:
        runs: (name, config) of every SAE it trains: itself, or the members of its sweep.

    Raises:
        UserError: the model's shape is neither at hand nor known, or has no such layer.
    """
    gemma, source = config_for_planning(config.model)
    store = store_plan(config.cache, config.text, gemma)
    harvest = harvest_work(config.cache, config.text, gemma, dtype=config.model.dtype)
    run_plans = tuple(_run_plan(name, one, gemma) for name, one in runs)
    cohorts = _cohort_plans(config, [one for _, one in runs], run_plans)
    return Plan(
        name=config.name,
        model=config.model.weights,
        model_from=source,
        model_dtype=config.model.dtype,
        assumptions=assumptions,
        store=store,
        harvest=harvest,
        runs=run_plans,
        cohorts=cohorts,
        accelerators=tuple(
            _on_accelerator(one, config, harvest, run_plans, cohorts, assumptions)
            for one in accelerators
        ),
    )


def _cohort_plans(
    config: Config, runs: Sequence[Config], plans: Sequence[RunPlan]
) -> tuple[CohortPlan, ...]:
    most = config.sweep.cohort.max_members if config.sweep else 1
    found = []
    for numbers in group_cohorts(list(enumerate(runs)), max_members=most):
        members = [plans[number] for number in numbers]
        found.append(
            CohortPlan(
                runs=numbers,
                memory=cohort_memory([one.memory for one in members]),
                memory_cpu=cohort_memory([one.memory_cpu for one in members]),
                batches=max(one.steps for one in members),
                batch_bytes=members[0].batch_bytes,
            )
        )
    return tuple(found)


def _run_plan(name: str, config: Config, gemma: GemmaConfig) -> RunPlan:
    tap = config.sae.tap
    check_tap(tap, gemma)
    shape = Shape(
        batch_size=config.train.batch_size,
        d_model=tap_width(gemma, tap.site),
        width=config.sae.width,
        mesh=config.mesh,
        architecture=config.sae.architecture,
        is_transcoder=config.sae.is_transcoder,
        has_skip=config.sae.affine_skip,
    )
    dtype = config.cache.dtype
    places = capacity_per_row(config.train, width=config.sae.width)
    by_pairs, by_pairs_cpu = (may_go_by_pairs(config, on_cpu=on_cpu) for on_cpu in (False, True))
    shape_cpu = dataclasses.replace(shape, places=places if by_pairs_cpu else None)
    shape = dataclasses.replace(shape, places=places if by_pairs else None)
    collectives = collective_bytes(shape)
    sizes = [("data", config.mesh.data), ("model", config.mesh.model)]
    memory = step_memory(shape, store_dtype=dtype)
    return RunPlan(
        name=name,
        tap=" to ".join(one.name for one in config.sae.taps),
        shape=shape,
        steps=config.train.steps,
        memory=memory,
        memory_cpu=step_memory(shape_cpu, store_dtype=dtype, backend="cpu"),
        by_pairs=by_pairs,
        by_pairs_cpu=by_pairs_cpu,
        flops_per_step=step_flops(shape),
        paper_flops_per_step=paper_step_flops(shape),
        traffic_per_step=step_traffic(shape),
        collectives=collectives,
        sent_per_step=sent_bytes(collectives, sizes),
        batch_bytes=memory.next_batch * config.mesh.data,
    )


def _on_accelerator(
    chip: Accelerator,
    config: Config,
    harvest: HarvestWork,
    runs: Sequence[RunPlan],
    cohorts: Sequence[CohortPlan],
    assumptions: Assumptions,
) -> AcceleratorPlan:
    usable = int(chip.hbm_bytes * USABLE_MEMORY)
    verdicts = tuple(_verdict(run, chip, config, usable, assumptions) for run in runs)
    devices = config.mesh.data * config.mesh.model
    harvest_seconds = harvest.flops / (chip.peak(config.model.dtype) * assumptions.mfu * devices)
    harvest_hours = harvest_seconds / 3600
    harvest_cost = _cost(harvest_hours, devices, assumptions)
    train_hours = _sum([one.hours for one in verdicts])
    train_cost = _sum([one.cost for one in verdicts])
    return AcceleratorPlan(
        accelerator=chip,
        usable_bytes=usable,
        harvest_hours=harvest_hours,
        harvest_cost=harvest_cost,
        verdicts=verdicts,
        cohorts=tuple(
            _cohort_verdict(cohort, runs, verdicts, usable=usable, assumptions=assumptions)
            for cohort in cohorts
        ),
        train_hours=train_hours,
        total_hours=_sum([harvest_hours, train_hours]),
        total_cost=_sum([harvest_cost, train_cost]),
    )


def _cohort_verdict(
    cohort: CohortPlan,
    runs: Sequence[RunPlan],
    verdicts: Sequence[Verdict],
    *,
    usable: int,
    assumptions: Assumptions,
) -> CohortVerdict:
    members = [runs[number] for number in cohort.runs]
    memories = sorted((one.memory for one in members), key=lambda memory: -memory.total)
    enough = members[0].devices <= (assumptions.devices or MOST_DEVICES)
    counts = range(1, len(members) + 1)
    fitting = [n for n in counts if cohort_memory(memories[:n]).total <= usable]
    at_once = max(fitting, default=0) if enough else 0
    seconds = sum(verdicts[number].step_seconds for number in cohort.runs)
    fits = at_once == len(members)
    rate = cohort.batch_bytes / seconds if fits else None
    return CohortVerdict(fits, at_once, seconds, rate)


def _verdict(
    run: RunPlan, chip: Accelerator, config: Config, usable: int, assumptions: Assumptions
) -> Verdict:
    most = assumptions.devices or MOST_DEVICES
    fits = run.memory.total <= usable and run.devices <= most
    # Training multiplies in float32 whatever the rows are stored in (docs/numerics.md).
    rate = chip.peak("float32") * assumptions.mfu * run.devices
    compute, memory = run.flops_per_step / rate, run.traffic_per_step / chip.hbm_bandwidth
    seconds = max(compute, memory)
    hours = run.steps * seconds / 3600 if fits else None
    return Verdict(
        run=run.name,
        fits=fits,
        mesh=run.shape.mesh
        if fits
        else nearest_mesh(run.shape, config.cache.dtype, usable=usable, most=most),
        step_seconds=seconds,
        bound="compute" if compute >= memory else "memory",
        hours=hours,
        cost=None if hours is None else _cost(hours, run.devices, assumptions),
        read_bytes_per_second=run.batch_bytes / seconds if fits else None,
        above_default=fits
        and chip.kind == "gpu"
        and run.memory.total > chip.hbm_bytes * GPU_DEFAULT_SHARE,
    )


def _cost(hours: float, devices: int, assumptions: Assumptions) -> float | None:
    return None if assumptions.price is None else hours * devices * assumptions.price


def _sum(parts: Sequence[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def plan_record(plan: Plan) -> dict[str, Any]:
    """The plan as JSON holds it: every field, and the sums that tables show."""
    record = asdict(plan)
    record["store"]["total_bytes"] = plan.store.total_bytes
    for run, entry in zip(plan.runs, record["runs"], strict=True):
        mesh = run.shape.mesh
        entry["shape"]["mesh"] = mesh.model_dump()
        entry["devices"] = run.devices
        for key, memory in (("memory", run.memory), ("memory_cpu", run.memory_cpu)):
            entry[key] |= {"step": memory.step, "total": memory.total, "biggest": memory.biggest}
    for cohort, entry in zip(plan.cohorts, record["cohorts"], strict=True):
        for key, memory in (("memory", cohort.memory), ("memory_cpu", cohort.memory_cpu)):
            entry[key] |= {"step": memory.step, "total": memory.total, "biggest": memory.biggest}
    for chip, entry in zip(plan.accelerators, record["accelerators"], strict=True):
        for verdict, inner in zip(chip.verdicts, entry["verdicts"], strict=True):
            inner["mesh"] = verdict.mesh.model_dump() if verdict.mesh else None
    return record

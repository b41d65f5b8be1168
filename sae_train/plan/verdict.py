"""A plan on one accelerator: does it fit, how long does it take, what does it cost.

`sae_train.plan.runs` and `sae_train.plan.work` have the sizes that this divides by an accelerator's
rates. docs/plan.md says how good the result is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from activation_cache.precision import Precision
from activation_cache.runtime.errors import UserError
from activation_cache.store.tap_array import host_dtype
from sae_train.config.run import Config, MeshConfig
from sae_train.plan.accelerators import Accelerator
from sae_train.plan.memory import nearest_mesh
from sae_train.plan.rolling import Sides, shared_hours
from sae_train.plan.runs import CohortPlan, RunPlan, cohort_bytes
from sae_train.plan.work import HarvestWork, step_traffic

# The runtime's own share, compiled programs, collectives' buffers, fragmentation.
USABLE_MEMORY = 0.92
# XLA_PYTHON_CLIENT_MEM_FRACTION's default (JAX documentation, "GPU memory allocation").
GPU_DEFAULT_SHARE = 0.75
MOST_DEVICES = 4096
# Bytes a second that one process read a store at, on two CPU cores and a local disk
# (docs/performance.md, "Reader"). A faster step waits for such a reader.
READER_RATE = 1.41e9


@dataclass(frozen=True)
class Assumptions:
    """What a plan takes as given.

    Attributes:
        mfu: the share of an accelerator's peak that products reach, 0 to 1.
        devices: how many there are; None: as many as each mesh has.
        price: of one device for one hour, in any currency; None leaves cost out. The
            mesh's devices are paid for, not those it leaves idle.
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

    @property
    def most_devices(self) -> int:
        """The most devices a mesh may have."""
        return self.devices or MOST_DEVICES


@dataclass(frozen=True)
class Verdict:
    """One run on one accelerator.

    Attributes:
        fits: memory and number of devices both suffice.
        mesh: the run's own if it fits, else the nearest that does; None when none does.
        hours, cost, read_bytes_per_second: on the run's own mesh, and None where it doesn't fit.
        precision: of its products.
        traffic_per_step: bytes between a device's memory and its cores.
        bound: `compute`, or `memory` where traffic takes longer than products.
        above_reader: it reads faster than `READER_RATE`.
        above_default: it fits, but not into what JAX takes of a GPU's memory by itself.
    """

    run: str
    fits: bool
    mesh: MeshConfig | None
    precision: Precision
    traffic_per_step: int
    step_seconds: float
    bound: str
    hours: float | None
    cost: float | None
    read_bytes_per_second: float | None
    above_reader: bool
    above_default: bool


@dataclass(frozen=True)
class CohortVerdict:
    """One cohort on one accelerator.

    Attributes:
        fits: memory and number of devices both suffice.
        at_once: how many of its runs fit together, the widest first.
        read_bytes_per_second: for all its runs; None where it doesn't fit.
        above_reader: they read faster than `READER_RATE`.
    """

    fits: bool
    at_once: int
    step_seconds: float
    read_bytes_per_second: float | None
    above_reader: bool


@dataclass(frozen=True)
class AcceleratorPlan:
    """All of a config on one accelerator; totals are None if a run doesn't fit.

    Of a rolling store the harvest is that of all cohorts, one after the other.

    Attributes:
        sides: of a rolling store, how its two sides share the hours.
    """

    accelerator: Accelerator
    usable_bytes: int
    harvest_precision: Precision
    harvest_hours: float
    harvest_cost: float | None
    verdicts: tuple[Verdict, ...]
    cohorts: tuple[CohortVerdict, ...]
    train_hours: float | None
    total_hours: float | None
    total_cost: float | None
    sides: Sides | None


def usable_bytes(chip: Accelerator) -> int:
    """What a step may fill of one device's memory."""
    return int(chip.hbm_bytes * USABLE_MEMORY)


def on_accelerator(
    chip: Accelerator,
    config: Config,
    *,
    harvest: HarvestWork,
    runs: Sequence[RunPlan],
    cohorts: Sequence[CohortPlan],
    assumptions: Assumptions,
) -> AcceleratorPlan:
    """What an accelerator makes of a config: the verdicts of `runs` and `cohorts`, and totals.

    Raises:
        UserError: it has no products at `train.precision`.
    """
    rolling = config.cache.rolling
    beside = rolling is not None and rolling.beside
    mesh = config.harvest_mesh[1] if beside else config.mesh
    usable = usable_bytes(chip)
    if rolling is not None and not beside:  # in turns the language model stays on the devices
        usable -= harvest.weight_bytes // config.harvest_mesh[1].model
    verdicts = tuple(_verdict(run, chip, config, usable, assumptions) for run in runs)
    devices = mesh.data * mesh.model
    precision = chip.harvesting(config.model)
    harvest_seconds = harvest.flops / (chip.flops[precision] * assumptions.mfu * devices)
    harvest_hours = harvest_seconds / 3600 * (1 if rolling is None else len(cohorts))
    harvest_cost = _cost(harvest_hours, devices, assumptions)
    train_hours = total([one.hours for one in verdicts])
    train_cost = total([one.cost for one in verdicts])
    total_hours, total_cost = total([harvest_hours, train_hours]), total([harvest_cost, train_cost])
    sides = None
    if rolling is not None and train_hours is not None:
        trained = [sum(verdicts[run].hours or 0.0 for run in cohort.runs) for cohort in cohorts]
        sides = shared_hours(harvest_hours / len(cohorts), trained, beside=beside)
        if beside:
            both = devices + config.mesh.data * config.mesh.model
            total_hours, total_cost = sides.hours, _cost(sides.hours, both, assumptions)
    return AcceleratorPlan(
        accelerator=chip,
        usable_bytes=usable,
        harvest_precision=precision,
        harvest_hours=harvest_hours,
        harvest_cost=harvest_cost,
        verdicts=verdicts,
        cohorts=tuple(
            _cohort_verdict(cohort, runs, verdicts, usable=usable, assumptions=assumptions)
            for cohort in cohorts
        ),
        train_hours=train_hours,
        total_hours=total_hours,
        total_cost=total_cost,
        sides=sides,
    )


def _verdict(
    run: RunPlan, chip: Accelerator, config: Config, usable: int, assumptions: Assumptions
) -> Verdict:
    most = assumptions.most_devices
    fits = run.needed_bytes <= usable and run.devices <= most
    precision = chip.training(run.precision)
    traffic = step_traffic(run.shape, kind=chip.kind, precision=precision)
    compute = run.flops_per_step / (chip.flops[precision] * assumptions.mfu * run.devices)
    memory = traffic / chip.hbm_bandwidth
    seconds = max(compute, memory)
    hours = None
    if fits:
        spent = run.steps * seconds
        if (phase := run.end_to_end) is not None:
            rate = assumptions.mfu * run.devices
            through = phase.model_flops / chip.flops[chip.harvesting(config.model)]
            through += phase.sae_flops / chip.flops[precision]
            spent += phase.steps * (through / rate - seconds)
        hours = spent / 3600
    reads = run.batch_bytes / seconds if fits else None
    return Verdict(
        run=run.name,
        fits=fits,
        mesh=run.shape.mesh
        if fits
        else nearest_mesh(run.shape, host_dtype(config.cache.dtype), usable=usable, most=most),
        precision=precision,
        traffic_per_step=traffic,
        step_seconds=seconds,
        bound="compute" if compute >= memory else "memory",
        hours=hours,
        cost=None if hours is None else _cost(hours, run.devices, assumptions),
        read_bytes_per_second=reads,
        above_reader=above_reader(reads),
        above_default=fits
        and chip.kind == "gpu"
        and run.needed_bytes > chip.hbm_bytes * GPU_DEFAULT_SHARE,
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
    widest = sorted(members, key=lambda one: -one.needed_bytes)
    enough = members[0].devices <= assumptions.most_devices
    counts = range(1, len(members) + 1)
    fitting = [n for n in counts if cohort_bytes(widest[:n]) <= usable]
    at_once = max(fitting, default=0) if enough else 0
    seconds = sum(verdicts[number].step_seconds for number in cohort.runs)
    fits = at_once == len(members)
    rate = cohort.batch_bytes / seconds if fits else None
    return CohortVerdict(fits, at_once, seconds, rate, above_reader(rate))


def above_reader(rate: float | None) -> bool:
    """Are rows read faster, in bytes a second, than the reader was measured to deliver them?"""
    return rate is not None and rate > READER_RATE


def _cost(hours: float, devices: int, assumptions: Assumptions) -> float | None:
    return None if assumptions.price is None else hours * devices * assumptions.price


def total(parts: Sequence[float | None]) -> float | None:
    """The sum; None where a part is."""
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None

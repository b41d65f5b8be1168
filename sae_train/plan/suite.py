"""What a suite costs: runs that need the same are computed once and counted.

Hours are of one device: devices of a mesh times the hours it runs, so that suites whose meshes
differ can be summed. All else is as in `plan`; docs/plan.md has both.

Legend: B rows of a batch, D width of what is read, F latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from activation_cache.config import MeshConfig
from activation_cache.gemma.config import GemmaConfig
from activation_cache.language_model.published_sizes import config_for_planning
from activation_cache.precision import Precision, PrecisionChoice
from activation_cache.store.tap_array import host_dtype
from sae_train.config.run import Config
from sae_train.plan.accelerators import Accelerator
from sae_train.plan.memory import FLOAT_BYTES, Shape, StepMemory, nearest_mesh
from sae_train.plan.recipe import RecipePlan, recipe_plans
from sae_train.plan.runs import plan_run
from sae_train.plan.verdict import Assumptions, above_reader, total, usable_bytes
from sae_train.plan.work import harvest_work, step_traffic, store_plan


@dataclass(frozen=True)
class CellGroup:
    """Cells, which is what a suite calls its runs, that need the same of everything.

    `kind` is sae, transcoder or embedding; `precision` is what `train.precision` says. `flops` (of
    training) and `weight_bytes` (of what is released) are of all of them.
    """

    what: str
    kind: str
    cells: int
    shape: Shape
    precision: PrecisionChoice
    steps: int
    memory: StepMemory
    batch_bytes: int
    flops: float
    weight_bytes: int

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        return self.shape.mesh.data * self.shape.mesh.model


@dataclass(frozen=True)
class StoreGroup:
    """Stores of one size: what they hold, and the forward passes that fill all of them."""

    stores: int
    taps: int
    rows: int
    bytes_each: int
    flops: float


@dataclass(frozen=True)
class GroupVerdict:
    """A group on one accelerator.

    Attributes:
        fits: a cell fits its own mesh.
        mesh: that mesh, or else the nearest that a cell fits; None where none does.
        precision: of its products.
        device_hours: of all cells of the group on `mesh`.
        read_bytes_per_second: of one cell that trains alone.
        above_reader: that is more than the reader was measured to deliver.
    """

    fits: bool
    mesh: MeshConfig | None
    precision: Precision
    device_hours: float | None
    read_bytes_per_second: float | None
    above_reader: bool


@dataclass(frozen=True)
class SuiteAccelerator:
    """A suite on one accelerator, in hours of one device; None where a group fits no mesh."""

    accelerator: Accelerator
    usable_bytes: int
    harvest_precision: Precision
    harvest_hours: float
    verdicts: tuple[GroupVerdict, ...]
    train_hours: float | None
    total_cost: float | None


@dataclass(frozen=True)
class SuitePlan:
    """What `sae plan` prints of a suite."""

    name: str
    model_from: str
    assumptions: Assumptions
    recipes: tuple[RecipePlan, ...]
    groups: tuple[CellGroup, ...]
    stores: tuple[StoreGroup, ...]
    accelerators: tuple[SuiteAccelerator, ...]

    @property
    def cells(self) -> int:
        """SAEs of the suite, in all groups."""
        return sum(group.cells for group in self.groups)

    @property
    def store_bytes(self) -> int:
        """Of all stores together; one at a time needs the largest alone."""
        return sum(store.stores * store.bytes_each for store in self.stores)


def make_suite_plan(
    config: Config,
    *,
    runs: Sequence[Config],
    accelerators: Sequence[Accelerator],
    assumptions: Assumptions,
) -> SuitePlan:
    """Compute everything that a suite needs.

    Args:
        config: of the suite.
        runs: the suite's runs, each with the store that it reads.

    Raises:
        UserError: the model's shape is neither at hand nor known, it has no such layer, or an
            accelerator makes no products at `train.precision`.
    """
    gemma, source = config_for_planning(config.model)
    groups = tuple(_groups(runs, gemma))
    stores = tuple(_store_groups(runs, gemma))
    return SuitePlan(
        name=config.name,
        model_from=source,
        assumptions=assumptions,
        recipes=recipe_plans([(run.name, run) for run in runs]),
        groups=groups,
        stores=stores,
        accelerators=tuple(
            _on_accelerator(chip, config, groups, stores, assumptions) for chip in accelerators
        ),
    )


def _groups(runs: Sequence[Config], gemma: GemmaConfig) -> list[CellGroup]:
    alike: dict[tuple[Any, ...], list[Config]] = {}
    for run in runs:
        site = None if _kind(run) == "transcoder" else run.sae.site
        work = (run.sae.width, run.train.tokens, run.train.precision, str(run.mesh))
        key = (site, run.sae.affine_skip, *work)
        alike.setdefault(key, []).append(run)
    return [_group(members, gemma) for members in alike.values()]


def _kind(run: Config) -> str:
    if run.sae.is_transcoder:
        return "transcoder"
    return "embedding" if run.sae.site == "embedding" else "sae"


def _group(members: list[Config], gemma: GemmaConfig) -> CellGroup:
    run, kind = members[0], _kind(members[0])
    plan = plan_run(run, name=run.name, gemma=gemma)
    shape = plan.shape
    weights = 2 * shape.width * shape.d_model + 2 * shape.width + shape.d_model
    weights += shape.d_model**2 if shape.has_skip else 0
    return CellGroup(
        what=(run.sae.site if kind == "sae" else kind) + (", affine" if shape.has_skip else ""),
        kind=kind,
        cells=len(members),
        shape=shape,
        precision=plan.precision,
        steps=plan.steps,
        memory=plan.memory,
        batch_bytes=plan.batch_bytes,
        flops=float(len(members)) * plan.steps * plan.flops_per_step,
        weight_bytes=len(members) * weights * FLOAT_BYTES,
    )


def _store_groups(runs: Sequence[Config], gemma: GemmaConfig) -> list[StoreGroup]:
    """The stores that the runs read."""
    alike: dict[tuple[int, int, int], list[float]] = {}
    for run in {run.cache.path: run for run in runs}.values():
        size = store_plan(run.cache, run.text, gemma)
        work = harvest_work(run.cache, run.text, gemma, dtype=run.model.dtype)
        key = (len(size.tap_bytes), size.rows, size.total_bytes)
        alike.setdefault(key, []).append(work.flops)
    return [
        StoreGroup(stores=len(flops), taps=taps, rows=rows, bytes_each=size, flops=sum(flops))
        for (taps, rows, size), flops in alike.items()
    ]


def _on_accelerator(
    chip: Accelerator,
    config: Config,
    groups: Sequence[CellGroup],
    stores: Sequence[StoreGroup],
    assumptions: Assumptions,
) -> SuiteAccelerator:
    verdicts = tuple(_verdict(group, chip, config, assumptions) for group in groups)
    precision = chip.harvesting(config.model)
    rate = chip.flops[precision] * assumptions.mfu
    harvest = sum(store.flops for store in stores) / rate / 3600
    train = total([verdict.device_hours for verdict in verdicts])
    price = assumptions.price
    return SuiteAccelerator(
        accelerator=chip,
        usable_bytes=usable_bytes(chip),
        harvest_precision=precision,
        harvest_hours=harvest,
        verdicts=verdicts,
        train_hours=train,
        total_cost=None if price is None or train is None else price * (harvest + train),
    )


def _verdict(
    group: CellGroup, chip: Accelerator, config: Config, assumptions: Assumptions
) -> GroupVerdict:
    usable, most = usable_bytes(chip), assumptions.most_devices
    fits = group.memory.total <= usable and group.devices <= most
    mesh: MeshConfig | None = group.shape.mesh
    if not fits:
        mesh = nearest_mesh(group.shape, host_dtype(config.cache.dtype), usable=usable, most=most)
    precision = chip.training(group.precision)
    if mesh is None:
        return GroupVerdict(False, None, precision, None, None, False)
    devices, steps = mesh.data * mesh.model, group.cells * group.steps
    traffic = step_traffic(replace(group.shape, mesh=mesh), kind=chip.kind, precision=precision)
    # Products are shared out among the devices; each makes its own passes over memory.
    compute = group.flops / (chip.flops[precision] * assumptions.mfu)
    seconds = max(compute, steps * devices * traffic / chip.hbm_bandwidth)
    reads = group.batch_bytes * steps * devices / seconds
    return GroupVerdict(
        fits=fits,
        mesh=mesh,
        precision=precision,
        device_hours=seconds / 3600,
        read_bytes_per_second=reads,
        above_reader=above_reader(reads),
    )

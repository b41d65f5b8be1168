"""What each SAE of a plan needs, whatever accelerator it is trained on.

The memory of a device, the work and the collectives of a step; and of runs that train together,
what a device holds for all of them. `sae_train.plan.verdict` turns it into hours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from activation_cache.gemma.config import GemmaConfig
from activation_cache.gemma.taps import tap_width
from activation_cache.precision import PrecisionChoice
from activation_cache.store.tap_array import host_dtype, stored_row_bytes
from sae_train.config.run import Config
from sae_train.plan.end_to_end import EndToEndPlan, plan_end_to_end
from sae_train.plan.memory import (
    STATE_ITEMS,
    Shape,
    StepMemory,
    cohort_memory,
    step_memory,
)
from sae_train.plan.work import collective_bytes, paper_step_flops, sent_bytes, step_flops
from sae_train.step.path_choice import capacity_per_row, may_be_sparse
from sae_train.train.cohort import group_cohorts


@dataclass(frozen=True)
class RunPlan:
    """One SAE: sizes, memory of a device, work per step. Independent of the accelerator.

    `sparse_path` and `sparse_path_cpu` say whether steps may take the sparse path, on accelerators
    and on CPUs; `memory` and `memory_cpu` are that path's then. Work and collectives are always
    those of the dense path; of steps through the language model `end_to_end` has them, if there
    are any. `precision` is what `train.precision` says, which may be `auto`.
    """

    name: str
    tap: str
    shape: Shape
    precision: PrecisionChoice
    steps: int
    memory: StepMemory
    memory_cpu: StepMemory
    sparse_path: bool
    sparse_path_cpu: bool
    flops_per_step: int
    paper_flops_per_step: int
    collectives: Mapping[str, int]
    sent_per_step: float
    batch_bytes: int
    end_to_end: EndToEndPlan | None

    @property
    def needed_bytes(self) -> int:
        """Bytes a device must have for all steps of the run."""
        through = 0 if self.end_to_end is None else self.end_to_end.memory.total
        return max(self.memory.total, through)

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
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


def cohort_bytes(runs: Sequence[RunPlan]) -> int:
    """Bytes a device must have for runs that train together, through the model too."""
    states = [sum(run.memory.items[name] for name in STATE_ITEMS) for run in runs]
    through = [
        run.end_to_end.memory.total - own
        for run, own in zip(runs, states, strict=True)
        if run.end_to_end is not None
    ]
    plain = cohort_memory([run.memory for run in runs]).total
    return max(plain, sum(states) + max(through, default=0))


def plan_run(config: Config, *, name: str, gemma: GemmaConfig | int) -> RunPlan:
    """Size one SAE up, of the model's shape or, of imported rows, their width.

    Raises:
        UserError: the model has no such layer.
    """
    dtype, capacity = host_dtype(config.cache.dtype), capacity_per_row(config)
    sparse_path, sparse_path_cpu = (
        may_be_sparse(config, on_cpu=on_cpu) for on_cpu in (False, True)
    )
    shape, shape_cpu = (
        Shape.of(config, gemma, capacity=capacity if sparse else None)
        for sparse in (sparse_path, sparse_path_cpu)
    )
    collectives = collective_bytes(shape)
    sizes = [("data", config.mesh.data), ("model", config.mesh.model)]
    memory = step_memory(shape, store_dtype=dtype)
    return RunPlan(
        name=name,
        tap=" to ".join(one.name for one in config.sae.taps),
        shape=shape,
        precision=config.train.precision,
        steps=config.train.steps,
        memory=memory,
        memory_cpu=step_memory(shape_cpu, store_dtype=dtype, backend="cpu"),
        sparse_path=sparse_path,
        sparse_path_cpu=sparse_path_cpu,
        flops_per_step=step_flops(shape),
        paper_flops_per_step=paper_step_flops(shape),
        collectives=collectives,
        sent_per_step=sent_bytes(collectives, sizes),
        batch_bytes=_batch_bytes(config, gemma),
        end_to_end=(
            None if isinstance(gemma, int) else plan_end_to_end(config, gemma, state=memory)
        ),
    )


def _batch_bytes(config: Config, gemma: GemmaConfig | int) -> int:
    """Bytes that a batch takes in the store, of all taps that the run reads."""
    cache = config.cache
    widths = [
        gemma if isinstance(gemma, int) else tap_width(gemma, tap.site) for tap in config.sae.taps
    ]
    row_bytes = (
        stored_row_bytes(cache.dtype, width=width, block_rows=cache.block_rows) for width in widths
    )
    return config.train.batch_size * sum(row_bytes)


def plan_cohorts(
    runs: Sequence[Config], *, plans: Sequence[RunPlan], max_members: int
) -> tuple[CohortPlan, ...]:
    """The cohorts of at most `max_members` in which runs train; `plans[i]` is that of `runs[i]`."""
    found = []
    for numbers in group_cohorts(list(enumerate(runs)), max_members=max_members):
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

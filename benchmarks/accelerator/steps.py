"""Milliseconds of a training step: dense, sparse, and sparse with kernels, at every precision.

The programs of a size are compiled side by side before the first of them is timed. What doesn't fit
on the device, doesn't compile or has no time left has a line that says so. The sparse step is timed
in bfloat16 and float32; the other two precisions change its first product alone.

Legend: B rows of a batch, D model width, F latents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from activation_cache.precision import Precision
from benchmarks.accelerator.results import (
    Clock,
    Row,
    is_gpu,
    memory_limit,
    milliseconds,
    most_held,
    over_peak,
    precisions,
    reason,
    timed,
)
from benchmarks.step import StepProgram, config_of, lowered_step
from sae_train.config.run import Config
from sae_train.sparse.kernels.mode import without_gpu

BATCH, L0 = 4096, 100
# The first of them are those that matter most where time is short.
SIZES = (
    (2304, 16_384),
    (2304, 131_072),
    (3584, 131_072),
    (2304, 1_048_576),
    (3584, 16_384),
    (3584, 1_048_576),
)
SMALL_BATCH, SMALL_L0, SMALL_SIZES = 64, 8, ((64, 512),)
# From this width on arrays are so large that trying algorithms for several programs at once, which
# the compiler does, might take more memory than there is.
ALONE = 2**19
COMPILERS = 8
PAIRS_AT: tuple[Precision, ...] = ("bfloat16", "float32")

Kind = Literal["dense", "sparse", "kernels"]
KINDS: tuple[Kind, ...] = ("dense", "sparse", "kernels")


@dataclass(frozen=True)
class Program:
    """One step of one size."""

    kind: Kind
    precision: Precision
    d_model: int
    width: int
    batch_size: int

    @property
    def columns(self) -> dict[str, Any]:
        """What names it in a line."""
        return {
            "what": self.kind,
            "precision": self.precision,
            "d_model": self.d_model,
            "width": self.width,
        }

    @property
    def paper_flops(self) -> float:
        """By Gemma Scope's convention, 6 for each parameter and row: 12 B D F."""
        return 12.0 * self.batch_size * self.d_model * self.width

    def config(self) -> Config:
        """The run's."""
        return step_config(self.kind, self.precision, width=self.width, batch_size=self.batch_size)

    def lowered(self) -> jax.stages.Lowered:
        """Traced; kernels are interpreted where there is no GPU."""
        with without_gpu("interpret") if is_interpreted(self.kind) else nullcontext():
            return lowered_step(self.config(), d_model=self.d_model)


def step_config(kind: Kind, precision: Precision, *, width: int, batch_size: int) -> Config:
    """The config of a run with this step."""
    return config_of(
        width=width,
        batch_size=batch_size,
        step="dense" if kind == "dense" else "sparse",
        kernels="pallas" if kind == "kernels" else "xla",
        precision=precision,
    )


def is_interpreted(kind: Kind) -> bool:
    """Are its kernels interpreted, there being no GPU?"""
    return kind == "kernels" and not is_gpu()


def rows(
    *,
    small: bool,
    clock: Clock,
    kinds: Sequence[Kind] = ("dense", "sparse"),
) -> Iterator[Row]:
    """The lines of each size."""
    for d_model, width in SMALL_SIZES if small else SIZES:
        batch_size = SMALL_BATCH if small else BATCH
        pairs_at = PAIRS_AT[1:] if small else PAIRS_AT
        programs = [
            Program(kind, precision, d_model, width, batch_size)
            for precision in precisions()
            for kind in kinds
            if kind == "dense" or precision in pairs_at
        ]
        together = 1 if width >= ALONE else len(programs)
        for first in range(0, len(programs), together):
            some = programs[first : first + together]
            yield from _side_by_side(some, l0=SMALL_L0 if small else L0, clock=clock)


def _side_by_side(programs: Sequence[Program], *, l0: float, clock: Clock) -> Iterator[Row]:
    rows_BD = unit_rows(programs[0].batch_size, programs[0].d_model)
    compiled = _compiled(programs, clock=clock)
    for program in programs:
        found = compiled[program]
        if isinstance(found, str):
            yield Row(**program.columns, note=found)
        else:
            yield _measured(program, found, rows_BD=rows_BD, l0=l0, clock=clock)


def unit_rows(num: int, d_model: int) -> jax.Array:
    """Random rows of norm 1, made on the device."""
    rows = jax.random.normal(jax.random.key(2), (num, d_model), jnp.float32)
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


def _compiled(
    programs: Sequence[Program], *, clock: Clock
) -> dict[Program, jax.stages.Compiled | str]:
    """Each program, or why there is none."""
    found: dict[Program, Any] = {}
    with ThreadPoolExecutor(COMPILERS) as pool:
        for program in programs:
            if clock.left <= 0:
                found[program] = "left out: no time"
                continue
            try:
                lowered = program.lowered()
            except Exception as error:  # of another part of the table, which goes on
                found[program] = reason(error)
                continue
            found[program] = pool.submit(_compile, lowered, clock)
    return {
        program: one if isinstance(one, str) else one.result() for program, one in found.items()
    }


def _compile(lowered: jax.stages.Lowered, clock: Clock) -> jax.stages.Compiled | str:
    if clock.left <= 0:
        return "left out: no time"
    try:
        return lowered.compile()
    except Exception as error:
        return reason(error)


def program_bytes(compiled: jax.stages.Compiled) -> int:
    """What it holds at once: arguments, temporaries, and results that overwrite nothing."""
    found: Any = compiled.memory_analysis()
    fresh = found.output_size_in_bytes - found.alias_size_in_bytes
    return int(found.argument_size_in_bytes + found.temp_size_in_bytes + fresh)


def _measured(
    program: Program, compiled: jax.stages.Compiled, *, rows_BD: jax.Array, l0: float, clock: Clock
) -> Row:
    needed, limit = program_bytes(compiled), memory_limit()
    columns = program.columns | {"gigabytes": needed / 1e9}
    if needed > limit:
        return Row(**columns, note=f"left out: more than the {limit / 1e9:.3g} GB there are")
    if clock.left <= 0:
        return Row(**columns, note="left out: no time")
    try:
        step = StepProgram(program.config(), rows_BD=rows_BD, l0=l0, compiled=compiled)
        times = timed(step, clock=clock)
        note = f"L0 {step.l0:.0f}" + (f", {step.overflows} overflows" if step.overflows else "")
    except Exception as error:
        return Row(**columns, note=reason(error))
    rate = program.paper_flops / times.median
    return Row(
        **columns,
        **milliseconds(times),
        rate=rate / 1e12,
        unit="TFLOP/s",
        mfu=over_peak(rate, program.precision),
        peak_gigabytes=most_held(),
        note=note,
    )

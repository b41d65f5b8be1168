"""Whole steps with Pallas kernels, and each kernel beside pure JAX and the machine's limit.

Both ways of a part work on the same operands. Beside selecting stands the encoder's product alone.
The rate of decoding and of the pass over touched latents counts the bytes that they can't but move,
to be compared with copying. A kernel that doesn't beat pure JAX should go.

Legend: B rows of a batch, D model width, F latents, P places for pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from activation_cache.precision import Precision
from activation_cache.products import einsum
from benchmarks.accelerator import steps
from benchmarks.accelerator.results import Clock, Row, is_gpu, milliseconds, reason, timed
from sae_train.config.run import Config
from sae_train.sparse import active_pairs, latent_updates, segment_sums
from sae_train.sparse.kernels import decode, select
from sae_train.sparse.kernels import update as update_module
from sae_train.sparse.kernels.mode import without_gpu
from sae_train.step.gradients import OutputGradients, Rows
from sae_train.step.optimiser import unit_rows
from sae_train.step.schedule import Scheduled

BANDWIDTH, PAIRS_PER_ROW = 1e-3, 2 * steps.L0
SIZES, SMALL_SIZE = ((2304, 16_384), (2304, 131_072)), (64, 512)


def rows(*, small: bool, clock: Clock) -> Iterator[Row]:
    """Whole steps in 60 % of the time, then the parts; on a CPU interpreted, so at small sizes."""
    if not small and not is_gpu():
        yield Row(what="kernels", note="left out: they are for GPUs")
        return
    whole = replace(clock, seconds=0.6 * clock.seconds)
    yield from steps.rows(small=small, clock=whole, kinds=("kernels",))
    for d_model, width in (SMALL_SIZE,) if small else SIZES:
        for precision in steps.PAIRS_AT[1:] if small else steps.PAIRS_AT:
            sizes = Sizes(d_model, width, steps.SMALL_BATCH if small else steps.BATCH, precision)
            with nullcontext() if is_gpu() else without_gpu("interpret"):
                yield from _parts(sizes, clock=clock)


@dataclass(frozen=True)
class Sizes:
    """Of the operands, and the precision of the products."""

    d_model: int
    width: int
    batch_size: int
    precision: Precision

    def row(self, part: str, **columns: Any) -> Row:
        """A line about a part."""
        return Row(
            what=part,
            precision=self.precision,
            d_model=self.d_model,
            width=self.width,
            **columns,
        )


class Case:
    """Operands of one size, on the device; about `steps.L0` latents of each row are active."""

    def __init__(self, sizes: Sizes) -> None:
        keys = iter(jax.random.split(jax.random.key(0), 6))

        @partial(jax.jit, static_argnums=1)
        def normal(key: jax.Array, num: int) -> jax.Array:
            return unit_rows(jax.random.normal(key, (num, sizes.d_model), jnp.float32))

        width, rows = sizes.width, sizes.batch_size
        self.sizes = sizes
        self.x_BD, g_BD = normal(next(keys), rows), normal(next(keys), rows)
        weights, roots = (
            {name: normal(next(keys), width) for name in ("W_enc", "W_dec")} for _ in range(2)
        )
        self.rows: Rows = weights, {name: root**2 for name, root in roots.items()}
        some = jnp.einsum("bd,fd->bf", self.x_BD[:256], weights["W_enc"][:16_384])
        active = min(steps.L0, width // 8)
        self.theta_F = jnp.full(width, jnp.quantile(some, 1 - active / width), jnp.float32)
        self.bias_F = jnp.zeros(width)
        self.output = OutputGradients(
            self.x_BD, g_BD, jnp.full(rows, 1e-6), jnp.full(width, 1e-6), self.theta_F, self.bias_F
        )
        scalars = Scheduled(
            learning_rate=jnp.float32(1e-6),
            sparsity_coefficient=jnp.zeros(()),
            sparsity_warmup=jnp.zeros(()),
            bias_correction=jnp.float32(1.0),
            momentum_correction=jnp.float32(1.0),
        )
        self.update = scalars, jnp.ones(width)
        self.select_options: dict[str, Any] = {
            "bandwidth": BANDWIDTH,
            "capacity": rows * PAIRS_PER_ROW,
            "precision": sizes.precision,
        }
        self.found: active_pairs.Pairs = jax.jit(
            partial(active_pairs.select_pairs, **self.select_options)
        )(weights["W_enc"], self.bias_F, self.theta_F, self.x_BD)

    @property
    def config(self) -> Config:
        """Of which the pass over touched latents reads the optimiser's numbers."""
        sizes = self.sizes
        return steps.step_config(
            "sparse", sizes.precision, width=sizes.width, batch_size=sizes.batch_size
        )


def _parts(sizes: Sizes, *, clock: Clock) -> Iterator[Row]:
    """The limits, then each part by both ways."""
    if clock.left <= 0:
        yield sizes.row("parts", note="left out: no time")
        return
    case = Case(sizes)
    product = jax.jit(partial(einsum, "bd,fd->bf", precision=sizes.precision))
    times = timed(partial(product, case.x_BD, case.rows[0]["W_enc"]), clock=clock)
    yield sizes.row("limit of select: its product", **milliseconds(times))
    total, touched = int(case.found.total), int((case.found.counts_F > 0).sum())
    parts = {
        "select": (_select, 0),
        "decode": (_decode, total + sizes.batch_size),
        "touched": (_touched, 8 * touched + 2 * total),
    }
    for part, (measure, moved_rows) in parts.items():
        try:
            for row in measure(case, clock):
                rate = 4e-9 * sizes.d_model * moved_rows / (row.milliseconds / 1e3)
                yield row if part == "select" else _with_rate(row, rate)
        except Exception as error:  # another kernel may do
            yield sizes.row(part, note=reason(error))


def _with_rate(row: Row, rate: float) -> Row:
    return Row(**(vars(row) | {"rate": rate, "unit": "GB/s"}))


def _both(
    case: Case, part: str, ways: dict[str, Callable[[], Any]], *, differ: float, clock: Clock
) -> Iterator[Row]:
    """The kernel, then pure JAX; `error` is how far their results are apart."""
    for way, call in ways.items():
        error = differ if way == "kernel" else None
        times = timed(call, clock=clock)
        yield case.sizes.row(f"{part}, {way}", error=error, **milliseconds(times))


def _select(case: Case, clock: Clock) -> Iterator[Row]:
    operands = case.rows[0]["W_enc"], case.bias_F, case.theta_F, case.x_BD
    kernel, xla = (
        jax.jit(partial(module.select_pairs, **case.select_options))
        for module in (select, active_pairs)
    )
    ways = {"kernel": partial(kernel, *operands), "pure JAX": partial(xla, *operands)}
    differ = _counts_apart(kernel(*operands), case.found)
    return _both(case, "select", ways, differ=differ, clock=clock)


def _counts_apart(ours: active_pairs.Pairs, theirs: active_pairs.Pairs) -> float:
    """Which share of the pairs is in one list alone, seen by the counts of each latent.

    A pair within rounding of its threshold is in one list and not in the other, so that the lists
    can't be compared place by place.
    """
    return int(jnp.abs(ours.counts_F - theirs.counts_F).sum()) / int(theirs.total)


def _decode(case: Case, clock: Clock) -> Iterator[Row]:
    found = case.found
    theta_P = jnp.append(case.theta_F, jnp.inf)[found.latent_P]
    latents_P = jnp.where(found.pre_P > theta_P, found.pre_P, 0.0)
    operands = found, latents_P, case.rows[0]["W_dec"]
    options: dict[str, Any] = {
        "num_rows": case.sizes.batch_size,
        "precision": case.sizes.precision,
    }
    kernel, xla = (
        jax.jit(partial(module.decode_pairs, **options)) for module in (decode, segment_sums)
    )
    ways = {"kernel": partial(kernel, *operands), "pure JAX": partial(xla, *operands)}
    differ = _differ(kernel(*operands), xla(*operands))
    return _both(case, "decode", ways, differ=differ, clock=clock)


def _touched(case: Case, clock: Clock) -> Iterator[Row]:
    """In place, both ways on the same rows one after the other."""
    segments = jax.jit(segment_sums.longest_first)(case.found.counts_F)
    options: dict[str, Any] = {
        "output": case.output,
        "config": case.config,
        "precision": case.sizes.precision,
    }
    both = {
        "kernel": partial(update_module.touched_pass, **options),
        "pure JAX": partial(latent_updates.touched_pass, **options),
    }
    lists = segments, case.found.row_P, case.found.pre_P
    passes = {
        way: jax.jit(partial(one, update=case.update), donate_argnums=0)
        for way, one in both.items()
    }
    looks = [
        jax.jit(lambda rows, *p, one=one: one(rows, *p, update=None)[1]) for one in both.values()
    ]
    differ = _differ(*(look(case.rows, *lists) for look in looks))

    def once(way: str) -> Any:
        case.rows, sums = passes[way](case.rows, *lists)
        return sums

    ways = {way: partial(once, way) for way in passes}
    return _both(case, "touched", ways, differ=differ, clock=clock)


def _differ(ours: Any, theirs: Any) -> float:
    """The largest difference of two trees, relative to the largest number of each of its leaves."""
    return max(
        float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-30))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    )

"""The Pallas kernels of the sparse step beside pure JAX and the machine's limit. Needs a GPU.

    python -m benchmarks.kernels --out kernels.json

At each size both ways of a part take turns on the same operands, once it was seen how far they
agree: selecting beside the encoder's product alone, decoding and the pass over touched latents
beside the time in which the bytes that they can't but move would be copied. `--precision` is that
of all products.

Legend: B rows of a batch, D model width, F latents, P places for pairs.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp

from activation_cache.precision import Precision, einsum
from benchmarks.step import config_of
from benchmarks.support.measure import interleaved, markdown, prepare, write_results
from sae_train.sparse import active_pairs, latent_updates, segment_sums
from sae_train.sparse.kernels import decode, select
from sae_train.sparse.kernels import update as update_module
from sae_train.step.gradients import OutputGradients, Rows
from sae_train.step.optimiser import unit_rows
from sae_train.step.schedule import Scheduled

BATCH, L0, BANDWIDTH = 4096, 100, 1e-3
CAPACITY = BATCH * 2 * L0
WIDTHS = (16_384, 131_072, 1_048_576)
D_MODELS = (2304, 3584)
NO_GPU = "kernels: no GPU here, so there is nothing to measure"


@dataclass(frozen=True)
class Row:
    """Seconds of one part at one size, by both ways; `differ` is relative to the largest number.

    `limit` is that of the encoder's product, or of copying the bytes that must be moved.
    """

    part: str
    d_model: int
    width: int
    pairs: int
    pallas: float
    pallas_quartiles: tuple[float, float]
    xla: float
    xla_quartiles: tuple[float, float]
    limit: float
    differ: float


def has_gpu() -> bool:
    """Is the default device a GPU?"""
    return jax.default_backend() == "gpu"


class Case:
    """Operands of one size, on the device; about `L0` latents of each row are active."""

    def __init__(self, *, d_model: int, width: int, precision: Precision) -> None:
        keys = iter(jax.random.split(jax.random.key(0), 6))

        @partial(jax.jit, static_argnums=1)
        def normal(key: jax.Array, num: int) -> jax.Array:
            return unit_rows(jax.random.normal(key, (num, d_model), jnp.float32))

        self.d_model, self.width, self.precision = d_model, width, precision
        self.x_BD, g_BD = normal(next(keys), BATCH), normal(next(keys), BATCH)
        weights, roots = (
            {name: normal(next(keys), width) for name in ("W_enc", "W_dec")} for _ in range(2)
        )
        self.rows: Rows = weights, {name: root**2 for name, root in roots.items()}
        some = jnp.einsum("bd,fd->bf", self.x_BD[:256], weights["W_enc"][:16_384])
        self.theta_F = jnp.full(width, jnp.quantile(some, 1 - L0 / width), jnp.float32)
        self.bias_F = jnp.zeros(width)
        per_latent = jnp.full(width, 1e-6)
        self.output = OutputGradients(
            self.x_BD, g_BD, jnp.full(BATCH, 1e-6), per_latent, self.theta_F, self.bias_F
        )
        scalars = Scheduled(
            learning_rate=jnp.float32(1e-6),
            sparsity_coefficient=jnp.zeros(()),
            sparsity_warmup=jnp.zeros(()),
            bias_correction=jnp.float32(1.0),
        )
        self.update = scalars, jnp.ones(width)
        self.config = config_of(width=width, batch_size=BATCH, step="sparse")

    @property
    def select_options(self) -> dict[str, Any]:
        """What `select_pairs` is told beside its operands."""
        return {"bandwidth": BANDWIDTH, "capacity": CAPACITY, "precision": self.precision}

    def found(self) -> active_pairs.Pairs:
        """The pairs, by pure JAX."""
        one = partial(active_pairs.select_pairs, **self.select_options)
        return jax.jit(one)(self.rows[0]["W_enc"], self.bias_F, self.theta_F, self.x_BD)


def _differ(ours: Any, theirs: Any) -> float:
    """The largest difference of two trees, relative to the largest number of each of its leaves."""
    return max(
        float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-30))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    )


def _timed(
    case: Case,
    found: active_pairs.Pairs,
    part: str,
    ways: dict[str, Callable[[], Any]],
    *,
    limit: float,
    differ: float,
    rounds: int,
) -> Row:
    times = interleaved(ways, rounds=rounds)
    ours, theirs = times["pallas"], times["xla"]
    return Row(
        part=part,
        d_model=case.d_model,
        width=case.width,
        pairs=int(found.total),
        pallas=ours.median,
        pallas_quartiles=(ours.low, ours.high),
        xla=theirs.median,
        xla_quartiles=(theirs.low, theirs.high),
        limit=limit,
        differ=differ,
    )


def _off(case: Case, ours: active_pairs.Pairs, theirs: active_pairs.Pairs) -> float:
    """How far pairs are from what they should be, some looked at, or the counts from each other.

    A pair within rounding of its threshold is in one list and not in the other, so that the lists
    can't be compared place by place.
    """
    some = slice(0, min(int(ours.total), 65_536))
    W_PD, x_PD = case.rows[0]["W_enc"][ours.latent_P[some]], case.x_BD[ours.row_P[some]]
    pre_differ = _differ(ours.pre_P[some], (W_PD * x_PD).sum(axis=1))
    return max(pre_differ, float(jnp.abs(ours.counts_F - theirs.counts_F).sum() / theirs.total))


def _select(case: Case, found: active_pairs.Pairs, *, product: float, rounds: int) -> Row:
    operands = case.rows[0]["W_enc"], case.bias_F, case.theta_F, case.x_BD
    xla = jax.jit(partial(active_pairs.select_pairs, **case.select_options))
    kernel = jax.jit(partial(select.select_pairs, **case.select_options))
    return _timed(
        case,
        found,
        "select",
        {"pallas": partial(kernel, *operands), "xla": partial(xla, *operands)},
        limit=product,
        differ=_off(case, kernel(*operands), found),
        rounds=rounds,
    )


def _decode(case: Case, found: active_pairs.Pairs, *, bandwidth: float, rounds: int) -> Row:
    theta_P = jnp.append(case.theta_F, jnp.inf)[found.latent_P]
    latents_P = jnp.where(found.pre_P > theta_P, found.pre_P, 0.0)
    operands = found, latents_P, case.rows[0]["W_dec"]
    ours, theirs = (
        jax.jit(partial(one, num_rows=BATCH, precision=case.precision))
        for one in (decode.decode_pairs, segment_sums.decode_pairs)
    )
    moved = 4 * case.d_model * (int(found.total) + BATCH)
    return _timed(
        case,
        found,
        "decode",
        {"pallas": partial(ours, *operands), "xla": partial(theirs, *operands)},
        limit=moved / bandwidth,
        differ=_differ(ours(*operands), theirs(*operands)),
        rounds=rounds,
    )


def _touched(case: Case, found: active_pairs.Pairs, *, bandwidth: float, rounds: int) -> Row:
    """In place, both ways on the same rows one after the other."""
    segments = jax.jit(segment_sums.longest_first)(found.counts_F)
    options: dict[str, Any] = {
        "output": case.output,
        "config": case.config,
        "precision": case.precision,
    }
    in_kernel = partial(update_module.touched_pass, **options)
    by_xla = partial(latent_updates.touched_pass, **options)
    lists = segments, found.row_P, found.pre_P
    both = {"pallas": in_kernel, "xla": by_xla}
    passes = {
        name: jax.jit(partial(one, update=case.update), donate_argnums=0)
        for name, one in both.items()
    }
    looks = [
        jax.jit(lambda rows, *p, one=one: one(rows, *p, update=None)[1]) for one in both.values()
    ]
    differ = _differ(*(look(case.rows, *lists) for look in looks))

    def once(name: str) -> Any:
        case.rows, sums = passes[name](case.rows, *lists)
        return sums

    num_touched = int((found.counts_F > 0).sum())
    moved = 4 * case.d_model * (8 * num_touched + 2 * int(found.total))
    return _timed(
        case,
        found,
        "touched",
        {name: partial(once, name) for name in passes},
        limit=moved / bandwidth,
        differ=differ,
        rounds=rounds,
    )


def copy_bandwidth(*, rounds: int) -> float:
    """Bytes a second that are read and written by adding 1 to an array of 1 GiB."""
    array = jnp.zeros(2**28, jnp.float32)
    times = interleaved({"copy": partial(jax.jit(lambda a: a + 1), array)}, rounds=rounds)
    return 2 * array.nbytes / times["copy"].median


def product_seconds(case: Case, *, rounds: int) -> float:
    """The encoder's product, of 16384 latents and multiplied up."""
    num = min(case.width, 16_384)
    product = jax.jit(partial(einsum, "bd,fd->bf", precision=case.precision))
    once = partial(product, case.x_BD, case.rows[0]["W_enc"][:num])
    return interleaved({"product": once}, rounds=rounds)["product"].median * case.width / num


def fits(*, d_model: int, width: int) -> bool:
    """Do four matrices, and what sorting and selecting need beside them, fit on the device?"""
    stats = jax.devices()[0].memory_stats() or {}
    return 5 * 4 * d_model * width < stats.get("bytes_limit", 0)


def measure(*, d_model: int, width: int, precision: Precision, rounds: int) -> list[Row]:
    """The rows of one size."""
    case = Case(d_model=d_model, width=width, precision=precision)
    found, bandwidth = case.found(), copy_bandwidth(rounds=rounds)
    return [
        _select(case, found, product=product_seconds(case, rounds=rounds), rounds=rounds),
        _decode(case, found, bandwidth=bandwidth, rounds=rounds),
        _touched(case, found, bandwidth=bandwidth, rounds=rounds),
    ]


def run(
    *,
    precision: Precision = "float32",
    rounds: int,
    widths: Sequence[int] = WIDTHS,
    d_models: Sequence[int] = D_MODELS,
) -> list[Row]:
    """All rows, of the sizes that fit on the device."""
    sizes = [(d_model, width) for d_model in d_models for width in widths]
    held = [size for size in sizes if fits(d_model=size[0], width=size[1])]
    return [
        row
        for D, F in held
        for row in measure(d_model=D, width=F, precision=precision, rounds=rounds)
    ]


def table(rows: Sequence[Row]) -> str:
    """Markdown, times in milliseconds."""
    lines = [
        [
            row.part,
            f"{row.d_model}",
            f"{row.width}",
            f"{row.pairs}",
            f"{1e3 * row.pallas:.2f}",
            f"{1e3 * row.xla:.2f}",
            f"{row.pallas / row.xla:.2f}",
            f"{1e3 * row.limit:.2f}",
            f"{row.pallas / row.limit:.2f}",
            f"{row.differ:.1e}",
        ]
        for row in rows
    ]
    sizes = ("part", "D", "width", "pairs")
    times = ("kernel", "pure JAX", "kernel / pure JAX", "limit", "kernel / limit", "differ by")
    return markdown([*sizes, *times], lines)


def main() -> None:
    """Print the table, or that there is no GPU; with `--out` keep the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write JSON here")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--precision", choices=get_args(Precision), default="float32")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--d-models", type=int, nargs="+", default=D_MODELS)
    arguments = parser.parse_args()
    prepare()
    if not has_gpu():
        sys.stdout.write(f"{NO_GPU}\n")
        return
    rows = run(
        precision=arguments.precision,
        rounds=arguments.rounds,
        widths=arguments.widths,
        d_models=arguments.d_models,
    )
    sys.stdout.write(table(rows) + "\n")
    if arguments.out is not None:
        write_results(arguments.out, {"rows": [dataclasses.asdict(row) for row in rows]})


if __name__ == "__main__":
    main()

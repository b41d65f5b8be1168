"""A training step against its own matrix products: the dense path and the sparse one.

    python -m benchmarks.step --out step.json

For each width and L0 four programs take turns on the same batch: the step with `train.step:
dense`, the one with `sparse`, the encoder's product alone, and all five products of a dense step.
Rows and encoder are random and of unit norm, and the threshold the quantile that lets about L0
latents fire. What counts is the ratio of medians in one run; the spread is the quartiles'.

Legend: B rows of a batch, D model width, F latents.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from activation_cache.config import CacheConfig, ModelConfig, SiteConfig, TextConfig
from activation_cache.precision import PrecisionChoice
from activation_cache.products import einsum
from benchmarks.support.measure import StepTimes, interleaved, markdown, prepare, write_results
from sae_train.config.run import Config, SaeConfig, TrainConfig
from sae_train.config.sparsity import L0Penalty
from sae_train.model.sharding import BATCH_DIMS, make_mesh, sharding
from sae_train.step.schedule import scheduled
from sae_train.step.state import TrainState, abstract_state, init_state
from sae_train.train.train_step import make_train_step


@dataclass(frozen=True, kw_only=True)
class Row(StepTimes):
    """Seconds of one program at one size."""

    l0: float


def config_of(
    *,
    width: int,
    batch_size: int,
    step: Literal["dense", "sparse"],
    kernels: Literal["xla", "pallas"] = "xla",
    precision: PrecisionChoice = "auto",
    sparse_capacity: int | None = None,
) -> Config:
    """A config of which the step looks at `sae` and `train` alone."""
    return Config(
        name="step",
        model=ModelConfig(weights="none", dtype="float32"),
        text=TextConfig(source=["none"], sequence_length=16),
        cache=CacheConfig(
            path="none",
            sites=[SiteConfig(site="resid_post", layers=[0])],
            tokens=batch_size,
        ),
        sae=SaeConfig(site="resid_post", layer=0, width=width),
        train=TrainConfig(
            batch_size=batch_size,
            tokens=1000 * batch_size,
            sparsity=L0Penalty(coefficient=1e-3, warmup_steps=0),
            precision=precision,
            step=step,
            kernels=kernels,
            sparse_capacity=sparse_capacity,
        ),
        output="none",
    )


def unit_rows(num: int, d_model: int, *, seed: int) -> np.ndarray:
    """Random rows of norm 1."""
    rows = np.random.default_rng(seed).standard_normal((num, d_model), np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def state_of(config: Config, *, rows_BD: np.ndarray | jax.Array, l0: float) -> TrainState:
    """A state in which about `l0` latents of each row are active.

    The threshold is a quantile of what 64 rows give at 65,536 latents, which are all alike.
    """
    mesh = make_mesh(config.mesh)
    state = init_state(config.sae, d_model=rows_BD.shape[1], seed=0, mesh=mesh)
    some = np.asarray(rows_BD[:64]) @ np.asarray(state.params["W_enc"][:65_536]).T
    theta = np.quantile(some, 1 - l0 / config.sae.width)
    threshold = jnp.full(config.sae.width, np.log(theta), jnp.float32)
    placed = jax.device_put(threshold, state.params["threshold"].sharding)
    return dataclasses.replace(state, params=state.params | {"threshold": placed})


def lowered_step(config: Config, *, d_model: int) -> jax.stages.Lowered:
    """The step of a config, traced for the devices here; nothing is allocated."""
    mesh = make_mesh(config.mesh)
    step: Any = make_train_step(config, input_scale=1.0, mesh=mesh)
    rows = jax.ShapeDtypeStruct(
        (config.train.batch_size, d_model), jnp.float32, sharding=sharding(mesh, BATCH_DIMS)
    )
    state = abstract_state(config.sae, d_model=d_model, mesh=mesh)
    return step.lower(state, rows, scheduled(config.train, step=1))


class StepProgram:
    """A compiled step that is always at its second one, its state handed on."""

    def __init__(
        self,
        config: Config,
        *,
        rows_BD: np.ndarray | jax.Array,
        l0: float,
        compiled: jax.stages.Compiled | None = None,
    ) -> None:
        self._scalars = scheduled(config.train, step=1)
        self._compiled: Any = compiled or lowered_step(config, d_model=rows_BD.shape[1]).compile()
        self._state = state_of(config, rows_BD=rows_BD, l0=l0)
        self._rows_BD = jax.device_put(rows_BD, sharding(make_mesh(config.mesh), BATCH_DIMS))
        self._metrics: Any = None
        self.temporary_bytes = self._compiled.memory_analysis().temp_size_in_bytes

    def __call__(self) -> Any:
        self._state, self._metrics = self._compiled(self._state, self._rows_BD, self._scalars)
        return self._state

    @property
    def l0(self) -> float:
        """Of the last step; 0 before there was one."""
        return 0.0 if self._metrics is None else float(self._metrics.l0)

    @property
    def overflows(self) -> int:
        """Sparse steps so far that had to be made again."""
        return 0 if self._metrics is None else int(self._metrics.sparse_overflows)


def products(rows_BD: np.ndarray, *, width: int) -> dict[str, Callable[[], Any]]:
    """The encoder's product, and the five of a dense step."""
    x_BD = jnp.asarray(rows_BD)
    W_FD = jnp.asarray(unit_rows(width, rows_BD.shape[1], seed=1))

    def product(spec: str) -> Callable:
        return jax.jit(partial(einsum, spec, precision="float32"))

    encode, decode = product("bd,fd->bf"), product("bf,fd->bd")
    gradient = product("bf,bd->fd")

    def five() -> list[Any]:
        pre_BF = jax.block_until_ready(encode(x_BD, W_FD))
        jax.block_until_ready(decode(pre_BF, W_FD))
        jax.block_until_ready(gradient(pre_BF, x_BD))
        jax.block_until_ready(encode(x_BD, W_FD))
        return [gradient(pre_BF, x_BD)]

    return {"encoder": lambda: encode(x_BD, W_FD), "five products": five}


def measure(
    *,
    width: int,
    l0: float,
    d_model: int,
    batch_size: int,
    repeats: int,
    dense: bool = True,
    sparse_capacity: int | None = None,
) -> list[Row]:
    """The rows of one width and L0; `dense` is False where [B, F] is too much for the machine."""
    rows_BD = unit_rows(batch_size, d_model, seed=2)
    kinds = ("sparse", "dense") if dense else ("sparse",)
    steps = {
        kind: StepProgram(
            config_of(
                width=width, batch_size=batch_size, step=kind, sparse_capacity=sparse_capacity
            ),
            rows_BD=rows_BD,
            l0=l0,
        )
        for kind in kinds
    }
    programs = products(rows_BD, width=width)
    if not dense:
        del programs["five products"]
    times = interleaved({**steps, **programs}, rounds=repeats)
    return [
        Row(
            program=name,
            width=width,
            l0=steps["sparse"].l0,
            d_model=d_model,
            batch_size=batch_size,
            median=found.median,
            quartiles=(found.low, found.high),
            temporary_bytes=steps[name].temporary_bytes if name in steps else 0,
            overflows=steps[name].overflows if name in steps else 0,
        )
        for name, found in times.items()
    ]


def sizes(
    *, widths: Sequence[int], l0s: Sequence[float], full: bool
) -> Iterator[tuple[int, float]]:
    """(width, L0): each width at each L0, and with `full` other L0s at two widths too."""
    yield from ((width, l0) for width in widths for l0 in l0s)
    if full:
        yield from ((width, l0) for width in (16_384, 65_536) for l0 in (16.0, 256.0, 512.0))


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line for each width and L0, times in seconds, and ratios."""
    programs = ("encoder", "five products", "dense", "sparse")
    lines = []
    for key in dict.fromkeys((row.width, row.l0) for row in rows):
        own = {row.program: row for row in rows if (row.width, row.l0) == key}
        times = {name: row.median for name, row in own.items()}
        memory = [f"{own[name].temporary_bytes / 1e9:.2f}" for name in ("dense", "sparse")]
        lines.append(
            [
                f"{key[0]}",
                f"{key[1]:.0f}",
                *(f"{times[name]:.2f}" for name in programs),
                f"{times['dense'] / times['five products']:.2f}",
                f"{times['dense'] / times['sparse']:.2f}",
                f"{times['sparse'] / times['encoder']:.2f}",
                f"{', '.join(memory)} GB",
            ]
        )
    ratios = ("dense / five", "dense / sparse", "sparse / encoder")
    return markdown(["width", "L0", *programs, *ratios, "temporaries dense, sparse"], lines)


WIDTHS, L0S = (4096, 16_384, 65_536), (64.0,)


def run(
    *,
    repeats: int,
    full: bool,
    widths: Sequence[int] = WIDTHS,
    l0s: Sequence[float] = L0S,
    d_model: int = 640,
    batch_size: int = 4096,
    sparse_capacity: int | None = None,
) -> list[Row]:
    """All rows of the benchmark."""
    rows: list[Row] = []
    for width, l0 in sizes(widths=widths, l0s=l0s, full=full):
        rows += measure(
            width=width,
            l0=l0,
            d_model=d_model,
            batch_size=batch_size,
            repeats=repeats,
            sparse_capacity=sparse_capacity,
        )
    return rows


def main() -> None:
    """Print the table; with `--out` keep the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write JSON here")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--l0s", type=float, nargs="+", default=L0S)
    parser.add_argument("--sparse-capacity", type=int, help="pairs a row, as in `train`")
    parser.add_argument("--full", action="store_true", help="other L0s too: longer")
    arguments = parser.parse_args()
    prepare()
    rows = run(
        repeats=arguments.repeats,
        full=arguments.full,
        widths=arguments.widths,
        l0s=arguments.l0s,
        sparse_capacity=arguments.sparse_capacity,
    )
    sys.stdout.write(table(rows) + "\n")
    if arguments.out is not None:
        write_results(arguments.out, {"rows": [dataclasses.asdict(row) for row in rows]})


if __name__ == "__main__":
    main()

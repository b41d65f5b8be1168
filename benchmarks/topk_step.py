"""A TopK step by pairs against the same by whole products, with and without dead latents.

    python -m benchmarks.topk_step --widths 16384 65536 --dead 0 0.05 0.25 --out topk_step.json

For each width and share of dead latents the step with `train.step: dense`, the one with `sparse`
and the encoder's product take turns on the same random unit rows. What counts is the ratio of
medians in one run.

Legend: B rows of a batch, D model width, F latents.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.step import config_of, products, unit_rows
from benchmarks.support.measure import StepTimes, interleaved, markdown, prepare, write_results
from sae_train.config.run import Config
from sae_train.model.sharding import make_mesh
from sae_train.step.schedule import scheduled
from sae_train.step.state import TrainState, init_state
from sae_train.train.train_step import make_train_step

# Steps done before, and after how many silent ones a latent is dead.
_STEPS, _DEAD_AFTER = 1000, 100


@dataclass(frozen=True, kw_only=True)
class Row(StepTimes):
    """Seconds of one program; `dead` is the share of latents that are when a step begins."""

    dead: float
    k: int


def selecting(config: Config, *, architecture: str, k: int) -> Config:
    """The config of a SAE that selects; fewer tokens than usual make a latent dead."""
    values = config.model_dump(mode="json")
    values["sae"] |= {"architecture": architecture, "k": k}
    values["train"] |= {
        "sparsity": {"penalty": "none"},
        "dead_after_tokens": _DEAD_AFTER * config.train.batch_size,
    }
    return Config.model_validate(values)


class Program:
    """A compiled step that always begins with the same share of dead latents."""

    def __init__(self, config: Config, *, rows_BD: np.ndarray) -> None:
        mesh = make_mesh(config.mesh)
        self._scalars = scheduled(config.train, step=1)
        state = init_state(config.sae, d_model=rows_BD.shape[1], seed=0, mesh=mesh)
        step: Any = make_train_step(config, input_scale=1.0, mesh=mesh)
        self._compiled = step.lower(state, rows_BD, self._scalars).compile()
        self._state, self._rows_BD = state, jnp.asarray(rows_BD)
        self._fired = np.full(config.sae.width, _STEPS, np.int32)
        self.temporary_bytes = self._compiled.memory_analysis().temp_size_in_bytes
        self.overflows = 0

    def kill(self, num: int) -> None:
        """From now on so many latents are dead when a step begins."""
        self._fired = np.where(np.arange(len(self._fired)) < num, 0, _STEPS).astype(np.int32)

    def __call__(self) -> TrainState:
        before = dataclasses.replace(
            self._state, step=jnp.int32(_STEPS), last_fired=jnp.asarray(self._fired)
        )
        self._state, metrics = self._compiled(before, self._rows_BD, self._scalars)
        self.overflows = int(metrics.sparse_overflows)
        return self._state


def measure(
    *,
    width: int,
    shares: Sequence[float],
    architecture: str,
    k: int,
    d_model: int,
    batch_size: int,
    rounds: int,
) -> list[Row]:
    """The rows of one width."""
    rows_BD = unit_rows(batch_size, d_model, seed=2)
    programs = {}
    for kind in ("sparse", "dense"):
        config = config_of(width=width, batch_size=batch_size, step=kind)
        programs[kind] = Program(selecting(config, architecture=architecture, k=k), rows_BD=rows_BD)
    ways: dict[str, Any] = {**programs, "encoder": products(rows_BD, width=width)["encoder"]}
    rows = []
    for share in shares:
        for program in programs.values():
            program.kill(round(share * width))
        for name, found in interleaved(ways, rounds=rounds).items():
            own = programs.get(name)
            rows.append(
                Row(
                    program=name,
                    width=width,
                    dead=share,
                    k=k,
                    d_model=d_model,
                    batch_size=batch_size,
                    median=found.median,
                    quartiles=(found.low, found.high),
                    temporary_bytes=own.temporary_bytes if own else 0,
                    overflows=own.overflows if own else 0,
                )
            )
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line for each width and share of dead latents, times in seconds."""
    programs = ("encoder", "dense", "sparse")
    lines = []
    for key in dict.fromkeys((row.width, row.dead) for row in rows):
        own = {row.program: row for row in rows if (row.width, row.dead) == key}
        times = {name: row.median for name, row in own.items()}
        memory = [f"{own[name].temporary_bytes / 1e9:.2f}" for name in ("dense", "sparse")]
        lines.append(
            [
                f"{key[0]}",
                f"{key[1]:.0%}",
                *(f"{times[name]:.2f}" for name in programs),
                f"{times['dense'] / times['sparse']:.2f}",
                f"{times['sparse'] / times['encoder']:.2f}",
                f"{', '.join(memory)} GB",
            ]
        )
    ratios = ("dense / sparse", "sparse / encoder")
    return markdown(["width", "dead", *programs, *ratios, "temporaries dense, sparse"], lines)


def main() -> None:
    """Print the table; with `--out` keep the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write JSON here")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--widths", type=int, nargs="+", default=(4096, 16_384))
    parser.add_argument("--dead", type=float, nargs="+", default=(0.0, 0.05, 0.25))
    parser.add_argument("--architecture", choices=("topk", "batch_topk"), default="topk")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--d-model", type=int, default=640)
    arguments = parser.parse_args()
    prepare()
    rows: list[Row] = []
    for width in arguments.widths:
        rows += measure(
            width=width,
            shares=arguments.dead,
            architecture=arguments.architecture,
            k=arguments.k,
            d_model=arguments.d_model,
            batch_size=4096,
            rounds=arguments.repeats,
        )
        jax.clear_caches()
    sys.stdout.write(table(rows) + "\n")
    if arguments.out is not None:
        write_results(arguments.out, {"rows": [dataclasses.asdict(row) for row in rows]})


if __name__ == "__main__":
    main()

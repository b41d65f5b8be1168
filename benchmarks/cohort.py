"""Six runs as one cohort against the same six alone; and ways to make their steps.

    python -m benchmarks.cohort                       # the sizes of the demo, minutes on two cores

The store is of random rows in a temporary folder. Seconds are of all processors (the process's CPU
time), so that other work on the machine hardly counts.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from activation_cache.store.reader import ActivationReader
from benchmarks.support.measure import prepare
from sae_train.config.run import Config
from sae_train.model.sharding import make_mesh
from sae_train.step.schedule import scheduled
from sae_train.step.state import init_state
from sae_train.train.loop import train, train_cohort
from sae_train.train.train_step import make_stacked_step, make_train_step
from tests.support.configs import make_config
from tests.support.stores import make_manifest, random_rows, write_store

logger = logging.getLogger("cohort")

RUNS = 6


def main() -> None:
    """Log reads and seconds of both ways to train, and of three ways to make a step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("width", 2048), ("d-model", 640), ("batch", 512), ("steps", 40)):
        parser.add_argument(f"--{name}", type=int, default=default)
    sizes = parser.parse_args()
    prepare()
    logger.setLevel(logging.INFO)
    with tempfile.TemporaryDirectory() as scratch:
        rows = sizes.batch * sizes.steps
        manifest = make_manifest(rows=rows, width=sizes.d_model)
        write_store(Path(scratch, "store"), manifest, make_rows=random_rows)

        def configs(place: str) -> list[Config]:
            return [
                make_config(
                    width=sizes.width,
                    batch_size=sizes.batch,
                    tokens=rows,
                    rows=rows,
                    cache_path=f"{scratch}/store",
                    output=f"{scratch}/{place}/{number}",
                    sparsity={"coefficient": 1e-3 * (number + 1)},
                )
                for number in range(RUNS)
            ]

        _measure("six alone", lambda: [train(one) for one in configs("alone")])
        _measure("one cohort", lambda: train_cohort(configs("together")))
        _stacked(configs("none"), d_model=sizes.d_model)


def _measure(label: str, work: Callable[[], Any]) -> None:
    read, reads = ActivationReader.batch, []

    def counting(reader: ActivationReader, step: int) -> np.ndarray:
        reads.append(step)
        return read(reader, step)

    ActivationReader.batch = counting  # type: ignore[method-assign]
    start, busy = time.monotonic(), time.process_time()
    work()
    logger.info(
        "%-12s %4d batches read, %6.1f s, %6.1f s of CPUs",
        *(label, len(reads), time.monotonic() - start, time.process_time() - busy),
    )
    ActivationReader.batch = read  # type: ignore[method-assign]


def _stacked(configs: list[Config], *, d_model: int) -> None:
    """A step of all runs: one program called for each, one over all, one over a new axis."""
    mesh = make_mesh(configs[0].mesh)
    step = make_train_step(configs[0], input_scale=1.0, mesh=mesh)
    plain = step.__wrapped__  # type: ignore[attr-defined]
    batch = np.random.default_rng(0).standard_normal((configs[0].train.batch_size, d_model))
    rows = jax.device_put((batch / d_model**0.5).astype(np.float32))
    together = make_stacked_step(configs[0], members=len(configs), input_scale=1.0, mesh=mesh)
    over_axis = jax.jit(lambda s, x, c: jax.vmap(plain, in_axes=(0, None, 0))(s, x, c)[0])
    ways: dict[str, Callable[[Any, Any], Any]] = {
        "one by one": lambda ss, cs: [step(s, rows, c)[0] for s, c in zip(ss, cs, strict=True)],
        "stacked": lambda ss, cs: together(tuple(ss), rows, tuple(cs))[0],
        "a new axis": lambda ss, cs: over_axis(ss, rows, jax.tree.map(lambda *c: np.stack(c), *cs)),
    }
    for label, way in ways.items():
        states: Any = [init_state(one.sae, d_model=d_model, seed=0, mesh=mesh) for one in configs]
        if label == "a new axis":
            states = jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *states)
        seconds, busy = [], []
        for number in range(12):
            scalars = [scheduled(one.train, step=number) for one in configs]
            start = time.monotonic(), time.process_time()
            states = jax.block_until_ready(way(states, scalars))
            seconds.append(time.monotonic() - start[0])
            busy.append(time.process_time() - start[1])
        logger.info(
            "%-12s %7.1f ms a step of all, %7.1f ms of CPUs",
            *(label, 1e3 * np.median(seconds[2:]), 1e3 * np.median(busy[2:])),
        )


if __name__ == "__main__":
    main()

"""Small training runs for tests: a store of random rows, a config, and what a run left behind."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sae_train.checkpoint.checkpoints import Checkpoints
from sae_train.config.run import Config
from sae_train.model.sharding import make_mesh
from sae_train.runs.metrics_file import read_metrics
from sae_train.step.state import abstract_state
from tests.support.configs import make_config
from tests.support.stores import make_manifest, random_rows, write_store

ROWS, WIDTH = 1000, 16
TIMINGS = {"tokens_per_second", "input_wait_fraction"}


def make_run(folder: Path, *, steps: int = 40, output: str = "run", **options: Any) -> Config:
    """A store under `folder` (written once) and the config of a run on it."""
    if not (folder / "store").exists():
        manifest = make_manifest(rows=ROWS, width=WIDTH, mean_squared_norm=2.0)
        write_store(folder / "store", manifest, make_rows=random_rows)
    defaults: dict[str, Any] = {
        "width": 64,
        "threshold_init": 0.02,
        "batch_size": 48,
        "checkpoint": {"every_steps": 10, "keep": 2},
        "learning_rate": {"peak": 1e-3, "warmup_steps": 5, "decay_steps": 10},
        "dead_after_tokens": 480,
    }
    return make_config(
        rows=ROWS,
        cache_path=str(folder / "store"),
        output=str(folder / output),
        tokens=48 * steps,
        **(defaults | options),
    )


def stop_after(calls: int) -> Callable[[], bool]:
    """A `stop` that says no so many times, and yes from then on."""
    count = itertools.count()
    return lambda: next(count) >= calls


def lines_logged(run_folder: Path) -> int:
    """Whole lines of a run's metrics by now."""
    path = run_folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def final_state(run_folder: Path, *, step: int) -> list[np.ndarray]:
    """Every array of a checkpoint, in a fixed order."""
    import jax

    with Checkpoints(run_folder) as checkpoints:
        meta = checkpoints.read_meta(step)
        config = Config.model_validate(meta["config"])
        abstract = abstract_state(
            config.sae,
            d_model=meta["d_model"],
            mesh=make_mesh(config.mesh),
            momentum=config.train.has_momentum,
        )
        return [
            np.asarray(leaf) for leaf in jax.tree.leaves(checkpoints.restore(abstract, step=step))
        ]


def untimed_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The metrics without the two fields that measure the machine."""
    return [
        {key: value for key, value in row.items() if key not in TIMINGS}
        for row in read_metrics(run_folder)
    ]


def assert_same_run(a: Path, b: Path, *, step: int) -> None:
    """Weights, optimiser state and metrics of two runs are bit-identical."""
    for left, right in zip(final_state(a, step=step), final_state(b, step=step), strict=True):
        np.testing.assert_array_equal(left, right)
    assert untimed_metrics(a) == untimed_metrics(b)

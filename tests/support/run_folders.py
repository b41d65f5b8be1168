"""Run folders as the stages leave them, with plausible numbers, for tests of what reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from launch.config.job import Job
from sae_train.config.file import write_config
from sae_train.config.run import Config, EvaluationConfig
from tests.support.configs import as_job, make_config

STEPS = 400


def sweep_config(folder: Path, *, coefficients: list[float], widths: list[int]) -> Job:
    """A sweep over λ and width, written nowhere yet."""
    base = make_config(output=str(folder), batch_size=1024, tokens=1024 * STEPS, width=widths[0])
    grid = {"train.sparsity.coefficient": coefficients, "sae.width": widths}
    return as_job(base, name="gemma3-270m-l5", sweep={"grid": grid})


def write_run(config: Config, *, l0: float, steps: int = STEPS, evaluated: bool = True) -> Path:
    """A run's folder that ends at `steps` around `l0` active latents per token."""
    folder = Path(config.output)
    write_config(config, folder)
    rows = [_row(config, l0=l0, step=step) for step in range(10, steps + 1, 10)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines)
    (folder / "checkpoints" / str(steps)).mkdir(parents=True)
    if evaluated:
        (folder / "evaluation.json").write_text(json.dumps(evaluation(l0=l0, step=steps)))
        for name in ("gemma_scope/params.npz", "sae_lens/sae_weights.safetensors"):
            path = folder / "release" / name
            path.parent.mkdir(parents=True)
            path.write_bytes(b"weights")
    return folder


def _row(config: Config, *, l0: float, step: int) -> dict[str, Any]:
    left = math.exp(-step / 60)
    wobble = 1 + 0.04 * math.sin(step * 1.7 + l0)
    fvu = (0.9 * left + 0.6 / math.sqrt(l0)) * wobble
    return {
        "step": step,
        "tokens": step * config.train.batch_size,
        "loss": 0.2 * fvu + 0.002 * l0 * wobble,
        "mse": 0.2 * fvu,
        "fvu": fvu,
        "l0": (l0 + 900 * left) * wobble,
        "dead_fraction": min(0.3, 0.004 * step / 10),
        "threshold_mean": 0.01 + 0.002 * step / l0,
        "learning_rate": 1e-3 * min(1, step / 50, (STEPS - step) / 100 + 0.05),
        "sparsity_coefficient": 1e-3,
        "tokens_per_second": 5100.0,
        "input_wait_fraction": 0.01,
    }


def evaluation(*, l0: float, step: int) -> dict[str, Any]:
    """The evaluation.json of a run with this L0."""
    loss, zero = 3.162, 11.874
    delta = 1.9 / l0**0.6
    counts = [int(260 * math.exp(-((x - 14) ** 2) / 40)) for x in range(24)]
    positions = list(range(1, 128))
    return {
        "step": step,
        "l0": l0,
        "fvu": 0.6 / math.sqrt(l0),
        "fvu_without_outlying": 0.9 / math.sqrt(l0),
        "fvu_median_token": 0.8 / math.sqrt(l0),
        "outlying": {"norm_over_median": 5.0, "tokens": 31, "share_of_variance": 0.46},
        "delta_loss": delta,
        "delta_loss_all_positions": delta * 1.3,
        "loss_recovered": 1 - delta / (zero - loss),
        "loss": loss,
        "loss_spliced": loss + delta,
        "loss_zero_ablated": zero,
        "alive_fraction": 0.93 - l0 / 2000,
        "sequences": 64,
        "loss_sequences": 64,
        "settings": EvaluationConfig().recorded(),
        "frequency_histogram": {
            "log10_edges": [-6 + x / 4 for x in range(25)],
            "counts": counts,
        },
        "by_position": {
            "position": positions,
            "l0": [l0 * (1 + 1 / p) for p in positions],
            "fvu": [0.6 / math.sqrt(l0) * (1 + 0.4 / p) for p in positions],
            "delta_loss": [delta * (0.6 + 0.2 * math.log(p)) for p in positions],
        },
    }

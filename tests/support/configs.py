"""Small configs for tests: every section valid, the interesting values as arguments."""

from __future__ import annotations

from typing import Any

from launch.config.job import Job
from sae_train.config.run import Config


def make_config(
    *,
    width: int = 128,
    bandwidth: float = 0.05,
    parametrisation: str = "log",
    threshold_init: float = 0.01,
    multiplier: float = 1.0,
    sparsity: dict[str, Any] | None = None,
    mesh: tuple[int, int] = (1, 1),
    cache_path: str = "store",
    output: str = "run",
    layer: int = 1,
    checkpoint: dict[str, Any] | None = None,
    sae: dict[str, Any] | None = None,
    rows: int = 1000,
    **train: Any,
) -> Config:
    """A config whose `train` section takes the remaining keyword arguments.

    It matches the stores of `tests.support.stores.make_manifest(rows=rows)`.
    """
    penalty = {"penalty": "l0", "coefficient": 0.01, "warmup_steps": 0} | (sparsity or {})
    if penalty["penalty"] == "none":
        penalty = {"penalty": "none"}
    own = {"site": "resid_post"} | (sae or {})
    tapped = [own[key] for key in ("site", "target") if own.get(key)]
    defaults = {"batch_size": 64, "tokens": 64 * 10, "log_every_steps": 1}
    threshold = {
        "init": threshold_init,
        "parametrisation": parametrisation,
        "learning_rate_multiplier": multiplier,
    }
    values = {
        "name": "test",
        "model": {"weights": "tiny", "dtype": "float32"},
        "text": {"source": ["*.txt"], "sequence_length": 16, "held_out_sequences": 1},
        "cache": {
            "path": cache_path,
            "sites": [{"site": site, "layers": [layer]} for site in dict.fromkeys(tapped)],
            "tokens": rows,
            "shuffle_rows": 64,
            "block_rows": 8,
            "sequences_per_batch": 4,
        },
        "sae": {
            "site": "resid_post",
            "layer": layer,
            "width": width,
            "bandwidth": bandwidth,
            "threshold": threshold,
        }
        | (sae or {}),
        "train": defaults | train | {"sparsity": penalty},
        "mesh": {"data": mesh[0], "model": mesh[1]},
        "checkpoint": checkpoint or {},
        "output": output,
    }
    return Config.model_validate(values)


def as_job(config: Config, **sections: Any) -> Job:
    """The config with the sections `sweep` and `launch`, where given."""
    return Job.model_validate(config.model_dump() | sections)

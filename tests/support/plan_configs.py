"""Configs to plan, and their plans."""

from __future__ import annotations

from typing import Any

from activation_cache.config import CacheConfig
from sae_train.config.run import Config
from sae_train.plan.accelerators import accelerator
from sae_train.plan.plan import Plan, make_plan
from sae_train.plan.verdict import Assumptions


def cache_config(**values: Any) -> CacheConfig:
    sites = [{"site": "resid_post", "layers": [1]}]
    return CacheConfig.model_validate({"path": "store", "sites": sites, "tokens": 1000} | values)


def scope_config(**changes: Any) -> Config:
    """Gemma Scope's 9B residual SAE of width 131k, on eight devices."""
    values: dict[str, Any] = {
        "name": "scope",
        "model": {"weights": "google/gemma-2-9b"},
        "text": {"source": ["*.txt"]},
        "cache": {
            "path": "gs://nowhere/store",
            "sites": [{"site": "resid_post", "layers": [20]}],
            "tokens": 8_000_000_000,
        },
        "sae": {"site": "resid_post", "layer": 20, "width": 131_072},
        "train": {"tokens": 8_000_000_000, "sparsity": {"coefficient": 6e-4}},
        "mesh": {"data": 1, "model": 8},
        "output": "gs://nowhere/run",
    }
    for key, value in changes.items():
        values[key] = values[key] | value
    return Config.model_validate(values)


def plan_of(config: Config, name: str = "h200", **given: Any) -> Plan:
    chips = [accelerator(name)]
    runs = [(config.name, config)]
    return make_plan(
        config,
        runs=runs,
        max_members=1,
        accelerators=chips,
        assumptions=Assumptions(**given),
    )

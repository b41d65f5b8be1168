"""A small harvest for tests: its sections, and one that was stopped half way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from activation_cache.config import CacheConfig, ModelConfig, SiteConfig, TextConfig
from activation_cache.harvest.harvest import harvest
from activation_cache.runtime.errors import Interrupted

SITES = [
    SiteConfig(site="resid_post", layers=[0, 2]),
    SiteConfig(site="attn_out_prelinear", layers=[1]),
]


ROWS, BUCKETS = 700, 6  # five buckets of 128 rows and a short one


def sections(gemma: Path, corpus: Path, path: Path, **changes: Any) -> dict[str, Any]:
    """The three sections of a small harvest; `changes` as `cache__tokens=5`."""
    made = {
        "model": ModelConfig(weights=str(gemma), dtype="float32"),
        "text": TextConfig(
            source=[str(corpus / "*.txt")], sequence_length=16, held_out_sequences=4
        ),
        "cache": CacheConfig(
            path=str(path),
            sites=SITES,
            tokens=ROWS,
            shuffle_rows=128,
            block_rows=16,
            sequences_per_batch=4,
        ),
    }
    for name, value in changes.items():
        section, field = name.split("__")
        made[section] = made[section].model_copy(update={field: value})
    return made


class StopAfter:
    """Turns true at the n-th forward pass."""

    def __init__(self, passes: int) -> None:
        self.passes = passes

    def __call__(self) -> bool:
        self.passes -= 1
        return self.passes < 0


def interrupted(gemma: Path, corpus: Path, path: Path, **changes: Any) -> dict[str, Any]:
    """Begin a harvest and stop it with some buckets committed; returns its sections."""
    made = sections(gemma, corpus, path, **changes)
    with pytest.raises(Interrupted, match="are committed"):
        harvest(**made, stop=StopAfter(12), resolved_config_yaml="name: test\n")
    assert 0 < len(list((path / "commits").iterdir())) < BUCKETS
    return made

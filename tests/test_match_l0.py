"""`match_l0` ends at its target on small data, wherever its coefficient starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from activation_cache.store import open_store
from activation_cache.taps import Tap
from sae_train.checkpoint import load_trained
from sae_train.loop import train
from sae_train.metrics import read_metrics
from tests.training import ROWS, make_run


def l0_over_the_store(run: Path, store: Path) -> float:
    """Mean active latents of the trained SAE over every row it was trained on."""
    trained = load_trained(run)
    params = trained.params
    rows = open_store(store).read(Tap("resid_post", 1), start=0, stop=ROWS)
    centred = rows.astype(np.float64) / trained.input_scale - params["b_dec"]
    pre = centred @ params["W_enc"].T + params["b_enc"]
    return float((pre > params["threshold"]).sum(axis=1).mean())


@pytest.mark.parametrize(("target", "start"), [(6.0, 1e-4), (6.0, 0.03), (15.0, 0.01)])
def test_the_trained_sae_has_the_l0_asked_for(tmp_path: Path, target: float, start: float):
    config = make_run(
        tmp_path,
        steps=600,
        parametrisation="direct",
        sparsity={
            "penalty": "match_l0",
            "target": target,
            "coefficient": start,
            "warmup_steps": 50,
        },
        checkpoint={"every_steps": 1000, "keep": 1},
        learning_rate={"peak": 2e-3, "warmup_steps": 20, "decay_steps": 100},
        log_every_steps=10,
    )
    train(config)
    found = l0_over_the_store(tmp_path / "run", tmp_path / "store")
    trail = [(row["l0"], row["sparsity_coefficient"]) for row in read_metrics(tmp_path / "run")]
    assert found == pytest.approx(target, rel=0.05), trail

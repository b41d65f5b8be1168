"""Splits, rankings and scores against those of sae-probes 0.4.2, recorded on the same activations.

`tests/support/oracles/sae_probes.json` holds what its own functions gave: `get_train_test_indices`,
`get_sorted_indices` with `mean_act_normalization`, and `find_best_reg` (scikit-learn 1.9.1).
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from sae_train.probe.datasets import split_of
from sae_train.probe.fit import best_latents, many_fits, score_of
from tests.support.paths import ROOT

KS = (1, 2, 5)
# One row of the test: versions of a solver may put it on the other side.
SLACK = 0.011


def recorded(rows: str) -> dict[str, Any]:
    path = ROOT / "tests" / "support" / "oracles" / "sae_probes.json"
    return json.loads(path.read_text())[rows]


def made_up(rows: int, *, seed: int, F: int = 40, D: int = 6) -> tuple[Any, Any, Any]:
    """Latents, activations and labels, as the recording had them."""
    random = np.random.default_rng(seed)
    label = np.arange(rows) % 2
    random.shuffle(label)
    shift = label[:, None] * np.linspace(0, 1.5, D).astype(np.float32)
    x = (random.standard_normal((rows, D)).astype(np.float32) * 3 + shift).astype(np.float32)
    # One product of fixed matrices: that of the recording.
    latents = np.maximum(x @ random.standard_normal((D, F)).astype(np.float32) - 2.0, 0)
    return latents.astype(np.float32), x, label


@pytest.mark.parametrize("rows", ["300", "200"])  # C by one part of 40 rows, and by six folds
def test_the_numbers_are_those_of_sae_probes(rows: str):
    theirs = recorded(rows)
    latents, x, label = made_up(int(rows), seed=theirs["seed"])
    seed = 42 + theirs["seed"]
    split = split_of(label, seed=seed)
    assert split.train.tolist() == theirs["train"]
    assert split.test.tolist() == theirs["test"]
    y, y_test = label[split.train], label[split.test]
    best = best_latents(scipy.sparse.csr_matrix(latents[split.train]), y, most=16)
    assert best.tolist() == theirs["latents"]
    with many_fits():
        for kind in (*map(str, KS), "raw"):
            columns = x if kind == "raw" else latents[:, best[: int(kind)]]
            penalty = "l2" if kind == "raw" else "l1"
            found = score_of(
                columns[split.train], y, columns[split.test], y_test, penalty=penalty, seed=seed
            )
            expected = pytest.approx(theirs[kind], abs=SLACK)
            assert [found.f1, found.accuracy, found.auc] == expected, kind


def test_a_label_with_fewer_rows_is_half_of_every_part():
    label = np.array([1] * 130 + [0] * 500)
    split = split_of(label, seed=1)
    assert len(split.train) == 160
    assert len(split.test) == 99
    assert not set(split.train) & set(split.test)
    assert label[split.train].mean() == 0.5
    assert label[split.test].sum() == 50

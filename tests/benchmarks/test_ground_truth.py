"""The synthetic ground truth: what its rows promise, and its scores against SAELens'."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.ground_truth.synthetic import draw, make_truth, rows_of, score

G, D, F, N = 170, 24, 40, 3000


def test_children_fire_under_their_parents_and_alone_among_siblings():
    truth = make_truth(features=G, width=D, seed=3)
    strength = draw(truth, start=100, stop=100 + N)
    fires = strength > 0
    for parent in np.unique(truth.parent_G[truth.parent_G >= 0]):
        children = np.flatnonzero(truth.parent_G == parent)
        assert parent < children.min()
        assert not fires[~fires[:, parent]][:, children].any()
        assert fires[:, children].sum(axis=1).max() <= 1
    assert (truth.parent_G >= 0).sum() == 84, "one tree of 85"
    roots = truth.parent_G < 0
    expected = truth.probability_G[roots]
    error = np.sqrt(expected * (1 - expected) / N)
    assert (np.abs(fires[:, roots].mean(axis=0) - expected) < 5 * error).all()
    np.testing.assert_array_equal(strength, draw(truth, start=100, stop=100 + N))
    x = rows_of(truth, strength)
    np.testing.assert_allclose(x[7], truth.bias_D + strength[7] @ truth.direction_GD, rtol=1e-5)


def test_scores_are_those_of_saelens(sae_lens: Any):
    torch = pytest.importorskip("torch")
    from sae_lens.synthetic import evals

    random = np.random.default_rng(0)
    truth = make_truth(features=G, width=D, seed=1)
    fires = draw(truth, start=0, stop=500) > 0
    chosen = np.r_[np.arange(F - 1), 3]  # a feature twice, the others a little off
    decoder = truth.direction_GD[chosen] * 2 + 0.15 * random.standard_normal((F, D))
    active = fires[:, chosen] ^ (random.random((500, F)) < 0.1)
    ours = score(decoder, active, truth.direction_GD, fires)
    theirs = [torch.tensor(one) for one in (decoder, truth.direction_GD)]
    assert ours.mcc == pytest.approx(evals.mean_correlation_coefficient(*theirs), rel=1e-6)
    assert ours.uniqueness == evals.feature_uniqueness(*theirs)
    found = evals.compute_classification_metrics(
        torch.tensor(active).float(), torch.tensor(fires).float(), *theirs
    )
    for name, expected in (
        ("precision", found.precision),
        ("recall", found.recall),
        ("f1", found.f1_score),
    ):
        assert getattr(ours, name) == pytest.approx(expected, rel=1e-5), name
    assert ours.l0 == active.sum(axis=1).mean()
    cosine = decoder @ truth.direction_GD.T / np.linalg.norm(decoder, axis=1, keepdims=True)
    assert ours.found == (np.abs(cosine).max(axis=0) > 0.8).mean()

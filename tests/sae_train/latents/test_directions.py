"""Logits that are searched in bfloat16, beside all of them in float64.

Legend: T rows, D model width, V vocabulary.
"""

from __future__ import annotations

from unittest.mock import Mock

import jax.numpy as jnp
import numpy as np
import pytest

from activation_cache.language_model.model import LanguageModel
from sae_train.latents.directions import CANDIDATES, Readout, _binned, _margins, _searched
from sae_train.latents.schema import BINS, RANKED

T, D, V = 6, 16, 256 * (CANDIDATES + 12) + 3  # more groups than candidates, the last one short


@pytest.fixture(scope="module")
def embedding() -> np.ndarray:
    """Among random rows 200 that differ less than bfloat16 can tell."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((V, D)).astype(np.float32)
    alike = random.choice(V, 200, replace=False)
    rows[alike] = 3 * rows[0] * (1 + 1e-4 * random.random((200, 1)))
    return rows


@pytest.fixture(scope="module")
def readout(embedding: np.ndarray) -> Readout:
    params = {"embedding": embedding, "final_norm": {"scale": np.zeros(D, np.float32)}}
    return Readout.of(Mock(spec=LanguageModel, params=params))


@pytest.fixture(scope="module")
def rows(embedding: np.ndarray) -> np.ndarray:
    """Random ones, one that points at the alike tokens, one away from them, one of zeros."""
    found = np.random.default_rng(1).standard_normal((T, D)).astype(np.float32)
    found[1], found[2], found[3] = embedding[0], -embedding[0], 0
    return found


def test_the_greatest_logits_are_those_of_all_in_float64(
    rows: np.ndarray, readout: Readout, embedding: np.ndarray
):
    exact = rows.astype(np.float64) @ embedding.astype(np.float64).T
    _, top, bottom = _searched(jnp.asarray(rows), readout)
    for (values, ids), sign in ((top, 1), (bottom, -1)):
        order = np.argsort(-sign * exact, axis=1, kind="stable")[:, :RANKED]
        expected = np.take_along_axis(exact, order, axis=1)
        np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-6)
        # Of float32's logits some are equal that float64 tells apart.
        found = np.take_along_axis(exact, ids, axis=1)
        np.testing.assert_allclose(found, expected, rtol=2e-6)
        np.testing.assert_array_equal(ids[[0, 3, 4, 5]], order[[0, 3, 4, 5]])


def test_a_histogram_is_within_the_margin_of_rounding(rows: np.ndarray, readout: Readout):
    rows = rows[[0, 4, 5]]
    exact = rows.astype(np.float64) @ np.asarray(readout.embedding, np.float64).T
    logits, top, bottom = _searched(jnp.asarray(rows), readout)
    margins = np.asarray(_margins(jnp.asarray(rows), readout.longest, readout.lost))
    assert (np.abs(np.asarray(logits) - exact).max(axis=1) < margins).all()
    bins = np.asarray(_binned(logits, bottom[0][:, 0], top[0][:, 0]))
    for number, margin in enumerate(margins):
        edges = np.linspace(exact[number].min(), exact[number].max(), BINS + 1)[1:-1]
        below = np.cumsum(np.bincount(bins[number], minlength=BINS))[:-1]
        assert (below >= (exact[number] < edges[:, None] - margin).sum(axis=1)).all()
        assert (below <= (exact[number] < edges[:, None] + margin).sum(axis=1)).all()

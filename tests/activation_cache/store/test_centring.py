"""γ of rows and of a store's tap."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from activation_cache.store.centring import SAMPLE_ROWS, gamma, gamma_of
from tests.support.stores import TAP, make_manifest, random_rows, write_store


def test_gamma_is_the_mean_s_length_over_the_spread():
    offset = np.array([3.0, 4.0], np.float32)
    around = np.array([[1, 0], [-1, 0], [0, 2], [0, -2]], np.float32)  # mean |x|² is 2.5
    assert gamma(offset + around) == pytest.approx(5 / math.sqrt(2.5))
    assert gamma(around) == 0
    assert gamma(np.tile(offset, (4, 1))) == math.inf


def test_a_store_s_gamma_is_that_of_its_first_rows(tmp_path: Path):
    manifest = make_manifest(rows=SAMPLE_ROWS + 8, width=16, shuffle_rows=1024)
    found = gamma_of(write_store(tmp_path, manifest, make_rows=random_rows), TAP)
    assert found == gamma(random_rows(0, SAMPLE_ROWS, 16))
    assert found == pytest.approx(1.0, rel=0.03), "Gaussian around an offset of one deviation"

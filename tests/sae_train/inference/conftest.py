"""Rows to encode, for the tests of this room."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture
def x_raw() -> np.ndarray:
    """40 raw activations of width 10, on which random SAEs have many active latents."""
    return 4 * np.random.default_rng(3).standard_normal((40, 10)).astype(np.float32)

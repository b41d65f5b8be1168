"""γ: how far the activations of a tap lie from zero, against how far they lie from each other.

    γ = |μ| / √(mean |x - μ|²)          μ the mean row

With a large γ all rows point the same way, and latents of random directions fire for all rows or
for none: γ predicts how many are dead at initialisation (arXiv 2605.31518). Where it is above 1
more of the mean square is the mean's than the rows' own, and an SAE does well to start with the
mean taken off (`sae.b_dec_init`, for transcoders `sae.subtract_mean`).

Legend: N rows, D width of a tap.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from activation_cache.gemma.taps import Tap
from activation_cache.store.store import Store

# The first rows of a store are drawn from all of its first bucket. The squared length of their
# mean is too large by this part of the spread's square.
SAMPLE_ROWS = 2048


def gamma(x_ND: Float[np.ndarray, "N D"]) -> float:
    """γ of some rows; infinite where all are the same."""
    x_ND = x_ND.astype(np.float64)
    mean_D = x_ND.mean(axis=0)
    return gamma_of_moments(mean_D, mean_square=float(np.square(x_ND).sum(axis=1).mean()))


def gamma_of_moments(mean_D: Float[np.ndarray, " D"], *, mean_square: float) -> float:
    """γ from the mean row and the mean of |x|²."""
    of_mean = float(np.square(mean_D).sum())
    spread = mean_square - of_mean
    return math.sqrt(of_mean / spread) if spread > 0 else math.inf


def gamma_of(store: Store, tap: Tap) -> float:
    """γ of a tap, from the first `SAMPLE_ROWS` rows of a store.

    Raises:
        UserError: the store doesn't have the tap, or a file is damaged.
    """
    there = store.manifest.bucket_span(store.manifest.first_window[-1]).stop
    return gamma(store.read(tap, start=0, stop=min(SAMPLE_ROWS, there)))

"""Outlying rows: those whose norm is above so many times the median norm.

One token in 700 of Gemma 3 270M's `resid_post.12` has ten times the usual norm, and together these
tokens hold half of the variance (docs/evaluation.md, "Outlying tokens").

Legend: N rows.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

NORM_OVER_MEDIAN = 10.0


def largest_usual_norm(
    norms_N: Float[np.ndarray, " N"], *, over_median: float = NORM_OVER_MEDIAN
) -> float:
    """The largest norm of a row that isn't outlying, of rows with these norms."""
    return float(over_median * np.median(norms_N.astype(np.float64)))

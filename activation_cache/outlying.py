"""Outlying rows: those whose norm is above so many times the median norm.

One token in 850 of the demo's text has 7 to 9.5 times the median norm at `resid_post.5` of Gemma 3
270M, none between 3 and 5 times; together they hold half of the variance (docs/evaluation.md,
"Outlying tokens").

Legend: N rows.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

NORM_OVER_MEDIAN = 5.0


def largest_usual_norm(
    norms_N: Float[np.ndarray, " N"], *, over_median: float = NORM_OVER_MEDIAN
) -> float:
    """The largest norm of a row that isn't outlying, of rows with these norms."""
    return float(over_median * np.median(norms_N.astype(np.float64)))

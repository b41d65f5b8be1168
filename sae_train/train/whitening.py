"""Whitening: training that sees the directions in which activations vary little.

The squared error |r|² of r = x - x̂ counts a direction by the variance that the rows have there, and
an SAE of a few hundred steps leaves out what counts for little. The layers above read just that
(docs/results.md, "What FVU hides"). With `sae.whitening: p` the error counts as rᵀ M r,

    M = (C / tr C)^-p,

C the covariance of the rows: p = 0 is the squared error, p = 1 the Mahalanobis distance, in which
all directions vary alike. Training reads rows x A, A = √M, in which that is the squared error:
nothing else of it changes. `inference.fold` multiplies A into the encoder and A⁻¹ into the
decoder, so that a release is a plain SAE of x. A is a parameter that is never trained, so that
checkpoints hold it.

Legend: B rows of a batch, D model width.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float

# Rows longer than so many times the batch's median are left out of C: one token in 700 of Gemma 3
# is ten times as long, and a few directions that they alone have would count for nothing.
OUTLYING = 3.0
# Eigenvalues below this share of the mean count as this share: no direction weighs without end.
_SMALLEST = 1e-6


def whitening_root(
    batches: Iterable[Float[np.ndarray, "B D"]], *, power: float
) -> Float[np.ndarray, "D D"]:
    """A = √M, symmetric, float32, scaled so that rows x A have the mean square of the rows x."""
    counts, sums, squares, moments = [], [], [], []
    for x_BD in batches:
        wide_BD = x_BD.astype(np.float64)
        norms_B = np.linalg.norm(wide_BD, axis=1)
        typical_BD = wide_BD[norms_B <= OUTLYING * np.median(norms_B)]
        counts.append(len(typical_BD))
        sums.append(typical_BD.sum(axis=0))
        squares.append(typical_BD.T @ typical_BD)
        moments.append(wide_BD.T @ wide_BD / len(wide_BD))
    mean_D = np.sum(sums, axis=0) / np.sum(counts)
    covariance_DD = np.sum(squares, axis=0) / np.sum(counts) - np.outer(mean_D, mean_D)
    values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    values_D = np.maximum(values_D / values_D.mean(), _SMALLEST)
    root_DD = (vectors_DD * values_D ** (-power / 2)) @ vectors_DD.T
    moment_DD = np.mean(moments, axis=0)
    grown = np.trace(root_DD @ moment_DD @ root_DD) / np.trace(moment_DD)
    return (root_DD / np.sqrt(grown)).astype(np.float32)

"""Rows of which rounding can't decide whether a latent is active or in its threshold's window.

Two ways of making one step round differently, by about 1e-7 of a pre-activation. Where that lies
nearer to θ or to θ ± ε/2 it is active, or in the window, for one of them alone, and from there on
they train apart: by more than any tolerance for rounding, on some machines and not on others.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.support.oracles import reference

# Far more than rounding moves a pre-activation within 200 steps, and few rows are as near.
DISTANCE = 1e-4


def off_edges(
    draw: Callable[[], np.ndarray],
    params: dict[str, np.ndarray],
    *,
    scale: float,
    bandwidth: float,
    centred: bool = True,
    product: Callable[[np.ndarray, np.ndarray], np.ndarray] = np.matmul,
) -> np.ndarray:
    """Raw rows, of which those too near to an edge are drawn again.

    Args:
        draw: gives other rows [B, D] in each call.
        params: of the SAE that will see the rows divided by `scale`; with the plain θ.
        product: how matrices are multiplied, for steps that round operands.
    """
    rows = draw()
    for _ in range(20):
        x = rows / np.float64(scale)
        pre, _, _ = reference.encode(params, x, centred=centred, product=product)
        above = pre - params["threshold"]
        edges = (-bandwidth / 2, 0.0, bandwidth / 2)
        near = np.any([np.abs(above - edge) < DISTANCE for edge in edges], axis=(0, 2))
        if not near.any():
            return rows
        rows = np.where(near[:, None], draw(), rows)
    raise AssertionError(f"{near.sum()} rows are still within {DISTANCE} of an edge")

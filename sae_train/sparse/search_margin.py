"""How far a product of rounded operands may be from float32's: a bound that needs norms alone.

The search for pairs asks of each row and latent only whether pre > θ - ε/2. On an accelerator a
product in one bfloat16 pass answers that many times as fast as float32's, for all pairs but those
within the product's error of the edge. With an upper bound on the error nothing is lost: every pair
is among the candidates

    pre_rounded + margin > θ - ε/2

and float32 pre-activations are made of the candidates alone (`active_pairs`). On trained SAEs there
are 11 to 21 % more candidates than pairs (docs/performance.md, "Float32 from a bfloat16 search").

**The bound.** bfloat16 has 8 significant bits: rounding to nearest changes a number by at most
u = 2⁻⁸ of it. Of x and w the product reads x̂ = x - e and ŵ = w - d. Then

    x·w - x̂·ŵ = e·w + x̂·d
    |x·w - x̂·ŵ| ≤ |e||w| + |x̂||d|                      Cauchy and Schwarz; ≤ (2u + u²)|x||w|

The norms |e| and |d| are computed, and are less than half of u|x| and u|w|. A float32 sum of D
products and a bias is, in whatever order, within (D + 1) 2⁻²⁴ (|x||w| + |b|) of the exact one (2⁻²³
where an accelerator cuts sums off instead of rounding them), and each of the two pre-activations is
such a sum.

Legend: N rows or latents, B rows, D model width, L latents of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

# Norms are float32 sums themselves; the comparison with an edge adds two numbers more.
_NORMS_ROUNDED = 1 + 2.0**-10
_FURTHER_TERMS = 4
_OF_BOTH_SUMS = 2.0**-23 + 2.0**-24


@dataclass(frozen=True)
class Norms:
    """Of rows or latents: |x|, |x̂| of what a product reads of them, and |x - x̂| of the rest."""

    whole_N: Float[Array, " N"]
    read_N: Float[Array, " N"]
    lost_N: Float[Array, " N"]


def norms(x_ND: Float[Array, "N D"], *, read_ND: Float[Array, "N D"]) -> Norms:
    """The norms of rows of which a product reads `read_ND`."""
    of_all = (x_ND, read_ND, x_ND - read_ND)
    return Norms(*(jnp.linalg.norm(rows_ND, axis=1) * _NORMS_ROUNDED for rows_ND in of_all))


def margin(x: Norms, w: Norms, *, bias_L: Float[Array, " L"], d_model: int) -> Float[Array, "B L"]:
    """At least as much as any pre-activation of rounded operands is below float32's."""

    def product(of_rows_B: Array, of_latents_L: Array) -> Array:
        return of_rows_B[:, None] * of_latents_L[None, :]

    rounding_BL = product(x.lost_N, w.whole_N) + product(x.read_N, w.lost_N)
    size_BL = product(x.whole_N + x.lost_N, w.whole_N + w.lost_N) + jnp.abs(bias_L)[None, :]
    return rounding_BL + (d_model + _FURTHER_TERMS) * _OF_BOTH_SUMS * size_BL

"""`segment_sums.decode_pairs` in a kernel: of each row of the batch the sum over its pairs.

A program makes a part of one row: it walks through the row's pairs, in the order of their latents,
some at a time, and adds up as much of W_dec's rows as it has columns for.

Legend: B rows, D model width, F latents, P positions for pairs; C pairs at once, K columns.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from activation_cache.precision import Precision
from activation_cache.products import rounded_in_kernel
from sae_train.sparse.active_pairs import Pairs
from sae_train.sparse.kernels.pallas import launch, load, store, table
from sae_train.sparse.segment_sums import sort_by_row

# 1 KB of each row of W_dec in one piece, and 8 pieces on their way at a time.
COLUMNS, AT_ONCE = 256, 8
_WARPS = 4


def decode_pairs(
    pairs: Pairs,
    latents_P: Float[Array, " P"],
    W_dec_FD: Float[Array, "F D"],
    *,
    num_rows: int,
    precision: Precision,
) -> tuple[Float[Array, "B D"], Float[Array, " B"]]:
    """`segment_sums.decode_pairs`; nothing of a list that `select_pairs` left empty."""
    d_model = W_dec_FD.shape[1]
    order_P, counts_B = sort_by_row(pairs, num_rows=num_rows)
    # A list that was too short is empty: every place would be row 0's, of a latent that isn't.
    counts_B = jnp.where(pairs.total > latents_P.shape[0], 0, counts_B)
    starts_B = jnp.cumsum(counts_B, dtype=jnp.int32) - counts_B
    decoded_BD, nonzero_B = launch(
        partial(_one_part, precision=precision),
        (starts_B, counts_B, pairs.latent_P[order_P], latents_P[order_P], W_dec_FD),
        out=[((num_rows, d_model), jnp.float32), ((num_rows,), jnp.float32)],
        grid=(num_rows, -(-d_model // COLUMNS)),
        num_warps=_WARPS,
    )
    return decoded_BD, nonzero_B


def _one_part(
    starts_ref: Any,
    counts_ref: Any,
    latent_ref: Any,
    value_ref: Any,
    W_dec_ref: Any,
    decoded_ref: Any,
    nonzero_ref: Any,
    *,
    precision: Precision,
) -> None:
    row, part = pl.program_id(0), pl.program_id(1)
    d_K = part * COLUMNS + jnp.arange(COLUMNS, dtype=jnp.int32)
    inside_K = d_K < W_dec_ref.shape[1]
    near_K = jnp.minimum(d_K, W_dec_ref.shape[1] - 1)
    start, count = starts_ref[row], counts_ref[row]
    nth_C = jnp.arange(AT_ONCE, dtype=jnp.int32)

    def add(step: Array, so_far: tuple[Array, Array]) -> tuple[Array, Array]:
        there_C = step * AT_ONCE + nth_C < count
        position_C = jnp.where(there_C, start + step * AT_ONCE + nth_C, 0)
        value_C = load(value_ref.at[position_C], there_C)
        latent_C = load(latent_ref.at[position_C], there_C)
        there_CK = there_C[:, None] & inside_K[None, :]
        W_CK = load(table(W_dec_ref, latent_C, near_K), there_CK)
        f_C, W_CK = (rounded_in_kernel(own, precision=precision) for own in (value_C, W_CK))
        nonzero = (value_C != 0).astype(jnp.float32).sum()
        return so_far[0] + (f_C[:, None] * W_CK).sum(axis=0), so_far[1] + nonzero

    start_K = jnp.zeros(COLUMNS, jnp.float32)
    steps = (count + AT_ONCE - 1) // AT_ONCE
    sum_K, nonzero = jax.lax.fori_loop(0, steps, add, (start_K, jnp.float32(0)))
    store(decoded_ref.at[jnp.full_like(near_K, row), d_K], sum_K, inside_K)
    store(nonzero_ref.at[row], nonzero, part == 0)

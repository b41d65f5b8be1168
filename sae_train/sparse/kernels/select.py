"""`active_pairs.select_pairs` in a kernel: encoder product, thresholds and list of pairs in one.

A program makes one tile of pre-activations, which never leaves the chip, finds its pairs and takes
as many positions of a common pool as it has pairs: an integer is added to where the pool ends, the
one atomic operation here. In which order tiles take their positions in the pool differs from run to
run, what comes of it doesn't: each pair has its latent, and its rank among those of its latent in
its tile; with the counts of all tiles that is its place in the list by latents, to which it is
moved.

Beside the pool there is one count for each latent and each `ROWS` rows: B·F / 32 bytes.

Legend: B rows, D model width, F latents, R blocks of rows, P positions for pairs; of a tile M rows,
L latents, K columns of D at a time.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from activation_cache.precision import Precision
from activation_cache.products import einsum_in_kernel
from sae_train.sparse.active_pairs import Pairs
from sae_train.sparse.kernels.pallas import launch, load, store, table
from sae_train.step.gradients import has_gradient

# Accumulators are 32 registers of each of 256 threads: with 64 there is no room for what else a
# thread holds, and the compiler spills. K columns of both operands are 24 KB of shared memory.
ROWS, LATENTS, DEPTH = 128, 64, 32
_WARPS, _STAGES = 8, 3


def select_pairs(
    W_enc_FD: Float[Array, "F D"],
    bias_F: Float[Array, " F"],
    theta_F: Float[Array, " F"],
    x_BD: Float[Array, "B D"],
    *,
    bandwidth: float,
    capacity: int,
    precision: Precision,
) -> Pairs:
    """`active_pairs.select_pairs`, but that if there are more than `capacity` none is kept."""
    num_rows, width = x_BD.shape[0], W_enc_FD.shape[0]
    blocks = -(-num_rows // ROWS), -(-width // LATENTS)
    # Only an interpreter writes at the place behind the last: what no pair is at.
    pool = (capacity + 1,)
    _, counts_RF, row_P, latent_P, pre_P, rank_P = launch(
        partial(_one_tile, bandwidth=bandwidth, capacity=capacity, precision=precision),
        (x_BD, W_enc_FD, bias_F, theta_F, jnp.zeros(1, jnp.int32)),
        out=[
            ((1,), jnp.int32),
            ((blocks[0], width), jnp.int32),
            (pool, jnp.int32),
            (pool, jnp.int32),
            (pool, jnp.float32),
            (pool, jnp.int32),
        ],
        # The last goes fastest: the tiles of the same latents one after the other, so that W_enc
        # is read once, and all of the batch, the smaller of the two, again from the cache.
        grid=(blocks[1], blocks[0]),
        aliases={4: 0},
        num_warps=_WARPS,
        num_stages=_STAGES,
    )
    return _by_latent(counts_RF, *(array[:capacity] for array in (row_P, latent_P, pre_P, rank_P)))


def _one_tile(
    x_ref: Any,
    W_ref: Any,
    bias_ref: Any,
    theta_ref: Any,
    _: Any,
    end_ref: Any,
    counts_ref: Any,
    row_ref: Any,
    latent_ref: Any,
    pre_ref: Any,
    rank_ref: Any,
    *,
    bandwidth: float,
    capacity: int,
    precision: Precision,
) -> None:
    row_M = pl.program_id(1) * ROWS + jnp.arange(ROWS, dtype=jnp.int32)
    latent_L = pl.program_id(0) * LATENTS + jnp.arange(LATENTS, dtype=jnp.int32)
    row_there_M, there_L = row_M < x_ref.shape[0], latent_L < W_ref.shape[0]
    # Of the last tiles some rows and latents are others again; they are not there.
    near_L = jnp.minimum(latent_L, W_ref.shape[0] - 1)
    near_M = jnp.minimum(row_M, x_ref.shape[0] - 1)
    product_ML = _product(x_ref, W_ref, near_M, near_L, precision=precision)
    pre_ML = product_ML + bias_ref[near_L][None, :]
    found_ML = has_gradient(pre_ML, theta_ref[near_L][None, :], bandwidth=bandwidth)
    found_ML = found_ML & row_there_M[:, None] & there_L[None, :]
    one_ML = found_ML.astype(jnp.int32)
    counts_L = one_ML.sum(axis=0)
    rank_ML = jnp.cumsum(one_ML, axis=0) - one_ML
    before_L = jnp.cumsum(counts_L, axis=0) - counts_L
    store(counts_ref.at[pl.program_id(1), latent_L], counts_L, there_L)
    first = triton.atomic_add(end_ref, (np.int32(0),), counts_L.sum())
    position_ML = first + before_L[None, :] + rank_ML
    # The sum of all counts may pass 2^31 and be below 0: nothing is written outside the pool.
    held_ML = found_ML & (position_ML >= 0) & (position_ML < capacity)
    position_ML = jnp.where(held_ML, position_ML, capacity)
    store(row_ref.at[position_ML], jnp.broadcast_to(row_M[:, None], position_ML.shape), held_ML)
    store(
        latent_ref.at[position_ML], jnp.broadcast_to(latent_L[None, :], position_ML.shape), held_ML
    )
    store(pre_ref.at[position_ML], pre_ML, held_ML)
    store(rank_ref.at[position_ML], rank_ML, held_ML)


def _product(
    x_ref: Any, W_ref: Any, row_M: Array, latent_L: Array, *, precision: Precision
) -> Array:
    """x[rows] W[latents]ᵀ."""
    d_model = x_ref.shape[1]

    def add(step: Array, so_far_ML: Array) -> Array:
        d_K = step * DEPTH + jnp.arange(DEPTH, dtype=jnp.int32)
        there_K = d_K < d_model

        def columns(ref: Any, row: Array) -> Array:
            if d_model % DEPTH == 0:
                return table(ref, row, d_K)[...]
            there = jnp.broadcast_to(there_K[None, :], (row.shape[0], DEPTH))
            return load(table(ref, row, jnp.minimum(d_K, d_model - 1)), there)

        x_MK, W_LK = columns(x_ref, row_M), columns(W_ref, latent_L)
        return so_far_ML + einsum_in_kernel("mk,lk->ml", x_MK, W_LK, precision=precision)

    start_ML = jnp.zeros((ROWS, LATENTS), jnp.float32)
    return jax.lax.fori_loop(0, -(-d_model // DEPTH), add, start_ML)


def _by_latent(
    counts_RF: Array, row_P: Array, latent_P: Array, pre_P: Array, rank_P: Array
) -> Pairs:
    """The pool in the order of latents, and of a latent's pairs that of their rows."""
    width, capacity = counts_RF.shape[1], row_P.shape[0]
    counts_F = counts_RF.sum(axis=0, dtype=jnp.int32)
    total = counts_F.astype(jnp.float32).sum()
    starts_F = jnp.cumsum(counts_F, dtype=jnp.int32) - counts_F
    before_RF = jnp.cumsum(counts_RF, axis=0, dtype=jnp.int32) - counts_RF + starts_F[None, :]
    nth_P = jnp.arange(capacity, dtype=jnp.int32)
    # Of too many the pool holds some, and which is chance.
    there_P = (nth_P < total.astype(jnp.int32)) & (total <= capacity)
    row_P, latent_P = jnp.where(there_P, row_P, 0), jnp.where(there_P, latent_P, 0)
    to_P = before_RF[row_P // ROWS, latent_P] + rank_P
    to_P = jnp.where(there_P, to_P, capacity + nth_P)

    def moved(values_P: Array, fill: Any) -> Array:
        empty_P = jnp.full_like(values_P, fill)
        return empty_P.at[to_P].set(values_P, mode="drop", unique_indices=True)

    return Pairs(
        row_P=moved(row_P, 0),
        latent_P=moved(latent_P, width),
        pre_P=moved(pre_P, 0.0),
        counts_F=counts_F,
        total=total,
    )

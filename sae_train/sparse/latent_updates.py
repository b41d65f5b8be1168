"""Gradients of touched latents and their update, a block of latents at a time, in place.

A block's rows of weights and second moments are read, their gradients made from the latents' pairs
(`sae_train.step.gradients` has the formulas), put through the optimiser and written back; no
gradient of a weight matrix exists as a whole. A latent that no pair names has no gradient, and with
β₁ = 0 the optimiser leaves it where it is: it is neither read nor written. Pure functions of one
device's latents, given the whole batch.

Legend: B rows, D model width, F latents, P positions of pairs, S latents of a block, C pairs of a
latent taken at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from activation_cache.precision import Precision
from activation_cache.products import rounded
from sae_train.config.run import Config
from sae_train.model.forward import Params
from sae_train.sparse.segment_sums import (
    Segments,
    block_of,
    over_pairs,
    rounded_rows,
    weighted_rows,
)
from sae_train.step.gradients import LatentSums, OutputGradients, Rows, added, no_sums
from sae_train.step.tile_passes import Update, updated_rows
from sae_train.step.tiles import varying_like


def _at(start: Array) -> Callable[[Array, Array], Array]:
    return lambda whole, block: jax.lax.dynamic_update_slice_in_dim(whole, block, start, axis=0)


def touched_pass(
    rows: Rows,
    segments: Segments,
    row_P: Int[Array, " P"],
    pre_P: Float[Array, " P"],
    *,
    output: OutputGradients,
    first_g_F: Int[Array, " F"] | None = None,
    update: Update | None,
    config: Config,
    precision: Precision,
) -> tuple[Rows, LatentSums]:
    """Over the latents that pairs name: (rows, sums).

    Args:
        segments: of each latent the pairs it has, `row_P` and `pre_P` being their rows and
            pre-activations.
        first_g_F: the row of `output.g_BD` where those of a latent's group begin; None: all at 0.
        update: None leaves the rows as they are; their sums then have the gradients' norm.
    """
    size, num = segments.block, segments.ids_N.shape[0]
    width, d_model = rows[0]["W_enc"].shape
    output = output.operands(precision)

    def one_block(number: Array, carry: tuple[Rows, LatentSums]) -> tuple[Rows, LatentSums]:
        rows, sums = carry
        counts_S = block_of(segments.counts_N, number, size=size)
        # The last block may hold latents without a pair: they must not be written.
        ids_S = jnp.where(counts_S > 0, block_of(segments.ids_N, number, size=size), width)
        near_S = jnp.minimum(ids_S, width - 1)
        own = jax.tree.map(lambda matrix_FD: matrix_FD.at[ids_S].get(mode="clip"), rows)
        gradients = _from_pairs(
            own[0]["W_dec"],
            near_S,
            block_of(segments.starts_N, number, size=size),
            counts_S,
            row_P=row_P,
            pre_P=pre_P,
            output=output,
            first_g_S=None if first_g_F is None else first_g_F[near_S],
            bandwidth=config.sae.bandwidth,
            precision=precision,
        )
        place = _at(number * size)
        sums = added(sums, own[0], gradients, place=place, for_norm=update is None)
        if update is None:
            return rows, sums
        new = updated_rows(own, gradients, near_S, update=update, config=config)
        return jax.tree.map(partial(_write, ids_S), rows, new), sums

    start = rows, no_sums(num, d_model, like=rows[0]["W_enc"][0, 0] + pre_P[0])
    rows, sums = jax.lax.fori_loop(0, segments.num_blocks, one_block, start)
    back_F = jnp.argsort(segments.ids_N)[:width]
    return rows, LatentSums(
        bias_F=sums.bias_F[back_F],
        theta_F=sums.theta_F[back_F],
        encoded_D=sums.encoded_D,
        squares=sums.squares,
        projected=sums.projected,
    )


def _write(ids_S: Array, matrix_FD: Array, new_SD: Array) -> Array:
    return matrix_FD.at[ids_S].set(new_SD, mode="drop")


def _from_pairs(
    W_dec_SD: Array,
    ids_S: Array,
    starts_S: Array,
    counts_S: Array,
    *,
    row_P: Array,
    pre_P: Array,
    output: OutputGradients,
    first_g_S: Array | None,
    bandwidth: float,
    precision: Precision,
) -> Params:
    """`tile_gradients` of a block of latents, from its pairs."""
    multiplied_SD = rounded(W_dec_SD, precision=precision)
    add_rows = partial(weighted_rows, precision=precision)
    theta_S, g_count_S = output.theta_F[ids_S], output.g_count_F[ids_S]

    def add(so_far: Params, position_SC: Array, there_SC: Array) -> Params:
        row_SC, pre_SC = row_P[position_SC], pre_P[position_SC]
        g_row_SC = row_SC if first_g_S is None else row_SC + first_g_S[:, None]
        active_SC = there_SC & (pre_SC > theta_S[:, None])
        window_SC = there_SC & (jnp.abs(pre_SC - theta_S[:, None]) < bandwidth / 2)
        g_f_SC = _dots(output.g_BD, g_row_SC, multiplied_SD, precision=precision)
        g_pre_SC = jnp.where(active_SC, g_f_SC, 0.0)
        g_step_SC = output.g_l0_B[row_SC] + g_count_S[:, None]
        g_theta_SC = jnp.where(window_SC, theta_S[:, None] * g_f_SC + g_step_SC, 0.0)
        f_SC = jnp.where(active_SC, pre_SC, 0.0)
        return {
            "W_enc": so_far["W_enc"] + add_rows(output.x_BD, row_SC, g_pre_SC),
            "W_dec": so_far["W_dec"] + add_rows(output.g_BD, g_row_SC, f_SC),
            "b_enc": so_far["b_enc"] + g_pre_SC.sum(axis=1),
            "threshold": so_far["threshold"] - g_theta_SC.sum(axis=1) / bandwidth,
        }

    like = W_dec_SD[0, 0] + pre_P[0]
    zero_SD = varying_like(jnp.zeros(W_dec_SD.shape), like=like)
    zero_S = varying_like(jnp.zeros(theta_S.shape), like=like)
    start = {"W_enc": zero_SD, "W_dec": zero_SD, "b_enc": zero_S, "threshold": zero_S}
    return over_pairs(starts_S, counts_S, start, add)


def _dots(source_BD: Array, row_SC: Array, with_SD: Array, *, precision: Precision) -> Array:
    """Of each pair source[row] · with, written out for the same reason as `weighted_rows`."""
    columns = (
        rounded_rows(source_BD, row_SC[:, c], precision=precision) for c in range(row_SC.shape[1])
    )
    return jnp.stack([(column_SD * with_SD).sum(axis=1) for column_SD in columns], axis=1)

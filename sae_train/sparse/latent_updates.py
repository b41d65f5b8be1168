"""Gradients of latents and their update, a block of latents at a time, in place.

A block's rows of weights and second moments are read, their gradients made, projected, put through
Adam, renormalised and written back; no gradient of a weight matrix exists as a whole. Two passes
make the same gradients (JumpReLU paper, equations 11 and 12; docs/numerics.md):

    g_f  = d_i · g_b                         g_b the gradient in the reconstruction
    dd_i = Σ f g_b                           over active pairs (row, latent)
    de_i = Σ g_f x_b,  db_i = Σ g_f          over active pairs
    dθ_i = -(1/ε) Σ (θ_i g_f + s_b + ω_i)    over pairs within ε/2 of θ_i, active or not

`touched_pass` goes over the latents that pairs name. A latent that none names has no gradient, and
with β₁ = 0 Adam leaves it where it is: it is neither read nor written. `every_pass` goes over all,
by products of whole tiles. Pure functions of one device's latents, given the whole batch.

Legend: B rows, D model width, F latents, P places for pairs, S latents of a block, C pairs of a
latent taken at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sae_train.model.forward import PRECISION
from sae_train.sparse.segment_sums import Segments, block_of, over_pairs, weighted_rows
from sae_train.step.adam import Rows, remove_parallel
from sae_train.step.gradients import Gradients, Pulls, from_products
from sae_train.step.tiles import tile_of, varying_like


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sums:
    """What a pass leaves besides the rows.

    Attributes:
        bias_F, theta_F: the gradients of b_enc and of θ itself.
        encoded_D: W_encᵀ of the former, with the weights before their update.
        squares: summed over both weight matrices' gradients.
        projected: the same, the decoder's projected.

    Its leaves are arrays; in its twins, their dims or where they lie.
    """

    bias_F: Any
    theta_F: Any
    encoded_D: Any
    squares: Any
    projected: Any


# New rows from a block's latents, its rows and their gradients.
Write = Callable[[Array, Rows, Gradients], Rows]


def no_sums(num: int, d_model: int, *, like: Array) -> Sums:
    """Zeros for `num` latents, typed as `like` is in a `shard_map`."""
    zeros = Sums(
        bias_F=jnp.zeros(num),
        theta_F=jnp.zeros(num),
        encoded_D=jnp.zeros(d_model),
        squares=jnp.zeros(()),
        projected=jnp.zeros(()),
    )
    return jax.tree.map(lambda zero: varying_like(zero, like=like), zeros)


def added(
    sums: Sums, own: Rows, found: Gradients, *, place: Callable[[Array, Array], Array]
) -> Sums:
    """The sums with those of a block.

    Args:
        place: puts what the block has of each latent into an array of all.
    """
    projected_SD = remove_parallel(found.dec_SD, rows_FD=own.W_dec)
    encoder = jnp.square(found.enc_SD).sum()
    return Sums(
        bias_F=place(sums.bias_F, found.bias_S),
        theta_F=place(sums.theta_F, found.theta_S),
        encoded_D=sums.encoded_D
        + jnp.einsum("s,sd->d", found.bias_S, own.W_enc, precision=PRECISION),
        squares=sums.squares + encoder + jnp.square(found.dec_SD).sum(),
        projected=sums.projected + encoder + jnp.square(projected_SD).sum(),
    )


def _at(start: Array) -> Callable[[Array, Array], Array]:
    return lambda whole, block: jax.lax.dynamic_update_slice_in_dim(whole, block, start, axis=0)


def touched_pass(
    rows: Rows,
    segments: Segments,
    row_P: Int[Array, " P"],
    pre_P: Float[Array, " P"],
    *,
    pulls: Pulls,
    bandwidth: float,
    write: Write | None,
) -> tuple[Rows, Sums]:
    """Over the latents that pairs name: (rows, sums).

    Args:
        segments: of each latent the pairs it has, `row_P` and `pre_P` being their rows and
            pre-activations.
        write: makes the new rows; None leaves them, for a look at the gradients' norm.
    """
    size, num = segments.block, segments.ids_N.shape[0]
    width, d_model = rows.W_enc.shape
    like = rows.W_enc[0, 0] + pre_P[0]

    def one_block(number: Array, carry: tuple[Rows, Sums]) -> tuple[Rows, Sums]:
        rows, sums = carry
        counts_S = block_of(segments.counts_N, number, size=size)
        # The last block may hold latents without a pair: they must not be written.
        ids_S = jnp.where(counts_S > 0, block_of(segments.ids_N, number, size=size), width)
        own = Rows(*(matrix_FD.at[ids_S].get(mode="clip") for matrix_FD in rows))
        found = _from_pairs(
            own.W_dec,
            jnp.minimum(ids_S, width - 1),
            block_of(segments.starts_N, number, size=size),
            counts_S,
            row_P=row_P,
            pre_P=pre_P,
            pulls=pulls,
            bandwidth=bandwidth,
        )
        sums = added(sums, own, found, place=_at(number * size))
        if write is None:
            return rows, sums
        new = write(jnp.minimum(ids_S, width - 1), own, found)
        written = (
            matrix_FD.at[ids_S].set(new_SD, mode="drop")
            for matrix_FD, new_SD in zip(rows, new, strict=True)
        )
        return Rows(*written), sums

    start = rows, no_sums(num, d_model, like=like)
    rows, sums = jax.lax.fori_loop(0, segments.num_blocks, one_block, start)
    back_F = jnp.argsort(segments.ids_N)[:width]
    return rows, Sums(
        bias_F=sums.bias_F[back_F],
        theta_F=sums.theta_F[back_F],
        encoded_D=sums.encoded_D,
        squares=sums.squares,
        projected=sums.projected,
    )


def _from_pairs(
    W_dec_SD: Array,
    ids_S: Array,
    starts_S: Array,
    counts_S: Array,
    *,
    row_P: Array,
    pre_P: Array,
    pulls: Pulls,
    bandwidth: float,
) -> Gradients:
    theta_S, g_count_S = pulls.theta_F[ids_S], pulls.g_count_F[ids_S]

    def add(so_far: Gradients, place_SC: Array, there_SC: Array) -> Gradients:
        row_SC, pre_SC = row_P[place_SC], pre_P[place_SC]
        distance_SC = pre_SC - theta_S[:, None]
        active_SC = there_SC & (pre_SC > theta_S[:, None])
        window_SC = there_SC & (jnp.abs(distance_SC) < bandwidth / 2)
        g_f_SC = _dots(pulls.g_BD, row_SC, W_dec_SD)
        g_pre_SC = jnp.where(active_SC, g_f_SC, 0.0)
        step_SC = pulls.g_l0_B[row_SC] + g_count_S[:, None]
        pull_SC = jnp.where(window_SC, theta_S[:, None] * g_f_SC + step_SC, 0.0)
        f_SC = jnp.where(active_SC, pre_SC, 0.0)
        return Gradients(
            enc_SD=so_far.enc_SD + weighted_rows(pulls.x_BD, row_SC, g_pre_SC),
            dec_SD=so_far.dec_SD + weighted_rows(pulls.g_BD, row_SC, f_SC),
            bias_S=so_far.bias_S + g_pre_SC.sum(axis=1),
            theta_S=so_far.theta_S - pull_SC.sum(axis=1) / bandwidth,
        )

    like = W_dec_SD[0, 0] + pre_P[0]
    zero_SD = varying_like(jnp.zeros(W_dec_SD.shape), like=like)
    zero_S = varying_like(jnp.zeros(theta_S.shape), like=like)
    return over_pairs(starts_S, counts_S, Gradients(zero_SD, zero_SD, zero_S, zero_S), add)


def _dots(source_BD: Array, row_SC: Array, with_SD: Array) -> Array:
    """Of each pair source[row] · with, written out for the same reason as `weighted_rows`."""
    columns = (source_BD[row_SC[:, c]] * with_SD for c in range(row_SC.shape[1]))
    return jnp.stack([column_SD.sum(axis=1) for column_SD in columns], axis=1)


def every_pass(
    rows: Rows,
    wanted: Bool[Array, ""],
    *,
    pulls: Pulls,
    bandwidth: float,
    write: Write | None,
    reduce: Callable[[Gradients], Gradients],
) -> tuple[Rows, Sums]:
    """Over all latents, tile by tile: (rows, sums). Each tile's pre-activations are made again.

    Args:
        wanted: False goes over none.
        reduce: adds up the gradients of the parts of a batch.
    """
    width, d_model = rows.W_enc.shape
    size = tile_of(width)

    def one_tile(number: Array, carry: tuple[Rows, Sums]) -> tuple[Rows, Sums]:
        rows, sums = carry
        at = number * size
        ids_S = at + jnp.arange(size, dtype=jnp.int32)
        # Gathers: slices would be fused into what follows, and XLA then copies each whole matrix.
        own = Rows(*(matrix_FD.at[ids_S].get(mode="clip") for matrix_FD in rows))
        pre_SB = jnp.einsum("sd,bd->sb", own.W_enc, pulls.x_BD, precision=PRECISION)
        found = from_products(
            own.W_dec,
            pre_SB + pulls.bias_F[ids_S][:, None],
            theta_S=pulls.theta_F[ids_S],
            g_count_S=pulls.g_count_F[ids_S],
            pulls=pulls,
            bandwidth=bandwidth,
        )
        found = reduce(found)
        sums = added(sums, own, found, place=_at(at))
        if write is None:
            return rows, sums
        new = write(ids_S, own, found)
        place = jax.lax.dynamic_update_slice_in_dim
        return Rows(*(place(a, b, at, axis=0) for a, b in zip(rows, new, strict=True))), sums

    start = rows, no_sums(width, d_model, like=rows.W_enc[0, 0])
    return jax.lax.fori_loop(0, jnp.where(wanted, width // size, 0), one_tile, start)

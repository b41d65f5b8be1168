"""Both passes over the latents on the dense path, a tile of latents at a time.

`encode_tiles` encodes and decodes, `update_tiles` makes each tile's gradients and writes its new
rows in place: no gradient of a weight matrix exists as a whole. Pure functions of one device's
rows and latents, with the sums over devices written out.

Legend: B rows of a batch, D model width, F latents, T tiles, L latents of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from activation_cache.precision import Precision
from activation_cache.products import einsum, operand
from sae_train.config.run import Config
from sae_train.model.forward import Params
from sae_train.model.sharding import sum_over
from sae_train.step import optimiser
from sae_train.step.gradients import (
    LatentSums,
    OutputGradients,
    Rows,
    added,
    has_gradient,
    no_sums,
    tile_gradients,
)
from sae_train.step.latents import kept_for_gradients, latents_of, read_kept
from sae_train.step.schedule import Scheduled
from sae_train.step.tiles import TiledLatents, varying_like

# How rows are updated: by the step's scalars and each latent's `waited_decay`.
Update = tuple[Scheduled, Float[Array, " F"]]


def encode_tiles(
    W_enc_FD: Float[Array, "F D"],
    W_dec_FD: Float[Array, "F D"],
    bias_F: Float[Array, " F"],
    theta_F: Float[Array, " F"],
    x_BD: Float[Array, "B D"],
    *,
    latents_of_pass: TiledLatents,
    bandwidth: float,
    keep: bool,
    precision: Precision,
) -> tuple[Array, Array, Array, Array | None, Array]:
    """(f W_dec, L0 of each row, active rows of each latent, what is kept, number of pairs).

    Args:
        latents_of_pass: whose latents count; the others might as well not be there.
        x_BD: what the encoder multiplies, b_dec subtracted if it is at all.
        keep: return what the gradients need [T, L, B], the only array of size [B, F]; else None,
            and pairs that have a gradient are counted instead.
    """

    multiplied_BD = operand(x_BD, precision=precision)
    per_latent = W_enc_FD, W_dec_FD, bias_F, theta_F
    positions = latents_of_pass.positions

    def one_tile(carry: Any, inputs: Any) -> Any:
        decoded_BD, l0_B, total = carry
        operands = inputs
        if positions is not None:
            operands = (_rows_at(array, inputs) for array in per_latent)
        W_enc_LD, W_dec_LD, bias_L, theta_L = operands
        pre_LB = _pre_activations(W_enc_LD, bias_L, multiplied_BD, precision=precision)
        if keep:
            kept_LB, latents = kept_for_gradients(
                pre_LB, theta_S=theta_L, bandwidth=bandwidth, precision=precision
            )
        else:
            kept_LB, latents = None, latents_of(pre_LB, theta_S=theta_L, bandwidth=bandwidth)
        decoded_BD += einsum("lb,ld->bd", latents.f_SB, W_dec_LD, precision=precision)
        l0_B += latents.active_SB.sum(axis=0, dtype=x_BD.dtype)
        if not keep:
            found_LB = has_gradient(pre_LB, theta_L[:, None], bandwidth=bandwidth)
            total += found_LB.sum(dtype=jnp.int32).astype(jnp.float32)
        active_L = latents.active_SB.sum(axis=1, dtype=x_BD.dtype)
        return (decoded_BD, l0_B, total), (active_L, kept_LB)

    like = W_enc_FD[0, 0] + x_BD[0, 0]
    zeros = jnp.zeros(x_BD.shape), jnp.zeros(x_BD.shape[0]), jnp.zeros(())
    start = tuple(varying_like(zero, like=like) for zero in zeros)
    inputs: tuple[Array, ...] = per_latent if positions is None else (jnp.asarray(positions),)
    tiles = tuple(array.reshape(-1, latents_of_pass.tile, *array.shape[1:]) for array in inputs)
    # No loop where there is only one tile, for XLA to see through.
    (decoded_BD, l0_B, total), (active_TL, kept_TLB) = jax.lax.scan(
        one_tile,
        start,
        tiles if positions is None else tiles[0],
        unroll=latents_of_pass.num_tiles == 1,
    )
    return decoded_BD, l0_B, active_TL.reshape(-1), kept_TLB, total


def _pre_activations(
    W_enc_LD: Array, bias_L: Array, x_BD: Array, *, precision: Precision
) -> Float[Array, "L B"]:
    pre_LB = einsum("ld,bd->lb", W_enc_LD, x_BD, precision=precision)
    return pre_LB + bias_L[:, None]


def update_tiles(
    rows: Rows,
    output: OutputGradients,
    kept_TLB: Float[Array, "T L B"] | None,
    num_tiles: int | Array,
    *,
    latents_of_pass: TiledLatents,
    before: LatentSums | None = None,
    update: Update | None,
    config: Config,
    mesh: Mesh,
    precision: Precision,
) -> tuple[Rows, LatentSums]:
    """New rows, in place of the old ones, and sums of their gradients.

    Args:
        kept_TLB: what `encode_tiles` kept; None computes each tile's pre-activations again.
        num_tiles: all of the tiles, or 0 to do nothing.
        latents_of_pass: whose rows are made anew.
        before: the sums of passes over other latents, to which these are added.
        update: None leaves the rows as they are; their sums then have the gradients' norm.
    """
    width, d_model = rows[0]["W_enc"].shape
    bandwidth = config.sae.bandwidth
    output = output.operands(precision)

    def one_tile(number: int | Array, carry: tuple[Rows, LatentSums]) -> tuple[Rows, LatentSums]:
        rows, sums = carry
        ids_L, place = _tile_at(number, latents_of_pass, width=width)
        own = jax.tree.map(partial(_part, ids_L), rows)
        theta_L, g_count_L = _of(output.theta_F, ids_L), _of(output.g_count_F, ids_L)
        if kept_TLB is None:
            bias_L = _of(output.bias_F, ids_L)
            pre_LB = _pre_activations(own[0]["W_enc"], bias_L, output.x_BD, precision=precision)
            latents = latents_of(pre_LB, theta_S=theta_L, bandwidth=bandwidth)
        else:
            latents = read_kept(
                kept_TLB[number], theta_S=theta_L, bandwidth=bandwidth, precision=precision
            )
        gradients = tile_gradients(
            own[0]["W_dec"],
            latents,
            theta_S=theta_L,
            g_count_S=g_count_L,
            output=output,
            bandwidth=bandwidth,
            precision=precision,
        )
        gradients = sum_over("data", gradients, mesh=mesh)
        sums = added(sums, own[0], gradients, place=place, for_norm=update is None)
        if update is None:
            return rows, sums
        new = updated_rows(own, gradients, ids_L, update=update, config=config)
        return jax.tree.map(place, rows, new), sums

    start = rows, before or no_sums(width, d_model, like=rows[0]["W_enc"][0, 0])
    if latents_of_pass.num_tiles == 1 and isinstance(num_tiles, int):
        return one_tile(0, start)
    return jax.lax.fori_loop(0, num_tiles, one_tile, start)


def _tile_at(
    number: int | Array, latents_of_pass: TiledLatents, *, width: int
) -> tuple[Array | None, Callable[[Array, Array], Array]]:
    """The latents of a tile, None for all there are, and what writes their rows into an array."""
    tile, positions = latents_of_pass.tile, latents_of_pass.positions
    at = number * tile
    if positions is not None:
        ids_L = jax.lax.dynamic_slice_in_dim(jnp.asarray(positions), at, tile)
        return ids_L, partial(_written_at, ids_L)
    place = partial(jax.lax.dynamic_update_slice_in_dim, start_index=at, axis=0)
    return None if tile == width else at + jnp.arange(tile, dtype=jnp.int32), place


def _part(ids_L: Array | None, matrix_FD: Array) -> Array:
    """The rows of a tile; a gather, for a slice would be fused, and XLA copy the whole matrix."""
    return matrix_FD if ids_L is None else _rows_at(matrix_FD, ids_L)


def _rows_at(array_F: Array, ids_L: Array) -> Array:
    return array_F.at[ids_L].get(mode="clip")


def _written_at(ids_L: Array, array_F: Array, values_L: Array) -> Array:
    return array_F.at[ids_L].set(values_L, mode="drop", unique_indices=True)


def _of(array_F: Array, ids_L: Array | None) -> Array:
    return array_F if ids_L is None else array_F[ids_L]


def whole_gradients(
    W_dec_FD: Float[Array, "F D"],
    kept_TLB: Float[Array, "T L B"],
    output: OutputGradients,
    *,
    latents_of_pass: TiledLatents,
    config: Config,
    mesh: Mesh,
    precision: Precision,
) -> Params:
    """The gradients of latents, none of them applied: a row for each, in the order of the pass."""
    multiplied, bandwidth = output.operands(precision), config.sae.bandwidth

    def one_tile(tile: tuple[Array, ...]) -> Params:
        W_dec_LD, kept_LB, theta_L, g_count_L = tile
        latents = read_kept(kept_LB, theta_S=theta_L, bandwidth=bandwidth, precision=precision)
        gradients = tile_gradients(
            W_dec_LD,
            latents,
            theta_S=theta_L,
            g_count_S=g_count_L,
            output=multiplied,
            bandwidth=bandwidth,
            precision=precision,
        )
        return sum_over("data", gradients, mesh=mesh)

    per_latent: tuple[Array, ...] = W_dec_FD, output.theta_F, output.g_count_F
    if latents_of_pass.positions is not None:
        ids = jnp.asarray(latents_of_pass.positions)
        per_latent = tuple(_rows_at(array, ids) for array in per_latent)
    W_dec_TLD, *others = (a.reshape(-1, latents_of_pass.tile, *a.shape[1:]) for a in per_latent)
    tiled = jax.lax.map(one_tile, (W_dec_TLD, kept_TLB, *others))
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), tiled)


def updated_rows(
    own: Rows, gradients: Params, ids_S: Array | None, *, update: Update, config: Config
) -> Rows:
    """The new rows of some latents.

    Args:
        gradients: of these latents; the decoder's not yet projected.
        ids_S: which latents they are; None for all.
    """
    scalars, decay_F = update
    params, second_moment = own
    return optimiser.update(
        params,
        {name: gradients[name] for name in params},
        second_moment=second_moment,
        decay_F=_of(decay_F, ids_S),
        scalars=scalars,
        config=config,
    )

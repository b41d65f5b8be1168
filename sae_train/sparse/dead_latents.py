"""Passes over a list of latents by products, a tile at a time: dead ones, or all of them.

TopK's loss that wakes dead latents selects up to D/2 of those in each row, far too many for pairs.
So dead latents go by products, of the list that has them first: their selection (`least_of_dead`),
what they predict (`decode_dead`), and their gradients and update, those as ordinary latents
included (`listed_pass`). A step whose pairs don't fit goes over the whole list.

All passes make a tile's pre-activations by the same product, so that a comparison comes out the
same in each. Loops are of no length where there is nothing to do. Pure functions of one device's
latents and rows, with the sums over devices written out.

Legend: B rows, D model width, F latents, S latents of a tile, P places for pairs, R rows of a part
of a batch, T tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sae_train.model.forward import PRECISION
from sae_train.model.topk import bisect
from sae_train.sparse.active_pairs import Pairs
from sae_train.sparse.latent_updates import Sums, Write, added, no_sums
from sae_train.sparse.segment_sums import over_pairs
from sae_train.sparse.topk_selection import Goal, as_bits
from sae_train.step.adam import Rows
from sae_train.step.gradients import Gradients, Pulls
from sae_train.step.tiles import tile_of, varying_like

# Parts of a batch whose dead pre-activations are kept at a time: they take [B, F] / 16 at the most.
PARTS = 16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Listed:
    """Latents, the dead ones first.

    Attributes:
        ids_F: latents of this device.
        num_dead: how many of them are dead.

    Its leaves are arrays; in its twins, their dims.
    """

    ids_F: Any
    num_dead: Any


class Encoder(NamedTuple):
    """What pre-activations are made from: weights, biases, and rows less b_dec if it is at all."""

    W_enc_FD: Array
    bias_F: Array
    x_BD: Array


class Cuts(NamedTuple):
    """What a row's latents are compared with.

    Attributes:
        least_B: selected if positive and not below.
        dead_least_B: of a dead latent, selected to predict what the others missed if above.

    Its fields are arrays; in its twins, their dims.
    """

    least_B: Any
    dead_least_B: Any


class _Tile(NamedTuple):
    """Latents of a list: F in the place of those beyond its end, rows clipped."""

    ids_S: Array
    dead_S: Array
    there_S: Array


def dead_first(dead_F: Bool[Array, " F"]) -> Listed:
    """The list of all latents, each kind in order."""
    place_F = varying_like(jnp.arange(dead_F.shape[0], dtype=jnp.int32), like=dead_F)
    alive_F = (~dead_F).astype(jnp.int32)
    _, ids_F = jax.lax.sort((alive_F, place_F), num_keys=1, is_stable=True)
    return Listed(ids_F=ids_F, num_dead=dead_F.sum(dtype=jnp.int32))


def _tile(listed: Listed, number: Array, *, size: int, num: Array) -> _Tile:
    width = listed.ids_F.shape[0]
    place_S = number * size + jnp.arange(size, dtype=jnp.int32)
    ids_S = jax.lax.dynamic_slice_in_dim(listed.ids_F, number * size, size)
    there_S = place_S < num
    return _Tile(
        ids_S=jnp.where(there_S, ids_S, width),
        dead_S=place_S < listed.num_dead,
        there_S=there_S,
    )


def _rows_of(matrix_FD: Array, tile: _Tile) -> Array:
    return matrix_FD.at[tile.ids_S].get(mode="clip")


def _placed(array_F: Array, own_S: Array, *, tile: _Tile) -> Array:
    return array_F.at[tile.ids_S].set(own_S, mode="drop")


def _pre(encoder: Encoder, W_SD: Array, tile: _Tile) -> Array:
    """Of the tile's latents, 0 in the place of those that aren't there."""
    pre_SB = jnp.einsum("sd,bd->sb", W_SD, encoder.x_BD, precision=PRECISION)
    pre_SB = pre_SB + encoder.bias_F.at[tile.ids_S].get(mode="clip")[:, None]
    return jnp.where(tile.there_S[:, None], pre_SB, 0.0)


def _selected(pre_SB: Array, least_B: Array) -> Array:
    return jnp.where((pre_SB > 0) & (pre_SB >= least_B[None, :]), pre_SB, 0.0)


def _to_predict(pre_SB: Array, dead_least_B: Array, tile: _Tile) -> Array:
    wanted_SB = tile.dead_S[:, None] & (pre_SB > dead_least_B[None, :])
    return jnp.where(wanted_SB, pre_SB, 0.0)


def _num_tiles(num: Array, *, size: int) -> Array:
    """Of the device with the most: a loop with a sum over devices must be as long on all."""
    return jax.lax.pmax(-(-num // size), "model")


def least_by_products(
    encoder: Encoder, listed: Listed, *, goal: Goal, wanted: Bool[Array, ""]
) -> Float[Array, " B"]:
    """Of each row the smallest value that is selected, by 31 products of all latents.

    Args:
        wanted: False makes none.
    """
    width, num_rows = encoder.W_enc_FD.shape[0], encoder.x_BD.shape[0]
    size = tile_of(width)
    like = encoder.W_enc_FD[0, 0] + encoder.x_BD[0, 0]
    zeros_B = varying_like(jnp.zeros(num_rows, jnp.int32), like=like)
    num_tiles = jnp.where(wanted, width // size, 0)

    def enough(least_B: Array) -> Array:
        def count(number: Array, counts_B: Array) -> Array:
            tile = _tile(listed, number, size=size, num=jnp.int32(width))
            pre_SB = _pre(encoder, _rows_of(encoder.W_enc_FD, tile), tile)
            found_SB = as_bits(jnp.maximum(pre_SB, 0.0)) >= least_B[None, :]
            return counts_B + found_SB.sum(axis=0, dtype=jnp.int32)

        return goal.enough(jax.lax.fori_loop(0, num_tiles, count, zeros_B))

    return bisect(enough, zeros_B)


def decode_selected(
    encoder: Encoder,
    W_dec_FD: Float[Array, "F D"],
    listed: Listed,
    least_B: Float[Array, " B"],
    *,
    wanted: Bool[Array, ""],
) -> tuple[Float[Array, "B D"], Float[Array, " B"], Float[Array, " F"]]:
    """f W_dec, selected latents of each row and rows of each latent, by products of all latents.

    Args:
        wanted: False makes none, and zeros.
    """
    width = W_dec_FD.shape[0]
    size = tile_of(width)
    like = encoder.W_enc_FD[0, 0] + encoder.x_BD[0, 0]

    def add(number: Array, so_far: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        tile = _tile(listed, number, size=size, num=jnp.int32(width))
        pre_SB = _pre(encoder, _rows_of(encoder.W_enc_FD, tile), tile)
        f_SB = _selected(pre_SB, least_B)
        decoded_BD, l0_B, active_F = so_far
        product_BD = jnp.einsum("sb,sd->bd", f_SB, _rows_of(W_dec_FD, tile), precision=PRECISION)
        return (
            decoded_BD + product_BD,
            l0_B + (f_SB > 0).sum(axis=0, dtype=jnp.float32),
            active_F.at[tile.ids_S].set((f_SB > 0).sum(axis=1, dtype=jnp.float32)),
        )

    shapes = encoder.x_BD.shape, encoder.x_BD.shape[:1], (width,)
    start = tuple(varying_like(jnp.zeros(shape), like=like) for shape in shapes)
    return jax.lax.fori_loop(0, jnp.where(wanted, width // size, 0), add, start)


def least_of_dead(encoder: Encoder, listed: Listed, *, k: int) -> Float[Array, " B"]:
    """Of each row's dead latents a value above which the k largest are, and all of a tie; or 0.

    It lies between the k-th and the next smaller one, not at the k-th: the passes that compare
    with it round otherwise.
    """
    width, num_rows = encoder.W_enc_FD.shape[0], encoder.x_BD.shape[0]
    size = tile_of(width)
    part = next(rows for rows in range(max(1, num_rows // PARTS), 0, -1) if num_rows % rows == 0)
    like = encoder.W_enc_FD[0, 0] + encoder.x_BD[0, 0]
    num_tiles = -(-listed.num_dead // size)
    # Where no more than k are dead all of them are selected, and nothing is made.
    wanted = jax.lax.psum(listed.num_dead, "model") > k

    def one_part(number: Array, so_far: tuple[Array, Array]) -> tuple[Array, Array]:
        kept_TSR, least_B = so_far
        rows_RD = jax.lax.dynamic_slice_in_dim(encoder.x_BD, number * part, part)

        def fill(nth: Array, kept_TSR: Array) -> Array:
            tile = _tile(listed, nth, size=size, num=listed.num_dead)
            W_SD = _rows_of(encoder.W_enc_FD, tile)
            pre_SR = _pre(encoder._replace(x_BD=rows_RD), W_SD, tile)
            return kept_TSR.at[nth].set(jnp.maximum(pre_SR, 0.0))

        kept_TSR = jax.lax.fori_loop(0, num_tiles, fill, kept_TSR)
        least_R = _between_kth_and_next(kept_TSR, num_tiles, k=k)
        place = jax.lax.dynamic_update_slice_in_dim
        return kept_TSR, place(least_B, least_R, number * part, axis=0)

    start = jnp.zeros((width // size, size, part)), jnp.zeros(num_rows)
    start = jax.tree.map(partial(varying_like, like=like), start)
    num_parts = jnp.where(wanted, num_rows // part, 0)
    return jax.lax.fori_loop(0, num_parts, one_part, start)[1]


def _between_kth_and_next(kept_TSR: Array, num_tiles: Array, *, k: int) -> Array:
    zeros_R = varying_like(jnp.zeros(kept_TSR.shape[2], jnp.int32), like=kept_TSR)

    def enough(least_R: Array) -> Array:
        def count(nth: Array, counts_R: Array) -> Array:
            found_SR = as_bits(kept_TSR[nth]) >= least_R[None, :]
            return counts_R + found_SR.sum(axis=0, dtype=jnp.int32)

        return jax.lax.psum(jax.lax.fori_loop(0, num_tiles, count, zeros_R), "model") >= k

    kth_R = bisect(enough, zeros_R)

    def below(nth: Array, largest_R: Array) -> Array:
        values_SR = kept_TSR[nth]
        below_SR = jnp.where(values_SR < kth_R[None, :], values_SR, 0.0)
        return jnp.maximum(largest_R, below_SR.max(axis=0))

    next_R = jax.lax.fori_loop(0, num_tiles, below, zeros_R.astype(jnp.float32))
    next_R = varying_like(jax.lax.pmax(next_R, "model"), like=kth_R)
    middle_R = next_R + 0.5 * (kth_R - next_R)
    return jnp.where(middle_R < kth_R, middle_R, next_R)


def decode_dead(
    encoder: Encoder,
    W_dec_FD: Float[Array, "F D"],
    listed: Listed,
    dead_least_B: Float[Array, " B"],
) -> Float[Array, "B D"]:
    """z W_dec of the dead latents that are selected to predict what the others missed."""
    size = tile_of(W_dec_FD.shape[0])

    def add(number: Array, decoded_BD: Array) -> Array:
        tile = _tile(listed, number, size=size, num=listed.num_dead)
        pre_SB = _pre(encoder, _rows_of(encoder.W_enc_FD, tile), tile)
        z_SB = _to_predict(pre_SB, dead_least_B, tile)
        W_SD = _rows_of(W_dec_FD, tile)
        return decoded_BD + jnp.einsum("sb,sd->bd", z_SB, W_SD, precision=PRECISION)

    like = encoder.W_enc_FD[0, 0] + encoder.x_BD[0, 0]
    start = varying_like(jnp.zeros(encoder.x_BD.shape), like=like)
    return jax.lax.fori_loop(0, -(-listed.num_dead // size), add, start)


def listed_pass(
    rows: Rows,
    listed: Listed,
    pairs: Pairs,
    fits: Bool[Array, ""],
    *,
    pulls: Pulls,
    g_missed_BD: Float[Array, "B D"],
    cuts: Cuts,
    write: Write | None,
) -> tuple[Rows, Sums]:
    """Over dead latents if the pairs fit, else over all: (rows, sums).

    Args:
        pairs: those of this device's rows, `pre_P` 0 at those that weren't selected.
        g_missed_BD: the gradient in what dead latents predict.
        write: makes the new rows; None leaves them, for a look at the gradients' norm.
    """
    width, d_model = rows.W_enc.shape
    size = tile_of(width)
    num = jnp.where(fits, listed.num_dead, width)
    starts_F = jnp.cumsum(pairs.counts_F, dtype=jnp.int32) - pairs.counts_F

    def one_tile(number: Array, carry: tuple[Rows, Sums]) -> tuple[Rows, Sums]:
        rows, sums = carry
        tile = _tile(listed, number, size=size, num=num)
        own = Rows(*(_rows_of(matrix_FD, tile) for matrix_FD in rows))
        pre_SB = _pre(Encoder(rows.W_enc, pulls.bias_F, pulls.x_BD), own.W_enc, tile)
        counts_S = pairs.counts_F.at[tile.ids_S].get(mode="fill", fill_value=0)
        from_pairs_SB = _at_pairs(
            starts_F.at[tile.ids_S].get(mode="clip"), jnp.where(fits, counts_S, 0), pairs, pre_SB
        )
        found = _gradients(
            own,
            f_SB=jnp.where(fits, from_pairs_SB, _selected(pre_SB, cuts.least_B)),
            z_SB=_to_predict(pre_SB, cuts.dead_least_B, tile),
            pulls=pulls,
            g_missed_BD=g_missed_BD,
        )
        sums = added(sums, own, found, place=partial(_placed, tile=tile))
        if write is None:
            return rows, sums
        new = write(jnp.minimum(tile.ids_S, width - 1), own, found)
        written = (
            matrix_FD.at[tile.ids_S].set(new_SD, mode="drop")
            for matrix_FD, new_SD in zip(rows, new, strict=True)
        )
        return Rows(*written), sums

    start = rows, no_sums(width, d_model, like=rows.W_enc[0, 0])
    return jax.lax.fori_loop(0, _num_tiles(num, size=size), one_tile, start)


def _at_pairs(starts_S: Array, counts_S: Array, pairs: Pairs, like_SB: Array) -> Array:
    """Selected latents of a tile from its pairs, not from a product that may round otherwise."""
    nth_S1 = jnp.arange(starts_S.shape[0], dtype=jnp.int32)[:, None]

    def add(f_SB: Array, place_SC: Array, there_SC: Array) -> Array:
        value_SC = jnp.where(there_SC, pairs.pre_P[place_SC], 0.0)
        return f_SB.at[nth_S1, pairs.row_P[place_SC]].add(value_SC)

    start = varying_like(jnp.zeros(like_SB.shape), like=like_SB[0, 0] + pairs.pre_P[0])
    return over_pairs(starts_S, counts_S, start, add)


def _gradients(
    own: Rows, *, f_SB: Array, z_SB: Array, pulls: Pulls, g_missed_BD: Array
) -> Gradients:
    product = partial(jnp.einsum, precision=PRECISION)
    g_f_SB = product("sd,bd->sb", own.W_dec, pulls.g_BD)
    g_z_SB = product("sd,bd->sb", own.W_dec, g_missed_BD)
    g_pre_SB = jnp.where(f_SB > 0, g_f_SB, 0.0) + jnp.where(z_SB > 0, g_z_SB, 0.0)
    found = Gradients(
        enc_SD=product("sb,bd->sd", g_pre_SB, pulls.x_BD),
        dec_SD=product("sb,bd->sd", f_SB, pulls.g_BD) + product("sb,bd->sd", z_SB, g_missed_BD),
        bias_S=g_pre_SB.sum(axis=1),
        theta_S=jnp.zeros_like(g_pre_SB[:, 0]),
    )
    return Gradients(*(jax.lax.psum(array, "data") for array in found))

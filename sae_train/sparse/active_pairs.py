"""The pairs (row, latent) that a JumpReLU step looks at, found without keeping [B, F].

Every gradient of a step is exactly zero but at pairs whose latent is active, pre > θ, or within
half a bandwidth of its threshold. `select_pairs` makes the encoder's product tile by tile over
latents and keeps of each tile only its pairs: what the tile was compared with is packed into
words of 32 rows, and the j-th pair of a tile is the j-th set bit, found by binary search.

Pure functions of one device's shard: they don't know of meshes.

Legend: B rows, D model width, F latents, L latents of a tile, W words of 32 rows, G groups of I
words, P positions for pairs, Q pairs written at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from activation_cache.precision import Precision
from activation_cache.products import einsum, operand, rounded
from sae_train.sparse.search_margin import Norms, margin, norms
from sae_train.step.gradients import has_gradient
from sae_train.step.tiles import tile_of, varying_like

WORD = 32
WRITTEN_AT_ONCE = 2048
GROUP = 8  # words


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pairs:
    """Pairs in the order of their latents; behind the last one, positions that hold (0, F, 0).

    Attributes:
        row_P, latent_P: a pair's row of the batch and its latent.
        pre_P: its pre-activation.
        counts_F: pairs of each latent, also those for which there was no space.
        total: pairs there are, as a float; above P, there was no space for some.

    The same class also holds dims, field by field.
    """

    row_P: Any
    latent_P: Any
    pre_P: Any
    counts_F: Any
    total: Any


def pack_rows(found_BL: Bool[Array, "B L"]) -> UInt32[Array, "W L"]:
    """One bit per row: bit j of word w is row j·W + w, so that packing adds up whole rows."""
    rows = found_BL.shape[0]
    num_words = -(-rows // WORD)
    if rows % WORD:
        found_BL = jnp.pad(found_BL, ((0, num_words * WORD - rows), (0, 0)))
    bits = found_BL.reshape(WORD, num_words, -1).astype(jnp.uint32)
    bit = jnp.arange(WORD, dtype=jnp.uint32)[:, None, None]
    return (bits << bit).sum(axis=0, dtype=jnp.uint32)


def nth_set_bit(word_Q: UInt32[Array, " Q"], rank_Q: Int[Array, " Q"]) -> Int[Array, " Q"]:
    """The position of the set bit that `rank` others precede, by halving."""
    position_Q = jnp.zeros_like(rank_Q)
    for half in (16, 8, 4, 2, 1):
        low_Q = word_Q & jnp.uint32((1 << half) - 1)
        below_Q = jax.lax.population_count(low_Q).astype(rank_Q.dtype)
        above_Q = rank_Q >= below_Q
        rank_Q = jnp.where(above_Q, rank_Q - below_Q, rank_Q)
        position_Q = jnp.where(above_Q, position_Q + half, position_Q)
        word_Q = jnp.where(above_Q, word_Q >> half, low_Q)
    return position_Q


def _last_not_above(before_GL: Array, latent_Q: Array, rank_Q: Array) -> Array:
    """Of each pair's latent the last group before which no more than `rank` bits are set."""
    num_groups = before_GL.shape[0]
    group_Q = jnp.zeros_like(rank_Q)
    step = 1 << max(0, num_groups - 1).bit_length()
    while step := step // 2:
        further_Q = group_Q + step
        inside_Q = further_Q < num_groups
        before_Q = before_GL[jnp.where(inside_Q, further_Q, 0), latent_Q]
        group_Q = jnp.where(inside_Q & (before_Q <= rank_Q), further_Q, group_Q)
    return group_Q


def _nth_of_words(words: Sequence[Array], rank_Q: Array) -> tuple[Array, Array]:
    """(word, bit): where in successive words the set bit is that `rank` others precede."""
    found_Q, word_Q, left_Q = jnp.zeros_like(rank_Q), words[0], rank_Q
    before_Q = jnp.zeros_like(rank_Q)
    for number in range(1, len(words)):
        before_Q += jax.lax.population_count(words[number - 1]).astype(rank_Q.dtype)
        further_Q = before_Q <= rank_Q
        found_Q = jnp.where(further_Q, number, found_Q)
        word_Q = jnp.where(further_Q, words[number], word_Q)
        left_Q = jnp.where(further_Q, rank_Q - before_Q, left_Q)
    return found_Q, nth_set_bit(word_Q, left_Q)


def _nothing(capacity: int, *, like: Array) -> tuple[tuple[Array, Array, Array], Array, Array]:
    """Empty lists of pairs, how many they hold, and how many pairs there are."""

    def zeros(shape: Any, dtype: Any) -> Array:
        return varying_like(jnp.zeros(shape, dtype), like=like)

    size = capacity + WRITTEN_AT_ONCE
    lists = zeros(size, jnp.int32), zeros(size, jnp.int32), zeros(size, jnp.float32)
    return lists, zeros((), jnp.int32), zeros((), jnp.float32)


def select_pairs(
    W_enc_FD: Float[Array, "F D"],
    bias_F: Float[Array, " F"],
    theta_F: Float[Array, " F"],
    x_BD: Float[Array, "B D"],
    *,
    bandwidth: float,
    capacity: int,
    precision: Precision,
    searched_rounded: bool = False,
) -> Pairs:
    """Candidates of pre = x W_encᵀ + bias; the product is made tile by tile and not kept.

    Args:
        x_BD: what the encoder multiplies, b_dec subtracted if it is at all.
        capacity: P, the positions for pairs. If there are more, the first P of them are kept and
            `total` says how many there are.
        searched_rounded: find float32's pairs by a bfloat16 product and a margin
            (`search_margin`). What is found in vain is kept: it adds zeros to every gradient.
    """
    num_latents, d_model = W_enc_FD.shape
    tile = tile_of(num_latents)
    num_tiles = num_latents // tile
    start = _nothing(capacity, like=W_enc_FD[0, 0] * x_BD[0, 0])
    searched = _searched(x_BD, precision=precision, rounded_to_search=searched_rounded)

    def one_tile(carry, inputs):
        W_LD, bias_L, theta_L, first = inputs
        product_BL, pre_BL = searched(W_LD, bias_L)
        lists, filled, total = carry
        counts_L, lists, written = append(
            product_BL,
            has_gradient(pre_BL, theta_L[None, :], bandwidth=bandwidth),
            bias_L=bias_L,
            lists=lists,
            filled=filled,
            first_latent=first,
            capacity=capacity,
        )
        total = total + counts_L.sum(dtype=jnp.int32).astype(jnp.float32)
        return (lists, written, total), counts_L

    tiles = (
        W_enc_FD.reshape(num_tiles, tile, d_model),
        bias_F.reshape(num_tiles, tile),
        theta_F.reshape(num_tiles, tile),
        jnp.arange(num_tiles, dtype=jnp.int32) * tile,
    )
    (lists, filled, total), counts_TL = jax.lax.scan(one_tile, start, tiles)
    if searched_rounded:
        lists = _in_float32(lists, filled, W_enc_FD, bias_F, x_BD)
    row_P, latent_P, pre_P = (array[:capacity] for array in lists)
    held_P = jnp.arange(capacity) < filled
    return Pairs(
        row_P=jnp.where(held_P, row_P, 0),
        latent_P=jnp.where(held_P, latent_P, num_latents),
        pre_P=jnp.where(held_P, pre_P, 0.0),
        counts_F=counts_TL.reshape(num_latents),
        total=total,
    )


def _searched(
    x_BD: Array, *, precision: Precision, rounded_to_search: bool
) -> Callable[[Array, Array], tuple[Array, Array]]:
    """Of a tile's weights and biases: the product, and pre-activations that are at least float32's.

    With `rounded_to_search` the product is of operands in bfloat16; else both are as they are.
    """
    assert not rounded_to_search or precision == "float32", precision
    search: Precision = "bfloat16" if rounded_to_search else precision
    multiplied_BD = operand(x_BD, precision=search)
    norms_B = _norms(x_BD) if rounded_to_search else None

    def of_tile(W_LD: Array, bias_L: Array) -> tuple[Array, Array]:
        product_BL = einsum("bd,fd->bf", multiplied_BD, W_LD, precision=search)
        pre_BL = product_BL + bias_L[None, :]
        if norms_B is not None:
            d_model = x_BD.shape[1]
            pre_BL = pre_BL + margin(norms_B, _norms(W_LD), bias_L=bias_L, d_model=d_model)
        return product_BL, pre_BL

    return of_tile


def _norms(x_ND: Array) -> Norms:
    return norms(x_ND, read_ND=rounded(x_ND, precision="bfloat16"))


def _in_float32(
    lists: tuple[Array, Array, Array],
    filled: Int[Array, ""],
    W_enc_FD: Array,
    bias_F: Array,
    x_BD: Array,
) -> tuple[Array, Array, Array]:
    """The lists with the pre-activations of those that are filled made again, a block at a time."""
    row_P, latent_P, _ = lists

    def one_block(block: Array, pre_P: Array) -> Array:
        at = block * WRITTEN_AT_ONCE
        row_Q, latent_Q = (
            jax.lax.dynamic_slice_in_dim(ids_P, at, WRITTEN_AT_ONCE) for ids_P in (row_P, latent_P)
        )
        pre_Q = (x_BD[row_Q] * W_enc_FD[latent_Q]).sum(axis=1) + bias_F[latent_Q]
        return jax.lax.dynamic_update_slice_in_dim(pre_P, pre_Q, at, axis=0)

    num_blocks = -(-filled // WRITTEN_AT_ONCE)
    return row_P, latent_P, jax.lax.fori_loop(0, num_blocks, one_block, lists[2])


def append(
    product_BL: Float[Array, "B L"],
    found_BL: Bool[Array, "B L"],
    *,
    bias_L: Float[Array, " L"],
    lists: tuple[Array, Array, Array],
    filled: Int[Array, ""],
    first_latent: Int[Array, ""],
    capacity: int,
) -> tuple[Int[Array, " L"], tuple[Array, Array, Array], Int[Array, ""]]:
    """Write a tile's pairs behind those of the tiles before: (counts, lists, positions filled).

    Args:
        product_BL: pre-activations less the bias, which is added to those that are kept: a sum of
            the whole tile would be written to memory and read again.
        lists: rows, latents and pre-activations; `WRITTEN_AT_ONCE` longer than `capacity`.
    """
    words_WL = pack_rows(found_BL)
    num_words, tile = words_WL.shape
    # Sums over groups of words: over the words themselves they take as long as the search.
    words_WL = jnp.pad(words_WL, ((0, -num_words % GROUP), (0, 0)))
    words_GIL = words_WL.reshape(-1, GROUP, tile)
    set_GL = jax.lax.population_count(words_GIL).astype(jnp.int32).sum(axis=1, dtype=jnp.int32)
    up_to_GL = jnp.cumsum(set_GL, axis=0, dtype=jnp.int32)
    counts_L, before_GL = up_to_GL[-1], up_to_GL - set_GL
    ends_L = jnp.cumsum(counts_L, dtype=jnp.int32)
    wanted = jnp.minimum(ends_L[-1], capacity - filled)

    def write(block, lists):
        nth_Q = block * WRITTEN_AT_ONCE + jnp.arange(WRITTEN_AT_ONCE, dtype=jnp.int32)
        latent_Q = jnp.searchsorted(ends_L, nth_Q, side="right", method="scan_unrolled")
        latent_Q = jnp.minimum(latent_Q, ends_L.shape[0] - 1).astype(jnp.int32)
        rank_Q = nth_Q - (ends_L - counts_L)[latent_Q]
        group_Q = _last_not_above(before_GL, latent_Q, rank_Q)
        rank_Q = rank_Q - before_GL[group_Q, latent_Q]
        words = [words_GIL[group_Q, number, latent_Q] for number in range(GROUP)]
        word_Q, bit_Q = _nth_of_words(words, rank_Q)
        row_Q = bit_Q * num_words + group_Q * GROUP + word_Q
        row_Q = jnp.minimum(row_Q, product_BL.shape[0] - 1)  # behind the last pair: no row at all
        pre_Q = product_BL[row_Q, latent_Q] + bias_L[latent_Q]
        values = (row_Q, first_latent + latent_Q, pre_Q)
        at = (filled + block * WRITTEN_AT_ONCE,)
        return tuple(
            jax.lax.dynamic_update_slice(array, value, at)
            for array, value in zip(lists, values, strict=True)
        )

    num_blocks = -(-wanted // WRITTEN_AT_ONCE)
    return counts_L, jax.lax.fori_loop(0, num_blocks, write, lists), filled + wanted

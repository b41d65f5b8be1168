"""Sums over pairs, row by row or latent by latent, as gathers: nothing is scattered and added.

XLA's scatter-add walks through its updates one by one. Here pairs lie in the order of what they
are summed into, a segment for each; segments are taken in blocks, longest first, so that those of
a block are about as long as each other, and of each the next few pairs are gathered at a time
until the longest is through. The order of additions is fixed, so the same pairs give the same
bits. Pure functions of one device's shard.

Legend: B rows, D model width, F latents, P positions for pairs, S segments of a block, C pairs of a
segment taken at once, N segments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from activation_cache.precision import Precision
from activation_cache.products import rounded
from sae_train.sparse.active_pairs import Pairs
from sae_train.step.tiles import varying_like

# Measured on a CPU, with 4 to 16 pairs a latent: smaller blocks start too many loops, larger ones
# and more pairs at once fall out of its caches.
BLOCK = 1024
AT_ONCE = 4

Carried = TypeVar("Carried")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Segments:
    """Segments of a list of pairs, longest first, padded with empty ones to whole blocks.

    Attributes:
        ids_N: which row or latent a segment is of; of padding, their number.
        starts_N, counts_N: where its pairs begin and how many they are.
        num_blocks: blocks that have a pair at all.
    """

    ids_N: Int[Array, " N"]
    starts_N: Int[Array, " N"]
    counts_N: Int[Array, " N"]
    num_blocks: Int[Array, ""]

    @property
    def block(self) -> int:
        """Segments of a block."""
        return min(BLOCK, self.ids_N.shape[0])


def longest_first(counts_N: Int[Array, " N"], *, wanted: Bool[Array, ""] | None = None) -> Segments:
    """The segments of pairs that lie one segment after the other.

    Args:
        wanted: False takes all segments for empty.
    """
    num = counts_N.shape[0]
    padding = -num % min(BLOCK, num)
    starts_N = jnp.cumsum(counts_N, dtype=jnp.int32) - counts_N
    if wanted is not None:
        counts_N = jnp.where(wanted, counts_N, 0)
    longest_N, ids_N, starts_N = jax.lax.sort(
        (-counts_N, jnp.arange(num, dtype=jnp.int32), starts_N), num_keys=1, is_stable=True
    )
    counts_N = jnp.pad(-longest_N, (0, padding))
    size = min(BLOCK, num)
    return Segments(
        ids_N=jnp.pad(ids_N, (0, padding), constant_values=num),
        starts_N=jnp.pad(starts_N, (0, padding)),
        counts_N=counts_N,
        num_blocks=-(-(counts_N > 0).sum(dtype=jnp.int32) // size),
    )


def block_of(array_N: Array, number: Array, *, size: int) -> Array:
    """The part of an array that belongs to a block."""
    return jax.lax.dynamic_slice_in_dim(array_N, number * size, size)


def over_pairs(
    starts_S: Int[Array, " S"],
    counts_S: Int[Array, " S"],
    start: Carried,
    add: Callable[[Carried, Int[Array, "S C"], Bool[Array, "S C"]], Carried],
) -> Carried:
    """`add` the next few pairs of each segment, given their positions and which of them exist."""

    def some(state: tuple[Array, Carried]) -> tuple[Array, Carried]:
        done, carried = state
        nth_C = done + jnp.arange(AT_ONCE, dtype=jnp.int32)
        there_SC = nth_C[None, :] < counts_S[:, None]
        position_SC = jnp.where(there_SC, starts_S[:, None] + nth_C[None, :], 0)
        return done + AT_ONCE, add(carried, position_SC, there_SC)

    longest = counts_S.max()
    zero = varying_like(jnp.zeros((), jnp.int32), like=longest)
    return jax.lax.while_loop(lambda state: state[0] < longest, some, (zero, start))[1]


def weighted_rows(
    source_ND: Float[Array, "N D"],
    index_SC: Int[Array, "S C"],
    weight_SC: Float[Array, "S C"],
    *,
    precision: Precision,
) -> Float[Array, "S D"]:
    """Σ_c weight · source[index]: written out, so that it compiles to one loop over S·D."""
    weight_SC = rounded(weight_SC, precision=precision)
    columns = (
        rounded_rows(source_ND, index_SC[:, c], precision=precision)
        for c in range(index_SC.shape[1])
    )
    terms = (weight_SC[:, c, None] * column_SD for c, column_SD in enumerate(columns))
    return sum(terms, jnp.zeros(()))


def rounded_rows(
    source_ND: Float[Array, "N D"], index_S: Int[Array, " S"], *, precision: Precision
) -> Float[Array, "S D"]:
    """Rows of a matrix, which may be kept as an `operand`, as a product would see them."""
    return rounded(source_ND[index_S].astype(jnp.float32), precision=precision)


def sort_by_row(pairs: Pairs, *, num_rows: int) -> tuple[Int[Array, " P"], Int[Array, " B"]]:
    """Where the pairs of row 0 are, then those of row 1 and so on; and how many each has."""
    capacity = pairs.row_P.shape[0]
    held = jnp.minimum(pairs.total, capacity).astype(jnp.int32)
    there_P = jnp.arange(capacity, dtype=jnp.int32) < held
    row_P = jnp.where(there_P, pairs.row_P, num_rows)
    sorted_P, order_P = _sorted(row_P, total=pairs.total, largest=num_rows)
    ends_B = jnp.searchsorted(
        sorted_P, jnp.arange(num_rows, dtype=jnp.int32), side="right", method="scan_unrolled"
    )
    return order_P, jnp.diff(ends_B, prepend=0).astype(jnp.int32)


def _sorted(key_P: Array, *, total: Array, largest: int) -> tuple[Array, Array]:
    """Keys in order and where they were; only the part of the list that holds pairs is sorted."""
    capacity = key_P.shape[0]
    sizes = [capacity >> shift for shift in range(5, -1, -1) if capacity >> shift]

    def sort(size: int) -> tuple[Array, Array]:
        key, place = _sort_keys(key_P[:size], largest=largest)
        rest = jnp.arange(size, capacity, dtype=jnp.int32)
        return (
            jnp.concatenate([key, key_P[size:]]),
            jnp.concatenate([place, varying_like(rest, like=place)]),
        )

    fits = sum((total > size).astype(jnp.int32) for size in sizes[:-1])
    return jax.lax.switch(fits, [partial(sort, size) for size in sizes])


def _sort_keys(key_P: Array, *, largest: int) -> tuple[Array, Array]:
    size = key_P.shape[0]
    bits = max(1, (size - 1).bit_length())
    position_P = jnp.arange(size, dtype=jnp.uint32)
    if (largest << bits) + size > 1 << 32:
        varying = varying_like(position_P.astype(jnp.int32), like=key_P)
        key, place = jax.lax.sort((key_P, varying), num_keys=1, is_stable=True)
        return key, place
    # Key and place in one word: sorting pairs of arrays takes four times as long on a CPU.
    packed_P = jax.lax.sort((key_P.astype(jnp.uint32) << bits) | position_P)
    return (packed_P >> bits).astype(jnp.int32), (packed_P & ((1 << bits) - 1)).astype(jnp.int32)


def decode_pairs(
    pairs: Pairs,
    latents_P: Float[Array, " P"],
    W_dec_FD: Float[Array, "F D"],
    *,
    num_rows: int,
    precision: Precision,
) -> tuple[Float[Array, "B D"], Float[Array, " B"]]:
    """f W_dec of the latents that are given by pair, and how many of a row aren't 0.

    No active latent of a JumpReLU is 0, its threshold being 0 or above.
    """
    order_P, counts_B = sort_by_row(pairs, num_rows=num_rows)
    return decode_sorted(
        pairs.latent_P[order_P], latents_P[order_P], counts_B, W_dec_FD, precision=precision
    )


def decode_sorted(
    latent_P: Int[Array, " P"],
    value_P: Float[Array, " P"],
    counts_B: Int[Array, " B"],
    W_dec_FD: Float[Array, "F D"],
    *,
    precision: Precision,
) -> tuple[Float[Array, "B D"], Float[Array, " B"]]:
    """`decode_pairs` of pairs that lie in the order of their rows, so many of each."""
    num_rows = counts_B.shape[0]
    segments = longest_first(counts_B)
    size = segments.block

    def zeros(num: int) -> tuple[Array, Array]:
        like = value_P[0] + W_dec_FD[0, 0]
        empty = jnp.zeros((num, W_dec_FD.shape[1])), jnp.zeros(num)
        return varying_like(empty[0], like=like), varying_like(empty[1], like=like)

    def one_block(number: Array, so_far: tuple[Array, Array]) -> tuple[Array, Array]:
        def add(
            sums: tuple[Array, Array], position_SC: Array, there_SC: Array
        ) -> tuple[Array, Array]:
            value_SC = jnp.where(there_SC, value_P[position_SC], 0.0)
            added_SD = weighted_rows(W_dec_FD, latent_P[position_SC], value_SC, precision=precision)
            return sums[0] + added_SD, sums[1] + (value_SC != 0).sum(axis=1, dtype=jnp.float32)

        starts_S = block_of(segments.starts_N, number, size=size)
        counts_S = block_of(segments.counts_N, number, size=size)
        sums = over_pairs(starts_S, counts_S, zeros(size), add)
        place = jax.lax.dynamic_update_slice_in_dim
        return place(so_far[0], sums[0], number * size, axis=0), place(
            so_far[1], sums[1], number * size, axis=0
        )

    found = jax.lax.fori_loop(0, segments.num_blocks, one_block, zeros(segments.ids_N.shape[0]))
    back_B = jnp.argsort(segments.ids_N)[:num_rows]
    return found[0][back_B], found[1][back_B]


def per_latent(found_P: Bool[Array, " P"], counts_F: Int[Array, " F"]) -> Float[Array, " F"]:
    """How many of each latent's pairs are found; whole numbers, so differences are exact."""
    up_to_P = jnp.pad(jnp.cumsum(found_P, dtype=jnp.int32), (1, 0))
    ends_F = jnp.minimum(jnp.cumsum(counts_F, dtype=jnp.int32), found_P.shape[0])
    counted_F = up_to_P[ends_F] - up_to_P[jnp.pad(ends_F, (1, 0))[:-1]]
    return counted_F.astype(jnp.float32)

"""TopK's and BatchTopK's selection as pairs (row, latent), exact, without keeping [B, F].

    each tile of the encoder's product    -> pairs at or above the row's bound as it stands
    the pairs at or above the last bound  -> the k-th largest value: what isn't below is selected

**The bound.** Latents fall into groups, one of each tile to a group. The k-th largest of a row's
group maxima is no larger than its k-th largest value, k groups holding one at least as large each;
and hardly smaller, as long as groups are many times k. It is raised after 2, 4, 8, ... tiles, so
that about k of a row's pairs are collected for each doubling. If they don't fit, for the largest
values come last, all is done again from the last bound, above which there are little more than k.

Values are compared as they were made once, so nothing depends on how a product rounds. Pure
functions of one device's shard; only `Goal` and `select_largest` know that there may be others.

Legend: B rows, D model width, F latents, L latents of a tile, T tiles, P places for pairs, K places
for the pairs of a row, Q pairs written at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sae_train.model.forward import PRECISION
from sae_train.model.topk import bisect
from sae_train.sparse.active_pairs import WRITTEN_AT_ONCE, Pairs, append
from sae_train.sparse.segment_sums import per_latent
from sae_train.step.tiles import tile_of, varying_like

# Groups for each of the k: with 8 the bound is at about the 1.07 k-th largest value of a row.
_GROUPS = 8
# Sign aside the upper bits of a bound: 8 of exponent, 8 of mantissa. It may be 0.4 % too low.
_BOUND_BITS = 16
# Places for the pairs of a row at or above the last bound: for each of the k, and some more.
_ROW_PLACES, _MORE_PLACES = 2, 16


@dataclass(frozen=True)
class Goal:
    """How many latents are selected: `k` of each row, or as many in the mean of a whole batch.

    Attributes:
        num_rows: of the whole batch.
    """

    k: int
    over_batch: bool
    num_rows: int

    def enough(self, counts: Int[Array, "..."]) -> Bool[Array, "..."]:
        """Are so many of each row, on this device, as many as are selected on all devices?

        Args:
            counts: of each row [B]; over a batch their sum will do.
        """
        if not self.over_batch:
            return jax.lax.psum(counts, "model") >= self.k
        # In float32, as `topk.kth_largest_of_all` counts and for the same reason.
        total = jax.lax.psum(counts.astype(jnp.float32).sum(), ("data", "model"))
        return jnp.broadcast_to(total >= self.k * self.num_rows, counts.shape)


class _Collected(NamedTuple):
    """What a pass over the tiles carries."""

    lists: Any
    filled: Any
    total: Any
    counts_TL: Any
    maxima_BL: Any
    bound_B: Any


def as_bits(values: Float[Array, "..."]) -> Int[Array, "..."]:
    """Values >= 0 as integers in the same order."""
    return jax.lax.bitcast_convert_type(values, jnp.int32)


def _bound(maxima_BL: Array, *, goal: Goal) -> Array:
    """A lower bound of each row's smallest selected value, from maxima of groups."""
    groups = maxima_BL.shape[1]
    while groups % 2 == 0 and groups // 2 >= _GROUPS * goal.k:
        groups //= 2
        maxima_BL = jnp.maximum(maxima_BL[:, :groups], maxima_BL[:, groups:])
    bits_BL = as_bits(maxima_BL)
    start_B = varying_like(jnp.zeros(bits_BL.shape[0], jnp.int32), like=bits_BL)
    return bisect(
        lambda least_B: goal.enough((bits_BL >= least_B[:, None]).sum(axis=1, dtype=jnp.int32)),
        start_B,
        bits=_BOUND_BITS,
    )


def select_largest(
    W_enc_FD: Float[Array, "F D"],
    bias_F: Float[Array, " F"],
    x_BD: Float[Array, "B D"],
    *,
    goal: Goal,
    capacity: int,
) -> tuple[Pairs, Float[Array, ""]]:
    """Pairs at or above a bound of what is selected, and how many places that took.

    The pairs are all that may be selected if no device's places, of the second result the most,
    are above `capacity`.

    Args:
        x_BD: what the encoder multiplies, b_dec subtracted if it is at all.
        capacity: P, the places for pairs.
    """
    num_latents, d_model = W_enc_FD.shape
    tile = tile_of(num_latents)
    num_tiles = num_latents // tile
    W_TLD, bias_TL = W_enc_FD.reshape(num_tiles, tile, d_model), bias_F.reshape(num_tiles, tile)
    like = W_enc_FD[0, 0] + x_BD[0, 0]

    def product(number: Array) -> Array:
        return jnp.einsum("bd,fd->bf", x_BD, W_TLD[number], precision=PRECISION)

    def one_tile(number: Array, so_far: _Collected) -> _Collected:
        product_BL, bias_L = product(number), bias_TL[number]
        pre_BL = product_BL + bias_L[None, :]
        counts_L, lists, filled = append(
            product_BL,
            (pre_BL >= so_far.bound_B[:, None]) & (pre_BL > 0),
            bias_L=bias_L,
            lists=so_far.lists,
            filled=so_far.filled,
            first_latent=(number * tile).astype(jnp.int32),
            capacity=capacity,
        )
        return _Collected(
            lists=lists,
            filled=filled,
            total=so_far.total + counts_L.sum(dtype=jnp.int32).astype(jnp.float32),
            counts_TL=so_far.counts_TL.at[number].set(counts_L),
            maxima_BL=jnp.maximum(so_far.maxima_BL, pre_BL),
            bound_B=so_far.bound_B,
        )

    def doubling(nth: Array, so_far: _Collected) -> _Collected:
        first = jnp.where(nth == 0, 0, jnp.left_shift(1, nth))
        last = jnp.minimum(jnp.left_shift(2, nth), num_tiles)
        so_far = jax.lax.fori_loop(first, last, one_tile, so_far)
        bound_B = jnp.maximum(so_far.bound_B, _bound(so_far.maxima_BL, goal=goal))
        return so_far._replace(bound_B=bound_B)

    def attempt(state: tuple[Array, Array, _Collected]) -> tuple[Array, Array, _Collected]:
        number, _, before = state
        start = before._replace(filled=before.filled * 0, total=before.total * 0)
        found = jax.lax.fori_loop(0, max(1, (num_tiles - 1).bit_length()), doubling, start)
        return number + 1, jax.lax.pmax(found.total, ("data", "model")), found

    def again(state: tuple[Array, Array, _Collected]) -> Array:
        return (state[0] == 0) | ((state[0] == 1) & (state[1] > capacity))

    maxima_BL = jnp.maximum(product(jnp.int32(0)) + bias_TL[0][None, :], 0.0)
    start = _nothing(num_tiles, tile, capacity=capacity, like=like)._replace(
        maxima_BL=maxima_BL, bound_B=_bound(maxima_BL, goal=goal)
    )
    _, most, found = jax.lax.while_loop(again, attempt, (jnp.int32(0), jnp.float32(0), start))
    return _above(found, capacity=capacity), most


def _nothing(num_tiles: int, tile: int, *, capacity: int, like: Array) -> _Collected:
    def zeros(shape: Any, dtype: Any) -> Array:
        return varying_like(jnp.zeros(shape, dtype), like=like)

    places = capacity + WRITTEN_AT_ONCE
    return _Collected(
        lists=tuple(zeros(places, dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32)),
        filled=zeros((), jnp.int32),
        total=zeros((), jnp.float32),
        counts_TL=zeros((num_tiles, tile), jnp.int32),
        maxima_BL=None,
        bound_B=None,
    )


def _above(found: _Collected, *, capacity: int) -> Pairs:
    """The collected pairs that the last bound leaves, close together."""
    row_P, _, pre_P = found.lists
    num_latents = found.counts_TL.size
    places = jnp.arange(row_P.shape[0], dtype=jnp.int32)
    kept_P = (places < found.filled) & (pre_P >= found.bound_B[row_P])
    ends_P = jnp.cumsum(kept_P, dtype=jnp.int32)
    empty = (jnp.int32(0), jnp.int32(num_latents), jnp.float32(0))
    lists = tuple(varying_like(jnp.full(row_P.shape, value), like=pre_P) for value in empty)

    def write(block: Array, lists: tuple[Array, ...]) -> tuple[Array, ...]:
        nth_Q = block * WRITTEN_AT_ONCE + jnp.arange(WRITTEN_AT_ONCE, dtype=jnp.int32)
        from_Q = jnp.searchsorted(ends_P, nth_Q, side="right", method="scan_unrolled")
        there_Q = nth_Q < ends_P[-1]
        return tuple(
            jax.lax.dynamic_update_slice(
                array,
                jnp.where(there_Q, source.at[from_Q].get(mode="clip"), value),
                (block * WRITTEN_AT_ONCE,),
            )
            for array, source, value in zip(lists, found.lists, empty, strict=True)
        )

    num_blocks = -(-ends_P[-1] // WRITTEN_AT_ONCE)
    row_P, latent_P, pre_P = jax.lax.fori_loop(0, num_blocks, write, lists)
    return Pairs(
        row_P=row_P[:capacity],
        latent_P=latent_P[:capacity],
        pre_P=pre_P[:capacity],
        counts_F=per_latent(kept_P, found.counts_TL.reshape(-1)).astype(jnp.int32),
        total=ends_P[-1].astype(jnp.float32),
    )


def smallest_selected(
    sorted_P: Float[Array, " P"], counts_B: Int[Array, " B"], *, goal: Goal
) -> tuple[Float[Array, " B"], Bool[Array, ""]]:
    """Of each row the smallest value that is selected, 0 if too few are positive; is it right?

    It isn't where a row has too many pairs that are all about as large.

    Args:
        sorted_P: values of all pairs that may be selected, in the order of their rows.
        counts_B: how many each row has.
    """
    bisected = partial(
        bisect, start=varying_like(jnp.zeros(counts_B.shape, jnp.int32), like=sorted_P)
    )
    if goal.over_batch:
        bits_P = as_bits(sorted_P)

        def enough(least_B: Array) -> Array:
            found = (bits_P >= least_B[0]).sum(dtype=jnp.int32)
            return jnp.broadcast_to(goal.enough(found), least_B.shape)

        return bisected(enough), jnp.ones((), bool)
    places = _ROW_PLACES * goal.k + _MORE_PLACES
    nth_K = jnp.arange(places, dtype=jnp.int32)
    starts_B = jnp.cumsum(counts_B, dtype=jnp.int32) - counts_B
    there_BK = nth_K[None, :] < counts_B[:, None]
    place_BK = jnp.where(there_BK, starts_B[:, None] + nth_K[None, :], 0)
    bits_BK = as_bits(jnp.where(there_BK, sorted_P[place_BK], 0.0))
    kth_B = bisected(
        lambda least_B: goal.enough((bits_BK >= least_B[:, None]).sum(axis=1, dtype=jnp.int32))
    )
    return kth_B, jax.lax.pmax(counts_B.max(), ("data", "model")) <= places

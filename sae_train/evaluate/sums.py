"""The sums that an evaluation's numbers are made of.

Devices sum one batch; the host adds up all batches in float64. Sums are kept by sequence position,
so curves by position and aggregates come from the same counts.

Legend: B sequences of a batch, S position, P = S - 1 predictions, D model width, F latents, G
subsets of the text, H = G + 1 the subsets and then all of the text, N rows = B·S, C rows of a
chunk, T all sequences measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from activation_cache.outlying import largest_usual_norm
from sae_train.inference.sae import HostOrDevice, Sae

# At most so many (row, latent) pairs are in memory at a time: 256 MB in float32 at any width.
MAX_LATENT_ELEMENTS = 2**26


def in_chunks(sae: Sae, *rows: Array) -> tuple[Array, ...]:
    """Arrays of rows as [chunks, rows of a chunk, ...], padded with zeros.

    The latents of one chunk are at most `MAX_LATENT_ELEMENTS`.
    """
    num_rows = len(rows[0])
    chunk = max(1, min(num_rows, MAX_LATENT_ELEMENTS // sae.W_enc.shape[1]))
    padding = -num_rows % chunk
    return tuple(
        jnp.pad(one, ((0, padding), *((0, 0),) * (one.ndim - 1))).reshape(-1, chunk, *one.shape[1:])
        for one in rows
    )


def reconstruct(
    sae: Sae, x_ND: Float[Array, "N D"], counted_N: Bool[Array, " N"]
) -> tuple[Float[Array, "N D"], Int[Array, " N"], Int[Array, " F"]]:
    """Reconstructions, L0 of every row, and how often each latent fires in the counted rows.

    Works chunk by chunk, so that the latents of all rows are never in memory at once.
    """
    num_rows, width = x_ND.shape

    def one_chunk(fired_F: Array, chunk_of: tuple[Array, ...]) -> tuple[Array, tuple]:
        x_CD, counted_C = chunk_of
        latents_CF = sae.encode(x_CD)
        active_CF = latents_CF > 0
        fired_F += (active_CF & counted_C[:, None]).sum(axis=0, dtype=jnp.int32)
        decoded_CD = sae.predict(x_CD, latents=latents_CF).astype(jnp.float32)
        return fired_F, (decoded_CD, active_CF.sum(axis=1, dtype=jnp.int32))

    start_F = jnp.zeros(sae.W_enc.shape[1], jnp.int32)
    fired_F, (decoded, l0) = jax.lax.scan(one_chunk, start_F, in_chunks(sae, x_ND, counted_N))
    return decoded.reshape(-1, width)[:num_rows], l0.reshape(-1)[:num_rows], fired_F


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SaeBatch:
    """Squared error and L0 of every token of a batch (0 if not counted), and firing counts."""

    squared_error_BS: Float[Array, "B S"]
    active_BS: Int[Array, "B S"]
    fired_F: Int[Array, " F"]


@jax.jit
def sae_batch(
    sae: Sae,
    x_BSD: Float[HostOrDevice, "B S D"],
    counted_BS: Bool[HostOrDevice, "B S"],
    target_BSD: Float[HostOrDevice, "B S D"] | None = None,
) -> SaeBatch:
    """One SAE on one batch; `sae` is traced, so SAEs of one shape share a compilation.

    Args:
        x_BSD: activations the SAE reads.
        target_BSD: what a transcoder predicts; None for an SAE, which predicts what it reads.
    """
    batch, length, width = x_BSD.shape
    x_ND = jnp.asarray(x_BSD).astype(jnp.float32).reshape(-1, width)
    decoded_ND, l0_N, fired_F = reconstruct(sae, x_ND, jnp.asarray(counted_BS).reshape(-1))
    target_ND = x_ND
    if target_BSD is not None:
        target_ND = jnp.asarray(target_BSD).astype(jnp.float32).reshape(-1, width)
    error_BS = jnp.square(target_ND - decoded_ND).sum(axis=1).reshape(batch, length)
    l0_BS = l0_N.reshape(batch, length)
    return SaeBatch(
        squared_error_BS=jnp.where(counted_BS, error_BS, 0.0),
        active_BS=jnp.where(counted_BS, l0_BS, 0),
        fired_F=fired_F,
    )


@jax.jit
def are_finite(x_BSD: Float[Array, "B S D"], counted_BS: Bool[HostOrDevice, "B S"]) -> Array:
    """Are the activations of all counted tokens finite?"""
    return (jnp.isfinite(x_BSD).all(axis=2) | ~jnp.asarray(counted_BS)).all()


@jax.jit
def _site_batch(
    x_BSD: Float[Array, "B S D"], counted_BS: Bool[Array, "B S"], shift_D: Float[Array, " D"]
) -> tuple[Float[Array, "S D"], Float[Array, "B D"], Float[Array, "B S"]]:
    """Sums of x - shift over the counted tokens, by position and by sequence, and |x - shift|²."""
    moved_BSD = x_BSD.astype(jnp.float32) - shift_D[None, None, :]
    moved_BSD = jnp.where(counted_BS[:, :, None], moved_BSD, 0.0)
    return moved_BSD.sum(axis=0), moved_BSD.sum(axis=1), jnp.square(moved_BSD).sum(axis=2)


@jax.jit
def _usual_batch(
    x_BSD: Float[Array, "B S D"],
    counted_BS: Bool[Array, "B S"],
    shift_D: Float[Array, " D"],
    largest: Float[Array, ""],
) -> tuple[Bool[Array, "B S"], Float[Array, "B D"]]:
    """Which counted tokens are at most `largest` long; their sum of x - shift by sequence."""
    wide_BSD = x_BSD.astype(jnp.float32)
    usual_BS = counted_BS & (jnp.sqrt(jnp.square(wide_BSD).sum(axis=2)) <= largest)
    moved_BSD = jnp.where(usual_BS[:, :, None], wide_BSD - shift_D[None, None, :], 0.0)
    return usual_BS, moved_BSD.sum(axis=1)


@dataclass(frozen=True)
class Subsets:
    """Which of the text's `number` subsets each sequence of a batch belongs to; 0: no subsets."""

    number: int = 0
    of_B: Int[np.ndarray, " B"] = field(default_factory=lambda: np.zeros(0, np.int64))

    def sums(self, values_B: np.ndarray) -> np.ndarray:
        """The sum of each subset's sequences, along the first dim."""
        sums_G = np.zeros((self.number, *values_B.shape[1:]), values_B.dtype)
        if self.number:
            np.add.at(sums_G, self.of_B, values_B)
        return sums_G

    def sums_and_all(self, values_B: np.ndarray) -> np.ndarray:
        """`sums`, and after them the sum of all sequences."""
        return np.concatenate([self.sums(values_B), values_B.sum(axis=0, keepdims=True)])


NO_SUBSETS = Subsets()


@dataclass
class SiteSums:
    """Mean and spread of one tap's activations over the counted tokens.

    Sums are of x - shift, the shift being the first batch's mean: most of the mean square of a
    Gemma's activations is that of their mean, and sums of x itself would cancel.

    Attributes:
        largest: the norm above which a token is outlying, by the median of the first batch: known
            to every process before it counts.
        usual_HD, usual_square_H, usual_count_H: of the tokens that aren't outlying the sums of
            x - shift and of |x - shift|², and their number.
    """

    shift_D: np.ndarray | None = None
    sum_SD: np.ndarray = field(default_factory=lambda: np.zeros(()))
    square_S: np.ndarray = field(default_factory=lambda: np.zeros(()))
    count_S: np.ndarray = field(default_factory=lambda: np.zeros((), np.int64))
    sum_GD: np.ndarray = field(default_factory=lambda: np.zeros(()))
    square_G: np.ndarray = field(default_factory=lambda: np.zeros(()))
    count_G: np.ndarray = field(default_factory=lambda: np.zeros((), np.int64))
    largest: float = math.inf
    usual_HD: np.ndarray = field(default_factory=lambda: np.zeros((1, 1)))
    usual_square_H: np.ndarray = field(default_factory=lambda: np.zeros(1))
    usual_count_H: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))

    def start(self, x_BSD: Float[Array, "B S D"], counted_BS: Bool[np.ndarray, "B S"]) -> None:
        """Set shift and largest usual norm by this batch, unless set or no token is counted."""
        if self.shift_D is None and counted_BS.any():
            zero_D = np.zeros(x_BSD.shape[-1], np.float32)
            sum_SD, _, square_BS = _site_batch(x_BSD, counted_BS, zero_D)
            self.largest = largest_usual_norm(np.sqrt(np.asarray(square_BS)[counted_BS]))
            mean_D = np.asarray(sum_SD, np.float64).sum(axis=0) / counted_BS.sum()
            self.shift_D = mean_D.astype(np.float32)

    def add(
        self,
        x_BSD: Float[Array, "B S D"],
        counted_BS: Bool[np.ndarray, "B S"],
        subsets: Subsets = NO_SUBSETS,
    ) -> Bool[np.ndarray, "B S"]:
        """Add one batch; returns which of its counted tokens aren't outlying."""
        self.start(x_BSD, counted_BS)
        if self.shift_D is None:
            return np.zeros_like(counted_BS)
        sum_SD, sum_BD, square_BS = _site_batch(x_BSD, counted_BS, self.shift_D)
        squares = np.asarray(square_BS, np.float64)
        self.sum_SD = self.sum_SD + np.asarray(sum_SD, np.float64)
        self.square_S = self.square_S + squares.sum(axis=0)
        self.count_S = self.count_S + counted_BS.sum(axis=0)
        self.sum_GD = self.sum_GD + subsets.sums(np.asarray(sum_BD, np.float64))
        self.square_G = self.square_G + subsets.sums(squares.sum(axis=1))
        self.count_G = self.count_G + subsets.sums(counted_BS.sum(axis=1))
        largest = np.float32(self.largest)
        found_BS, usual_BD = _usual_batch(x_BSD, counted_BS, self.shift_D, largest)
        usual_BS = np.asarray(found_BS)
        self.usual_HD = self.usual_HD + subsets.sums_and_all(np.asarray(usual_BD, np.float64))
        square_B = np.where(usual_BS, squares, 0.0).sum(axis=1)
        self.usual_square_H = self.usual_square_H + subsets.sums_and_all(square_B)
        self.usual_count_H = self.usual_count_H + subsets.sums_and_all(usual_BS.sum(axis=1))
        return usual_BS

    @property
    def spread_S(self) -> Float[np.ndarray, " S"]:
        """By position, the sum of |x - mean|², the mean being that of all counted tokens.

        With m the mean of x - shift: Σ|x - shift|² - 2 m·Σ(x - shift) + n |m|².
        """
        mean_D = self.sum_SD.sum(axis=0) / self.count_S.sum()
        return self.square_S - 2 * self.sum_SD @ mean_D + self.count_S * (mean_D @ mean_D)

    @property
    def spread_G(self) -> Float[np.ndarray, " G"]:
        """By subset, the sum of |x - mean|², the mean being the subset's own."""
        return _about_the_mean(self.sum_GD, self.square_G, self.count_G)

    @property
    def usual_spread_H(self) -> Float[np.ndarray, " H"]:
        """The sum of |x - mean|² over tokens that aren't outlying, about their own mean."""
        return _about_the_mean(self.usual_HD, self.usual_square_H, self.usual_count_H)

    @property
    def outlying_share(self) -> float:
        """The share of the spread that outlying tokens hold, about the mean of all tokens."""
        mean_D = self.sum_SD.sum(axis=0) / self.count_S.sum()
        usual = self.usual_square_H[-1] - 2 * self.usual_HD[-1] @ mean_D
        usual += self.usual_count_H[-1] * (mean_D @ mean_D)
        with np.errstate(invalid="ignore", divide="ignore"):  # not finite where the sums aren't
            return float(1 - usual / self.spread_S.sum())


def _about_the_mean(sum_GD: np.ndarray, square_G: np.ndarray, count_G: np.ndarray) -> np.ndarray:
    """Σ|x - mean|² of each group, from the sums of x and of |x|²."""
    return square_G - np.square(sum_GD).sum(axis=1) / np.maximum(count_G, 1)


@dataclass
class SaeSums:
    """Squared error, L0 and firing counts of one SAE over all batches.

    Attributes:
        usual_error_H: squared error of the tokens that aren't outlying.
        error_TS: squared error of every token, for its median: 4 bytes a token. 0 where a token
            isn't counted.
    """

    squared_error_S: np.ndarray = field(default_factory=lambda: np.zeros(()))
    active_S: np.ndarray = field(default_factory=lambda: np.zeros((), np.int64))
    fired_F: np.ndarray = field(default_factory=lambda: np.zeros((), np.int64))
    squared_error_G: np.ndarray = field(default_factory=lambda: np.zeros(()))
    active_G: np.ndarray = field(default_factory=lambda: np.zeros((), np.int64))
    usual_error_H: np.ndarray = field(default_factory=lambda: np.zeros(1))
    error_TS: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    def add(
        self,
        batch: SaeBatch,
        subsets: Subsets = NO_SUBSETS,
        *,
        usual_BS: Bool[np.ndarray, "B S"],
        first: int,
    ) -> None:
        """Add one batch, which begins with sequence `first`; waits for the device."""
        error_BS = np.asarray(batch.squared_error_BS, np.float64)
        active_BS = np.asarray(batch.active_BS, np.int64)
        self.squared_error_S = self.squared_error_S + error_BS.sum(axis=0)
        self.active_S = self.active_S + active_BS.sum(axis=0)
        self.fired_F = self.fired_F + np.asarray(batch.fired_F, np.int64)
        self.squared_error_G = self.squared_error_G + subsets.sums(error_BS.sum(axis=1))
        self.active_G = self.active_G + subsets.sums(active_BS.sum(axis=1))
        usual_B = np.where(usual_BS, error_BS, 0.0).sum(axis=1)
        self.usual_error_H = self.usual_error_H + subsets.sums_and_all(usual_B)
        rows_TS = self.error_TS[first : first + len(error_BS)]
        rows_TS[:] = error_BS[: len(rows_TS)]  # the rest of a last batch is filling

    def median_error(self, tokens: int) -> float:
        """The median squared error of the `tokens` that are counted; NaN if there is none.

        Those not counted hold 0, and no error is below 0: they are the first in order.
        """
        counted = np.sort(self.error_TS, axis=None)[self.error_TS.size - tokens :]
        return float(np.median(counted.astype(np.float64))) if counted.size else math.nan


@dataclass
class LossSums:
    """Next-token losses by position of the input token, over the counted predictions."""

    sum_S: np.ndarray = field(default_factory=lambda: np.zeros(()))
    count_S: np.ndarray = field(default_factory=lambda: np.zeros((), np.int64))
    sum_G: np.ndarray = field(default_factory=lambda: np.zeros(()))
    count_G: np.ndarray = field(default_factory=lambda: np.zeros((), np.int64))

    def add(
        self,
        losses: Float[HostOrDevice, "B P"],
        counted: Bool[np.ndarray, "B P"],
        subsets: Subsets = NO_SUBSETS,
    ) -> None:
        """Add one batch; entry s of `losses` is the loss of predicting token s + 1."""
        values = np.where(counted, np.asarray(losses, np.float64), 0.0)
        self.sum_S = self.sum_S + values.sum(axis=0)
        self.count_S = self.count_S + counted.sum(axis=0)
        self.sum_G = self.sum_G + subsets.sums(values.sum(axis=1))
        self.count_G = self.count_G + subsets.sums(counted.sum(axis=1))

    @property
    def mean(self) -> float:
        """Nats per counted prediction; NaN if there is none."""
        if not self.count_S.sum():
            return float("nan")
        return float(self.sum_S.sum() / self.count_S.sum())

"""Sums that evaluation is made of: device sums of a batch, float64 sums of all batches on the host.

Everything is kept by sequence position, so the curves by position and the aggregates are one count.

Legend: B sequences of a batch, S position, P = S - 1 predictions, D model width, F latents,
N rows = B·S, C rows at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sae_train.release import HostOrDevice, Sae

# Latents of so many (row, latent) pairs exist at a time: 256 MB in float32 whatever the width.
MAX_LATENT_ELEMENTS = 2**26


def reconstruct(
    sae: Sae, x_ND: Float[Array, "N D"], counted_N: Bool[Array, " N"]
) -> tuple[Float[Array, "N D"], Int[Array, " N"], Int[Array, " F"]]:
    """Reconstructions, L0 of every row, and how often each latent fires in the counted rows.

    Runs over chunks of rows, so that the latents of all rows never exist at once.
    """
    num_rows, width = x_ND.shape
    num_latents = sae.W_enc.shape[1]
    chunk = max(1, min(num_rows, MAX_LATENT_ELEMENTS // num_latents))
    padding = -num_rows % chunk
    rows = jnp.pad(x_ND, ((0, padding), (0, 0))).reshape(-1, chunk, width)
    counted = jnp.pad(counted_N, (0, padding)).reshape(-1, chunk)

    def one_chunk(fired_F: Array, chunk_of: tuple[Array, Array]) -> tuple[Array, tuple]:
        x_CD, counted_C = chunk_of
        latents_CF = sae.encode(x_CD)
        active_CF = latents_CF > 0
        fired_F += (active_CF & counted_C[:, None]).sum(axis=0, dtype=jnp.int32)
        return fired_F, (sae.decode(latents_CF), active_CF.sum(axis=1, dtype=jnp.int32))

    start_F = jnp.zeros(num_latents, jnp.int32)
    fired_F, (decoded, l0) = jax.lax.scan(one_chunk, start_F, (rows, counted))
    return decoded.reshape(-1, width)[:num_rows], l0.reshape(-1)[:num_rows], fired_F


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SaeBatch:
    """Sums over the counted tokens of one batch: squared error and active latents by position."""

    squared_error_S: Float[Array, " S"]
    active_S: Int[Array, " S"]
    fired_F: Int[Array, " F"]


@jax.jit
def sae_batch(
    sae: Sae, x_BSD: Float[HostOrDevice, "B S D"], counted_BS: Bool[HostOrDevice, "B S"]
) -> SaeBatch:
    """What one SAE does to one batch; `sae` is traced, so one compilation serves a shape."""
    batch, length, width = x_BSD.shape
    x_ND = jnp.asarray(x_BSD).astype(jnp.float32).reshape(-1, width)
    decoded_ND, l0_N, fired_F = reconstruct(sae, x_ND, jnp.asarray(counted_BS).reshape(-1))
    error_BS = jnp.square(x_ND - decoded_ND).sum(axis=1).reshape(batch, length)
    l0_BS = l0_N.reshape(batch, length)
    return SaeBatch(
        squared_error_S=jnp.where(counted_BS, error_BS, 0.0).sum(axis=0),
        active_S=jnp.where(counted_BS, l0_BS, 0).sum(axis=0),
        fired_F=fired_F,
    )


@jax.jit
def _site_batch(
    x_BSD: Float[Array, "B S D"], counted_BS: Bool[Array, "B S"], shift_D: Float[Array, " D"]
) -> tuple[Float[Array, "S D"], Float[Array, " S"]]:
    """By position, the sums of x - shift and of |x - shift|² over the counted tokens."""
    moved_BSD = x_BSD.astype(jnp.float32) - shift_D[None, None, :]
    moved_BSD = jnp.where(counted_BS[:, :, None], moved_BSD, 0.0)
    return moved_BSD.sum(axis=0), jnp.square(moved_BSD).sum(axis=(0, 2))


@dataclass
class SiteSums:
    """Mean and spread of one tap's activations over the counted tokens.

    Sums are taken about the first batch's mean: the activations of a Gemma have a mean that holds
    most of their mean square, and sums about 0 would cancel.
    """

    shift_D: np.ndarray | None = None
    sum_SD: np.ndarray = field(default_factory=lambda: np.zeros(()))
    square_S: np.ndarray = field(default_factory=lambda: np.zeros(()))
    count_S: np.ndarray = field(default_factory=lambda: np.zeros((), np.int64))

    def start(self, x_BSD: Float[Array, "B S D"], counted_BS: Bool[np.ndarray, "B S"]) -> None:
        """Take the shift from the first batch that counts; where it is known, do nothing."""
        if self.shift_D is None and counted_BS.any():
            zero_D = np.zeros(x_BSD.shape[-1], np.float32)
            sum_SD, _ = _site_batch(x_BSD, counted_BS, zero_D)
            mean_D = np.asarray(sum_SD, np.float64).sum(axis=0) / counted_BS.sum()
            self.shift_D = mean_D.astype(np.float32)

    def add(self, x_BSD: Float[Array, "B S D"], counted_BS: Bool[np.ndarray, "B S"]) -> None:
        """Take in one batch."""
        self.start(x_BSD, counted_BS)
        if self.shift_D is None:
            return
        sum_SD, square_S = _site_batch(x_BSD, counted_BS, self.shift_D)
        self.sum_SD = self.sum_SD + np.asarray(sum_SD, np.float64)
        self.square_S = self.square_S + np.asarray(square_S, np.float64)
        self.count_S = self.count_S + counted_BS.sum(axis=0)

    @property
    def spread_S(self) -> Float[np.ndarray, " S"]:
        """By position, the sum of |x - mean|², the mean being that of all counted tokens.

        With m the mean of x - shift: Σ|x - shift|² - 2 m·Σ(x - shift) + n |m|².
        """
        mean_D = self.sum_SD.sum(axis=0) / self.count_S.sum()
        return self.square_S - 2 * self.sum_SD @ mean_D + self.count_S * (mean_D @ mean_D)


@dataclass
class SaeSums:
    """What one SAE did to all batches."""

    squared_error_S: np.ndarray = field(default_factory=lambda: np.zeros(()))
    active_S: np.ndarray = field(default_factory=lambda: np.zeros((), np.int64))
    fired_F: np.ndarray = field(default_factory=lambda: np.zeros((), np.int64))

    def add(self, batch: SaeBatch) -> None:
        """Take in one batch; waits for the device."""
        self.squared_error_S = self.squared_error_S + np.asarray(batch.squared_error_S, np.float64)
        self.active_S = self.active_S + np.asarray(batch.active_S, np.int64)
        self.fired_F = self.fired_F + np.asarray(batch.fired_F, np.int64)


@dataclass
class LossSums:
    """Next-token losses by position of the input token, over the counted predictions."""

    sum_S: np.ndarray = field(default_factory=lambda: np.zeros(()))
    count_S: np.ndarray = field(default_factory=lambda: np.zeros((), np.int64))

    def add(self, losses: Float[Array, "B P"], counted: Bool[np.ndarray, "B P"]) -> None:
        """Take in one batch; entry s of `losses` is the loss of predicting token s + 1."""
        values = np.where(counted, np.asarray(losses, np.float64), 0.0)
        self.sum_S = self.sum_S + values.sum(axis=0)
        self.count_S = self.count_S + counted.sum(axis=0)

    @property
    def mean(self) -> float:
        """Nats per counted prediction."""
        return float(self.sum_S.sum() / self.count_S.sum())

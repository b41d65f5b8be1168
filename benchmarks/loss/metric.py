"""Training that weighs the error by what later layers read.

The squared error |x - x̂|² counts all directions alike. Here it is (x - x̂)ᵀ M (x - x̂) with

    M = (1 - a) I + a D G / tr G,        G = E[g gᵀ], g the gradient of the loss at the tap.

With A the symmetric root of M that is the squared error of rows x A: an SAE trained on those, as
it is, with its own unit-norm decoder, is a JumpReLU SAE of x once A is multiplied into the encoder
and divided out of the decoder.

`diagonal` keeps the diagonal of G alone. `whitened` needs no gradients: M = (C / tr C)^-a with C
the rows' covariance, as `sae.whitening: a` has it.

Legend: B rows of a batch, N rows, D model width, F latents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from jaxtyping import Float

from sae_train.config.run import Config
from sae_train.inference.sae import Sae
from sae_train.model.sharding import local_mesh
from sae_train.step.schedule import scheduled
from sae_train.step.state import init_state
from sae_train.train.train_step import make_train_step

Kind = Literal["plain", "loss", "diagonal", "whitened"]
_SCALED_BY = 16_384  # rows that the scale and the mean are taken from


@dataclass(frozen=True)
class Metric:
    """Which M: its kind and a."""

    kind: Kind = "plain"
    share: float = 0.0

    def __str__(self) -> str:
        return self.kind if self.kind == "plain" else f"{self.kind} {self.share:g}"

    def root(
        self, *, gradients_ND: Float[np.ndarray, "N D"], rows_ND: Float[np.ndarray, "N D"]
    ) -> Float[np.ndarray, "D D"]:
        """A, the symmetric root of M."""
        D = rows_ND.shape[1]
        if self.kind == "plain":
            return np.eye(D)
        if self.kind == "whitened":
            covariance = np.cov(rows_ND.astype(np.float64).T)
            return _power(covariance / np.trace(covariance), -self.share / 2)
        G_DD = second_moment(gradients_ND)
        if self.kind == "diagonal":
            G_DD = np.diag(np.diag(G_DD))
        return _power((1 - self.share) * np.eye(D) + self.share * D * G_DD / np.trace(G_DD), 0.5)


def second_moment(gradients_ND: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "D D"]:
    """G = E[g gᵀ]."""
    wide_ND = gradients_ND.astype(np.float64)
    return wide_ND.T @ wide_ND / len(wide_ND)


def _power(matrix_DD: Float[np.ndarray, "D D"], exponent: float) -> Float[np.ndarray, "D D"]:
    """A power of a symmetric positive matrix; eigenvalues of nothing count as 1e-6 of the mean."""
    values, vectors = np.linalg.eigh(matrix_DD)
    values = np.maximum(values, 1e-6 * values.mean())
    return (vectors * values**exponent) @ vectors.T


def batches(
    rows_ND: Float[np.ndarray, "N D"], *, size: int, seed: int
) -> Iterator[Float[np.ndarray, "B D"]]:
    """All rows in a random order, again and again in another."""
    random = np.random.default_rng(1000 + seed)
    order = np.array([], int)
    while True:
        if len(order) < size:
            order = np.concatenate([order, random.permutation(len(rows_ND))])
        chosen, order = np.sort(order[:size]), order[size:]
        yield np.asarray(rows_ND[chosen])


def train(
    config: Config, rows_ND: Float[np.ndarray, "N D"], *, root_DD: Float[np.ndarray, "D D"]
) -> Sae:
    """Train a config's JumpReLU SAE on rows x A, and fold A and the scale into its weights."""
    some_ND = np.asarray(rows_ND[:_SCALED_BY], np.float64) @ root_DD
    scale = np.sqrt((some_ND**2).sum(axis=1).mean())
    to_DD = (root_DD / scale).astype(np.float32)
    mesh, sae, size = local_mesh(), config.sae, config.train.batch_size
    state = init_state(sae, d_model=len(to_DD), seed=config.train.seed, mesh=mesh)
    mean_D = (some_ND.mean(axis=0) / scale).astype(np.float32)
    b_dec_D = jax.device_put(mean_D, state.params["b_dec"].sharding)
    state = dataclasses.replace(state, params=state.params | {"b_dec": b_dec_D})
    take_step = make_train_step(config, input_scale=1.0, mesh=mesh)
    stream = batches(rows_ND, size=size, seed=config.train.seed)
    for step, rows_BD in zip(range(config.train.steps), stream, strict=False):
        state, _ = take_step(state, rows_BD @ to_DD, scheduled(config.train, step=step))
    params = {name: np.asarray(value, np.float64) for name, value in state.params.items()}
    return folded(params, to_DD=to_DD.astype(np.float64))


def folded(params: dict[str, np.ndarray], *, to_DD: Float[np.ndarray, "D D"]) -> Sae:
    """The SAE of x that the one of x A is: W_enc A before, A⁻¹ after."""
    back_DD = np.linalg.inv(to_DD)
    b_enc_F = params["b_enc"] - params["W_enc"] @ params["b_dec"]
    folded = {
        "W_enc": (params["W_enc"] @ to_DD.T).T,
        "W_dec": params["W_dec"] @ back_DD,
        "b_enc": b_enc_F,
        "b_dec": params["b_dec"] @ back_DD,
        "threshold": params["threshold"],
    }
    return Sae(**{name: np.ascontiguousarray(one, np.float32) for name, one in folded.items()})

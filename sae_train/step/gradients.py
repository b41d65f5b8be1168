"""The gradients of the small parameters and of the whole-batch products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sae_train.config.run import SaeConfig
from sae_train.model.forward import PRECISION, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pulls:
    """A batch, and what its loss sends back to reconstruction, counts and thresholds.

    Attributes:
        x_BD: what the encoder multiplied.
        g_BD: the gradient in the reconstruction.
        g_l0_B: that in a row's count of active latents.
        g_count_F: that in a latent's count of active rows.
        theta_F, bias_F: thresholds and encoder biases.

    Its leaves are arrays; in its twins, their dims or where they lie.
    """

    x_BD: Any
    g_BD: Any
    g_l0_B: Any
    g_count_F: Any
    theta_F: Any
    bias_F: Any


class Gradients(NamedTuple):
    """Of the latents of one block: W_enc, W_dec, b_enc and θ itself.

    Its fields are arrays; in its twins, their dims.
    """

    enc_SD: Any
    dec_SD: Any
    bias_S: Any
    theta_S: Any


def from_products(
    W_dec_SD: Float[Array, "S D"],
    pre_SB: Float[Array, "S B"],
    *,
    theta_S: Float[Array, " S"],
    g_count_S: Float[Array, " S"],
    pulls: Pulls,
    bandwidth: float,
) -> Gradients:
    """The gradients of a tile's latents, given their pre-activations.

    Args:
        theta_S, g_count_S: the tile's part of what `pulls` has for all latents.
    """
    g_f_SB = jnp.einsum("sd,bd->sb", W_dec_SD, pulls.g_BD, precision=PRECISION)
    active_SB = pre_SB > theta_S[:, None]
    window_SB = jnp.abs(pre_SB - theta_S[:, None]) < bandwidth / 2
    g_pre_SB = jnp.where(active_SB, g_f_SB, 0.0)
    f_SB = jnp.where(active_SB, pre_SB, 0.0)
    step_SB = pulls.g_l0_B[None, :] + g_count_S[:, None]
    pull_SB = jnp.where(window_SB, theta_S[:, None] * g_f_SB + step_SB, 0.0)
    return Gradients(
        enc_SD=jnp.einsum("sb,bd->sd", g_pre_SB, pulls.x_BD, precision=PRECISION),
        dec_SD=jnp.einsum("sb,bd->sd", f_SB, pulls.g_BD, precision=PRECISION),
        bias_S=g_pre_SB.sum(axis=1),
        theta_S=-pull_SB.sum(axis=1) / bandwidth,
    )


def small_gradients(
    params: Params,
    x_BD: Float[Array, "B D"],
    *,
    pulls: Pulls,
    bias_F: Float[Array, " F"],
    theta_F: Float[Array, " F"],
    encoded_D: Float[Array, " D"],
    sae: SaeConfig,
) -> Params:
    """The gradients of all but the two large matrices, from what a pass over the latents left.

    Args:
        x_BD: scaled rows, from which `pulls.x_BD` is shifted by b_dec where the config says so.
        bias_F, theta_F, encoded_D: as in `Sums`.
    """
    b_dec_D = pulls.g_BD.sum(axis=0)
    small = {"b_enc": bias_F}
    if "threshold" in params:
        log = sae.threshold.parametrisation == "log"
        small["threshold"] = theta_F * pulls.theta_F if log else theta_F
    small["b_dec"] = b_dec_D - encoded_D if sae.pre_encoder_bias else b_dec_D
    if "W_skip" in params:
        small["W_skip"] = jnp.einsum("bd,be->de", x_BD, pulls.g_BD, precision=PRECISION)
    return small

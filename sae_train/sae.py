"""The JumpReLU sparse autoencoder: forward pass and straight-through gradients.

    pre  = (x - b_dec) W_encᵀ + b_enc            no ReLU before the jump
    f    = pre · 1[pre > θ]
    x̂    = f W_dec + b_dec
    loss = mean over rows of |x - x̂|², plus a penalty (sae_train/penalty.py)

A transcoder predicts another row y and not x (Gemma Scope, appendix B): y takes x's place in the
loss, no b_dec is subtracted, and with an affine skip ŷ = f W_dec + b_dec + x W_skip.

Sources: Gemma Scope (arXiv 2408.05147) section 2 and the JumpReLU paper (arXiv 2407.14435)
equations 8-12. Inputs are scaled to unit mean squared norm; the bandwidth assumes it.

Legend: B rows of a batch, D model width, F latents. Weights are latent-major, [F, D] both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sae_train.sae_config import SaeConfig

# Gemma Scope trains in float32; without this a GPU would round products to TF32.
PRECISION = jax.lax.Precision.HIGHEST

Params = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Forward:
    """One pass over a batch; all but the reconstruction carry straight-through gradients.

    `l0_B` counts the active latents of a row; `frequency_F` is the share of rows a latent is
    active in. What only some architectures have: `l1_B`, the norm that an L1 penalty prices;
    `auxiliary`, a loss of its own; `smallest`, the smallest latent that was selected.
    """

    reconstruction_BD: Float[Array, "B D"]
    latents_BF: Float[Array, "B F"]
    l0_B: Float[Array, " B"]
    frequency_F: Float[Array, " F"]
    l1_B: Float[Array, " B"] | None = None
    auxiliary: Float[Array, ""] | None = None
    smallest: Float[Array, ""] | None = None


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def jumprelu(
    pre_BF: Float[Array, "B F"], threshold_F: Float[Array, " F"], bandwidth: float
) -> tuple[Float[Array, "B F"], Float[Array, " B"], Float[Array, " F"]]:
    """Latents, the number active per row, and each latent's frequency in the batch.

    Pseudo-derivatives in the threshold are the JumpReLU paper's, equations 11 and 12, K the
    rectangle 1[|u| < 1/2]: ∂f/∂θ := -(θ/ε) K((pre - θ)/ε) and, of the step that counts a latent
    as active, ∂H/∂θ := -(1/ε) K((pre - θ)/ε). With respect to `pre`, the latent passes
    1[pre > θ] and the step passes nothing.
    """
    active_BF = pre_BF > threshold_F[None, :]
    l0_B = active_BF.sum(axis=1, dtype=pre_BF.dtype)
    frequency_F = active_BF.sum(axis=0, dtype=pre_BF.dtype) / pre_BF.shape[0]
    return jnp.where(active_BF, pre_BF, 0.0), l0_B, frequency_F


def _jumprelu_forward(pre_BF, threshold_F, bandwidth):
    return jumprelu(pre_BF, threshold_F, bandwidth), (pre_BF, threshold_F)


def _jumprelu_backward(bandwidth, residuals, cotangents):
    pre_BF, threshold_F = residuals
    g_latents_BF, g_l0_B, g_frequency_F = cotangents
    distance_BF = pre_BF - threshold_F[None, :]
    window_BF = jnp.abs(distance_BF) < bandwidth / 2
    g_pre_BF = jnp.where(distance_BF > 0, g_latents_BF, 0.0)
    step_BF = g_l0_B[:, None] + g_frequency_F[None, :] / pre_BF.shape[0]
    pull_BF = threshold_F[None, :] * g_latents_BF + step_BF
    g_threshold_F = -jnp.where(window_BF, pull_BF, 0.0).sum(axis=0) / bandwidth
    return g_pre_BF, g_threshold_F


jumprelu.defvjp(_jumprelu_forward, _jumprelu_backward)


def threshold_of(params: Params, *, config: SaeConfig) -> Float[Array, " F"]:
    """θ from the trained parameter: exp of it for `log`, itself for `direct`."""
    if config.threshold.parametrisation == "log":
        return jnp.exp(params["threshold"])
    return params["threshold"]


def pre_activations(
    params: Params, x_BD: Float[Array, "B D"], *, bias: Float[Array, " F"], config: SaeConfig
) -> Float[Array, "B F"]:
    """(x - b_dec) W_encᵀ + bias, b_dec subtracted only under `pre_encoder_bias`.

    The subtraction is of a constant copy of b_dec; its gradient comes from the last term, whose
    value is 0. Autodiff would otherwise spend a [B, F] by [F, D] product, a fifth of the step, on
    a gradient that the sum over rows reduces to one matrix-vector product.
    """
    bias_F = bias
    if config.pre_encoder_bias:
        b_dec_D = jax.lax.stop_gradient(params["b_dec"])
        x_BD = x_BD - b_dec_D[None, :]
        zero_D = params["b_dec"] - b_dec_D
        W_enc_FD = jax.lax.stop_gradient(params["W_enc"])
        bias_F = bias_F - jnp.einsum("fd,d->f", W_enc_FD, zero_D, precision=PRECISION)
    pre_BF = jnp.einsum("bd,fd->bf", x_BD, params["W_enc"], precision=PRECISION)
    return pre_BF + bias_F[None, :]


def decode(
    params: Params, latents_BF: Float[Array, "B F"], *, x_BD: Float[Array, "B D"]
) -> Float[Array, "B D"]:
    """f W_dec + b_dec, and x W_skip where a transcoder has an affine skip."""
    decoded_BD = product_with_decoder(params, latents_BF) + params["b_dec"][None, :]
    if "W_skip" not in params:
        return decoded_BD
    return decoded_BD + jnp.einsum("bd,de->be", x_BD, params["W_skip"], precision=PRECISION)


def product_with_decoder(params: Params, latents_BF: Float[Array, "B F"]) -> Float[Array, "B D"]:
    """f W_dec."""
    return jnp.einsum("bf,fd->bd", latents_BF, params["W_dec"], precision=PRECISION)


def counted(
    reconstruction_BD: Float[Array, "B D"], latents_BF: Float[Array, "B F"], **losses: Array
) -> Forward:
    """A pass whose counts carry no gradient: the architectures without straight-through ones."""
    active_BF = jax.lax.stop_gradient(latents_BF) > 0
    return Forward(
        reconstruction_BD=reconstruction_BD,
        latents_BF=latents_BF,
        l0_B=active_BF.sum(axis=1, dtype=latents_BF.dtype),
        frequency_F=active_BF.sum(axis=0, dtype=latents_BF.dtype) / latents_BF.shape[0],
        **losses,
    )


def forward(params: Params, x_BD: Float[Array, "B D"], *, config: SaeConfig) -> Forward:
    """Encode and decode scaled rows.

    Args:
        params: W_enc [F, D], b_enc [F], W_dec [F, D], b_dec [D] and the trained `threshold` [F].
        x_BD: activations divided by the input scale, so that E|x|² = 1.
    """
    pre_BF = pre_activations(params, x_BD, bias=params["b_enc"], config=config)
    theta_F = threshold_of(params, config=config)
    latents_BF, l0_B, frequency_F = jumprelu(pre_BF, theta_F, config.bandwidth)
    return Forward(
        reconstruction_BD=decode(params, latents_BF, x_BD=x_BD),
        latents_BF=latents_BF,
        l0_B=l0_B,
        frequency_F=frequency_F,
    )

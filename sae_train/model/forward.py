"""What the passes of all architectures are made of: encoder product, decoder, their result.

    pre  = (x - b_dec) W_encᵀ + bias
    x̂    = f W_dec + b_dec                       f the latents that an architecture makes of pre
    loss = mean over rows of |x - x̂|², plus a penalty (sae_train/step/sparsity_penalty.py)

A transcoder predicts another row y instead of x (Gemma Scope, arXiv 2408.05147, appendix B): the
loss compares ŷ with y, no b_dec is subtracted (but, if configured, a constant: the mean of x), and
with an affine skip ŷ = f W_dec + b_dec + x W_skip. Inputs are scaled to unit mean squared norm.

Legend: B rows of a batch, D model width, F latents. Weights are latent-major, [F, D] both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from activation_cache.precision import Precision
from activation_cache.products import einsum
from sae_train.config.sae import SaeConfig

Params = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Forward:
    """One pass over a batch.

    Attributes:
        l0_B: active latents of each row.
        frequency_F: the share of rows in which each latent is active.
        l1_B: the L1 norm that is penalised; ReLU and Gated only.
        auxiliary: a loss of the architecture's own; Gated, TopK and BatchTopK only.
        smallest: the smallest latent that was selected; BatchTopK only.
        inner: of a Matryoshka SAE the reconstructions by its smaller prefixes.
    """

    reconstruction_BD: Float[Array, "B D"]
    latents_BF: Float[Array, "B F"]
    l0_B: Float[Array, " B"]
    frequency_F: Float[Array, " F"]
    l1_B: Float[Array, " B"] | None = None
    auxiliary: Float[Array, ""] | None = None
    smallest: Float[Array, ""] | None = None
    inner: tuple[Float[Array, "B D"], ...] = ()


def threshold_of(params: Params, *, config: SaeConfig) -> Float[Array, " F"]:
    """θ from the trained parameter: exp of it for `log`, itself for `direct`."""
    if config.threshold.parametrisation == "log":
        return jnp.exp(params["threshold"])
    return params["threshold"]


def whitened(params: Params, x_BD: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """Scaled rows as the SAE reads and predicts them: times A where `sae.whitening` is set.

    At float32 on every device, as the release has A in its weights.
    """
    if "whitening" not in params:
        return x_BD
    return einsum("bd,de->be", x_BD, params["whitening"], precision="float32")


def pre_activations(
    params: Params,
    x_BD: Float[Array, "B D"],
    *,
    bias: Float[Array, " F"],
    config: SaeConfig,
    precision: Precision,
) -> Float[Array, "B F"]:
    """(x - b_dec) W_encᵀ + bias, b_dec subtracted only if `pre_encoder_bias` is set.

    A transcoder subtracts its input's mean instead, if `subtract_mean` is set.

    A constant copy of b_dec is subtracted; its gradient comes from another term, whose value is 0.
    Autodiff would otherwise spend a [B, F] by [F, D] product, a fifth of the step, on a gradient
    that the sum over rows reduces to one matrix-vector product.
    """
    bias_F = bias
    if config.subtract_mean:
        x_BD = x_BD - jax.lax.stop_gradient(params["input_mean"])[None, :]
    if config.pre_encoder_bias:
        b_dec_D = jax.lax.stop_gradient(params["b_dec"])
        x_BD = x_BD - b_dec_D[None, :]
        zero_D = params["b_dec"] - b_dec_D
        W_enc_FD = jax.lax.stop_gradient(params["W_enc"])
        bias_F = bias_F - einsum("fd,d->f", W_enc_FD, zero_D, precision="float32")
    pre_BF = einsum("bd,fd->bf", x_BD, params["W_enc"], precision=precision)
    return pre_BF + bias_F[None, :]


def decode(
    params: Params,
    latents_BF: Float[Array, "B F"],
    *,
    x_BD: Float[Array, "B D"],
    precision: Precision,
) -> Float[Array, "B D"]:
    """f W_dec + b_dec, and x W_skip where a transcoder has an affine skip."""
    product_BD = product_with_decoder(params, latents_BF, precision=precision)
    return decoded_with(params, product_BD, x_BD=x_BD, precision=precision)


def decoded_with(
    params: Params,
    product_BD: Float[Array, "B D"],
    *,
    x_BD: Float[Array, "B D"],
    precision: Precision,
) -> Float[Array, "B D"]:
    """`decode`, given the product f W_dec."""
    decoded_BD = product_BD + params["b_dec"][None, :]
    if "W_skip" not in params:
        return decoded_BD
    return decoded_BD + einsum("bd,de->be", x_BD, params["W_skip"], precision=precision)


def product_with_decoder(
    params: Params, latents_BF: Float[Array, "B F"], *, precision: Precision
) -> Float[Array, "B D"]:
    """f W_dec."""
    return einsum("bf,fd->bd", latents_BF, params["W_dec"], precision=precision)


def counted(
    reconstruction_BD: Float[Array, "B D"], latents_BF: Float[Array, "B F"], **others: Any
) -> Forward:
    """A pass over a batch whose L0 and frequencies have no gradients; `others` are fields."""
    active_BF = jax.lax.stop_gradient(latents_BF) > 0
    return Forward(
        reconstruction_BD=reconstruction_BD,
        latents_BF=latents_BF,
        l0_B=active_BF.sum(axis=1, dtype=latents_BF.dtype),
        frequency_F=active_BF.sum(axis=0, dtype=latents_BF.dtype) / latents_BF.shape[0],
        **others,
    )

"""The ReLU SAE with an L1 penalty weighted by decoder norms.

    f  = ReLU((x - b_dec) W_encᵀ + b_enc)
    x̂  = f W_dec + b_dec
    L1 = Σ f_i |W_dec_i|

Source: "RI-L1" of the JumpReLU paper (arXiv 2407.14435, appendix I), Anthropic's April 2024
update. With the weighting the penalty doesn't change if scale moves between encoder
and decoder, so the decoder's rows may have any norm.

Legend: B rows of a batch, D model width, F latents.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from activation_cache.precision import Precision
from sae_train.config.sae import SaeConfig
from sae_train.model.forward import Forward, Params, counted, decode, pre_activations


def forward(
    params: Params, x_BD: Float[Array, "B D"], *, config: SaeConfig, precision: Precision
) -> Forward:
    """Encode and decode scaled rows.

    Args:
        params: W_enc [F, D], b_enc [F], W_dec [F, D], b_dec [D].
        x_BD: activations divided by the input scale, so that E|x|² = 1.
    """
    pre_BF = pre_activations(params, x_BD, bias=params["b_enc"], config=config, precision=precision)
    latents_BF = jax.nn.relu(pre_BF)
    norm_F = jnp.linalg.norm(params["W_dec"], axis=1)
    l1_B = (latents_BF * norm_F[None, :]).sum(axis=1)
    decoded_BD = decode(params, latents_BF, x_BD=x_BD, precision=precision)
    return counted(decoded_BD, latents_BF, l1_B=l1_B)

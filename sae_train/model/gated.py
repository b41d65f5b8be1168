"""The Gated SAE: one linear map decides which latents are active and, rescaled, how strongly.

    gate = (x - b_dec) W_encᵀ + b_gate
    f    = 1[gate > 0] · ReLU(exp(r_mag) · (x - b_dec) W_encᵀ + b_mag)
    x̂    = f W_dec + b_dec,  rows of W_dec of unit norm
    loss = |x - x̂|² + λ |ReLU(gate)|₁ + |x - ReLU(gate) W_dec' - b_dec'|²,  ' without gradient

Source: Rajamanoharan et al. 2024 (arXiv 2404.16014), equations 3 and 4 and section 3.2. The step
function passes no gradient; the two other terms train the gate.

With r_mag and both biases it is a JumpReLU SAE: gate > 0 exactly where the magnitude's
pre-activation is above b_mag - exp(r_mag) b_gate (`sae_train.inference.sae.fold`).

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
    params: Params,
    x_BD: Float[Array, "B D"],
    *,
    target_BD: Float[Array, "B D"],
    config: SaeConfig,
    precision: Precision,
) -> Forward:
    """Encode and decode scaled rows.

    Args:
        params: W_enc [F, D], b_gate [F], r_mag [F], b_mag [F], W_dec [F, D], b_dec [D].
        x_BD: activations divided by the input scale, so that E|x|² = 1.
        target_BD: what is to be predicted: of an SAE, x itself.
    """
    gate_BF = pre_activations(
        params, x_BD, bias=params["b_gate"], config=config, precision=precision
    )
    linear_BF = gate_BF - params["b_gate"][None, :]
    magnitude_BF = linear_BF * jnp.exp(params["r_mag"])[None, :] + params["b_mag"][None, :]
    latents_BF = jnp.where(gate_BF > 0, jax.nn.relu(magnitude_BF), 0.0)
    open_BF = jax.nn.relu(gate_BF)
    constant = jax.lax.stop_gradient(params)
    via_gate_BD = decode(constant, open_BF, x_BD=x_BD, precision=precision)
    auxiliary = jnp.square(target_BD - via_gate_BD).sum(axis=1).mean()
    decoded_BD = decode(params, latents_BF, x_BD=x_BD, precision=precision)
    return counted(decoded_BD, latents_BF, l1_B=open_BF.sum(axis=1), auxiliary=auxiliary)

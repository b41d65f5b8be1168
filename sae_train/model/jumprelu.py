"""The JumpReLU sparse autoencoder, as its papers write it: forward, gradients, loss.

    π    = W_enc (x - b_dec) + b_enc             Gemma Scope (1); no ReLU before the jump
    f    = JumpReLU_θ(π) = π · H(π - θ)          Gemma Scope (3), JumpReLU paper (8)
    x̂    = W_dec f + b_dec                       Gemma Scope (2)
    loss = |x - x̂|² + λ |f|₀                     Gemma Scope (4), JumpReLU paper (9); mean over rows

H is the step function and |f|₀ = Σ_i H(π_i - θ_i) the number of active latents, L0.

**How a threshold learns.** Neither f nor L0 has a useful derivative in θ: both jump. Training uses
the JumpReLU paper's straight-through estimators, which spread the jump over a window of width ε:

    ∂f/∂θ  := -(θ/ε) K((π - θ)/ε)                JumpReLU paper (11)
    ∂H/∂θ  := -(1/ε) K((π - θ)/ε)                JumpReLU paper (12)

with K the rectangle, K(u) = 1 where |u| < 1/2. A latent within ε/2 of its threshold so lowers θ if
keeping the latent would reduce the error by more than its penalty, and raises θ otherwise. In π the
latent has the derivative H and its count has none, so the penalty reaches the encoder through θ
only.

This file is for reading and for tests: training computes the same gradients explicitly and faster
(`sae_train.step`, `sae_train.sparse`), and its steps are held to `jax.grad` of `loss`. ε is
`sae.bandwidth`, for inputs scaled to E|x|² = 1.

Sources: JumpReLU paper, arXiv 2407.14435; Gemma Scope, arXiv 2408.05147.

Legend: B rows of a batch, D model width, F latents. Weights are latent-major, [F, D] both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from activation_cache.precision import Precision
from sae_train.config.sae import SaeConfig
from sae_train.model.forward import Forward, Params, pre_activations, threshold_of
from sae_train.model.matryoshka import decode_prefixes, with_prefixes


def window(pre_BF: Array, theta_1F: Array, bandwidth: float) -> Bool[Array, "B F"]:
    """K((π - θ)/ε): is a pre-activation within half a bandwidth of its threshold?"""
    return jnp.abs(pre_BF - theta_1F) < bandwidth / 2


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def jumprelu(pre_BF: Array, theta_1F: Array, bandwidth: float) -> Float[Array, "B F"]:
    """π where it is above θ, else 0."""
    return jnp.where(pre_BF > theta_1F, pre_BF, 0.0)


@jumprelu.defjvp
def _jumprelu_jvp(bandwidth, primals, tangents):
    (pre, theta), (d_pre, d_theta) = primals, tangents
    by_theta = jnp.where(window(pre, theta, bandwidth), -theta / bandwidth, 0.0)  # (11)
    by_pre = jnp.where(pre > theta, 1.0, 0.0)
    return jumprelu(pre, theta, bandwidth), by_pre * d_pre + by_theta * d_theta


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def step(pre_BF: Array, theta_1F: Array, bandwidth: float) -> Float[Array, "B F"]:
    """H(π - θ): 1 where a latent is active, else 0."""
    return (pre_BF > theta_1F).astype(pre_BF.dtype)


@step.defjvp
def _step_jvp(bandwidth, primals, tangents):
    (pre, theta), (_, d_theta) = primals, tangents
    by_theta = jnp.where(window(pre, theta, bandwidth), -1.0 / bandwidth, 0.0)  # (12)
    return step(pre, theta, bandwidth), by_theta.astype(pre.dtype) * d_theta


def forward(
    params: Params, x_BD: Float[Array, "B D"], *, config: SaeConfig, precision: Precision
) -> Forward:
    """Encode and decode scaled rows; L0 and frequencies have the gradient of H.

    Args:
        params: W_enc [F, D], b_enc [F], W_dec [F, D], b_dec [D], and `threshold` [F], which is
            log θ where `config.threshold.parametrisation` says so.
        x_BD: activations divided by the input scale, so that E|x|² = 1.
    """
    pre_BF = pre_activations(params, x_BD, bias=params["b_enc"], config=config, precision=precision)
    theta_1F = threshold_of(params, config=config)[None, :]
    latents_BF = jumprelu(pre_BF, theta_1F, config.bandwidth)
    active_BF = step(pre_BF, theta_1F, config.bandwidth)
    *inner, reconstruction_BD = decode_prefixes(
        params, latents_BF, x_BD=x_BD, config=config, precision=precision
    )
    return Forward(
        reconstruction_BD=reconstruction_BD,
        latents_BF=latents_BF,
        l0_B=active_BF.sum(axis=1),
        frequency_F=active_BF.mean(axis=0),
        inner=tuple(inner),
    )


def loss(
    params: Params,
    x_BD: Float[Array, "B D"],
    *,
    target_BD: Float[Array, "B D"],
    penalty: Callable[[Float[Array, " B"], Float[Array, " F"]], Float[Array, ""]],
    config: SaeConfig,
    precision: Precision,
) -> Float[Array, ""]:
    """Squared error summed over D, mean over rows, plus the penalty.

    Args:
        target_BD: what is predicted: of an SAE, x itself; of a transcoder another tap's rows.
        penalty: of each row's L0 and each latent's frequency; Gemma Scope's is λ times the mean L0.
    """
    out = forward(params, x_BD, config=config, precision=precision)
    error = jnp.square(target_BD - out.reconstruction_BD).sum(axis=1).mean()
    error = with_prefixes(error, out, target_BD, config=config)
    return error + penalty(out.l0_B, out.frequency_F)

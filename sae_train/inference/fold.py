"""From trained weights to a released SAE: input scale and pre-encoder bias are folded in.

Training sees scaled inputs and may subtract a pre-encoder bias from them. A released SAE reads raw
activations, so that no tool needs to know of either.
"""

from __future__ import annotations

import numpy as np

from sae_train.checkpoint.trained import Trained
from sae_train.config.sae import Architecture, SaeConfig
from sae_train.inference.metadata import metadata_of
from sae_train.inference.sae import SKIP, Sae, check_finite, gated_as_jumprelu


def fold(trained: Trained) -> Sae:
    """The released form of trained weights (Gemma Scope, arXiv 2408.05147, appendix A).

    With x = x_raw / C: W_enc' = W_enc, W_dec' = W_dec, b_enc' = C (b_enc - W_enc b_dec),
    b_dec' = C b_dec, θ' = C θ; the latents come out multiplied by C. Without a pre-encoder bias
    the term W_enc b_dec is absent.

    For a transcoder whose target was divided by T, T replaces C, and the two matrices that read
    x_raw are multiplied by T/C: W_enc' = T/C W_enc, W_skip' = T/C W_skip. A mean m that it
    subtracts from its input goes the way of b_dec: b_enc' = T (b_enc - W_enc m).

    With `sae.whitening` training reads x A: W_enc' = W_enc Aᵀ, W_dec' = W_dec A⁻¹ and
    b_dec' = C b_dec A⁻¹. Each latent is then multiplied by the norm n of its row of W_dec': its
    rows of W_enc', b_enc' and θ' by n and that of W_dec' by 1/n, so that releases of all SAEs
    alike have rows of unit norm. Not TopK's latents, whose sizes are compared.

    Returns:
        Float32 NumPy tensors W_enc [D, F], W_dec [F, D], ...; computed in float64.

    Raises:
        UserError: a weight isn't finite.
    """
    config = trained.config.sae
    params = {name: np.asarray(value, np.float64) for name, value in trained.params.items()}
    scale = float(trained.target_scale)
    ratio = scale / float(trained.input_scale)  # 1 for an SAE
    check_finite(params, where=f"the checkpoint at step {trained.step}")
    params = _as_jumprelu(params, architecture=config.architecture)
    # The trainer clamps direct thresholds at 0: every format applies a ReLU, so less means 0.
    assert (params["threshold"] >= 0).all(), "a trained threshold is negative"
    bias_F = params["b_enc"]
    if config.pre_encoder_bias:
        bias_F = bias_F - params["W_enc"] @ params["b_dec"]
    if config.subtract_mean:
        bias_F = bias_F - params["W_enc"] @ params["input_mean"]
    W_enc_FD = params["W_enc"] if ratio == 1.0 else ratio * params["W_enc"]
    W_dec_FD, b_dec_D, threshold_F = params["W_dec"], params["b_dec"], params["threshold"]
    if config.whitening > 0:
        # Of rows x A: x A W_encᵀ = x (W_enc Aᵀ)ᵀ, and what it decodes to is times A⁻¹ one of x.
        back_DD = np.linalg.inv(params["whitening"])
        W_enc_FD = W_enc_FD @ params["whitening"].T
        W_dec_FD, b_dec_D = W_dec_FD @ back_DD, b_dec_D @ back_DD
        norm_F = np.linalg.norm(W_dec_FD, axis=1)
        if config.architecture == "topk":
            norm_F = np.ones_like(norm_F)
        W_enc_FD, W_dec_FD = norm_F[:, None] * W_enc_FD, W_dec_FD / norm_F[:, None]
        bias_F, threshold_F = norm_F * bias_F, norm_F * threshold_F
    return Sae(
        W_enc=np.ascontiguousarray(W_enc_FD.T, np.float32),
        W_dec=np.ascontiguousarray(W_dec_FD, np.float32),
        b_enc=(scale * bias_F).astype(np.float32),
        b_dec=(scale * b_dec_D).astype(np.float32),
        threshold=(scale * threshold_F).astype(np.float32),
        k=config.k if config.architecture == "topk" else None,
        architecture=_released_architecture(config),
        metadata=metadata_of(trained),
        W_skip=(ratio * params[SKIP]).astype(np.float32) if config.affine_skip else None,
    )


def _released_architecture(config: SaeConfig) -> Architecture:
    """The architecture a release names: JumpReLU where no format has the trained one's form.

    BatchTopK ends as a JumpReLU SAE, and a Gated transcoder, which no format has, is one too.
    """
    gated_transcoder = config.architecture == "gated" and config.is_transcoder
    if config.architecture == "batch_topk" or gated_transcoder:
        return "jumprelu"
    return config.architecture


def _as_jumprelu(
    params: dict[str, np.ndarray], *, architecture: Architecture
) -> dict[str, np.ndarray]:
    """The five tensors of any architecture's trained parameters, weights latent-major."""
    if architecture == "gated":
        return params | gated_as_jumprelu(params, latent_axis=0)
    if architecture in ("relu", "topk"):
        return params | {"threshold": np.zeros_like(params["b_enc"])}
    return params

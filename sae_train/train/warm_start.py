"""The parameters of a run that starts from a released SAE, ours or anyone's (`sae.start_from`).

Gemma Scope 2 made its SAEs of instruction-tuned models this way, from those of the base models.

Training and release differ in three things. Training divides what it reads by a scale C and what it
predicts by a scale T (T = C for an SAE); a release takes raw activations. Training may subtract
b_dec before the encoder; a release has that folded into b_enc. Training keeps the decoder's rows at
norm 1; those of a release may have any norm n. This file computes training's parameters from the
released ones, which are primed here; `sae_train.inference.fold` goes the other way:

    W_dec = W_dec' / n    W_enc = C/T n W_enc'    θ = n θ' / T    b_dec = b_dec' / T
    b_enc = n b_enc' / T + W_enc b_dec            W_skip = C/T W_skip'

Legend: D model width, F latents.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from activation_cache.runtime.errors import UserError
from sae_train.config.sae import SaeConfig
from sae_train.inference.read_formats import load_sae
from sae_train.inference.sae import Sae, check_kind
from sae_train.model.matryoshka import latent_at
from sae_train.model.sharding import table_of

# Training log θ can't hold θ = 0. A released latent with θ = 0 starts from this instead.
_SMALLEST_THRESHOLD = 1e-6


def starting_params(
    config: SaeConfig,
    *,
    d_model: int,
    input_scale: float,
    target_scale: float,
    input_mean_D: Float[np.ndarray, " D"] | None = None,
) -> dict[str, Float[np.ndarray, "..."]]:
    """The parameters that training begins with, float32, by the names in `sharding.table_of`.

    Args:
        d_model: the width of the activations that the run reads.
        input_scale, target_scale: C and T.
        input_mean_D: what is subtracted from a transcoder's scaled rows.

    Raises:
        UserError: no SAE is there, or it has another architecture, width or site.
    """
    assert config.start_from is not None
    sae = load_sae(config.start_from)
    _check(sae, config, d_model=d_model)
    t = {name: tensor.astype(np.float64) for name, tensor in sae.tensors.items()}
    norm_F = np.linalg.norm(t["W_dec"], axis=1)
    ratio = input_scale / target_scale
    W_enc_FD = ratio * t["W_enc"].T * norm_F[:, None]
    b_dec_D = t["b_dec"] / target_scale
    b_enc_F = norm_F * t["b_enc"] / target_scale
    if config.pre_encoder_bias:
        b_enc_F = b_enc_F + W_enc_FD @ b_dec_D
    if input_mean_D is not None:
        b_enc_F = b_enc_F + W_enc_FD @ input_mean_D
    threshold_F = norm_F * t["threshold"] / target_scale
    params = {
        "W_dec": t["W_dec"] / norm_F[:, None],
        "W_enc": W_enc_FD,
        "b_dec": b_dec_D,
        "b_enc": b_enc_F,
    }
    if config.affine_skip:
        # A released transcoder without a skip is the same as one whose skip is 0.
        D = W_enc_FD.shape[1]
        params["W_skip"] = ratio * t.get("W_skip", np.zeros((D, D)))
    if config.architecture == "jumprelu":
        if config.threshold.parametrisation == "log":
            threshold_F = np.log(np.maximum(threshold_F, _SMALLEST_THRESHOLD))
        params["threshold"] = threshold_F
    # The release's first latents become those of the smallest prefix.
    latents, table = latent_at(config), table_of(config)
    return {
        name: (value[latents] if table[name].dims[0] == "F" else value).astype(np.float32)
        for name, value in params.items()
    }


def _check(sae: Sae, config: SaeConfig, *, d_model: int) -> None:
    source = config.start_from
    D, F = sae.W_enc.shape
    # The release of a Gated SAE is a JumpReLU SAE.
    kind = {"gated": "jumprelu"}.get(sae.architecture, sae.architecture)
    if kind != config.architecture:
        raise UserError(
            f"sae.start_from {source} is a {sae.architecture} SAE and sae.architecture is "
            f"{config.architecture}: make it {kind}"
        )
    check_kind(sae, config, name=f"sae.start_from {source}")
    if sae.W_skip is not None and not config.affine_skip:
        raise UserError(
            f"sae.start_from {source} has an affine skip, and sae.affine_skip is false: set it"
        )
    if config.width != F:
        raise UserError(
            f"sae.start_from {source} has {F} latents and sae.width is {config.width}: make it {F}"
        )
    if d_model != D:
        raise UserError(
            f"sae.start_from {source} reads vectors of {D} and {config.site} of layer "
            f"{config.layer} has {d_model}: choose an SAE of this model and site"
        )
    if not np.linalg.norm(np.asarray(sae.W_dec), axis=1).all():
        raise UserError(f"sae.start_from {source} has decoder rows of norm 0, which can't train")

"""Adam without a first moment, and the unit-norm decoder.

Gemma Scope (arXiv 2408.05147, section 3.2): β₁ = 0, β₂ = 0.999, ε = 1e-8; the part of each
decoder row's gradient that is parallel to the row is removed before Adam, and rows are
renormalised after every update. With β₁ = 0 there is no first moment to keep.

Legend: D model width, F latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sae_train.config.run import AdamConfig, TrainConfig
from sae_train.config.sae import SaeConfig, has_unit_decoder
from sae_train.model.forward import Params

Scalar = Array | np.float32


def tree_norm(arrays: Params) -> Float[Array, ""]:
    """The Euclidean norm of all entries of all arrays together."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(array)) for array in jax.tree.leaves(arrays)))


def remove_parallel(
    gradient_FD: Float[Array, "F D"], *, rows_FD: Float[Array, "F D"]
) -> Float[Array, "F D"]:
    """The gradient less its component along each (unit-norm) row."""
    along_F1 = (gradient_FD * rows_FD).sum(axis=1, keepdims=True)
    return gradient_FD - along_F1 * rows_FD


def unit_rows(rows_FD: Float[Array, "F D"]) -> Float[Array, "F D"]:
    """Each row divided by its norm."""
    return rows_FD / jnp.linalg.norm(rows_FD, axis=1, keepdims=True)


def adam_step(
    param: Array,
    gradient: Array,
    *,
    second_moment: Array,
    learning_rate: Scalar,
    bias_correction: Scalar,
    config: AdamConfig,
    kept: Array | None = None,
) -> tuple[Array, Array]:
    """One update of one tensor: (new parameter, new second moment).

    v ← β₂ v + (1 - β₂) g²;  p ← p - lr g / (√(v / bias_correction) + ε).
    `bias_correction` is 1 - β₂ᵗ, t counted from 1; the host computes it in float64, where
    float32 would lose four digits in the first steps. `kept` takes the place of the first β₂
    where v hasn't been brought up to date in every step (`kept_share`).
    """
    before = config.beta2 if kept is None else kept
    moment = before * second_moment + (1.0 - config.beta2) * jnp.square(gradient)
    scaled = gradient / (jnp.sqrt(moment / bias_correction) + config.epsilon)
    return param - learning_rate * scaled, moment


def kept_share(steps_N: Int[Array, " N"], *, config: AdamConfig) -> Float[Array, " N"]:
    """What is left of a second moment after so many steps, all but the last without a gradient.

    β₂ⁿ as exp(n log β₂): its error grows with n log β₂, which is small where the share isn't. The
    β₂ is float32's, as in the dense update that this one must agree with.
    """
    if config.beta2 == 0:
        return jnp.zeros(steps_N.shape)
    beta2 = float(np.float32(config.beta2))
    powers_N = jnp.exp(steps_N.astype(jnp.float32) * math.log(beta2))
    return jnp.where(steps_N == 1, jnp.float32(beta2), powers_N)


class Rows(NamedTuple):
    """What a latent has D numbers of: its weights and their second moments, [F, D] each.

    Its fields are arrays; in its twins, their dims or where they lie.
    """

    W_enc: Any
    W_dec: Any
    v_enc: Any
    v_dec: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowUpdate:
    """The scalars of an update of rows; `scale` is what clipping leaves of a gradient.

    In its twins, where they lie.
    """

    learning_rate: Any
    bias_correction: Any
    scale: Any


def update_rows(
    rows: Rows,
    *,
    g_enc_FD: Float[Array, "F D"],
    g_dec_FD: Float[Array, "F D"],
    kept_F: Float[Array, " F"],
    scalars: RowUpdate,
    config: AdamConfig,
) -> Rows:
    """`update` of some latents' rows of unit-norm architectures, the decoder not yet projected."""
    step = partial(
        adam_step,
        learning_rate=scalars.learning_rate,
        bias_correction=scalars.bias_correction,
        config=config,
        kept=kept_F[:, None],
    )
    g_dec_FD = remove_parallel(g_dec_FD, rows_FD=rows.W_dec) * scalars.scale
    W_enc_FD, v_enc_FD = step(rows.W_enc, g_enc_FD * scalars.scale, second_moment=rows.v_enc)
    W_dec_FD, v_dec_FD = step(rows.W_dec, g_dec_FD, second_moment=rows.v_dec)
    return Rows(W_enc=W_enc_FD, W_dec=unit_rows(W_dec_FD), v_enc=v_enc_FD, v_dec=v_dec_FD)


def update(
    params: Params,
    gradients: Params,
    *,
    second_moment: Params,
    learning_rate: Scalar,
    bias_correction: Scalar,
    sae: SaeConfig,
    train: TrainConfig,
) -> tuple[Params, Params]:
    """Project, clip if asked to, step every parameter, renormalise the decoder.

    Args:
        gradients: as autodiff gives them, decoder not yet projected.
        learning_rate: this step's rate; thresholds multiply it by their own factor.
    """
    gradients = dict(gradients)
    unit = has_unit_decoder(sae.architecture)
    if unit:
        gradients["W_dec"] = remove_parallel(gradients["W_dec"], rows_FD=params["W_dec"])
    if train.gradient_clip is not None:
        scale = jnp.minimum(1.0, train.gradient_clip / tree_norm(gradients))
        gradients = jax.tree.map(lambda g: g * scale, gradients)
    new_params, new_moment = adam_update(
        params,
        gradients,
        second_moment=second_moment,
        learning_rate=learning_rate,
        bias_correction=bias_correction,
        sae=sae,
        train=train,
    )
    if unit:
        new_params["W_dec"] = unit_rows(new_params["W_dec"])
    return new_params, new_moment


def adam_update(
    params: Params,
    gradients: Params,
    *,
    second_moment: Params,
    learning_rate: Scalar,
    bias_correction: Scalar,
    sae: SaeConfig,
    train: TrainConfig,
) -> tuple[Params, Params]:
    """`adam_step` of each of some parameters: (new parameters, their new second moments)."""
    new_params, new_moment = {}, {}
    for name, param in params.items():
        factor = sae.threshold.learning_rate_multiplier if name == "threshold" else 1.0
        new_params[name], new_moment[name] = adam_step(
            param,
            gradients[name],
            second_moment=second_moment[name],
            learning_rate=learning_rate * factor,
            bias_correction=bias_correction,
            config=train.adam,
        )
    if "threshold" in new_params and sae.threshold.parametrisation == "direct":
        # Released latents are relu(pre) where pre > θ: below 0 the two forms would differ.
        new_params["threshold"] = jnp.maximum(new_params["threshold"], 0.0)
    return new_params, new_moment

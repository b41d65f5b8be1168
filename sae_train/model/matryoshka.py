"""Matryoshka SAEs: prefixes of the latents that reconstruct on their own, at one decode's cost.

    x̂_j  = f_1 d_1 + ... + f_m d_m + b_dec, m = m_j    the reconstruction by the first m_j latents
    loss = Σ_j w_j |x - x̂_j|², plus one penalty on all latents

Source: Bussmann et al. 2025 (arXiv 2503.17547), whose weights w_j are 1. Latents between two
prefixes are a group. Each group is decoded once, and x̂_j is the sum of the first j
groups. A latent of group g is part of x̂_j for every j from g on, so that its gradients are those of
a plain SAE with G_g = Σ_{j ≥ g} 2 w_j (x̂_j - x) in place of 2 (x̂ - x).

**Where latents lie.** Latent 0 is the first of the smallest prefix: that is the order of releases,
evaluations and indices. In training they lie dealt out: with C the greatest common divisor of the
prefixes' widths, positions are C runs, each with a C-th of every group, in the order of groups. So
the devices of a mesh, among which positions are split, hold equal shares of every prefix, whatever
their number, and a checkpoint is the same on every mesh. `latent_at` has the order. Only
`sae_train.checkpoint.trained`, which undoes it, and `sae_train.train.warm_start` need it.

Prefixes whose weight is 0 make no group: they train nothing. Of one group everything here is what
a plain SAE has.

Legend: B rows of a batch, D model width, F latents, G groups.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from activation_cache.precision import Precision
from activation_cache.products import einsum
from sae_train.config.sae import SaeConfig
from sae_train.model.forward import Forward, Params, decode, decoded_with


def _runs(config: SaeConfig) -> tuple[int, list[tuple[int, int]]]:
    """C, and where in a run each group begins and ends."""
    ends = [end for end, _ in config.groups]
    runs = math.gcd(*ends)
    return runs, list(itertools.pairwise([0, *(end // runs for end in ends)]))


def latent_at(config: SaeConfig) -> Int[np.ndarray, " F"]:
    """The latent at each position of training's arrays."""
    runs, spans = _runs(config)
    groups = [np.arange(start * runs, end * runs).reshape(runs, -1) for start, end in spans]
    return np.concatenate(groups, axis=1).reshape(-1)


def positions_of_groups(config: SaeConfig, *, devices: int = 1) -> list[Int[np.ndarray, " P"]]:
    """Of each group the positions, counted on a device, of the latents that it holds; rising.

    Args:
        devices: among which positions are split, evenly; they hold the same.
    """
    runs, spans = _runs(config)
    per_device = np.arange(config.width // devices, dtype=np.int32).reshape(runs // devices, -1)
    return [per_device[:, start:end].reshape(-1) for start, end in spans]


def decode_prefixes(
    params: Params,
    latents_BF: Float[Array, "B F"],
    *,
    x_BD: Float[Array, "B D"],
    config: SaeConfig,
    precision: Precision,
) -> list[Float[Array, "B D"]]:
    """The reconstruction of each prefix that counts, that of all latents last.

    Latents may be split over devices: each then decodes its own.
    """
    if len(config.groups) == 1:
        return [decode(params, latents_BF, x_BD=x_BD, precision=precision)]
    runs, spans = _runs(config)
    latents_BCL = latents_BF.reshape(latents_BF.shape[0], runs, -1)
    W_dec_CLD = params["W_dec"].reshape(runs, -1, params["W_dec"].shape[1])
    decoded = [
        einsum(
            "bcl,cld->bd",
            latents_BCL[:, :, start:end],
            W_dec_CLD[:, start:end],
            precision=precision,
        )
        for start, end in spans
    ]
    return reconstructions(params, jnp.stack(decoded), x_BD=x_BD, precision=precision)


def reconstructions(
    params: Params,
    decoded: Float[Array, "*G B D"],
    *,
    x_BD: Float[Array, "B D"],
    precision: Precision,
) -> list[Float[Array, "B D"]]:
    """Of each prefix: b_dec and an affine skip are in all of them.

    Args:
        decoded: f W_dec of each group, or without the first dim that of all latents.
    """
    if decoded.ndim == 2:
        return [decoded_with(params, decoded, x_BD=x_BD, precision=precision)]
    others_BD = decoded_with(params, jnp.zeros_like(x_BD), x_BD=x_BD, precision=precision)
    return [up_to_BD + others_BD for up_to_BD in itertools.accumulate(decoded)]


def with_prefixes(
    error: Float[Array, ""], out: Forward, target_BD: Float[Array, "B D"], *, config: SaeConfig
) -> Float[Array, ""]:
    """The error of the whole SAE, weighted, and the squared errors of its smaller prefixes."""
    *weights, of_whole = [weight for _, weight in config.groups]
    total = error if of_whole == 1 else of_whole * error
    for weight, inner_BD in zip(weights, out.inner, strict=True):
        total = total + weight * jnp.square(target_BD - inner_BD).sum(axis=1).mean()
    return total


def weighted_error(
    residuals: Sequence[Float[Array, "B D"]], *, config: SaeConfig
) -> Float[Array, ""]:
    """Σ_j w_j |r_j|², mean over rows."""
    errors = [jnp.square(residual_BD).sum(axis=1).mean() for residual_BD in residuals]
    weights = [weight for _, weight in config.groups]
    if weights == [1.0]:
        return errors[0]
    weighted = [weight * error for weight, error in zip(weights, errors, strict=True)]
    return sum(weighted[1:], weighted[0])


def group_gradients(
    residuals: Sequence[Float[Array, "B D"]], *, config: SaeConfig
) -> Float[Array, "*G B D"]:
    """Of each group G_g = Σ_{j ≥ g} -2 w_j r_j over the number of rows; of one group [B, D]."""
    num_rows = residuals[0].shape[0]
    own = [
        -2.0 * weight / num_rows * residual_BD
        for (_, weight), residual_BD in zip(config.groups, residuals, strict=True)
    ]
    if len(own) == 1:
        return own[0]
    return jnp.stack([*itertools.accumulate(reversed(own))][::-1])

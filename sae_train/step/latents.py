"""The latents of a tile, as gradients need them, and how they are kept until then.

Legend: B rows of a batch, S latents of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Bool, Float

from activation_cache.precision import Precision
from sae_train.step.compiler_hints import written_once

# Stands for 0 where a sign is to be kept: below every latent and above 0.
_LEAST = float(jnp.finfo(jnp.bfloat16).tiny)


@dataclass(frozen=True)
class Latents:
    """Latents and the two decisions about them, made from float32 pre-activations.

    Attributes:
        f_SB: 0 where a latent isn't active.
        active_SB: is it above its threshold?
        window_SB: is it within half a bandwidth of it?
    """

    f_SB: Float[Array, "S B"]
    active_SB: Bool[Array, "S B"]
    window_SB: Bool[Array, "S B"]


def latents_of(
    pre_SB: Float[Array, "S B"], *, theta_S: Float[Array, " S"], bandwidth: float
) -> Latents:
    """The latents of pre-activations."""
    active_SB = pre_SB > theta_S[:, None]
    window_SB = jnp.abs(pre_SB - theta_S[:, None]) < bandwidth / 2
    return Latents(jnp.where(active_SB, pre_SB, 0.0), active_SB, window_SB)


def kept_for_gradients(
    pre_SB: Float[Array, "S B"],
    *,
    theta_S: Float[Array, " S"],
    bandwidth: float,
    precision: Precision,
) -> tuple[Float[Array, "S B"], Latents]:
    """The array that is kept, and the latents.

    At bfloat16 it is the latents as products read them, in half the bytes of pre-activations. They
    are positive or 0, so the sign has room for the other decision: it is negative in the window.
    """
    latents = latents_of(pre_SB, theta_S=theta_S, bandwidth=bandwidth)
    if precision != "bfloat16":
        return pre_SB, latents
    marked_SB = jnp.where(latents.window_SB, -jnp.maximum(latents.f_SB, _LEAST), latents.f_SB)
    kept_SB = written_once(marked_SB.astype(jnp.bfloat16))
    return kept_SB, _of_marked(kept_SB)


def read_kept(
    kept_SB: Float[Array, "S B"],
    *,
    theta_S: Float[Array, " S"],
    bandwidth: float,
    precision: Precision,
) -> Latents:
    """The latents of the array that `kept_for_gradients` gave."""
    if precision != "bfloat16":
        return latents_of(kept_SB, theta_S=theta_S, bandwidth=bandwidth)
    # Else what the encoder made of it would be kept too.
    return _of_marked(written_once(kept_SB))


def _of_marked(marked_SB: BFloat16[Array, "S B"]) -> Latents:
    f_SB = jnp.abs(marked_SB)
    return Latents(f_SB, active_SB=f_SB > _LEAST, window_SB=marked_SB < 0)

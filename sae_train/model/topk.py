"""TopK and BatchTopK SAEs: sparsity by selection, and an aux loss for dead latents.

    pre = ReLU((x - b_dec) W_encᵀ + b_enc)
    f   = pre where it is among the k largest of its row (TopK), or among the k·B largest of the
          batch (BatchTopK); else 0
    x̂   = f W_dec + b_dec,  rows of W_dec of unit norm

Sources: Gao et al. 2024 (arXiv 2406.04093) for TopK and AuxK (appendix A.2), Bussmann et al. 2024
(arXiv 2412.06410) for BatchTopK, whose inference is a JumpReLU at the mean of the smallest value
selected in training.

The k-th largest value is found without sorting, by bisection over the bits of a float32: 31 counts.
That is exact, and with the latents split over devices each count sends B integers, while a sort
would gather the whole [B, F].

Legend: B rows of a batch, D model width, F latents.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from activation_cache.precision import Precision
from sae_train.config.sae import SaeConfig
from sae_train.model.forward import (
    Forward,
    Params,
    counted,
    pre_activations,
    product_with_decoder,
)
from sae_train.model.matryoshka import decode_prefixes

# Bits of a float32 that isn't negative; read as integers, they have the floats' order.
_BITS = 31


def kth_largest(values_BF: Float[Array, "B F"], *, k: int) -> Float[Array, " B"]:
    """The k-th largest value of each row of values >= 0; 0 where fewer than k are positive."""
    bits_BF = jax.lax.bitcast_convert_type(values_BF, jnp.int32)

    def enough(least_B: Array) -> Array:
        return (bits_BF >= least_B[:, None]).sum(axis=1, dtype=jnp.int32) >= k

    return bisect(enough, jnp.zeros(values_BF.shape[0], jnp.int32))


def kth_largest_of_all(values_BF: Float[Array, "B F"], *, k: int) -> Float[Array, ""]:
    """The k-th largest of all values >= 0; 0 where fewer than k are positive."""
    bits_BF = jax.lax.bitcast_convert_type(values_BF, jnp.int32)

    def enough(least: Array) -> Array:
        # Counted in float32: B·F may pass 2^31, and up to k, at most 2^24, the sum is exact.
        return (bits_BF >= least).sum(axis=1, dtype=jnp.int32).astype(jnp.float32).sum() >= float(k)

    return bisect(enough, jnp.zeros((), jnp.int32))


def bisect(
    enough: Callable[[Int[Array, "..."]], Bool[Array, "..."]], start: Int[Array, "..."]
) -> Float[Array, "..."]:
    """The largest value >= 0 that is still `enough`, from its highest bit down.

    Args:
        enough: of values read as integers; true up to some value and false above it.
        start: zeros.
    """

    def body(number: Array, least: Array) -> Array:
        bit = (_BITS - 1 - number).astype(jnp.int32)
        candidate = least | jnp.left_shift(jnp.int32(1), bit)
        return jnp.where(enough(candidate), candidate, least)

    least = jax.lax.fori_loop(0, _BITS, body, start)
    return jax.lax.bitcast_convert_type(least, jnp.float32)


def select(values_BF: Float[Array, "B F"], *, k: int) -> Float[Array, "B F"]:
    """The k largest values of each row, if positive, and else 0; all of a tie are kept."""
    kth_B = kth_largest(jax.lax.stop_gradient(values_BF), k=k)
    return jnp.where(values_BF >= kth_B[:, None], values_BF, 0.0)


def forward(
    params: Params,
    x_BD: Float[Array, "B D"],
    *,
    target_BD: Float[Array, "B D"],
    config: SaeConfig,
    dead_F: Bool[Array, " F"],
    precision: Precision,
) -> Forward:
    """Encode and decode scaled rows with k latents active: per row, or in the mean of the batch.

    Args:
        params: W_enc [F, D], b_enc [F], W_dec [F, D], b_dec [D].
        x_BD: activations divided by the input scale, so that E|x|² = 1.
        target_BD: what is to be predicted: of an SAE, x itself.
        dead_F: latents that haven't fired for long.

    Returns:
        For BatchTopK with `smallest`.
    """
    assert config.k is not None
    pre_BF = jax.nn.relu(
        pre_activations(params, x_BD, bias=params["b_enc"], config=config, precision=precision)
    )
    smallest = None
    if config.architecture == "topk":
        latents_BF = select(pre_BF, k=config.k)
    else:
        smallest = kth_largest_of_all(jax.lax.stop_gradient(pre_BF), k=config.k * x_BD.shape[0])
        latents_BF = jnp.where(pre_BF >= smallest, pre_BF, 0.0)
    *inner, reconstruction_BD = decode_prefixes(
        params, latents_BF, x_BD=x_BD, config=config, precision=precision
    )

    def aux_loss() -> Array:
        """AuxK: the D/2 largest of the dead latents predict what the others missed.

        |e - z W_dec|², e without gradient; with n < D/2 dead latents it counts n / (D/2) of that.
        """
        k_aux = target_BD.shape[1] // 2
        z_BF = select(jnp.where(dead_F[None, :], pre_BF, 0.0), k=k_aux)
        error_BD = jax.lax.stop_gradient(target_BD - reconstruction_BD)
        found_BD = product_with_decoder(params, z_BF, precision=precision)
        squared = jnp.square(error_BD - found_BD).sum(axis=1).mean()
        return squared * jnp.minimum(dead_F.sum() / k_aux, 1.0)

    found = jax.lax.cond(dead_F.any(), aux_loss, lambda: jnp.zeros(()))
    return counted(
        reconstruction_BD,
        latents_BF,
        auxiliary=config.aux_k_coefficient * found,
        smallest=smallest,
        inner=tuple(inner),
    )

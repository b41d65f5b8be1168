"""The gradients of a JumpReLU step, written out, and the records that carry them.

`sae_train.model.jumprelu` has the equations; differentiated by hand they are, for one latent i
with decoder row d_i and for the rows b of a batch:

    g_f  = d_i · g_b                              g_b the gradient in the reconstruction
    dd_i = Σ f g_b                                over active pairs (row, latent)
    de_i = Σ g_f x_b,  db_i = Σ g_f               over active pairs
    dθ_i = -(1/ε) Σ (θ_i g_f + s_b + ω_i)         over pairs in the window, |π - θ_i| < ε/2

with s_b and ω_i the penalty's gradients in row b's L0 and in latent i's count of active rows. All
are zero away from pairs that are active or in the window (`has_gradient`). docs/numerics.md.

Legend: B rows of a batch, D model width, F latents, S latents of a tile or block, T tiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from activation_cache.precision import Precision
from activation_cache.products import einsum, operand
from sae_train.config.sae import SaeConfig
from sae_train.model.forward import Params
from sae_train.step.compiler_hints import row_major
from sae_train.step.latents import Latents
from sae_train.step.optimiser import remove_parallel
from sae_train.step.tiles import varying_like

# The two weight matrices [F, D] and their second moments, under the names "W_enc" and "W_dec".
Rows = tuple[Params, Params]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Encoded:
    """A batch's latents in sum; the same class also holds dims, field by field.

    Attributes:
        decoded_BD: f W_dec; of a Matryoshka SAE that of each group, [G, B, D].
        l0_B: active latents of each row.
        active_F: active rows of each latent, over the whole batch.
        pairs_per_row: pairs of row and latent that have a gradient, per row, of the device with the
            most, times the devices along `model`; the dense path doesn't count them.
        kept: what the gradients are made from: on the dense path an array [T, S, B] that
            `latents.read_kept` reads, on the sparse path `Pairs`.
        is_sparse: are the gradients made from pairs?
    """

    decoded_BD: Any
    l0_B: Any
    active_F: Any
    pairs_per_row: Any
    kept: Any
    is_sparse: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OutputGradients:
    """A batch, and the gradients of its loss in what the latents lead to.

    The same class also holds dims, field by field.

    Attributes:
        x_BD: what the encoder multiplied: rows less b_dec, if it is subtracted at all.
        g_BD: the gradient in the reconstruction; of a Matryoshka SAE that in each group's part of
            all reconstructions, [G, B, D].
        g_l0_B: that in each row's count of active latents.
        g_count_F: that in each latent's count of active rows.
        theta_F, bias_F: thresholds and encoder biases.
    """

    x_BD: Any
    g_BD: Any
    g_l0_B: Any
    g_count_F: Any
    theta_F: Any
    bias_F: Any

    def scaled(self, factor: Float[Array, ""]) -> OutputGradients:
        """With all gradients multiplied: those of the parameters then are too."""
        return dataclasses.replace(
            self,
            g_BD=factor * self.g_BD,
            g_l0_B=factor * self.g_l0_B,
            g_count_F=factor * self.g_count_F,
        )

    @property
    def shared_g_BD(self) -> Any:
        """The gradient in what is part of every reconstruction: b_dec and an affine skip."""
        return self.of_group(0).g_BD

    def of_group(self, number: int) -> OutputGradients:
        """As the latents of one group see it."""
        if self.g_BD.ndim == 2:
            return self
        return dataclasses.replace(self, g_BD=self.g_BD[number])

    def operands(self, precision: Precision) -> OutputGradients:
        """With x and g as products at this precision are given them; of no use for sums."""
        x_BD, g_BD = (operand(own, precision=precision) for own in (self.x_BD, self.g_BD))
        return dataclasses.replace(self, x_BD=x_BD, g_BD=g_BD)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LatentSums:
    """What a pass over the latents leaves besides their rows.

    The same class also holds dims, field by field.

    Attributes:
        bias_F, theta_F: the gradients of b_enc and of θ itself.
        encoded_D: W_encᵀ of the former, with the weights before their update.
        squares: summed over both weight matrices' gradients.
        projected: the same with the decoder's gradient projected; 0 where rows are written.
    """

    bias_F: Any
    theta_F: Any
    encoded_D: Any
    squares: Any
    projected: Any


def output_dims(row: str = "B", *, groups: int = 1) -> OutputGradients:
    """The dims of `OutputGradients`; `row="whole"` gives every device all rows."""
    g_dims = (row, "D") if groups == 1 else ("whole", row, "D")
    return OutputGradients((row, "D"), g_dims, (row,), ("F",), ("F",), ("F",))


SUM_DIMS = LatentSums(bias_F=("F",), theta_F=("F",), encoded_D=("D",), squares=(), projected=())


def has_gradient(pre: Array, theta: Array, *, bandwidth: float) -> Bool[Array, "..."]:
    """Active, or in the threshold's window: where a gradient may be other than zero.

    That is π > θ or |π - θ| < ε/2, in one comparison: XLA doesn't vectorise the packing of two.
    """
    return pre - theta > -bandwidth / 2


def tile_gradients(
    W_dec_SD: Float[Array, "S D"],
    latents: Latents,
    *,
    theta_S: Float[Array, " S"],
    g_count_S: Float[Array, " S"],
    output: OutputGradients,
    bandwidth: float,
    precision: Precision,
) -> Params:
    """A tile's gradients from matrix products: W_enc, W_dec [S, D], b_enc, threshold [S].

    The threshold's is that of θ itself, the decoder's is not yet projected.

    Args:
        theta_S, g_count_S: the tile's part of what `output` has for all latents.
    """
    g_f_SB = einsum("sd,bd->sb", W_dec_SD, output.g_BD, precision=precision)
    g_pre_SB = jnp.where(latents.active_SB, g_f_SB, 0.0)
    g_step_SB = output.g_l0_B[None, :] + g_count_S[:, None]
    g_theta_SB = jnp.where(latents.window_SB, theta_S[:, None] * g_f_SB + g_step_SB, 0.0)
    W_enc_SD = einsum("sb,bd->sd", g_pre_SB, output.x_BD, precision=precision)
    W_dec_SD = einsum("sb,bd->sd", latents.f_SB, output.g_BD, precision=precision)
    return {
        "W_enc": row_major(W_enc_SD),
        "W_dec": row_major(W_dec_SD),
        "b_enc": g_pre_SB.sum(axis=1),
        "threshold": -g_theta_SB.sum(axis=1) / bandwidth,
    }


def small_gradients(
    params: Params,
    x_BD: Float[Array, "B D"],
    *,
    output: OutputGradients,
    sums: LatentSums,
    sae: SaeConfig,
    precision: Precision,
) -> Params:
    """The gradients of all parameters but the two large matrices.

    Args:
        x_BD: scaled rows, b_dec not subtracted.
        sums: what a pass over the latents left.
    """
    b_dec_D = output.shared_g_BD.sum(axis=0)
    log = sae.threshold.parametrisation == "log"
    small = {
        "b_enc": sums.bias_F,
        "threshold": sums.theta_F * output.theta_F if log else sums.theta_F,
        "b_dec": b_dec_D - sums.encoded_D if sae.pre_encoder_bias else b_dec_D,
    }
    for name in ("input_mean", "whitening"):
        if name in params:
            small[name] = jnp.zeros_like(params[name])  # it stays as it is
    if "W_skip" in params:
        small["W_skip"] = einsum("bd,be->de", x_BD, output.shared_g_BD, precision=precision)
    return small


def no_sums(num: int, d_model: int, *, like: Array) -> LatentSums:
    """Zeros for `num` latents, typed as `like` is inside `over_devices`."""
    zeros = LatentSums(
        bias_F=jnp.zeros(num),
        theta_F=jnp.zeros(num),
        encoded_D=jnp.zeros(d_model),
        squares=jnp.zeros(()),
        projected=jnp.zeros(()),
    )
    return jax.tree.map(lambda zero: varying_like(zero, like=like), zeros)


def added(
    sums: LatentSums,
    weights: Params,
    gradients: Params,
    *,
    place: Callable[[Array, Array], Array],
    for_norm: bool,
) -> LatentSums:
    """The sums with those of a block of latents.

    Args:
        weights: the block's W_enc and W_dec.
        place: writes one number for each of the block's latents into an array of all.
        for_norm: add up `projected` too.
    """
    squares = {name: jnp.square(gradients[name]).sum() for name in ("W_enc", "W_dec")}
    projected = sums.projected
    if for_norm:
        g_dec_SD = remove_parallel(gradients["W_dec"], rows_FD=weights["W_dec"])
        projected = projected + squares["W_enc"] + jnp.square(g_dec_SD).sum()
    bias_S, W_enc_SD = gradients["b_enc"], weights["W_enc"]
    return LatentSums(
        bias_F=place(sums.bias_F, bias_S),
        theta_F=place(sums.theta_F, gradients["threshold"]),
        encoded_D=sums.encoded_D + einsum("s,sd->d", bias_S, W_enc_SD, precision="float32"),
        squares=sums.squares + squares["W_enc"] + squares["W_dec"],
        projected=projected,
    )

"""Dead latents of a JumpReLU learn what the living miss: TopK's aux loss, below thresholds.

    z    = ReLU(π) of the k dead latents with the largest, row by row; 0 of all others
    loss = c · min(n/k, 1) · |e - z W_dec|²       mean over rows; e = x - x̂ without gradient

with k = 32, n the number of dead latents and c `sae.revive_coefficient`. A latent below its
threshold has no gradient, so one that has once fallen silent stays so. Here it is given one, by
π as if there were no threshold. Source: AuxK of Gao et al. 2024 (arXiv 2406.04093, appendix A.2),
whose latents have no threshold, and whose k is D/2.

What it has learnt must come above its threshold. So a threshold that is above all of a latent's z
in the batch is brought down to the largest of them: that row is in the threshold's window then, and
the other losses decide whether the latent is worth what it costs. This is ours.

With a first moment (`train.adam.beta1`) this second update has none: a latent is taught only
while it is dead.

The loss changes W_enc, W_dec and b_enc of latents that are dead and silent in this batch too, and
nothing else. The step's other losses leave exactly these alone, but for their threshold, so a
second update after the step's own gives what one update by the sum would. If gradients are clipped,
those of this loss are multiplied by the same factor as the others.

At most `MOST` latents take part in a step; more dead ones take turns. All is done in a loop that
runs once if a latent is dead and else not at all, a block of dead latents at a time, in place.

Legend: B rows of a batch, D model width, F latents, C latents that take part on this device, S
latents of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from activation_cache.precision import Precision
from activation_cache.products import einsum, operand
from sae_train.config.run import Config
from sae_train.model.forward import Params
from sae_train.model.sharding import max_over, max_over_all, over_devices, sum_over
from sae_train.model.topk import bisect
from sae_train.step import optimiser
from sae_train.step.schedule import Scheduled
from sae_train.step.state import TrainState, is_dead
from sae_train.step.tiles import varying_like

# k: so few that each has a large part of the error to explain, and may come above its threshold.
SELECTED = 32
# Their pre-activations are kept: 64 MiB at 4,096 rows of a batch.
MOST = 4096
BLOCK = 512

# Parameters that latents own, and their second moments.
Own = tuple[Params, Params]

_PER_LATENT: dict[str, tuple[str, ...]] = {
    "W_enc": ("F", "D"),
    "W_dec": ("F", "D"),
    "b_enc": ("F",),
    "threshold": ("F",),
}


def takes_part(
    state: TrainState, active_F: Float[Array, " F"], *, config: Config
) -> tuple[Bool[Array, " F"], Int[Array, ""]]:
    """The latents that the loss teaches in this step, and how many are dead in all.

    Args:
        active_F: in how many rows of the batch each latent is active.
    """
    dead_F = is_dead(state.last_fired, step=state.step, train=config.train) & (active_F == 0)
    num = dead_F.sum(dtype=jnp.int32)
    if config.sae.width <= MOST:
        return dead_F, num
    turns = jnp.maximum(1, -(-num // MOST))
    rank_F = jnp.cumsum(dead_F, dtype=jnp.int32) - 1
    return dead_F & (rank_F // MOST == state.step % turns), num


def revive(
    state: TrainState,
    params: Params,
    second_moment: Params,
    touched_F: Bool[Array, " F"],
    *,
    active_F: Float[Array, " F"],
    encoder_input_BD: Float[Array, "B D"],
    residual_BD: Float[Array, "B D"],
    gradient_norm: Float[Array, ""],
    scalars: Scheduled,
    config: Config,
    mesh: Mesh,
    precision: Precision,
) -> tuple[Params, Params, Bool[Array, " F"], Float[Array, ""]]:
    """Parameters, second moments and touched latents after the second update, and the loss.

    Args:
        state: before the step.
        params, second_moment, touched_F: after the step's own update.
        encoder_input_BD: what the encoder multiplied.
        residual_BD: what was to be predicted less what was.
        gradient_norm: of the step's own gradients.
    """
    chosen_F, num = takes_part(state, active_F, config=config)
    k = SELECTED
    weight = config.sae.revive_coefficient * jnp.minimum(num / k, 1.0)
    clip = config.train.gradient_clip
    factor = jnp.ones(()) if clip is None else jnp.minimum(1.0, clip / gradient_norm)
    # Of touched latents the step's update has already let the second moments decay.
    waited_F = optimiser.waited_decay(state.step - state.last_touched, train=config.train)
    decay_F = jnp.where(touched_F, _undecayed(config.train.adam.beta2), waited_F)
    own = tuple({name: of[name] for name in _PER_LATENT} for of in (params, second_moment))
    size = min(BLOCK, config.sae.width // mesh.shape["model"])
    part = _Part(k=k, size=size, config=config, mesh=mesh, precision=precision)
    dims = (_PER_LATENT, _PER_LATENT)
    taught, loss = over_devices(
        part,
        mesh=mesh,
        in_dims=(dims, ("F",), ("F",), ("B", "D"), ("B", "D"), (), (), (), Scheduled(*((),) * 5)),
        out_dims=(dims, ()),
    )(
        own,
        chosen_F,
        decay_F,
        encoder_input_BD,
        residual_BD,
        num,
        weight,
        factor,
        jax.tree.map(jnp.asarray, scalars),
    )
    return params | taught[0], second_moment | taught[1], touched_F | chosen_F, loss


def _undecayed(beta2: float) -> float:
    """What undoes one decay by β₂; with β₂ = 0 nothing is left to undo it for."""
    return 1.0 / beta2 if beta2 else 0.0


@dataclass(frozen=True)
class _Part:
    """The pass over one device's dead latents, `size` of them at a time."""

    k: int
    size: int
    config: Config
    mesh: Mesh
    precision: Precision

    def __call__(
        self,
        own: Own,
        chosen_F: Array,
        decay_F: Array,
        x_BD: Array,
        residual_BD: Array,
        num: Array,
        weight: Array,
        factor: Array,
        scalars: Scheduled,
    ) -> tuple[Own, Array]:
        """New parameters and second moments, and the loss; `num` is of all devices."""
        width, size, mesh = chosen_F.shape[0], self.size, self.mesh
        num_rows = x_BD.shape[0] * mesh.shape["data"]
        x_BD = operand(x_BD, precision=self.precision)

        def once(_: Any, carry: tuple[Own, Array]) -> tuple[Own, Array]:
            own, _ = carry
            space = -(-min(MOST, width) // size) * size
            (ids_C,) = jnp.nonzero(chosen_F, size=space, fill_value=width)
            ids_C = ids_C.astype(jnp.int32)
            # The same number everywhere: devices add up sums in each round.
            num_blocks = max_over_all(-(-chosen_F.sum(dtype=jnp.int32) // size), mesh=mesh)
            z_CB = self._strongest(own[0], ids_C, num_blocks, x_BD, num=num)
            missed_BD = residual_BD - self._decoded(own[0], ids_C, num_blocks, z_CB)
            squares = sum_over("data", jnp.square(missed_BD).sum(), mesh=mesh)
            g_BD = operand(-2.0 / num_rows * weight * factor * missed_BD, precision=self.precision)

            def learn(number: Array, own: Own) -> Own:
                ids_S = _block(ids_C, number, size=size)
                mine = jax.tree.map(lambda of_all: of_all.at[ids_S].get(mode="clip"), own)
                z_SB = _block(z_CB, number, size=size)
                gradients = self._gradients(mine[0], z_SB, g_BD=g_BD, x_BD=x_BD)
                params, moments = optimiser.update(
                    mine[0],
                    gradients,
                    second_moment=mine[1],
                    decay_F=decay_F.at[ids_S].get(mode="clip"),
                    scalars=scalars,
                    config=self.config,
                )
                new = params | {"threshold": self._lowered(params["threshold"], z_SB)}, moments
                return jax.tree.map(lambda old, put: old.at[ids_S].set(put, mode="drop"), own, new)

            return jax.lax.fori_loop(0, num_blocks, learn, own), weight * squares / num_rows

        return jax.lax.fori_loop(0, (num > 0).astype(jnp.int32), once, (own, jnp.zeros(())))

    def _strongest(
        self, params: Params, ids_C: Array, num_blocks: Array, x_BD: Array, *, num: Array
    ) -> Float[Array, "C B"]:
        """ReLU(π) of the k strongest of all devices in each row; 0 of other latents."""
        width, rows = params["b_enc"].shape[0], x_BD.shape[0]

        def encode(number: Array, pre_CB: Array) -> Array:
            ids_S = _block(ids_C, number, size=self.size)
            W_enc_SD, bias_S = (
                params[name].at[ids_S].get(mode="clip") for name in ("W_enc", "b_enc")
            )
            pre_SB = einsum("sd,bd->sb", W_enc_SD, x_BD, precision=self.precision)
            pre_SB = jax.nn.relu(pre_SB + bias_S[:, None])
            pre_SB = jnp.where(ids_S[:, None] < width, pre_SB, 0.0)
            return jax.lax.dynamic_update_slice_in_dim(pre_CB, pre_SB, number * self.size, axis=0)

        like = params["b_enc"][0] + x_BD[0, 0].astype(jnp.float32)
        start_CB = varying_like(jnp.zeros((ids_C.shape[0], rows)), like=like)
        pre_CB = jax.lax.fori_loop(0, num_blocks, encode, start_CB)

        bits_CB = jax.lax.bitcast_convert_type(pre_CB, jnp.int32)

        def enough(least_B: Array) -> Array:
            count_B = (bits_CB >= least_B[None, :]).sum(axis=0, dtype=jnp.int32)
            return sum_over("model", count_B, mesh=self.mesh) >= self.k

        start_B = varying_like(jnp.zeros(rows, jnp.int32), like=x_BD[0, 0])
        zero_B = varying_like(jnp.zeros(rows), like=x_BD[0, 0])
        least_B = jax.lax.cond(num > self.k, lambda: bisect(enough, start_B), lambda: zero_B)
        return jnp.where(pre_CB >= least_B[None, :], pre_CB, 0.0)

    def _decoded(
        self, params: Params, ids_C: Array, num_blocks: Array, z_CB: Array
    ) -> Float[Array, "B D"]:
        """z W_dec, of all devices' latents."""

        def add(number: Array, so_far_BD: Array) -> Array:
            ids_S = _block(ids_C, number, size=self.size)
            W_dec_SD = params["W_dec"].at[ids_S].get(mode="clip")
            z_SB = _block(z_CB, number, size=self.size)
            return so_far_BD + einsum("sb,sd->bd", z_SB, W_dec_SD, precision=self.precision)

        shape = z_CB.shape[1], params["W_dec"].shape[1]
        start_BD = varying_like(jnp.zeros(shape), like=z_CB[0, 0])
        found_BD = jax.lax.fori_loop(0, num_blocks, add, start_BD)
        return sum_over("model", found_BD, mesh=self.mesh)

    def _gradients(self, params: Params, z_SB: Array, *, g_BD: Array, x_BD: Array) -> Params:
        """Of a block's parameters; `g_BD` is the gradient in z W_dec."""
        g_z_SB = einsum("sd,bd->sb", params["W_dec"], g_BD, precision=self.precision)
        g_pre_SB = jnp.where(z_SB > 0, g_z_SB, 0.0)
        gradients = {
            "W_enc": einsum("sb,bd->sd", g_pre_SB, x_BD, precision=self.precision),
            "W_dec": einsum("sb,bd->sd", z_SB, g_BD, precision=self.precision),
            "b_enc": g_pre_SB.sum(axis=1),
        }
        # The threshold has none; it is here for its second moment, which waits with the others.
        none_S = jnp.zeros_like(params["threshold"])
        return sum_over("data", gradients, mesh=self.mesh) | {"threshold": none_S}

    def _lowered(self, threshold_S: Array, z_SB: Array) -> Float[Array, " S"]:
        """Trained thresholds, brought down to a latent's largest z of the batch if above it."""
        largest_S = max_over("data", z_SB.max(axis=1), mesh=self.mesh)
        log = self.config.sae.threshold.parametrisation == "log"
        edge_S = jnp.log(largest_S) if log else largest_S
        return jnp.where(largest_S > 0, jnp.minimum(threshold_S, edge_S), threshold_S)


def _block(array_C: Array, number: Array, *, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(array_C, number * size, size)

"""The dense step of a JumpReLU SAE: five products of whole matrices, and as little else as can be.

    encode     encoder product, latents, decoder product; of all arrays of size [B, F] one is
               kept: pre-activations, or at bfloat16 the latents as products read them
    penalty    of L0 and frequencies, and its gradients in them
    update     gradients, projection, optimiser and new rows, a tile of latents at a time, in place

Masks, latents and their gradients exist for one tile only, and on a CPU stay in its caches; no
gradient of a weight matrix exists as a whole, unless gradients are clipped, for which the norm of
all must be known first. All gradients are explicit (`gradients`). Passes run on each device's rows
and latents, with the sums over devices written out; none is differentiated.

Legend: B rows of a batch, D model width, F latents, T tiles, L latents of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from activation_cache.precision import Precision
from activation_cache.products import einsum
from sae_train.config.run import Config
from sae_train.model.forward import Params, threshold_of
from sae_train.model.matryoshka import group_gradients, reconstructions, weighted_error
from sae_train.model.sharding import max_over_all, over_devices, sum_over
from sae_train.step import optimiser
from sae_train.step.gradients import (
    SUM_DIMS,
    Encoded,
    LatentSums,
    OutputGradients,
    Rows,
    output_dims,
    small_gradients,
)
from sae_train.step.result import StepResult, Updated
from sae_train.step.revive import revive
from sae_train.step.schedule import Scheduled
from sae_train.step.sparsity_penalty import Penalty, penalty_of
from sae_train.step.state import TrainState
from sae_train.step.tile_passes import Update, encode_tiles, update_tiles, whole_gradients
from sae_train.step.tiles import in_order, tile_of, tiled_groups

# A width without divisors in reach is one tile: hundreds of small ones would take longer.
_SMALLEST_TILE = 256

MATRIX = ("F", "D")
ROW_DIMS = ({"W_enc": MATRIX, "W_dec": MATRIX},) * 2
ENCODER_DIMS = (MATRIX, MATRIX, ("F",), ("F",), ("B", "D"))
_KEPT_DIMS = ("F", "whole", "B")  # [T, L, B]

# W_enc, W_dec, b_enc, θ, and what the encoder multiplies.
EncoderOperands = tuple[Array, Array, Array, Array, Array]


def cpu_tile(width: int) -> int:
    """Latents that go through a step together on a CPU, of those that a device holds."""
    tile = tile_of(width)
    return tile if tile >= _SMALLEST_TILE else width


def update_dims(update: Update | None) -> Any:
    """The dims of an `Update`: scalars everywhere, decays with their latents."""
    return None if update is None else (Scheduled((), (), (), (), ()), ("F",))


class DenseStep:
    """A `Step` of a JumpReLU SAE or transcoder on a mesh."""

    def __init__(self, config: Config, mesh: Mesh, *, precision: Precision) -> None:
        self._config, self._mesh, self._precision = config, mesh, precision
        self._sae, self._train = config.sae, config.train
        # Elsewhere one tile of all: five products, each as large as it can be.
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        self._groups = tiled_groups(
            config.sae, devices=mesh.shape["model"], tile_of=cpu_tile if on_cpu else int
        )
        self._num_rows = config.train.batch_size // mesh.shape["data"]  # of each device

    def __call__(
        self,
        state: TrainState,
        x_BD: Float[Array, "B D"],
        *,
        target_BD: Float[Array, "B D"],
        scalars: Scheduled,
    ) -> StepResult:
        """One step on scaled rows."""
        operands = self._encoder_operands(state.params, x_BD)
        encoded = self._encode(state, operands)
        every = reconstructions(
            state.params, encoded.decoded_BD, x_BD=x_BD, precision=self._precision
        )
        residuals = [target_BD - reconstruction_BD for reconstruction_BD in every]
        penalty, output = self._output_gradients(
            operands, residuals, encoded, scalars=scalars, log_gain=state.log_gain
        )
        updated = self._update(state, x_BD, encoded, output, scalars=scalars)
        params, first_moment, second_moment, touched_F, norm = updated
        loss = weighted_error(residuals, config=self._sae) + penalty.loss
        if self._sae.revive_coefficient:
            params, second_moment, touched_F, revival = revive(
                state,
                params,
                second_moment,
                touched_F,
                active_F=encoded.active_F,
                encoder_input_BD=output.x_BD,
                residual_BD=residuals[-1],
                gradient_norm=norm,
                scalars=scalars,
                config=self._config,
                mesh=self._mesh,
                precision=self._precision,
            )
            loss = loss + revival
        return StepResult(
            params=params,
            first_moment=first_moment,
            second_moment=second_moment,
            last_touched=jnp.where(touched_F, state.step + 1, state.last_touched),
            loss=loss,
            penalty=penalty,
            gradient_norm=norm,
            reconstruction_BD=every[-1],
            l0_B=encoded.l0_B,
            fired_F=encoded.active_F > 0,
            pairs_per_row=encoded.pairs_per_row,
            is_sparse=encoded.is_sparse,
            overflowed=self._tries_pairs(state) & ~encoded.is_sparse,
        )

    def _tries_pairs(self, state: TrainState) -> Bool[Array, ""]:
        """Does the step look for active pairs, whether or not there is space for all?"""
        return jnp.zeros((), bool)

    def _encoder_operands(self, params: Params, x_BD: Array) -> EncoderOperands:
        if self._sae.pre_encoder_bias:
            x_BD = x_BD - params["b_dec"][None, :]
        if self._sae.subtract_mean:
            x_BD = x_BD - params["input_mean"][None, :]
        theta_F = threshold_of(params, config=self._sae)
        return params["W_enc"], params["W_dec"], params["b_enc"], theta_F, x_BD

    def _encode(self, state: TrainState, operands: EncoderOperands) -> Encoded:
        """Encode and decode; which path a step takes may depend on the state."""
        return self._encode_tiles(operands, keep=True)

    def _encode_tiles(self, operands: EncoderOperands, *, keep: bool) -> Encoded:
        """The dense encoder; with `keep` latents stay, else pairs are counted."""

        def part(*operands):
            found = [
                encode_tiles(
                    *operands,
                    latents_of_pass=group,
                    bandwidth=self._sae.bandwidth,
                    keep=keep,
                    precision=self._precision,
                )
                for group in self._groups
            ]
            decoded, l0, active, kept, total = zip(*found, strict=True)
            return self._summed(
                decoded[0] if len(found) == 1 else jnp.stack(decoded),
                sum(l0[1:], l0[0]),
                in_order(active, self._groups),
                None if keep else sum(total[1:], total[0]),
                kept=kept if keep else None,
            )

        out_dims = self._encoded_dims(self._kept_dims if keep else None)
        return self._over_devices(part, ENCODER_DIMS, out_dims)(*operands)

    @property
    def _kept_dims(self) -> Any:
        """Of each group [T, L, B]."""
        return (_KEPT_DIMS,) * len(self._groups)

    def _encoded_dims(self, kept: Any) -> Encoded:
        """The dims of a batch's latents, given those of what is kept of them."""
        decoded_dims = ("B", "D") if len(self._groups) == 1 else ("whole", "B", "D")
        return Encoded(decoded_dims, ("B",), ("F",), (), kept, ())

    def _summed(
        self, decoded_BD: Array, l0_B: Array, active_F: Array, total: Array | None, *, kept: Any
    ) -> Encoded:
        """Each device's sums added up.

        Args:
            total: a device's number of pairs; None if they weren't counted.
        """
        mesh, pairs_per_row = self._mesh, jnp.zeros(())
        if total is not None:
            pairs_per_row = max_over_all(total, mesh=mesh) * (mesh.shape["model"] / self._num_rows)
        return Encoded(
            decoded_BD=sum_over("model", decoded_BD, mesh=mesh),
            l0_B=sum_over("model", l0_B, mesh=mesh),
            active_F=sum_over("data", active_F, mesh=mesh),
            pairs_per_row=pairs_per_row,
            kept=kept,
            is_sparse=jnp.zeros((), bool),
        )

    def _output_gradients(
        self,
        operands: EncoderOperands,
        residuals: list[Array],
        encoded: Encoded,
        *,
        scalars: Scheduled,
        log_gain: Array,
    ) -> tuple[Penalty, OutputGradients]:
        """The penalty, and the gradients of the loss in reconstructions, L0 and frequencies."""
        num_rows = residuals[0].shape[0]

        def penalty(l0_B: Array, frequency_F: Array) -> tuple[Array, Penalty]:
            found = penalty_of(
                l0_B, frequency_F, scalars=scalars, log_gain=log_gain, train=self._train
            )
            return found.loss, found

        (_, found), (g_l0_B, g_frequency_F) = jax.value_and_grad(
            penalty, argnums=(0, 1), has_aux=True
        )(encoded.l0_B, encoded.active_F / num_rows)
        _, _, bias_F, theta_F, encoder_input_BD = operands
        return found, OutputGradients(
            x_BD=encoder_input_BD,
            g_BD=group_gradients(residuals, config=self._sae),
            g_l0_B=g_l0_B,
            g_count_F=g_frequency_F / num_rows,
            theta_F=theta_F,
            bias_F=bias_F,
        )

    def _update(
        self,
        state: TrainState,
        x_BD: Array,
        encoded: Encoded,
        output: OutputGradients,
        *,
        scalars: Scheduled,
    ) -> Updated:
        """All at once where gradients are clipped or there are first moments, else in place."""
        if not self._train.has_whole_gradients:
            return self._update_in_place(state, x_BD, encoded, output, scalars=scalars)
        gradients = self._gradients(state.params, x_BD, encoded, output)
        new = optimiser.update_all(state, gradients, scalars=scalars, config=self._config)
        touched_F = jnp.ones(self._sae.width, bool)
        return Updated(*new, touched_F, optimiser.tree_norm(gradients))

    def _update_in_place(
        self,
        state: TrainState,
        x_BD: Array,
        encoded: Encoded,
        output: OutputGradients,
        *,
        scalars: Scheduled,
    ) -> Updated:
        """As `_update`, each block's rows written as soon as it has its gradients.

        Small parameters come last. Of untouched latents they stay as they are, waiting.
        """
        params, moment = state.params, state.second_moment
        decay_F = optimiser.waited_decay(state.step - state.last_touched, train=self._train)
        traced = jax.tree.map(jnp.asarray, scalars)
        rows, sums, touched_F = self._update_latents(
            self._rows(state), encoded, output, (traced, decay_F)
        )
        small = self._small_gradients(params, x_BD, output=output, sums=sums)
        new, new_moment = optimiser.update(
            {name: params[name] for name in small},
            small,
            second_moment=moment,
            decay_F=decay_F,
            scalars=scalars,
            config=self._config,
        )
        for name in ("b_enc", "threshold"):
            new[name] = jnp.where(touched_F, new[name], params[name])
            new_moment[name] = jnp.where(touched_F, new_moment[name], moment[name])
        norm = jnp.sqrt(sums.squares + optimiser.tree_norm(small) ** 2)
        return Updated(new | rows[0], state.first_moment, new_moment | rows[1], touched_F, norm)

    def _small_gradients(
        self, params: Params, x_BD: Array, *, output: OutputGradients, sums: LatentSums
    ) -> Params:
        return small_gradients(
            params, x_BD, output=output, sums=sums, sae=self._sae, precision=self._precision
        )

    @staticmethod
    def _rows(state: TrainState) -> Rows:
        params, moment = (
            {name: own[name] for name in ("W_enc", "W_dec")}
            for own in (state.params, state.second_moment)
        )
        return params, moment

    def _update_latents(
        self, rows: Rows, encoded: Encoded, output: OutputGradients, update: Update | None
    ) -> tuple[Rows, LatentSums, Array]:
        """New rows, sums of their gradients and which latents were touched: here all."""
        rows, sums = self._update_tiles(rows, output, encoded.kept, None, update)
        return rows, sums, jnp.ones(self._sae.width, bool)

    def _update_tiles(
        self,
        rows: Rows,
        output: OutputGradients,
        kept: tuple[Array, ...] | None,
        wanted: Array | None,
        update: Update | None,
    ) -> tuple[Rows, LatentSums]:
        """`update_tiles` of every group, or where `wanted` is False nothing."""

        def part(rows, output, kept, wanted, update):
            sums: LatentSums | None = None
            for number, group in enumerate(self._groups):
                num_tiles = group.num_tiles
                rows, sums = update_tiles(
                    rows,
                    output.of_group(number),
                    None if kept is None else kept[number],
                    num_tiles if wanted is None else jnp.where(wanted, num_tiles, 0),
                    latents_of_pass=group,
                    before=sums,
                    update=update,
                    config=self._config,
                    mesh=self._mesh,
                    precision=self._precision,
                )
            assert sums is not None
            return rows, self._latent_sums(sums)

        in_dims = (
            ROW_DIMS,
            output_dims(groups=len(self._groups)),
            None if kept is None else self._kept_dims,
            None if wanted is None else (),
            update_dims(update),
        )
        return self._over_devices(part, in_dims, (ROW_DIMS, SUM_DIMS))(
            rows, output, kept, wanted, update
        )

    def _latent_sums(self, sums: LatentSums) -> LatentSums:
        """Each device's sums over its own latents; those that no latent owns are added up."""
        encoded_D, squares, projected = sum_over(
            "model", (sums.encoded_D, sums.squares, sums.projected), mesh=self._mesh
        )
        return LatentSums(sums.bias_F, sums.theta_F, encoded_D, squares, projected)

    def _gradients(
        self, params: Params, x_BD: Array, encoded: Encoded, output: OutputGradients
    ) -> Params:
        """Of every parameter, as a whole, the decoder's not yet projected."""

        def part(W_enc_FD, W_dec_FD, kept, output):
            own = [
                whole_gradients(
                    W_dec_FD,
                    kept[number],
                    output.of_group(number),
                    latents_of_pass=group,
                    config=self._config,
                    mesh=self._mesh,
                    precision=self._precision,
                )
                for number, group in enumerate(self._groups)
            ]
            whole = {name: in_order([one[name] for one in own], self._groups) for name in own[0]}
            encoded_D = einsum("f,fd->d", whole["b_enc"], W_enc_FD, precision="float32")
            return whole, sum_over("model", encoded_D, mesh=self._mesh)

        whole_dims = {"W_enc": MATRIX, "W_dec": MATRIX, "b_enc": ("F",), "threshold": ("F",)}
        whole, encoded_D = self._over_devices(
            part,
            (MATRIX, MATRIX, self._kept_dims, output_dims(groups=len(self._groups))),
            (whole_dims, ("D",)),
        )(params["W_enc"], params["W_dec"], encoded.kept, output)
        sums = LatentSums(whole["b_enc"], whole["threshold"], encoded_D, None, None)
        return whole | self._small_gradients(params, x_BD, output=output, sums=sums)

    def _over_devices(self, function: Callable, in_dims: Any, out_dims: Any) -> Callable:
        return over_devices(function, mesh=self._mesh, in_dims=in_dims, out_dims=out_dims)

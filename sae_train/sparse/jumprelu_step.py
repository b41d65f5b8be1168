"""The sparse step of a JumpReLU SAE: it pays for active latents, not for the width; exact.

    encode     encoder product, a tile of latents at a time -> pairs (row, latent) that are active
               or in the window; decode at the pairs
    penalty    of L0 and frequencies, and its gradients in them
    update     touched latents: gradients, projection, optimiser, new rows, in place

There is space for a fixed number of pairs. A step tries the sparse path if the step before had few
enough; if its own turn out too many, or it didn't try, the same step is computed with products of
whole tiles: nothing is ever left out, and either way no array of size [B, F] exists. Which path a
step takes depends on the training state alone, so a resumed run takes the same paths.

Passes run on each device's rows and latents, with the sums over devices written out; all gradients
are explicit, none is differentiated through a `shard_map`.

Legend: B rows of a batch, D model width, F latents, P positions for pairs on one device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool

from activation_cache.precision import Precision
from sae_train.config.run import Config
from sae_train.model.sharding import over_devices
from sae_train.sparse.active_pairs import Pairs
from sae_train.sparse.kernels.backend import parts_of
from sae_train.sparse.kernels.mode import is_interpreted
from sae_train.sparse.segment_sums import longest_first, per_latent
from sae_train.step import optimiser
from sae_train.step.dense_jumprelu import (
    ENCODER_DIMS,
    ROW_DIMS,
    DenseStep,
    EncoderOperands,
    update_dims,
)
from sae_train.step.gradients import (
    SUM_DIMS,
    Encoded,
    LatentSums,
    OutputGradients,
    Rows,
    output_dims,
)
from sae_train.step.path_choice import capacity_per_row
from sae_train.step.result import Updated
from sae_train.step.schedule import Scheduled
from sae_train.step.state import TrainState
from sae_train.step.tile_passes import Update
from sae_train.step.tiles import first_rows, tile_of, tiled_groups

# Hysteresis: sparse below 70 % of capacity, dense above 95 %, so that a run near the limit doesn't
# try in vain every other step.
_BEGIN_SPARSE, _END_SPARSE = 0.7, 0.95

# Each device's pairs, stacked [data, model, ...]; and with those of all parts of the batch.
_PAIR_DIMS = Pairs(*(("B", "F"),) * 5)
_WHOLE_PAIR_DIMS = Pairs(*(("whole", "F"),) * 5)


class SparseStep(DenseStep):
    """A `Step` of a JumpReLU SAE or transcoder that takes the sparse path when it can."""

    def __init__(self, config: Config, mesh: Mesh, *, precision: Precision) -> None:
        super().__init__(config, mesh, precision=precision)
        self._parts = parts_of(config, mesh)
        self._groups = tiled_groups(config.sae, devices=mesh.shape["model"], tile_of=tile_of)
        self._capacity_per_row = capacity_per_row(config)
        # P: of each device, whose latents are a part of all.
        self._capacity = -(-self._num_rows * self._capacity_per_row // mesh.shape["model"])

    def _tries_pairs(self, state: TrainState) -> Bool[Array, ""]:
        if self._train.step == "sparse":
            return jnp.ones((), bool)
        share = jnp.where(state.sparse == 1, _END_SPARSE, _BEGIN_SPARSE)
        return state.candidates <= share * self._capacity_per_row

    def _encode(self, state: TrainState, operands: EncoderOperands) -> Encoded:
        by_pairs = jax.lax.cond(
            self._tries_pairs(state), self._encode_pairs, self._without_pairs, operands
        )
        found = by_pairs.pairs_per_row * (self._num_rows / self._mesh.shape["model"])
        fits = found <= self._capacity
        sums = dataclasses.replace(by_pairs, kept=None)
        by_tiles = partial(self._encode_tiles, keep=False)
        sums = jax.lax.cond(fits, lambda _: sums, by_tiles, operands)
        return dataclasses.replace(sums, kept=by_pairs.kept, is_sparse=fits)

    def _encode_pairs(self, operands: EncoderOperands) -> Encoded:
        """By pairs; of use only if there is space for all of them on every device."""

        def part(W_enc_FD, W_dec_FD, bias_F, theta_F, x_BD):
            pairs = self._parts.select(
                W_enc_FD,
                bias_F,
                theta_F,
                x_BD,
                bandwidth=self._sae.bandwidth,
                capacity=self._capacity,
                precision=self._precision,
            )
            theta_P = jnp.pad(theta_F, (0, 1), constant_values=jnp.inf)[pairs.latent_P]
            active_P = pairs.pre_P > theta_P
            latents_P = jnp.where(active_P, pairs.pre_P, 0.0)
            decoded_BD, l0_B = self._decoded(pairs, latents_P, W_dec_FD, num_rows=x_BD.shape[0])
            active_F = per_latent(active_P, pairs.counts_F)
            stacked = jax.tree.map(lambda array: array[None, None], pairs)
            return self._summed(decoded_BD, l0_B, active_F, pairs.total, kept=stacked)

        return self._over_devices(part, ENCODER_DIMS, self._encoded_dims(_PAIR_DIMS))(*operands)

    def _decoded(
        self, pairs: Pairs, latents_P: Array, W_dec_FD: Array, *, num_rows: int
    ) -> tuple[Array, Array]:
        """f W_dec and L0; of several groups each is decoded into rows of its own."""
        groups, first_F = len(self._groups), first_rows(self._groups, num_rows=num_rows)
        if first_F is not None:
            first_P = jnp.pad(first_F, (0, 1))[pairs.latent_P]
            pairs = dataclasses.replace(pairs, row_P=pairs.row_P + first_P)
        decoded, l0 = self._parts.decode(
            pairs, latents_P, W_dec_FD, num_rows=groups * num_rows, precision=self._precision
        )
        if first_F is None:
            return decoded, l0
        return decoded.reshape(groups, num_rows, -1), l0.reshape(groups, num_rows).sum(axis=0)

    def _without_pairs(self, operands: EncoderOperands) -> Encoded:
        """Instead of an encoding that wasn't tried: infinitely many pairs."""
        shapes = jax.eval_shape(self._encode_pairs, operands)
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return dataclasses.replace(nothing, pairs_per_row=jnp.full((), jnp.inf))

    def _update(
        self,
        state: TrainState,
        x_BD: Array,
        encoded: Encoded,
        output: OutputGradients,
        *,
        scalars: Scheduled,
    ) -> Updated:
        """In place; to clip, a first pass over the gradients finds their norm."""
        clip = self._train.gradient_clip
        if clip is None:
            return self._update_in_place(state, x_BD, encoded, output, scalars=scalars)
        rows = self._rows(state)
        _, sums, _ = self._update_latents(rows, encoded, output, None)
        small = self._small_gradients(state.params, x_BD, output=output, sums=sums)
        small_squares = optimiser.tree_norm(small) ** 2
        scale = jnp.minimum(1.0, clip / jnp.sqrt(sums.projected + small_squares))
        updated = self._update_in_place(state, x_BD, encoded, output.scaled(scale), scalars=scalars)
        return updated._replace(norm=jnp.sqrt(sums.squares + small_squares))

    def _update_latents(
        self, rows: Rows, encoded: Encoded, output: OutputGradients, update: Update | None
    ) -> tuple[Rows, LatentSums, Array]:
        """By pairs if they fit, else by tiles.

        Both passes stand in the program, one after the other, and one of them runs zero
        iterations. XLA's CPU compiler would copy what a branch of a `cond` writes into.
        """
        fits = encoded.is_sparse
        rows, by_pairs, touched_F = self._update_touched(rows, encoded, output, update)
        rows, by_tiles = self._update_tiles(rows, output, None, ~fits, update)
        sums = jax.tree.map(partial(jnp.where, fits), by_pairs, by_tiles)
        return rows, sums, touched_F | ~fits

    def _update_touched(
        self, rows: Rows, encoded: Encoded, output: OutputGradients, update: Update | None
    ) -> tuple[Rows, LatentSums, Array]:
        """Rows and sums of `touched_pass`, and which latents were touched; none if pairs don't fit.

        Each device goes over its latents with the pairs of the whole batch: the batch and its
        output gradients are smaller than the weights' gradients that would be added up instead.
        """

        def part(rows, pairs, fits, output, update):
            counts_F, row_P, pre_P = self._merged(pairs)
            num_rows, d_model = output.x_BD.shape
            # What each group's latents read lies in rows of its own.
            output = dataclasses.replace(output, g_BD=output.g_BD.reshape(-1, d_model))
            rows, sums = self._parts.touched(
                rows,
                longest_first(counts_F, wanted=fits),
                row_P,
                pre_P,
                output=output,
                first_g_F=first_rows(self._groups, num_rows=num_rows),
                update=update,
                config=self._config,
                precision=self._precision,
            )
            return rows, self._latent_sums(sums), fits & (counts_F > 0)

        whole = output_dims("whole", groups=len(self._groups))
        in_dims = (ROW_DIMS, _WHOLE_PAIR_DIMS, (), whole, update_dims(update))
        return self._over_devices(part, in_dims, (ROW_DIMS, SUM_DIMS, ("F",)))(
            rows, encoded.kept, encoded.is_sparse, output, update
        )

    def _merged(self, pairs: Pairs) -> tuple[Array, Array, Array]:
        """The pairs of all parts of the batch in the order of their latents."""
        counts_F = pairs.counts_F[:, 0].sum(axis=0)
        parts = pairs.row_P.shape[0]
        first_row = jnp.arange(parts, dtype=jnp.int32) * self._num_rows
        row_P = (pairs.row_P[:, 0] + first_row[:, None]).reshape(-1)
        pre_P = pairs.pre_P[:, 0].reshape(-1)
        if parts == 1:
            return counts_F, row_P, pre_P
        latent_P = pairs.latent_P[:, 0].reshape(-1)
        _, row_P, pre_P = jax.lax.sort((latent_P, row_P, pre_P), num_keys=1, is_stable=True)
        return counts_F, row_P, pre_P

    def _over_devices(self, function: Callable, in_dims: Any, out_dims: Any) -> Callable:
        # An interpreter's loops over references don't pass the check; kernels for GPUs do.
        return over_devices(
            function,
            mesh=self._mesh,
            in_dims=in_dims,
            out_dims=out_dims,
            check=not is_interpreted(),
        )

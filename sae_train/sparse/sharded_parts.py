"""The JumpReLU step that pays for active latents, not for the width; exact, with a dense fallback.

    encoder's product, tile by tile      -> pairs (row, latent) that are active or in the window
    decode at the pairs                  -> reconstruction; penalties; what they send back
    touched latents                      -> gradients, Adam, new rows, in place

A step has places for a fixed number of pairs. It tries if the step before had few enough, and if
its own turn out too many, or it didn't try, the same step is made by products of whole tiles:
nothing is ever left out, and either way nothing of size [B, F] exists. Which way a step goes
depends on the training state alone, so a resumed run goes the same ways.

Parts run under `shard_map`, each device on its rows and latents, with the sums over devices
written out; all gradients are explicit, none is taken through a `shard_map`.

Legend: B rows of a batch, D model width, F latents, P places for pairs on one device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from sae_train.config.run import Config
from sae_train.model.forward import PRECISION
from sae_train.model.sharding import spec
from sae_train.sparse.active_pairs import Pairs, candidates
from sae_train.sparse.kernels.backend import parts_of
from sae_train.sparse.kernels.mode import is_interpreted
from sae_train.sparse.latent_updates import Sums, Write, every_pass
from sae_train.sparse.segment_sums import longest_first, per_latent
from sae_train.step.adam import Rows
from sae_train.step.gradients import Gradients, Pulls
from sae_train.step.path_choice import capacity_per_row
from sae_train.step.tiles import tile_of, varying_like


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EncodedSums:
    """A batch's latents in sum.

    Attributes:
        decoded_BD: f W_dec.
        l0_B: active latents of a row.
        active_F: active rows of a latent, over the whole batch.
        per_row: pairs a row, of the device with the most, times the devices along `model`.

    Its leaves are arrays; in its twins, their dims or where they lie.
    """

    decoded_BD: Any
    l0_B: Any
    active_F: Any
    per_row: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Encoded:
    """A batch's latents in sum, and the pairs they are at if there were places for all.

    `pairs` are each device's, stacked [data, model, ...].
    """

    sums: EncodedSums
    pairs: Any


class ShardedParts:
    """The parts of a step on a mesh, for one shape of SAE."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self._mesh, self._parts = mesh, parts_of(config, mesh)
        self._bandwidth = config.sae.bandwidth
        self._data, self._model = mesh.shape["data"], mesh.shape["model"]
        rows = config.train.batch_size // self._data
        per_row = capacity_per_row(config)
        self.capacity = -(-rows * per_row // self._model)
        self._rows = rows

    def _map(self, function: Callable, in_dims: Any, out_dims: Any) -> Callable:
        return jax.shard_map(
            function,
            mesh=self._mesh,
            in_specs=_specs(in_dims),
            out_specs=_specs(out_dims),
            # An interpreter's loops over references don't pass the check; kernels for GPUs do.
            check_vma=not is_interpreted(),
        )

    def encode_sparsely(
        self, W_enc_FD: Array, W_dec_FD: Array, bias_F: Array, theta_F: Array, x_BD: Array
    ) -> Encoded:
        """By pairs; worth something only if `fits`."""

        def part(W_enc_FD, W_dec_FD, bias_F, theta_F, x_BD):
            pairs = self._parts.select(
                W_enc_FD,
                bias_F,
                theta_F,
                x_BD,
                bandwidth=self._bandwidth,
                capacity=self.capacity,
            )
            theta_P = jnp.pad(theta_F, (0, 1), constant_values=jnp.inf)[pairs.latent_P]
            active_P = pairs.pre_P > theta_P
            latents_P = jnp.where(active_P, pairs.pre_P, 0.0)
            decoded_BD, l0_B = self._parts.decode(
                pairs, latents_P, W_dec_FD, num_rows=x_BD.shape[0]
            )
            active_F = per_latent(active_P, pairs.counts_F)
            return self._summed(decoded_BD, l0_B, active_F, pairs.total), jax.tree.map(
                lambda array: array[None, None], pairs
            )

        sums, pairs = self._map(
            part,
            (("F", "D"), ("F", "D"), ("F",), ("F",), ("B", "D")),
            (_ENCODED_DIMS, PAIR_DIMS),
        )(W_enc_FD, W_dec_FD, bias_F, theta_F, x_BD)
        return Encoded(sums=sums, pairs=pairs)

    def encode_densely(
        self, W_enc_FD: Array, W_dec_FD: Array, bias_F: Array, theta_F: Array, x_BD: Array
    ) -> EncodedSums:
        """By products of tiles."""

        def part(W_enc_FD, W_dec_FD, bias_F, theta_F, x_BD):
            width = W_enc_FD.shape[0]
            num_tiles = width // tile_of(width)
            like = W_enc_FD[0, 0] + x_BD[0, 0]

            def one_tile(carry, tile):
                decoded_BD, l0_B, total = carry
                W_enc_LD, W_dec_LD, bias_L, theta_L = tile
                pre_BL = jnp.einsum("bd,ld->bl", x_BD, W_enc_LD, precision=PRECISION)
                pre_BL = pre_BL + bias_L[None, :]
                active_BL = pre_BL > theta_L[None, :]
                f_BL = jnp.where(active_BL, pre_BL, 0.0)
                decoded_BD = decoded_BD + jnp.einsum(
                    "bl,ld->bd", f_BL, W_dec_LD, precision=PRECISION
                )
                found_BL = candidates(pre_BL, theta_L, bandwidth=self._bandwidth)
                num_found = found_BL.sum(dtype=jnp.int32).astype(jnp.float32)
                l0_B = l0_B + active_BL.sum(axis=1, dtype=jnp.float32)
                carry = decoded_BD, l0_B, total + num_found
                return carry, active_BL.sum(axis=0, dtype=jnp.float32)

            zeros = jnp.zeros(x_BD.shape), jnp.zeros(x_BD.shape[0]), jnp.zeros(())
            start = tuple(varying_like(zero, like=like) for zero in zeros)
            tiles = tuple(
                array.reshape(num_tiles, -1, *array.shape[1:])
                for array in (W_enc_FD, W_dec_FD, bias_F, theta_F)
            )
            (decoded_BD, l0_B, total), active_TL = jax.lax.scan(one_tile, start, tiles)
            return self._summed(decoded_BD, l0_B, active_TL.reshape(width), total)

        dims = (("F", "D"), ("F", "D"), ("F",), ("F",), ("B", "D"))
        return self._map(part, dims, _ENCODED_DIMS)(W_enc_FD, W_dec_FD, bias_F, theta_F, x_BD)

    def _summed(self, decoded_BD: Array, l0_B: Array, active_F: Array, total: Array) -> EncodedSums:
        return EncodedSums(
            decoded_BD=jax.lax.psum(decoded_BD, "model"),
            l0_B=jax.lax.psum(l0_B, "model"),
            active_F=jax.lax.psum(active_F, "data"),
            per_row=jax.lax.pmax(total, ("data", "model")) * (self._model / self._rows),
        )

    def no_pairs(self, *, x_BD: Array, width: int) -> Encoded:
        """In the place of an encoding that wasn't tried: with infinitely many pairs."""
        stacked = self._data, self._model
        places = (*stacked, self.capacity)
        pairs = Pairs(
            row_P=jnp.zeros(places, jnp.int32),
            latent_P=jnp.zeros(places, jnp.int32),
            pre_P=jnp.zeros(places),
            counts_F=jnp.zeros((*stacked, width // self._model), jnp.int32),
            total=jnp.zeros(stacked),
        )
        sums = EncodedSums(
            decoded_BD=jnp.zeros(x_BD.shape),
            l0_B=jnp.zeros(x_BD.shape[0]),
            active_F=jnp.zeros(width),
            per_row=jnp.full((), jnp.inf),
        )
        return Encoded(sums=sums, pairs=pairs)

    def fits(self, encoded: Encoded) -> Array:
        """Was there a place for every pair, on every device?"""
        return encoded.sums.per_row * (self._rows / self._model) <= self.capacity

    def update(
        self,
        rows: Rows,
        *,
        pairs: Pairs,
        fits: Array,
        pulls: Pulls,
        write: Write | None,
        arguments: Any,
    ) -> tuple[Rows, Sums, Array]:
        """New rows, sums and which latents were touched: by pairs if they fit, else by products.

        Both passes are in the program one behind the other, and one of them is of no length. Of
        a `cond` XLA's CPU compiler copies what a branch writes into where it begins and ends.
        """
        rows, touched, touched_F = self.update_touched(
            rows,
            pairs,
            jnp.broadcast_to(fits, rows.W_enc.shape[:1]),
            pulls,
            write=write,
            arguments=arguments,
        )
        rows, every = self._update_all(rows, ~fits, pulls, write=write, arguments=arguments)
        sums = jax.tree.map(partial(jnp.where, fits), touched, every)
        return rows, sums, touched_F | ~fits

    def update_touched(
        self,
        rows: Rows,
        pairs: Pairs,
        wanted_F: Array,
        pulls: Pulls,
        *,
        write: Write | None,
        arguments: Any,
    ) -> tuple[Rows, Sums, Array]:
        """Rows and sums of `touched_pass`, and which latents were touched, of those `wanted`.

        Each device goes over its latents with the pairs of the whole batch: the batch and what
        is sent back to it are smaller than the gradients that would be added up instead.
        """

        def part(rows, pairs, wanted_F, pulls, arguments):
            counts_F, row_P, pre_P = self._merged(pairs)
            rows, sums = self._parts.touched(
                rows,
                longest_first(counts_F, wanted_N=wanted_F),
                row_P,
                pre_P,
                pulls=pulls,
                bandwidth=self._bandwidth,
                write=write,
                arguments=arguments,
            )
            return rows, over_model(sums), wanted_F & (counts_F > 0)

        everywhere = {name: ("whole", *dims[1:]) for name, dims in _PAIR_DIMS_BY_NAME.items()}
        own_dims = pull_dims("whole"), argument_dims(arguments)
        in_dims = (ROW_DIMS, Pairs(**everywhere), ("F",), *own_dims)
        return self._map(part, in_dims, (ROW_DIMS, SUM_DIMS, ("F",)))(
            rows, pairs, wanted_F, pulls, arguments
        )

    def _merged(self, pairs: Pairs) -> tuple[Array, Array, Array]:
        """The pairs of all parts of the batch in the order of their latents."""
        counts_F = pairs.counts_F[:, 0].sum(axis=0)
        first_row = jnp.arange(self._data, dtype=jnp.int32) * self._rows
        row_P = (pairs.row_P[:, 0] + first_row[:, None]).reshape(-1)
        pre_P = pairs.pre_P[:, 0].reshape(-1)
        if self._data == 1:
            return counts_F, row_P, pre_P
        latent_P = pairs.latent_P[:, 0].reshape(-1)
        _, row_P, pre_P = jax.lax.sort((latent_P, row_P, pre_P), num_keys=1, is_stable=True)
        return counts_F, row_P, pre_P

    def _update_all(
        self, rows: Rows, wanted: Array, pulls: Pulls, *, write: Write | None, arguments: Any
    ) -> tuple[Rows, Sums]:
        """Rows and sums of `every_pass`, each device with its part of the batch."""

        def part(rows, wanted, pulls, arguments):
            def over_data(found: Gradients) -> Gradients:
                return Gradients(*(jax.lax.psum(array, "data") for array in found))

            rows, sums = every_pass(
                rows,
                wanted,
                pulls=pulls,
                bandwidth=self._bandwidth,
                write=None if write is None else partial(write, arguments),
                reduce=over_data,
            )
            return rows, over_model(sums)

        in_dims = (ROW_DIMS, (), pull_dims("B"), argument_dims(arguments))
        return self._map(part, in_dims, (ROW_DIMS, SUM_DIMS))(rows, wanted, pulls, arguments)


_PAIR_DIMS_BY_NAME = dict.fromkeys(("row_P", "latent_P", "pre_P", "counts_F", "total"), ("B", "F"))
PAIR_DIMS = Pairs(**_PAIR_DIMS_BY_NAME)
_ENCODED_DIMS = EncodedSums(decoded_BD=("B", "D"), l0_B=("B",), active_F=("F",), per_row=())
ROW_DIMS = Rows(*(("F", "D"),) * 4)
SUM_DIMS = Sums(bias_F=("F",), theta_F=("F",), encoded_D=("D",), squares=(), projected=())


def pull_dims(row: str) -> Pulls:
    """How `Pulls` lie on the mesh, their rows as the dimension `row` does."""
    return Pulls(
        x_BD=(row, "D"),
        g_BD=(row, "D"),
        g_l0_B=(row,),
        g_count_F=("F",),
        theta_F=("F",),
        bias_F=("F",),
    )


def argument_dims(arguments: Any) -> Any:
    """Arrays of latents lie with their latents, scalars everywhere."""
    return jax.tree.map(lambda array: ("F",) if jnp.ndim(array) else (), arguments)


def _specs(dims: Any) -> Any:
    return jax.tree.map(spec, dims, is_leaf=lambda leaf: isinstance(leaf, tuple) and _is_dims(leaf))


def _is_dims(leaf: tuple) -> bool:
    return all(isinstance(dim, str) for dim in leaf)


def over_model(sums: Sums) -> Sums:
    """Each device's sums over its own latents, those that no latent owns added up over `model`."""
    return Sums(
        bias_F=sums.bias_F,
        theta_F=sums.theta_F,
        encoded_D=jax.lax.psum(sums.encoded_D, "model"),
        squares=jax.lax.psum(sums.squares, "model"),
        projected=jax.lax.psum(sums.projected, "model"),
    )

"""The JumpReLU step by products of whole matrices: five of them, and as little else as can be.

    encoder's product, latents, decode       a tile of latents at a time; of all that is [B, F] only
                                             the pre-activations are kept
    penalties, what they send back
    gradients, projection, Adam, new rows    a tile at a time, in place

Masks, latents and their gradients exist for one tile only, and on a CPU don't leave its caches; no
gradient of a weight matrix exists as a whole, unless gradients are clipped, for which the norm of
all must be known first. All gradients are explicit (`row_passes.from_products`). Parts run under
`shard_map`, each device on its rows and latents, with the sums over devices written out.

Legend: B rows of a batch, D model width, F latents, T tiles, L latents of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from sae_train.config.run import Config
from sae_train.model.forward import PRECISION, Params, decoded_with, threshold_of
from sae_train.model.sharding import spec_on
from sae_train.step.adam import Rows, RowUpdate, adam_update, tree_norm, update, update_rows
from sae_train.step.gradients import Gradients, Pulls, from_products, small_gradients
from sae_train.step.result import Stepped
from sae_train.step.schedule import Scheduled
from sae_train.step.sparsity_penalty import Counts, Priced, priced
from sae_train.step.state import TrainState
from sae_train.step.tiles import tile_of, varying_like

# A width without divisors in reach goes as one tile: hundreds of small ones would take longer.
_SMALLEST_TILE = 256

_KEPT_DIMS = ("F", "whole", "B")  # pre-activations [T, L, B]
_ROW_DIMS = Rows(*(("F", "D"),) * 4)
_PULL_DIMS = Pulls(
    x_BD=("B", "D"),
    g_BD=("B", "D"),
    g_l0_B=("B",),
    g_count_F=("F",),
    theta_F=("F",),
    bias_F=("F",),
)


class Loss(NamedTuple):
    """A batch's loss, what it was made of, and what it sends back.

    Attributes:
        active_F: rows of the batch that a latent is active in.
        kept_TLB: pre-activations.
    """

    loss: Float[Array, ""]
    penalty: Priced
    reconstruction_BD: Float[Array, "B D"]
    l0_B: Float[Array, " B"]
    active_F: Float[Array, " F"]
    kept_TLB: Float[Array, "T L B"]
    pulls: Pulls


class _Sums(NamedTuple):
    """What a pass over the latents leaves besides their rows: gradients of b_enc and of θ itself,
    W_encᵀ of the former, and the squares of both weight matrices' gradients."""

    bias_F: Any
    theta_F: Any
    encoded_D: Any
    squares: Any


def cpu_tile(width: int) -> int:
    """Latents that go through a step together on a CPU, of those that a device holds."""
    tile = tile_of(width)
    return tile if tile >= _SMALLEST_TILE else width


class DenseStep:
    """The step of a JumpReLU SAE or transcoder on a mesh."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self._sae, self._train, self._mesh = config.sae, config.train, mesh
        width = config.sae.width // mesh.shape["model"]
        # Elsewhere products of small tiles may not fill the device: nothing was measured.
        self._tile = cpu_tile(width) if mesh.devices.flat[0].platform == "cpu" else width

    def __call__(
        self, state: TrainState, x_BD: Array, *, target_BD: Array, scalars: Scheduled
    ) -> Stepped:
        """One step on scaled rows."""
        found = self.loss(state.params, x_BD, scalars, target_BD=target_BD, log_gain=state.log_gain)
        how = self._by_norm if self._train.gradient_clip is not None else self._in_place
        params, second_moment, norm = how(state, x_BD, scalars, found)
        return Stepped(
            params=params,
            second_moment=second_moment,
            last_touched=jnp.full_like(state.last_touched, state.step + 1),
            loss=found.loss,
            coefficient=found.penalty.coefficient,
            log_gain=found.penalty.log_gain,
            norm=norm,
            reconstruction_BD=found.reconstruction_BD,
            l0_B=found.l0_B,
            fired_F=found.active_F > 0,
            candidates=jnp.zeros(()),
        )

    def loss(
        self,
        params: Params,
        x_BD: Float[Array, "B D"],
        scalars: Scheduled,
        *,
        target_BD: Float[Array, "B D"],
        log_gain: Float[Array, ""],
    ) -> Loss:
        """Squared error plus penalty, mean over rows (Gemma Scope, equation 4).

        Args:
            x_BD, target_BD: scaled rows; of an SAE the target is x.
        """
        theta_F = threshold_of(params, config=self._sae)
        shifted_BD = x_BD - params["b_dec"][None, :] if self._sae.pre_encoder_bias else x_BD
        product_BD, l0_B, active_F, kept_TLB = self._encode(params, theta_F, shifted_BD)
        reconstruction_BD = decoded_with(params, product_BD, x_BD=x_BD)
        residual_BD, num_rows = target_BD - reconstruction_BD, target_BD.shape[0]

        def price(l0_B: Array, frequency_F: Array) -> tuple[Array, Priced]:
            counts = Counts(l0_B=l0_B, frequency_F=frequency_F)
            found = priced(counts, scalars, log_gain=log_gain, train=self._train)
            return found.loss, found

        (_, penalty), (g_l0_B, g_frequency_F) = jax.value_and_grad(
            price, argnums=(0, 1), has_aux=True
        )(l0_B, active_F / num_rows)
        return Loss(
            loss=jnp.square(residual_BD).sum(axis=1).mean() + penalty.loss,
            penalty=penalty,
            reconstruction_BD=reconstruction_BD,
            l0_B=l0_B,
            active_F=active_F,
            kept_TLB=kept_TLB,
            pulls=Pulls(
                x_BD=shifted_BD,
                g_BD=-2.0 / num_rows * residual_BD,
                g_l0_B=g_l0_B,
                g_count_F=g_frequency_F / num_rows,
                theta_F=theta_F,
                bias_F=params["b_enc"],
            ),
        )

    def gradients(self, params: Params, x_BD: Float[Array, "B D"], found: Loss) -> Params:
        """Of every parameter, as a whole, the decoder's not yet projected."""

        def part(W_enc_FD, W_dec_FD, kept_TLB, pulls):
            def one_tile(tile):
                W_dec_LD, pre_LB, theta_L, g_count_L = tile
                return self._over_data(W_dec_LD, pre_LB, theta_L, g_count_L, pulls=pulls)

            tiles = self._tiles(W_dec_FD), kept_TLB, *self._per_latent(pulls)
            whole = jax.tree.map(_untiled, Gradients(*jax.lax.map(one_tile, tiles)))
            encoded_D = jnp.einsum("f,fd->d", whole.bias_S, W_enc_FD, precision=PRECISION)
            return whole, self._sum(encoded_D, "model")

        out_dims = (Gradients(("F", "D"), ("F", "D"), ("F",), ("F",)), ("D",))
        whole, encoded_D = self._map(
            part, (("F", "D"), ("F", "D"), _KEPT_DIMS, _PULL_DIMS), out_dims
        )(params["W_enc"], params["W_dec"], found.kept_TLB, found.pulls)
        small = small_gradients(
            params,
            x_BD,
            pulls=found.pulls,
            bias_F=whole.bias_S,
            theta_F=whole.theta_S,
            encoded_D=encoded_D,
            sae=self._sae,
        )
        return small | {"W_enc": whole.enc_SD, "W_dec": whole.dec_SD}

    def _by_norm(
        self, state: TrainState, x_BD: Array, scalars: Scheduled, found: Loss
    ) -> tuple[Params, Params, Array]:
        """New parameters, second moments and the gradient's norm, the latter first."""
        gradients = self.gradients(state.params, x_BD, found)
        params, second_moment = update(
            state.params,
            gradients,
            second_moment=state.second_moment,
            learning_rate=scalars.learning_rate,
            bias_correction=scalars.bias_correction,
            sae=self._sae,
            train=self._train,
        )
        return params, second_moment, tree_norm(gradients)

    def _in_place(
        self, state: TrainState, x_BD: Array, scalars: Scheduled, found: Loss
    ) -> tuple[Params, Params, Array]:
        """As `_by_norm`, each tile's rows written as soon as it has its gradients."""
        params, moment = state.params, state.second_moment
        rows = Rows(params["W_enc"], params["W_dec"], moment["W_enc"], moment["W_dec"])
        rows, sums = self._update_rows(rows, scalars, found)
        small = small_gradients(
            params,
            x_BD,
            pulls=found.pulls,
            bias_F=sums.bias_F,
            theta_F=sums.theta_F,
            encoded_D=sums.encoded_D,
            sae=self._sae,
        )
        new, new_moment = adam_update(
            {name: params[name] for name in small},
            small,
            second_moment=moment,
            learning_rate=scalars.learning_rate,
            bias_correction=scalars.bias_correction,
            sae=self._sae,
            train=self._train,
        )
        squares = sums.squares + sum(jnp.square(gradient).sum() for gradient in small.values())
        new |= {"W_enc": rows.W_enc, "W_dec": rows.W_dec}
        new_moment |= {"W_enc": rows.v_enc, "W_dec": rows.v_dec}
        return new, new_moment, jnp.sqrt(squares)

    def _encode(
        self, params: Params, theta_F: Array, shifted_BD: Array
    ) -> tuple[Array, Array, Array, Array]:
        """f W_dec, active latents of a row, active rows of a latent, and the pre-activations."""

        def part(W_enc_FD, W_dec_FD, bias_F, theta_F, x_BD):
            def one_tile(carry, tile):
                decoded_BD, l0_B = carry
                W_enc_LD, W_dec_LD, bias_L, theta_L = tile
                pre_LB = jnp.einsum("ld,bd->lb", W_enc_LD, x_BD, precision=PRECISION)
                pre_LB = pre_LB + bias_L[:, None]
                active_LB = pre_LB > theta_L[:, None]
                f_LB = jnp.where(active_LB, pre_LB, 0.0)
                product_BD = jnp.einsum("lb,ld->bd", f_LB, W_dec_LD, precision=PRECISION)
                l0_B = l0_B + active_LB.sum(axis=0, dtype=x_BD.dtype)
                return (decoded_BD + product_BD, l0_B), (
                    pre_LB,
                    active_LB.sum(axis=1, dtype=x_BD.dtype),
                )

            like = W_enc_FD[0, 0] + x_BD[0, 0]
            zeros = jnp.zeros(x_BD.shape), jnp.zeros(x_BD.shape[0])
            start = tuple(varying_like(zero, like=like) for zero in zeros)
            tiles = tuple(self._tiles(array) for array in (W_enc_FD, W_dec_FD, bias_F, theta_F))
            (decoded_BD, l0_B), (pre_TLB, active_TL) = self._scan(one_tile, start, tiles)
            return (
                self._sum(decoded_BD, "model"),
                self._sum(l0_B, "model"),
                self._sum(_untiled(active_TL), "data"),
                pre_TLB,
            )

        in_dims = (("F", "D"), ("F", "D"), ("F",), ("F",), ("B", "D"))
        out_dims = (("B", "D"), ("B",), ("F",), _KEPT_DIMS)
        return self._map(part, in_dims, out_dims)(
            params["W_enc"], params["W_dec"], params["b_enc"], theta_F, shifted_BD
        )

    def _update_rows(self, rows: Rows, scalars: Scheduled, found: Loss) -> tuple[Rows, _Sums]:
        """New rows, in the old ones' place, and sums of their gradients."""

        def part(rows, kept_TLB, pulls, scalars):
            def one_tile(carry, tile):
                rows, encoded_D, squares = carry
                number, pre_LB, theta_L, g_count_L = tile
                own = self._rows_of(rows, number)
                found = self._over_data(own.W_dec, pre_LB, theta_L, g_count_L, pulls=pulls)
                new = update_rows(
                    own,
                    g_enc_FD=found.enc_SD,
                    g_dec_FD=found.dec_SD,
                    kept_F=jnp.full(self._tile, self._train.adam.beta2),
                    scalars=scalars,
                    config=self._train.adam,
                )
                squares = squares + jnp.square(found.enc_SD).sum() + jnp.square(found.dec_SD).sum()
                encoded_D = encoded_D + jnp.einsum(
                    "l,ld->d", found.bias_S, own.W_enc, precision=PRECISION
                )
                return (self._placed(rows, new, number), encoded_D, squares), (
                    found.bias_S,
                    found.theta_S,
                )

            zeros = jnp.zeros(pulls.x_BD.shape[1]), jnp.zeros(())
            start = rows, *(varying_like(zero, like=rows.W_enc[0, 0]) for zero in zeros)
            numbers_T = jnp.arange(kept_TLB.shape[0], dtype=jnp.int32)
            tiles = numbers_T, kept_TLB, *self._per_latent(pulls)
            (rows, encoded_D, squares), per_latent = self._scan(one_tile, start, tiles)
            encoded_D, squares = self._sum((encoded_D, squares), "model")
            bias_F, theta_F = map(_untiled, per_latent)
            return rows, _Sums(bias_F, theta_F, encoded_D, squares)

        everywhere = RowUpdate(learning_rate=(), bias_correction=(), scale=())
        update = RowUpdate(
            learning_rate=jnp.asarray(scalars.learning_rate),
            bias_correction=jnp.asarray(scalars.bias_correction),
            scale=jnp.ones(()),
        )
        in_dims = (_ROW_DIMS, _KEPT_DIMS, _PULL_DIMS, everywhere)
        out_dims = (_ROW_DIMS, _Sums(("F",), ("F",), ("D",), ()))
        return self._map(part, in_dims, out_dims)(rows, found.kept_TLB, found.pulls, update)

    def _over_data(
        self, W_dec_LD: Array, pre_LB: Array, theta_L: Array, g_count_L: Array, *, pulls: Pulls
    ) -> Gradients:
        own = from_products(
            W_dec_LD,
            pre_LB,
            theta_S=theta_L,
            g_count_S=g_count_L,
            pulls=pulls,
            bandwidth=self._sae.bandwidth,
        )
        return Gradients(*self._sum(tuple(own), "data"))

    def _rows_of(self, rows: Rows, number: Array) -> Rows:
        if rows.W_enc.shape[0] == self._tile:
            return rows
        ids_L = number * self._tile + jnp.arange(self._tile, dtype=jnp.int32)
        # Gathers: slices would be fused into what follows, and XLA then copies each whole matrix.
        return Rows(*(matrix_FD.at[ids_L].get(mode="clip") for matrix_FD in rows))

    def _placed(self, rows: Rows, new: Rows, number: Array) -> Rows:
        place = jax.lax.dynamic_update_slice_in_dim
        at = number * self._tile
        return Rows(*(place(all_, own, at, axis=0) for all_, own in zip(rows, new, strict=True)))

    def _per_latent(self, pulls: Pulls) -> tuple[Array, Array]:
        return self._tiles(pulls.theta_F), self._tiles(pulls.g_count_F)

    def _tiles(self, array_F: Array) -> Array:
        return array_F.reshape(-1, self._tile, *array_F.shape[1:])

    def _scan(self, body: Callable, start: Any, tiles: Any) -> Any:
        """A loop over tiles; no loop where there is only one, for XLA to see through."""
        return jax.lax.scan(body, start, tiles, unroll=len(tiles[0]) == 1)

    def _map(self, function: Callable, in_dims: Any, out_dims: Any) -> Callable:
        return jax.shard_map(
            function,
            mesh=self._mesh,
            in_specs=self._specs(in_dims),
            out_specs=self._specs(out_dims),
            check_vma=True,
        )

    def _specs(self, dims: Any) -> Any:
        return jax.tree.map(partial(spec_on, self._mesh), dims, is_leaf=_is_dims)

    def _sum(self, value: Any, axis: str) -> Any:
        """Over the devices along a mesh axis."""
        return jax.lax.psum(value, axis) if self._mesh.shape[axis] > 1 else value


def _untiled(array_TL: Array) -> Array:
    return array_TL.reshape(-1, *array_TL.shape[2:])


def _is_dims(leaf: Any) -> bool:
    return type(leaf) is tuple and all(isinstance(dim, str) for dim in leaf)

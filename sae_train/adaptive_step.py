"""The gradients and the update of a JumpReLU step by pairs where they are few, else by products.

Composes the parts of `sparse_step`; see there for the order of things. Everything outside those
parts is small: vectors of one number a latent, and rows [B, D].

Legend: B rows of a batch, D model width, F latents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from sae_train.config import Config
from sae_train.optimiser import Rows, RowUpdate, adam_step, kept_share, update_rows
from sae_train.penalty import Counts, priced
from sae_train.row_passes import Gradients, Pulls, Sums, small_gradients
from sae_train.sae import PRECISION, Params, threshold_of
from sae_train.schedule import Scheduled
from sae_train.sparse_step import Encoded, EncodedSums, ShardedParts, capacity_per_row
from sae_train.state import TrainState

# Below this width whole products are as fast on a CPU (docs/performance.md).
SMALLEST_WIDTH = 4096
# Shares of the capacity at which steps begin to go by pairs, and cease to: apart, so that a run
# near the limit doesn't try in vain every other step.
_BEGIN, _CEASE = 0.7, 0.95


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stepped:
    """What one step makes of a state and a batch."""

    params: Params
    second_moment: Params
    last_touched: Array
    loss: Float[Array, ""]
    coefficient: Float[Array, ""]
    log_gain: Float[Array, ""]
    norm: Float[Array, ""]
    reconstruction_BD: Float[Array, "B D"]
    l0_B: Float[Array, " B"]
    fired_F: Bool[Array, " F"]
    candidates: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Batch:
    """What all parts of a step read."""

    state: TrainState
    scalars: Scheduled
    x_BD: Array  # what is read, scaled
    shifted_BD: Array  # what the encoder multiplies
    target_BD: Array
    theta_F: Array


def may_go_by_pairs(config: Config, *, on_cpu: bool) -> bool:
    """May steps go by pairs? Only a JumpReLU's, and if left open only a wide one's on CPUs.

    On other devices nothing was measured: its many short loops may cost more there than products.
    """
    if config.sae.architecture != "jumprelu" or config.train.step == "dense":
        return False
    return config.train.step == "sparse" or (on_cpu and config.sae.width >= SMALLEST_WIDTH)


def is_adaptive(config: Config, mesh: Mesh) -> bool:
    """`may_go_by_pairs` on the devices of a mesh."""
    return may_go_by_pairs(config, on_cpu=mesh.devices.flat[0].platform == "cpu")


class AdaptiveStep:
    """The step of `is_adaptive` configs."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self._sae, self._train = config.sae, config.train
        self._parts = ShardedParts(config, mesh)
        self._capacity = capacity_per_row(config.train, width=config.sae.width)

    def __call__(
        self, state: TrainState, x_BD: Array, *, target_BD: Array, scalars: Scheduled
    ) -> tuple[Stepped, Bool[Array, ""], Bool[Array, ""]]:
        """What the step makes, whether it went by pairs and whether it tried to."""
        params = state.params
        theta_F = threshold_of(params, config=self._sae)
        shifted_BD = x_BD - params["b_dec"][None, :] if self._sae.pre_encoder_bias else x_BD
        batch = _Batch(state, scalars, x_BD, shifted_BD, target_BD, theta_F)
        tries = self._tries(state)
        encoded = jax.lax.cond(tries, self._encode, self._without_pairs, batch)
        fits = self._parts.fits(encoded)
        sums = jax.lax.cond(fits, lambda _: encoded.sums, self._encode_densely, batch)
        encoded = dataclasses.replace(encoded, sums=sums)
        return self._finish(batch, encoded, fits), fits, tries

    def _tries(self, state: TrainState) -> Array:
        if self._train.step == "sparse":
            return jnp.ones((), bool)
        share = jnp.where(state.sparse == 1, _CEASE, _BEGIN)
        return state.candidates <= share * self._capacity

    def _weights(self, batch: _Batch) -> tuple[Array, ...]:
        params = batch.state.params
        own = params["W_enc"], params["W_dec"], params["b_enc"]
        return (*own, batch.theta_F, batch.shifted_BD)

    def _encode(self, batch: _Batch) -> Encoded:
        return self._parts.encode_sparsely(*self._weights(batch))

    def _without_pairs(self, batch: _Batch) -> Encoded:
        return self._parts.no_pairs(x_BD=batch.x_BD, width=self._sae.width)

    def _encode_densely(self, batch: _Batch) -> EncodedSums:
        return self._parts.encode_densely(*self._weights(batch))

    def _finish(self, batch: _Batch, encoded: Encoded, fits: Array) -> Stepped:
        """From sums over latents on: what they cost, what that sends back, the update."""
        sums = encoded.sums
        state, scalars, params = batch.state, batch.scalars, batch.state.params
        reconstruction_BD = sums.decoded_BD + params["b_dec"][None, :]
        if "W_skip" in params:
            reconstruction_BD = reconstruction_BD + jnp.einsum(
                "bd,de->be", batch.x_BD, params["W_skip"], precision=PRECISION
            )
        residual_BD = batch.target_BD - reconstruction_BD
        num_rows = residual_BD.shape[0]

        def price(l0_B: Array, frequency_F: Array) -> tuple[Array, Any]:
            priced_ = priced(
                Counts(l0_B=l0_B, frequency_F=frequency_F),
                scalars,
                log_gain=state.log_gain,
                train=self._train,
            )
            return priced_.loss, priced_

        (_, penalty), (g_l0_B, g_frequency_F) = jax.value_and_grad(
            price, argnums=(0, 1), has_aux=True
        )(sums.l0_B, sums.active_F / num_rows)
        pulls = Pulls(
            x_BD=batch.shifted_BD,
            g_BD=-2.0 / num_rows * residual_BD,
            g_l0_B=g_l0_B,
            g_count_F=g_frequency_F / num_rows,
            theta_F=batch.theta_F,
            bias_F=params["b_enc"],
        )
        update = partial(self._parts.update, pairs=encoded.pairs, fits=fits, pulls=pulls)
        new_params, second_moment, last_touched, norm = self._updated(batch, pulls, update)
        return Stepped(
            params=new_params,
            second_moment=second_moment,
            last_touched=last_touched,
            loss=jnp.square(residual_BD).sum(axis=1).mean() + penalty.loss,
            coefficient=penalty.coefficient,
            log_gain=penalty.log_gain,
            norm=norm,
            reconstruction_BD=reconstruction_BD,
            l0_B=sums.l0_B,
            fired_F=sums.active_F > 0,
            candidates=sums.per_row,
        )

    def _updated(
        self, batch: _Batch, pulls: Pulls, update: Callable
    ) -> tuple[Params, Params, Array, Array]:
        """New parameters and second moments, when they were touched, and the gradient's norm."""
        state, scalars = batch.state, batch.scalars
        params, moment = state.params, state.second_moment
        rows = Rows(params["W_enc"], params["W_dec"], moment["W_enc"], moment["W_dec"])
        kept_F = kept_share(state.step + 1 - state.last_touched, config=self._train.adam)
        scale = jnp.ones(())
        if self._train.gradient_clip is not None:
            _, sums, _ = update(rows, write=None, arguments=())
            norm = _norm(sums.projected, self._small_gradients(batch, pulls, sums))
            scale = jnp.minimum(1.0, self._train.gradient_clip / norm)
        scalars_of_rows = RowUpdate(
            learning_rate=jnp.asarray(scalars.learning_rate),
            bias_correction=jnp.asarray(scalars.bias_correction),
            scale=scale,
        )
        write = partial(_write, config=self._train.adam)
        rows, sums, touched_F = update(rows, write=write, arguments=(scalars_of_rows, kept_F))
        small = self._small_gradients(batch, pulls, sums)
        new, new_moment = {}, {}
        for name in params:
            if name in ("W_enc", "W_dec"):
                new[name], new_moment[name] = getattr(rows, name), getattr(rows, f"v{name[1:]}")
                continue
            new[name], new_moment[name] = self._small_update(
                name, small[name] * scale, batch, kept_F=kept_F, touched_F=touched_F
            )
        last_touched = jnp.where(touched_F, state.step + 1, state.last_touched)
        return new, new_moment, last_touched, _norm(sums.squares, small)

    def _small_gradients(self, batch: _Batch, pulls: Pulls, sums: Sums) -> Params:
        params = batch.state.params
        return small_gradients(
            params,
            batch.x_BD,
            pulls=pulls,
            bias_F=sums.bias_F,
            theta_F=sums.theta_F,
            encoded_D=sums.encoded_D,
            sae=self._sae,
        )

    def _small_update(
        self, name: str, gradient: Array, batch: _Batch, *, kept_F: Array, touched_F: Array
    ) -> tuple[Array, Array]:
        per_latent = name in ("b_enc", "threshold")
        factor = self._sae.threshold.learning_rate_multiplier if name == "threshold" else 1.0
        before = batch.state.params[name], batch.state.second_moment[name]
        new, moment = adam_step(
            before[0],
            gradient,
            second_moment=before[1],
            learning_rate=batch.scalars.learning_rate * factor,
            bias_correction=batch.scalars.bias_correction,
            config=self._train.adam,
            kept=kept_F if per_latent else None,
        )
        if name == "threshold" and self._sae.threshold.parametrisation == "direct":
            new = jnp.maximum(new, 0.0)
        if not per_latent:
            return new, moment
        return jnp.where(touched_F, new, before[0]), jnp.where(touched_F, moment, before[1])


def _write(
    arguments: tuple[RowUpdate, Array], ids_S: Array, own: Rows, found: Gradients, *, config: Any
) -> Rows:
    scalars, kept_F = arguments
    return update_rows(
        own,
        g_enc_FD=found.enc_SD,
        g_dec_FD=found.dec_SD,
        kept_F=kept_F[ids_S],
        scalars=scalars,
        config=config,
    )


def _norm(squares: Array, small: Params) -> Array:
    return jnp.sqrt(squares + sum(jnp.square(gradient).sum() for gradient in small.values()))

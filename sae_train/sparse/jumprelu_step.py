"""The gradients and the update of a JumpReLU step by pairs where they are few, else by products.

Composes the parts of `sparse_step`; see there for the order of things. Everything outside those
parts is small: vectors of one number a latent, and rows [B, D].

Legend: B rows of a batch, D model width, F latents.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool

from sae_train.config.run import Config
from sae_train.model.forward import decoded_with, threshold_of
from sae_train.sparse.lazy_update import StepInputs, step_inputs, updated
from sae_train.sparse.sharded_parts import Encoded, EncodedSums, ShardedParts
from sae_train.step.gradients import Pulls
from sae_train.step.path_choice import capacity_per_row
from sae_train.step.result import Stepped
from sae_train.step.schedule import Scheduled
from sae_train.step.sparsity_penalty import Counts, priced
from sae_train.step.state import TrainState

# Shares of the capacity at which steps begin to go by pairs, and cease to: apart, so that a run
# near the limit doesn't try in vain every other step.
_BEGIN, _CEASE = 0.7, 0.95


class AdaptiveStep:
    """The step of a JumpReLU SAE or transcoder that may go by pairs."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self._sae, self._train = config.sae, config.train
        self._parts = ShardedParts(config, mesh)
        self._capacity = capacity_per_row(config)

    def __call__(
        self, state: TrainState, x_BD: Array, *, target_BD: Array, scalars: Scheduled
    ) -> tuple[Stepped, Bool[Array, ""], Bool[Array, ""]]:
        """What the step makes, whether it went by pairs and whether it tried to."""
        batch = step_inputs(state, x_BD, target_BD=target_BD, scalars=scalars, sae=self._sae)
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

    def _weights(self, batch: StepInputs) -> tuple[Array, ...]:
        params = batch.state.params
        own = params["W_enc"], params["W_dec"], params["b_enc"]
        return (*own, threshold_of(params, config=self._sae), batch.shifted_BD)

    def _encode(self, batch: StepInputs) -> Encoded:
        return self._parts.encode_sparsely(*self._weights(batch))

    def _without_pairs(self, batch: StepInputs) -> Encoded:
        return self._parts.no_pairs(x_BD=batch.x_BD, width=self._sae.width)

    def _encode_densely(self, batch: StepInputs) -> EncodedSums:
        return self._parts.encode_densely(*self._weights(batch))

    def _finish(self, batch: StepInputs, encoded: Encoded, fits: Array) -> Stepped:
        """From sums over latents on: what they cost, what that sends back, the update."""
        sums = encoded.sums
        state, scalars, params = batch.state, batch.scalars, batch.state.params
        reconstruction_BD = decoded_with(params, sums.decoded_BD, x_BD=batch.x_BD)
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
            theta_F=threshold_of(params, config=self._sae),
            bias_F=params["b_enc"],
        )
        update = partial(self._parts.update, pairs=encoded.pairs, fits=fits, pulls=pulls)
        new = updated(batch, pulls, update, sae=self._sae, train=self._train)
        return Stepped(
            params=new.params,
            second_moment=new.second_moment,
            last_touched=new.last_touched,
            loss=jnp.square(residual_BD).sum(axis=1).mean() + penalty.loss,
            coefficient=penalty.coefficient,
            log_gain=penalty.log_gain,
            norm=new.norm,
            reconstruction_BD=reconstruction_BD,
            l0_B=sums.l0_B,
            fired_F=sums.active_F > 0,
            candidates=sums.per_row,
        )

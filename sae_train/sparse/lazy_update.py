"""What a step makes of a state, and the update that all steps by pairs have in common.

Large matrices are updated row by row, by passes that are handed in; everything here is small:
vectors of one number a latent, and rows [B, D].

Legend: B rows of a batch, D model width, F latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sae_train.config.run import TrainConfig
from sae_train.config.sae import SaeConfig
from sae_train.model.forward import Params
from sae_train.sparse.latent_updates import Sums
from sae_train.step.adam import Rows, RowUpdate, adam_step, kept_share, update_rows
from sae_train.step.gradients import Gradients, Pulls, small_gradients
from sae_train.step.schedule import Scheduled
from sae_train.step.state import TrainState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepInputs:
    """What all parts of a step read."""

    state: TrainState
    scalars: Scheduled
    x_BD: Array  # what is read, scaled
    shifted_BD: Array  # what the encoder multiplies
    target_BD: Array


@dataclass(frozen=True)
class Updated:
    """New parameters and second moments, when they were touched, and the gradient's norm."""

    params: Params
    second_moment: Params
    last_touched: Array
    norm: Array


# (rows, write=, arguments=) -> (rows, sums, touched_F)
UpdateOfRows = Callable[..., tuple[Rows, Sums, Array]]


def step_inputs(
    state: TrainState,
    x_BD: Float[Array, "B D"],
    *,
    target_BD: Float[Array, "B D"],
    scalars: Scheduled,
    sae: SaeConfig,
) -> StepInputs:
    """Of scaled rows."""
    shift_D = state.params["b_dec"]
    shifted_BD = x_BD - shift_D[None, :] if sae.pre_encoder_bias else x_BD
    return StepInputs(state, scalars, x_BD, shifted_BD, target_BD)


def updated(
    inputs: StepInputs,
    pulls: Pulls,
    update: UpdateOfRows,
    *,
    sae: SaeConfig,
    train: TrainConfig,
) -> Updated:
    """The whole update, clipped if asked to: for that, all gradients are made twice."""
    state, scalars = inputs.state, inputs.scalars
    params, moment = state.params, state.second_moment
    rows = Rows(params["W_enc"], params["W_dec"], moment["W_enc"], moment["W_dec"])
    kept_F = kept_share(state.step + 1 - state.last_touched, config=train.adam)
    scale = jnp.ones(())
    if train.gradient_clip is not None:
        _, sums, _ = update(rows, write=None, arguments=())
        norm = _norm(sums.projected, _small_gradients(inputs, pulls, sums, sae=sae))
        scale = jnp.minimum(1.0, train.gradient_clip / norm)
    scalars_of_rows = RowUpdate(
        learning_rate=jnp.asarray(scalars.learning_rate),
        bias_correction=jnp.asarray(scalars.bias_correction),
        scale=scale,
    )
    write = partial(write_rows, config=train.adam)
    rows, sums, touched_F = update(rows, write=write, arguments=(scalars_of_rows, kept_F))
    small = _small_gradients(inputs, pulls, sums, sae=sae)
    new, new_moment = {}, {}
    for name in params:
        if name in ("W_enc", "W_dec"):
            new[name], new_moment[name] = getattr(rows, name), getattr(rows, f"v{name[1:]}")
            continue
        new[name], new_moment[name] = _small_update(
            name,
            small[name] * scale,
            inputs,
            kept_F=kept_F,
            touched_F=touched_F,
            sae=sae,
            train=train,
        )
    return Updated(
        params=new,
        second_moment=new_moment,
        last_touched=jnp.where(touched_F, state.step + 1, state.last_touched),
        norm=_norm(sums.squares, small),
    )


def _small_gradients(inputs: StepInputs, pulls: Pulls, sums: Sums, *, sae: SaeConfig) -> Params:
    return small_gradients(
        inputs.state.params,
        inputs.x_BD,
        pulls=pulls,
        bias_F=sums.bias_F,
        theta_F=sums.theta_F,
        encoded_D=sums.encoded_D,
        sae=sae,
    )


def _small_update(
    name: str,
    gradient: Array,
    inputs: StepInputs,
    *,
    kept_F: Array,
    touched_F: Array,
    sae: SaeConfig,
    train: TrainConfig,
) -> tuple[Array, Array]:
    per_latent = name in ("b_enc", "threshold")
    factor = sae.threshold.learning_rate_multiplier if name == "threshold" else 1.0
    before = inputs.state.params[name], inputs.state.second_moment[name]
    new, moment = adam_step(
        before[0],
        gradient,
        second_moment=before[1],
        learning_rate=inputs.scalars.learning_rate * factor,
        bias_correction=inputs.scalars.bias_correction,
        config=train.adam,
        kept=kept_F if per_latent else None,
    )
    if name == "threshold" and sae.threshold.parametrisation == "direct":
        new = jnp.maximum(new, 0.0)
    if not per_latent:
        return new, moment
    return jnp.where(touched_F, new, before[0]), jnp.where(touched_F, moment, before[1])


def write_rows(
    arguments: tuple[RowUpdate, Array], ids_S: Array, own: Rows, found: Gradients, *, config: Any
) -> Rows:
    """The new rows of a block of latents [S, D]: a `Write`, once it has its first argument."""
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

"""The step whose gradients are autodiff's: of every architecture except JumpReLU.

One program over a (data, model) mesh, in which the compiler places the collectives. It can train a
JumpReLU SAE too, for tests to hold the explicit gradients to.

Legend: B rows of a batch, D model width, F latents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from activation_cache.precision import Precision
from sae_train.config.run import Config, TrainConfig
from sae_train.config.sae import SaeConfig
from sae_train.model.architectures import forward
from sae_train.model.forward import Forward, Params
from sae_train.model.matryoshka import with_prefixes
from sae_train.step import optimiser
from sae_train.step.result import StepResult
from sae_train.step.schedule import Scheduled
from sae_train.step.sparsity_penalty import Penalty, penalty_of
from sae_train.step.state import TrainState, is_dead

# Of reconstructions and targets [B, D]: what stands in the loss for their distance, and what else
# is to be told of it.
Error = Callable[[Array, Array], tuple[Array, Any]]


def squared_error(
    reconstruction_BD: Float[Array, "B D"], target_BD: Float[Array, "B D"]
) -> tuple[Float[Array, ""], None]:
    """Summed over D, mean over rows."""
    return jnp.square(target_BD - reconstruction_BD).sum(axis=1).mean(), None


def loss_and_forward(
    params: Params,
    x_BD: Float[Array, "B D"],
    scalars: Scheduled,
    *,
    target_BD: Float[Array, "B D"],
    log_gain: Float[Array, ""],
    dead_F: Bool[Array, " F"],
    sae: SaeConfig,
    train: TrainConfig,
    precision: Precision,
    error: Error = squared_error,
) -> tuple[Float[Array, ""], tuple[Forward, Penalty, Any]]:
    """The error plus penalty, mean over rows, and an auxiliary loss if there is one.

    Args:
        x_BD, target_BD: scaled rows; of an SAE the target is x.
        error: of all latents' reconstruction; what it tells is the last of the results.
    """
    out = forward(params, x_BD, target_BD=target_BD, config=sae, dead_F=dead_F, precision=precision)
    distance, told = error(out.reconstruction_BD, target_BD)
    penalty = penalty_of(
        out.l0_B, out.frequency_F, l1_B=out.l1_B, scalars=scalars, log_gain=log_gain, train=train
    )
    loss = with_prefixes(distance, out, target_BD, config=sae) + penalty.loss
    if out.auxiliary is not None:
        loss = loss + out.auxiliary
    return loss, (out, penalty, told)


class AutodiffStep:
    """A `Step` by `jax.grad` and one optax chain over all parameters."""

    def __init__(self, config: Config, *, precision: Precision) -> None:
        self._config, self._precision = config, precision

    def __call__(
        self,
        state: TrainState,
        x_BD: Float[Array, "B D"],
        *,
        target_BD: Float[Array, "B D"],
        scalars: Scheduled,
        error: Error = squared_error,
    ) -> StepResult:
        """One step on scaled rows."""
        of_params = jax.value_and_grad(loss_and_forward, has_aux=True)
        (loss, (out, penalty, told)), gradients = of_params(
            state.params,
            x_BD,
            scalars,
            target_BD=target_BD,
            log_gain=state.log_gain,
            dead_F=is_dead(state.last_fired, step=state.step, train=self._config.train),
            sae=self._config.sae,
            train=self._config.train,
            precision=self._precision,
            error=error,
        )
        params, first_moment, second_moment = optimiser.update_all(
            state, gradients, scalars=scalars, config=self._config
        )
        return StepResult(
            params=params,
            first_moment=first_moment,
            second_moment=second_moment,
            last_touched=jnp.full_like(state.last_touched, state.step + 1),
            loss=loss,
            penalty=penalty,
            gradient_norm=optimiser.tree_norm(gradients),
            reconstruction_BD=out.reconstruction_BD,
            l0_B=out.l0_B,
            fired_F=(out.latents_BF > 0).any(axis=0),
            pairs_per_row=jnp.zeros(()),
            is_sparse=jnp.zeros((), bool),
            overflowed=jnp.zeros((), bool),
            smallest=out.smallest,
            told=told,
        )

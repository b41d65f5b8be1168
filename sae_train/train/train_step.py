"""One optimiser step: loss, gradients, update, metrics; compiled once per shape and mesh.

The loop sees only `TrainStep`, wherever gradients come from: a JumpReLU's are explicit, by products
(`DenseStep`) or by pairs (`AdaptiveStep`); all others are autodiff's, of one program over a (data,
model) mesh in which the compiler places the collectives.

Legend: B rows of a batch, D model width, F latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from sae_train.config.run import Config, TrainConfig
from sae_train.config.sae import SaeConfig
from sae_train.model.architectures import forward
from sae_train.model.forward import Forward, Params, threshold_of
from sae_train.model.sharding import BATCH_DIMS, sharding
from sae_train.sparse.jumprelu_step import AdaptiveStep
from sae_train.step.adam import tree_norm, update
from sae_train.step.dense_jumprelu import DenseStep
from sae_train.step.path_choice import is_by_pairs
from sae_train.step.result import Stepped
from sae_train.step.schedule import Scheduled
from sae_train.step.sparsity_penalty import Priced, priced
from sae_train.step.state import TrainState, state_shardings


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepMetrics:
    """Scalars of one batch, measured before its update, in scaled units (E|x|² = 1).

    `mse` is the squared error summed over D, mean over rows. `fvu` is the summed squared error
    over that of always predicting the batch's mean. `sparsity_coefficient` is the λ that was in
    force, warm-up and steering included. `sparse_candidates` are the pairs of row and latent, per
    row, that a step by pairs must have places for: a JumpReLU's that have a gradient, a TopK's
    that its selection collected; 0 where steps never go by pairs. `sparse_overflows` counts the
    steps so far that had too many. `finite` covers loss and gradients, hence the
    state after the step.
    """

    loss: Float[Array, ""]
    mse: Float[Array, ""]
    fvu: Float[Array, ""]
    l0: Float[Array, ""]
    dead_fraction: Float[Array, ""]
    threshold_mean: Float[Array, ""]
    sparsity_coefficient: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    sparse_candidates: Float[Array, ""]
    sparse_overflows: Array
    finite: Array


# How a step's smallest selected latent fades in BatchTopK's threshold; SAELens' rate is the same.
_SELECTION_DECAY = 0.99

# Raw rows [B, D]: of an SAE one array; of a transcoder two, what it reads and what it predicts.
Batch = Array | tuple[Array, Array]

TrainStep = Callable[[TrainState, Batch, Scheduled], tuple[TrainState, StepMetrics]]
StackedStep = Callable[
    [tuple[TrainState, ...], Batch, tuple[Scheduled, ...]],
    tuple[tuple[TrainState, ...], tuple[StepMetrics, ...]],
]


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
) -> tuple[Float[Array, ""], tuple[Forward, Priced]]:
    """Squared error plus penalty, mean over rows, and an auxiliary loss if there is one.

    Args:
        x_BD, target_BD: scaled rows; of an SAE the target is x.
    """
    out = forward(params, x_BD, target_BD=target_BD, config=sae, dead_F=dead_F)
    mse = jnp.square(target_BD - out.reconstruction_BD).sum(axis=1).mean()
    penalty = priced(out, scalars, log_gain=log_gain, train=train)
    loss = mse + penalty.loss
    if out.auxiliary is not None:
        loss = loss + out.auxiliary
    return loss, (out, penalty)


def _is_dead(last_fired_F: Array, *, step: Array, train: TrainConfig) -> Array:
    """Latents that haven't fired for `dead_after_tokens`."""
    return step - last_fired_F >= -(-train.dead_after_tokens // train.batch_size)


def _threshold_mean(state: TrainState, *, config: SaeConfig) -> Array:
    if config.architecture == "jumprelu":
        return threshold_of(state.params, config=config).mean()
    return state.selection_threshold


def averaged(mean: Array, smallest: Array | None, *, step: Array) -> Array:
    """The mean of the smallest selected latents so far, older ones fading; `step` counts from 1."""
    if smallest is None:
        return mean
    # m ← m + w (s - m) with w = (1 - d) / (1 - dᵗ): the weighted mean of all so far.
    weight = (1.0 - _SELECTION_DECAY) / (1.0 - _SELECTION_DECAY ** step.astype(jnp.float32))
    return mean + weight * (smallest - mean)


def _measure(
    state: TrainState,
    stepped: Stepped,
    *,
    target_BD: Array,
    overflows: Array,
    config: Config,
) -> tuple[StepMetrics, Array]:
    """The step's metrics and the new `last_fired`."""
    loss, norm = stepped.loss, stepped.norm
    fired_F = stepped.fired_F
    last_fired_F = jnp.where(fired_F, state.step + 1, state.last_fired)
    mse = jnp.square(target_BD - stepped.reconstruction_BD).sum(axis=1).mean()
    variance = jnp.square(target_BD - target_BD.mean(axis=0, keepdims=True)).sum(axis=1).mean()
    dead_F = _is_dead(last_fired_F, step=state.step + 1, train=config.train)
    metrics = StepMetrics(
        loss=loss,
        mse=mse,
        fvu=mse / variance,
        l0=stepped.l0_B.mean(),
        dead_fraction=dead_F.mean(),
        threshold_mean=_threshold_mean(state, config=config.sae),
        sparsity_coefficient=stepped.coefficient,
        gradient_norm=norm,
        sparse_candidates=stepped.candidates,
        sparse_overflows=overflows,
        finite=jnp.isfinite(loss) & jnp.isfinite(norm),
    )
    return metrics, last_fired_F


def make_train_step(
    config: Config, *, input_scale: float, target_scale: float | None = None, mesh: Mesh
) -> TrainStep:
    """Compile-ready step for raw rows: (state, batch, scalars) -> (state, metrics).

    Args:
        input_scale: C of x = x_raw / C, which gives E|x|² = 1 (Gemma Scope 3.1).
        target_scale: what a transcoder's target is divided by; None is C too.

    The state is donated: the caller must not touch the one it passed in.
    """
    states, rows, scalar = _placements(config, mesh)
    return jax.jit(
        _plain_step(config, input_scale=input_scale, target_scale=target_scale, mesh=mesh),
        in_shardings=(states, rows, scalar),
        out_shardings=(states, scalar),
        donate_argnums=0,
    )


def make_stacked_step(
    config: Config,
    *,
    members: int,
    input_scale: float,
    target_scale: float | None = None,
    mesh: Mesh,
) -> StackedStep:
    """The steps of several runs that differ in numbers alone, as one compiled program.

    (states, batch, scalars of each) -> (states, metrics of each). The states stay apart, so
    that each can be saved, or leave, without being copied; they are donated.
    """
    states, rows, scalar = _placements(config, mesh)
    plain = _plain_step(config, input_scale=input_scale, target_scale=target_scale, mesh=mesh)

    def step(
        own: tuple[TrainState, ...], batch: Batch, scalars: tuple[Scheduled, ...]
    ) -> tuple[tuple[TrainState, ...], tuple[StepMetrics, ...]]:
        pairs = [plain(one, batch, its) for one, its in zip(own, scalars, strict=True)]
        return tuple(state for state, _ in pairs), tuple(metrics for _, metrics in pairs)

    return jax.jit(
        step,
        in_shardings=((states,) * members, rows, scalar),
        out_shardings=((states,) * members, scalar),
        donate_argnums=0,
    )


def _placements(config: Config, mesh: Mesh) -> tuple[TrainState, Any, Any]:
    """Where the state, the rows and the scalars of a step lie."""
    states = state_shardings(mesh, config=config.sae)
    return states, sharding(mesh, BATCH_DIMS), sharding(mesh, ())


def _scaled(
    batch: Batch, *, input_scale: float, target_scale: float | None
) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
    """What is read and what is to be predicted, in float32: of an SAE one and the same array."""
    if not isinstance(batch, tuple):
        x_BD = batch.astype(jnp.float32) * (1.0 / input_scale)
        return x_BD, x_BD
    inputs_BD, targets_BD = (rows_BD.astype(jnp.float32) for rows_BD in batch)
    return inputs_BD * (1.0 / input_scale), targets_BD * (1.0 / (target_scale or input_scale))


def _plain_step(
    config: Config, *, input_scale: float, target_scale: float | None, mesh: Mesh
) -> TrainStep:
    """The step as it is written, uncompiled."""
    adaptive = AdaptiveStep(config, mesh) if is_by_pairs(config, mesh) else None
    dense = DenseStep(config, mesh) if config.sae.architecture == "jumprelu" else None

    def step(state: TrainState, batch: Batch, scalars: Scheduled) -> tuple[TrainState, StepMetrics]:
        x_BD, target_BD = _scaled(batch, input_scale=input_scale, target_scale=target_scale)
        sparse, overflows = jnp.zeros((), bool), state.overflows
        if adaptive is not None:
            stepped, sparse, tried = adaptive(state, x_BD, target_BD=target_BD, scalars=scalars)
            overflows = overflows + (tried & ~sparse).astype(jnp.int32)
        elif dense is not None:
            stepped = dense(state, x_BD, target_BD=target_BD, scalars=scalars)
        else:
            stepped = _by_autodiff(state, x_BD, target_BD, scalars, config=config)
        metrics, last_fired = _measure(
            state, stepped, target_BD=target_BD, overflows=overflows, config=config
        )
        new_state = TrainState(
            params=stepped.params,
            second_moment=stepped.second_moment,
            last_fired=last_fired,
            last_touched=stepped.last_touched,
            step=state.step + 1,
            log_gain=stepped.log_gain,
            selection_threshold=averaged(
                state.selection_threshold, stepped.smallest, step=state.step + 1
            ),
            candidates=stepped.candidates,
            sparse=sparse.astype(jnp.int32),
            overflows=overflows,
        )
        return new_state, metrics

    return step


def _by_autodiff(
    state: TrainState, x_BD: Array, target_BD: Array, scalars: Scheduled, *, config: Config
) -> Stepped:
    """A step of any architecture but JumpReLU."""
    sae, train = config.sae, config.train
    (loss, (out, penalty)), gradients = jax.value_and_grad(loss_and_forward, has_aux=True)(
        state.params,
        x_BD,
        scalars,
        target_BD=target_BD,
        log_gain=state.log_gain,
        dead_F=_is_dead(state.last_fired, step=state.step, train=train),
        sae=sae,
        train=train,
    )
    params, second_moment = update(
        state.params,
        gradients,
        second_moment=state.second_moment,
        learning_rate=scalars.learning_rate,
        bias_correction=scalars.bias_correction,
        sae=sae,
        train=train,
    )
    return Stepped(
        params=params,
        second_moment=second_moment,
        last_touched=jnp.full_like(state.last_touched, state.step + 1),
        loss=loss,
        coefficient=penalty.coefficient,
        log_gain=penalty.log_gain,
        norm=tree_norm(gradients),
        reconstruction_BD=out.reconstruction_BD,
        l0_B=out.l0_B,
        fired_F=(out.latents_BF > 0).any(axis=0),
        candidates=jnp.zeros(()),
        smallest=out.smallest,
    )

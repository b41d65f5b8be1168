"""One optimiser step, compiled once per shape and mesh: loss, gradients, update, metrics.

The loop sees only `TrainStep`. Where gradients come from is the `Step` it was made with: a
JumpReLU's are explicit (`DenseStep`, `SparseStep`), those of other architectures autodiff's.

A batch goes from the loop to new weights through `loop`, `cohort_step`, this file, then
`sae_train.step.dense_jumprelu` (or `sae_train.sparse.jumprelu_step`, or `sae_train.step.autodiff`),
`sae_train.step.gradients` and `sae_train.step.optimiser`.

Legend: B rows of a batch, D model width, F latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from sae_train.config.run import Config
from sae_train.config.sae import SaeConfig
from sae_train.end_to_end.frozen_model import FrozenModel, SequenceBatch
from sae_train.end_to_end.loss import through_model
from sae_train.model.forward import threshold_of, whitened
from sae_train.model.sharding import BATCH_DIMS, sharding
from sae_train.sparse.jumprelu_step import SparseStep
from sae_train.step.autodiff import AutodiffStep
from sae_train.step.dense_jumprelu import DenseStep
from sae_train.step.path_choice import may_be_sparse_on, precision_on
from sae_train.step.result import Step, StepResult
from sae_train.step.schedule import Scheduled
from sae_train.step.state import TrainState, is_dead, state_shardings


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepMetrics:
    """Scalars of one batch, measured before its update, in scaled units (E|x|² = 1).

    Attributes:
        mse: squared error summed over D, mean over rows.
        fvu: the summed squared error over that of always predicting the batch's mean.
        sparsity_coefficient: the λ in force, warm-up and steering included.
        sparse_candidates: pairs of row and latent that have a gradient, per row, which the sparse
            path needs space for; 0 where it isn't taken into account.
        sparse_overflows: steps so far that had too many of them.
        finite: are loss and gradients, and so the state after the step?
    """

    loss: Float[Array, ""]
    mse: Float[Array, ""]
    fvu: Float[Array, ""]
    l0: Float[Array, ""]
    dead_fraction: Float[Array, ""]
    threshold_mean: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    sparse_candidates: Float[Array, ""]
    sparse_overflows: Array
    sparsity_coefficient: Float[Array, ""]
    finite: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EndToEndMetrics(StepMetrics):
    """The same of a step through the model, where the loss has KL in it.

    Attributes:
        kl: in nats a token, of the predictions with the reconstruction against the original ones.
        alpha: what KL was multiplied by beside β, so that it weighs as much as the squared error.
    """

    kl: Float[Array, ""]
    alpha: Float[Array, ""]


# The decay of past values in the mean that is BatchTopK's threshold; SAELens has the same.
_SELECTION_DECAY = 0.99

# Raw rows [B, D]: of an SAE one array; of a transcoder two, what it reads and what it predicts.
Batch = Array | tuple[Array, Array]

TrainStep = Callable[[TrainState, Batch, Scheduled], tuple[TrainState, StepMetrics]]
StackedStep = Callable[
    [tuple[TrainState, ...], Batch, tuple[Scheduled, ...]],
    tuple[tuple[TrainState, ...], tuple[StepMetrics, ...]],
]
EndToEndStep = Callable[[TrainState, SequenceBatch, Scheduled], tuple[TrainState, EndToEndMetrics]]


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
    state: TrainState, result: StepResult, *, target_BD: Array, config: Config
) -> tuple[TrainState, StepMetrics]:
    """The new state and the step's metrics."""
    step = state.step + 1
    last_fired_F = jnp.where(result.fired_F, step, state.last_fired)
    mse = jnp.square(target_BD - result.reconstruction_BD).sum(axis=1).mean()
    variance = jnp.square(target_BD - target_BD.mean(axis=0, keepdims=True)).sum(axis=1).mean()
    overflows = state.overflows + result.overflowed.astype(jnp.int32)
    metrics = StepMetrics(
        loss=result.loss,
        mse=mse,
        fvu=mse / variance,
        l0=result.l0_B.mean(),
        dead_fraction=is_dead(last_fired_F, step=step, train=config.train).mean(),
        threshold_mean=_threshold_mean(state, config=config.sae),
        sparsity_coefficient=result.penalty.coefficient,
        gradient_norm=result.gradient_norm,
        sparse_candidates=result.pairs_per_row,
        sparse_overflows=overflows,
        finite=jnp.isfinite(result.loss) & jnp.isfinite(result.gradient_norm),
    )
    new_state = TrainState(
        params=result.params,
        first_moment=result.first_moment,
        second_moment=result.second_moment,
        last_fired=last_fired_F,
        last_touched=result.last_touched,
        step=step,
        log_gain=result.penalty.log_gain,
        selection_threshold=averaged(state.selection_threshold, result.smallest, step=step),
        candidates=result.pairs_per_row,
        sparse=result.is_sparse.astype(jnp.int32),
        overflows=overflows,
    )
    return new_state, metrics


def make_train_step(
    config: Config, *, input_scale: float, target_scale: float | None = None, mesh: Mesh
) -> TrainStep:
    """Compile-ready step for raw rows: (state, batch, scalars) -> (state, metrics).

    Args:
        input_scale: C of x = x_raw / C, which gives E|x|² = 1 (Gemma Scope 3.1).
        target_scale: what a transcoder's target is divided by; None is C too.

    The state is donated: the caller must not touch the one it passed in.
    """
    step = _uncompiled_step(config, input_scale=input_scale, target_scale=target_scale, mesh=mesh)
    return _compiled(step, _shardings(config, mesh), mesh)


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
    plain = _uncompiled_step(config, input_scale=input_scale, target_scale=target_scale, mesh=mesh)

    def step(
        own: tuple[TrainState, ...], batch: Batch, scalars: tuple[Scheduled, ...]
    ) -> tuple[tuple[TrainState, ...], tuple[StepMetrics, ...]]:
        pairs = [plain(one, batch, its) for one, its in zip(own, scalars, strict=True)]
        return tuple(state for state, _ in pairs), tuple(metrics for _, metrics in pairs)

    return _compiled(step, (_shardings(config, mesh),) * members, mesh)


def make_end_to_end_step(
    config: Config,
    *,
    input_scale: float,
    target_scale: float | None = None,
    mesh: Mesh,
    model: FrozenModel,
) -> EndToEndStep:
    """As `make_train_step`, for a batch of sequences: the loss is that of `end_to_end.loss`.

    Gradients are autodiff's for every architecture: those that are written out for JumpReLU begin
    with the squared error.
    """
    take_step = AutodiffStep(config, precision=precision_on(config, mesh))
    phase = config.train.end_to_end
    assert phase is not None

    def step(
        state: TrainState, batch: SequenceBatch, scalars: Scheduled
    ) -> tuple[TrainState, EndToEndMetrics]:
        params, original = batch
        inputs_ND = _merged(original.inputs_BRD)
        targets = original.targets_BRD
        rows = inputs_ND if targets is None else (inputs_ND, _merged(targets))
        x_ND, target_ND = _scaled(rows, input_scale=input_scale, target_scale=target_scale)

        def kl_of(reconstruction_ND: Array) -> Array:
            raw_ND = reconstruction_ND * (target_scale or input_scale)
            raw_BRD = raw_ND.reshape(*original.inputs_BRD.shape[:2], -1)
            return model.divergence(params, original, raw_BRD)

        error = through_model(kl_of, beta=phase.beta)
        result = take_step(state, x_ND, target_BD=target_ND, scalars=scalars, error=error)
        state, metrics = _measure(state, result, target_BD=target_ND, config=config)
        return state, EndToEndMetrics(**vars(metrics), kl=result.told.kl, alpha=result.told.alpha)

    return _compiled(step, _shardings(config, mesh), mesh, batch=None)


def _shardings(config: Config, mesh: Mesh) -> TrainState:
    return state_shardings(mesh, config=config.sae, momentum=config.train.has_momentum)


def _merged(rows_BRD: Array) -> Array:
    return rows_BRD.reshape(-1, rows_BRD.shape[-1])


def _compiled(
    step: Callable[..., Any], states: Any, mesh: Mesh, *, batch: Any = BATCH_DIMS
) -> Callable[..., Any]:
    """The step with every argument and result in its place; `states`: where the states lie.

    Args:
        batch: dims of the batch's arrays; None: they stay where they are.
    """
    rows, scalar = None if batch is None else sharding(mesh, batch), sharding(mesh, ())
    return jax.jit(
        step,
        in_shardings=(states, rows, scalar),
        out_shardings=(states, scalar),
        donate_argnums=0,
    )


def _scaled(
    batch: Batch, *, input_scale: float, target_scale: float | None
) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
    """What is read and what is to be predicted, in float32: of an SAE one and the same array."""
    if not isinstance(batch, tuple):
        x_BD = batch.astype(jnp.float32) * (1.0 / input_scale)
        return x_BD, x_BD
    inputs_BD, targets_BD = (rows_BD.astype(jnp.float32) for rows_BD in batch)
    return inputs_BD * (1.0 / input_scale), targets_BD * (1.0 / (target_scale or input_scale))


def _step_of(config: Config, mesh: Mesh) -> Step:
    """The step that a config asks for."""
    precision = precision_on(config, mesh)
    if config.sae.architecture != "jumprelu":
        return AutodiffStep(config, precision=precision)
    kind = SparseStep if may_be_sparse_on(config, mesh) else DenseStep
    return kind(config, mesh, precision=precision)


def _uncompiled_step(
    config: Config, *, input_scale: float, target_scale: float | None, mesh: Mesh
) -> TrainStep:
    """The step as it is written, from raw rows to the new state."""
    take_step = _step_of(config, mesh)

    def step(state: TrainState, batch: Batch, scalars: Scheduled) -> tuple[TrainState, StepMetrics]:
        x_BD, target_BD = _scaled(batch, input_scale=input_scale, target_scale=target_scale)
        if config.sae.whitening > 0:
            x_BD = target_BD = whitened(state.params, x_BD)
        result = take_step(state, x_BD, target_BD=target_BD, scalars=scalars)
        return _measure(state, result, target_BD=target_BD, config=config)

    return step

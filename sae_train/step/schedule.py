"""What changes with the step number alone: learning rate, sparsity coefficient, bias correction.

Schedules are optax's, evaluated for all steps of a run at once, before its first; a step is given
its scalars from the host. So runs that differ only in a coefficient share one compilation, and no
step waits for a schedule on the device.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from sae_train.config.run import LearningRateConfig, TrainConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scheduled:
    """The scalars of one step, float32: NumPy's on the host, traced inside the step.

    Attributes:
        learning_rate: of all parameters; the threshold multiplies it by its own factor.
        sparsity_coefficient: λ, warmed up.
        sparsity_warmup: the share of λ that is in force, 0 to 1.
        bias_correction: Adam's 1 - β₂ᵗ, t counted from 1.
        momentum_correction: 1 - β₁ᵗ; 1 where β₁ is 0.
    """

    learning_rate: Any
    sparsity_coefficient: Any
    sparsity_warmup: Any
    bias_correction: Any
    momentum_correction: Any


def learning_rate_schedule(config: LearningRateConfig, *, steps: int) -> optax.Schedule:
    """The factor on the peak rate, of steps counted from 0.

    Cosine from `warmup_from` to 1 over `warmup_steps` (Gemma Scope 3.2), then constant, then
    linear to `decay_to` over the last `decay_steps`.
    """
    fall = optax.cosine_decay_schedule(1.0, max(1, config.warmup_steps))
    last = optax.linear_schedule(1.0, config.decay_to, max(1, config.decay_steps))
    begin = steps - config.decay_steps

    def schedule(step: Any) -> Any:
        rate = 1.0
        if config.warmup_steps:
            rate = rate - (1.0 - config.warmup_from) * fall(step)
        return rate * last(step - begin) if config.decay_steps else rate

    return schedule


def sparsity_schedule(warmup_steps: int) -> optax.Schedule:
    """The share of λ in force: linear from 0 to 1 over `warmup_steps`, counted from 0."""
    if not warmup_steps:
        return optax.constant_schedule(1.0)
    return optax.linear_schedule(0.0, 1.0, warmup_steps)


@functools.cache
def learning_rate_factors(config: LearningRateConfig, *, steps: int) -> Float[np.ndarray, " steps"]:
    """`learning_rate_schedule` of every step of a run."""
    return _of_all_steps(learning_rate_schedule(config, steps=steps), steps=steps)


@functools.cache
def _sparsity_factors(warmup_steps: int, *, steps: int) -> Float[np.ndarray, " steps"]:
    return _of_all_steps(sparsity_schedule(warmup_steps), steps=steps)


def _of_all_steps(schedule: optax.Schedule, *, steps: int) -> Float[np.ndarray, " steps"]:
    return np.broadcast_to(np.asarray(schedule(jnp.arange(steps, dtype=jnp.float32))), (steps,))


def scheduled(config: TrainConfig, *, step: int) -> Scheduled:
    """The scalars of the step that turns `step` done steps into `step + 1`."""
    # Runs of a cohort often differ in their peak alone: the factors are those of all.
    shape = config.learning_rate.model_copy(update={"peak": 1.0})
    rate = config.learning_rate.peak * float(learning_rate_factors(shape, steps=config.steps)[step])
    penalty = config.sparsity
    warmup = float(_sparsity_factors(penalty.warmup_steps, steps=config.steps)[step])
    return Scheduled(
        learning_rate=np.float32(rate),
        sparsity_coefficient=np.float32(penalty.coefficient * warmup),
        sparsity_warmup=np.float32(warmup),
        bias_correction=np.float32(_correction(config.adam.beta2, step=step)),
        momentum_correction=np.float32(_correction(config.adam.beta1, step=step)),
    )


def _correction(beta: float, *, step: int) -> float:
    """1 - βᵗ for t = step + 1, without the cancellation."""
    return -math.expm1((step + 1) * math.log(beta)) if beta > 0 else 1.0


def total_learning_rate(config: TrainConfig) -> float:
    """The sum of the learning rate over all steps: how far Adam carries a steady parameter."""
    factors = learning_rate_factors(config.learning_rate, steps=config.steps)
    return config.learning_rate.peak * float(factors.sum(dtype=np.float64))

"""What changes with the step number alone: learning rate, sparsity coefficient, bias correction.

Computed on the host in float64 and handed to the compiled step as scalars, so that runs which
differ only in a coefficient share one compilation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from sae_train.config.run import LearningRateConfig, TrainConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scheduled:
    """The scalars of one step, float32: NumPy's on the host, traced inside the step."""

    learning_rate: Any
    sparsity_coefficient: Any
    sparsity_warmup: Any  # the share of the coefficient that is in force, 0 to 1
    bias_correction: Any


def learning_rate_factor(config: LearningRateConfig, *, step: int, steps: int) -> float:
    """The factor on the peak rate at `step` (counted from 0) of `steps`.

    Cosine from `warmup_from` to 1 over `warmup_steps` (Gemma Scope 3.2), then constant, then
    linear to `decay_to` over the last `decay_steps`.
    """
    factor = 1.0
    if step < config.warmup_steps:
        rise = (1 - math.cos(math.pi * step / config.warmup_steps)) / 2
        factor = config.warmup_from + (1 - config.warmup_from) * rise
    left = steps - step
    if left < config.decay_steps:
        factor *= config.decay_to + (1 - config.decay_to) * left / config.decay_steps
    return factor


def sparsity_factor(*, step: int, warmup_steps: int) -> float:
    """Linear from 0 to 1 over `warmup_steps`, `step` counted from 0."""
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


def scheduled(config: TrainConfig, *, step: int) -> Scheduled:
    """The scalars of the step that turns `step` done steps into `step + 1`."""
    factor = learning_rate_factor(config.learning_rate, step=step, steps=config.steps)
    penalty = config.sparsity
    warmup = sparsity_factor(step=step, warmup_steps=penalty.warmup_steps)
    beta2 = config.adam.beta2
    # 1 - β₂ᵗ for t = step + 1, without the cancellation.
    correction = -math.expm1((step + 1) * math.log(beta2)) if beta2 > 0 else 1.0
    return Scheduled(
        learning_rate=np.float32(config.learning_rate.peak * factor),
        sparsity_coefficient=np.float32(penalty.coefficient * warmup),
        sparsity_warmup=np.float32(warmup),
        bias_correction=np.float32(correction),
    )


def total_learning_rate(config: TrainConfig) -> float:
    """The sum of the learning rate over all steps: how far Adam carries a steady parameter."""
    total = sum(
        learning_rate_factor(config.learning_rate, step=step, steps=config.steps)
        for step in _sampled(config.steps)
    )
    return config.learning_rate.peak * total * config.steps / len(_sampled(config.steps))


def _sampled(steps: int) -> range:
    """Every step, or 10,000 evenly spaced ones of a long run."""
    return range(0, steps, max(1, steps // 10_000))

"""Before training: can the thresholds get to where the data is in the steps configured?

With log θ and Adam, θ moves by at most the learning rate in relative terms per step: one e-fold
per 14,286 steps at 7e-5. From 0.001 to 0.05 is 3.9 of them, 56,000 steps. Short runs with that
parametrisation end with the L0 they started with, and their users lose days.

Legend: B rows of a batch, F latents.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sae_train.config import Config, TargetL0Penalty
from sae_train.sae import Params, pre_activations
from sae_train.schedule import total_learning_rate

# What an L0 penalty is after when it names no target: the released SAEs' canonical L0.
TYPICAL_L0 = 100.0


def reachable_threshold(config: Config) -> float:
    """The highest θ a steady gradient can reach within the configured steps."""
    threshold = config.sae.threshold
    travel = total_learning_rate(config.train) * threshold.learning_rate_multiplier
    if threshold.parametrisation == "log":
        return threshold.init * math.exp(min(travel, 50.0))
    return threshold.init + travel


def needed_threshold(pre_BF: Float[Array, "B F"], *, l0: float) -> float:
    """The common θ that would leave `l0` latents active per row."""
    share = min(max(1.0 - l0 / pre_BF.shape[1], 0.0), 1.0)
    return float(np.quantile(np.asarray(pre_BF), share))


def threshold_warning(
    config: Config, *, params: Params, x_BD: Float[Array, "B D"]
) -> str | None:
    """A warning when `reachable_threshold` falls short of what the first batch asks for.

    Args:
        params: parameters at initialisation.
        x_BD: scaled rows.
    """
    penalty = config.train.sparsity
    l0 = penalty.target if isinstance(penalty, TargetL0Penalty) else TYPICAL_L0
    pre_BF = pre_activations(params, jnp.asarray(x_BD[:256]), config=config.sae)
    needed, reachable = needed_threshold(pre_BF, l0=l0), reachable_threshold(config)
    if reachable >= needed:
        return None
    return (
        f"the thresholds can rise from {config.sae.threshold.init:.3g} to at most {reachable:.3g} "
        f"in {config.train.steps} steps, and at initialisation an L0 of {l0:.0f} needs "
        f"{needed:.3g}: sparsity will hardly train. Train longer, raise "
        "sae.threshold.learning_rate_multiplier, train.learning_rate.peak or sae.threshold.init, "
        "or set sae.threshold.parametrisation to direct (docs/numerics.md)."
    )

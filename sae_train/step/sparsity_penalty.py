"""What sparsity costs: the penalties, and the controller that steers a coefficient to a target L0.

    l0          λ L0                              Gemma Scope (arXiv 2408.05147), equation 4
    batch_mean  λ (mean L0 / L* - 1)²             JumpReLU paper's target form (arXiv 2407.14435)
    per_token   λ (2 / L*) (L0 - L*)²             Gemma Scope 2, equation 5 as printed
    match_l0    λ L0, λ steered                   ours, docs/recipes.md
    l1          λ mean L1                         the ReLU and the Gated SAE's
    frequency   λ Σ ω² / ω₀ beside any of them    GDM's update on high-frequency latents (2025)

each the mean over rows. Their gradients reach the threshold only (`sae_train.model.jumprelu`).

Legend: B rows of a batch, F latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sae_train.config.run import TrainConfig
from sae_train.config.sparsity import (
    L1Penalty,
    MatchL0Penalty,
    NoPenalty,
    Sparsity,
    TargetL0Penalty,
)
from sae_train.step.schedule import Scheduled

# A distance from the target beyond a factor of e counts as a factor of e: while an SAE is young,
# half of its latents are active.
_FURTHEST = 1.0
# λ moves from where it started by at most a factor of e to this power, up or down: a target that no
# λ reaches must not end in an overflow.
_LARGEST_LOG_GAIN = 12.0
# Settling times in a run, where none is configured: see docs/recipes.md.
_SETTLINGS = 50


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Penalty:
    """A batch's mean penalty, the λ in force and what the controller carries to the next step."""

    loss: Float[Array, ""]
    coefficient: Float[Array, ""]
    log_gain: Float[Array, ""]


def penalty_of(
    l0_B: Float[Array, " B"],
    frequency_F: Float[Array, " F"],
    *,
    l1_B: Float[Array, " B"] | None = None,
    scalars: Scheduled,
    log_gain: Float[Array, ""],
    train: TrainConfig,
) -> Penalty:
    """The mean penalty of a batch.

    Args:
        l0_B: active latents of each row.
        frequency_F: the share of rows in which each latent is active.
        l1_B: the L1 norm of each row, for `l1` alone.
        scalars: this step's, with the warmed-up λ.
        log_gain: what steering has added to log λ so far; 0 except for `match_l0`.
    """
    penalty, lam = train.sparsity, jnp.asarray(scalars.sparsity_coefficient)
    if isinstance(penalty, NoPenalty):
        return Penalty(loss=jnp.zeros(()), coefficient=lam, log_gain=log_gain)
    if isinstance(penalty, L1Penalty):
        assert l1_B is not None
        return Penalty(loss=lam * l1_B.mean(), coefficient=lam, log_gain=log_gain)
    if isinstance(penalty, MatchL0Penalty):
        distance = _distance(l0_B, target=penalty.target)
        # In proportion to this batch's own distance, which damps, and to the sum of all before.
        lam = lam * jnp.exp(log_gain + distance)
        settle_steps = penalty.settle_steps or max(1, train.steps // _SETTLINGS)
        # Nothing is summed while λ warms up: the distance isn't yet the full λ's doing.
        moved = log_gain + jnp.where(scalars.sparsity_warmup < 1, 0.0, distance / settle_steps)
        log_gain = jnp.clip(moved, -_LARGEST_LOG_GAIN, _LARGEST_LOG_GAIN)
    loss = lam * _l0_term(l0_B, penalty)
    if penalty.frequency is not None:
        own = penalty.frequency.coefficient
        lam_frequency = lam if own is None else own * scalars.sparsity_warmup
        loss = loss + lam_frequency * jnp.square(frequency_F).sum() / penalty.frequency.scale
    return Penalty(loss=loss, coefficient=lam, log_gain=log_gain)


def _l0_term(l0_B: Float[Array, " B"], penalty: Sparsity) -> Float[Array, ""]:
    if not isinstance(penalty, TargetL0Penalty):
        return l0_B.mean()
    if penalty.form == "batch_mean":
        return jnp.square(l0_B.mean() / penalty.target - 1.0)
    return (2.0 / penalty.target) * jnp.square(l0_B - penalty.target).mean()


def _distance(l0_B: Float[Array, " B"], *, target: float) -> Float[Array, ""]:
    """log(mean L0 / target), bounded; no gradient flows through the controller."""
    share = jax.lax.stop_gradient(l0_B.mean()) / target
    return jnp.clip(jnp.log(jnp.maximum(share, 1e-6)), -_FURTHEST, _FURTHEST)

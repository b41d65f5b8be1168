"""What a training step returns."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jaxtyping import Array, Bool, Float

from sae_train.model.forward import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stepped:
    """What one step makes of a state and a batch.

    `smallest` is BatchTopK's alone: the smallest latent that was selected.
    """

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
    smallest: Float[Array, ""] | None = None

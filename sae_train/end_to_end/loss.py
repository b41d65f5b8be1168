"""The loss of a phase that trains through the model.

    loss = (MSE + α β KL) / (1 + β) + penalty      α = MSE / (KL + 1e-8), held constant

Gemma Scope 2, section 2.4. KL is that of the next token's distribution in the model with the
reconstruction against the original one, in nats, mean over tokens. α makes α KL as large as MSE, so
that β is the weight of the one against the other; it has no gradient.

Legend: N rows of a step, R rows of a sequence, D width of a tap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sae_train.step.autodiff import Error

_SMALLEST_KL = 1e-8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Parts:
    """What the loss is made of, beside the MSE.

    Attributes:
        kl: in nats a token.
        alpha: what it was multiplied by, in scaled squared error a nat.
    """

    kl: Float[Array, ""]
    alpha: Float[Array, ""]


def through_model(kl_of: Callable[[Float[Array, "N D"]], Array], *, beta: float) -> Error:
    """The error that stands in the loss for the squared one.

    Args:
        kl_of: of scaled reconstructions.
    """

    def error(
        reconstruction_ND: Float[Array, "N D"], target_ND: Float[Array, "N D"]
    ) -> tuple[Float[Array, ""], Parts]:
        mse = jnp.square(target_ND - reconstruction_ND).sum(axis=1).mean()
        kl = kl_of(reconstruction_ND)
        alpha = jax.lax.stop_gradient(mse / (kl + _SMALLEST_KL))
        return (mse + alpha * beta * kl) / (1.0 + beta), Parts(kl=kl, alpha=alpha)

    return error

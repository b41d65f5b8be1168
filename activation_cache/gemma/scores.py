"""Scores of a language model's predictions: the loss, or the target token's mean-centred logit.

Legend: C predictions of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# From logits [C, V] and target tokens [C] to one score per prediction, [C].
Score = Callable[[Array, Array], Array]


def cross_entropy(logits_CV: Float[Array, "C V"], token_C: Int[Array, " C"]) -> Float[Array, " C"]:
    """Next-token loss in nats."""
    return jax.nn.logsumexp(logits_CV, axis=-1) - _picked(logits_CV, token_C)


def centred_logit(logits_CV: Float[Array, "C V"], token_C: Int[Array, " C"]) -> Float[Array, " C"]:
    """The target token's logit minus the mean of all logits."""
    return _picked(logits_CV, token_C) - logits_CV.mean(axis=-1)


def _picked(logits_CV: Array, token_C: Array) -> Array:
    return jnp.take_along_axis(logits_CV, token_C[:, None], axis=-1)[:, 0]

"""Uniformity of active latent importance (Gemma Scope, arXiv 2408.05147, appendix C.3).

The importance of a latent with activation f for one prediction is y = f · (W_decᵀ ∇L). L is the
mean-centred logit of the target token, and ∇L its gradient with respect to the activations that the
SAE reconstructs. With p = |y| / Σ|y| and its entropy S(p), the uniformity r = exp(S(p)) / ‖y‖₀ is
the effective fraction of the active latents that matter: 1 if all matter equally, 1 / ‖y‖₀ if only
one does.

Legend: B sequences of a batch, S position, D model width, F latents, C rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from activation_cache.products import einsum
from sae_train.evaluate.sums import in_chunks
from sae_train.inference.sae import Sae


@jax.jit
def uniformity(
    sae: Sae, x_BSD: Float[Array, "B S D"], gradient_BSD: Float[Array, "B S D"]
) -> Float[Array, "B S"]:
    """r of every token; NaN where no latent is active or has a gradient.

    Args:
        x_BSD: activations that the SAE reads.
        gradient_BSD: ∇L of the prediction made at each position.
    """
    x_ND = x_BSD.astype(jnp.float32).reshape(-1, x_BSD.shape[-1])
    gradient_ND = gradient_BSD.astype(jnp.float32).reshape(-1, gradient_BSD.shape[-1])
    chunks = in_chunks(sae, x_ND, gradient_ND)

    def one_chunk(chunk_of: tuple[Array, Array]) -> Array:
        x_CD, gradient_CD = chunk_of
        latents_CF = sae.encode(x_CD).astype(jnp.float32)
        return _uniformity(jnp.abs(latent_effects(sae, latents_CF, gradient_CD)))

    return jax.lax.map(one_chunk, chunks).reshape(-1)[: len(x_ND)].reshape(x_BSD.shape[:2])


def latent_effects(
    sae: Sae, latents_CF: Float[Array, "C F"], gradient_CD: Float[Array, "C D"]
) -> Float[Array, "C F"]:
    """y = f · (W_decᵀ ∇L) of each latent, with its sign."""
    W_dec_FD = jnp.asarray(sae.W_dec).astype(jnp.float32)
    return latents_CF * einsum("cd,df->cf", gradient_CD, W_dec_FD.T, precision=sae.precision)


def _uniformity(y_CF: Float[Array, "C F"]) -> Float[Array, " C"]:
    p_CF = y_CF / y_CF.sum(axis=1, keepdims=True)
    entropy_C = -jax.scipy.special.xlogy(p_CF, p_CF).sum(axis=1)
    return jnp.exp(entropy_C) / (y_CF > 0).sum(axis=1, dtype=jnp.float32)


@dataclass
class ImportanceSums:
    """The sum of r over the counted tokens where it is finite, and their number."""

    sum_: np.ndarray = field(default_factory=lambda: np.zeros(()))
    count: np.ndarray = field(default_factory=lambda: np.zeros((), np.int64))

    def add(self, r_BS: Float[Array, "B S"], counted_BP: Bool[np.ndarray, "B P"]) -> None:
        """Add one batch; the last position predicts nothing."""
        r_BP = np.asarray(r_BS, np.float64)[:, :-1]
        counted_BP = counted_BP & np.isfinite(r_BP)
        self.sum_ = self.sum_ + np.where(counted_BP, r_BP, 0.0).sum()
        self.count = self.count + counted_BP.sum()

    @property
    def mean(self) -> float | None:
        """Mean of r over tokens; None if none was counted."""
        return float(self.sum_ / self.count) if self.count else None

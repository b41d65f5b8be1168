"""What every trainer is given, and what it must do.

Legend: B rows of a batch, D width of the tap, F latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float

from sae_train.inference.sae import Sae


@dataclass(frozen=True)
class Budget:
    """Sizes, steps, and the schedule's lengths in steps."""

    d_model: int
    width: int
    batch_size: int
    steps: int
    warmup_steps: int
    sparsity_warmup_steps: int
    decay_steps: int
    input_scale: float  # C: the root of the rows' mean squared norm
    seed: int = 0

    @property
    def dead_after_steps(self) -> int:
        """A latent that hasn't fired for so long is dead, where a trainer asks."""
        return max(1, self.steps // 10)


class Trainer(Protocol):
    """One library's trainer."""

    def step(self, rows_BD: Float[np.ndarray, "B D"]) -> None:
        """One optimiser step on raw rows."""

    def sae(self) -> Sae:
        """What was trained, on raw rows."""


def on_raw_rows(tensors: dict[str, torch.Tensor], *, scale: float, k: int | None = None) -> Sae:
    """An SAE on rows of x / scale as one on x: biases and threshold grow by the scale.

    Args:
        tensors: W_enc [D, F], W_dec [F, D], b_enc, b_dec and threshold, which may be one number.
    """
    host = {
        name: tensor.detach().cpu().numpy().astype(np.float32) for name, tensor in tensors.items()
    }
    host["threshold"] = np.broadcast_to(host["threshold"], host["b_enc"].shape)
    for name in ("b_enc", "b_dec", "threshold"):
        host[name] = host[name] * np.float32(scale)
    return Sae(**host, k=k)

"""sparsify's TopK SAE: its `SparseCoder` in the order of its `Trainer`'s steps, on raw rows.

Its `Trainer` reads a model's own forward and can't be given rows, so that the loop is written here
from it. It scales nothing: its loss is the batch's FVU. Needs the extra `bench`.

Legend: B rows of a batch, D width of the tap.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float

from benchmarks.quality.trainer import Budget, on_raw_rows
from sae_train.inference.sae import Sae

if not torch.cuda.is_available():
    # With torch's build for GPUs comes Triton, by which sparsify decodes on a CPU too: in vain.
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

Optimiser = Literal["signum", "adam"]


class TopK:
    """k active latents in every row; AuxK with `auxk_alpha` above 0."""

    def __init__(
        self,
        budget: Budget,
        *,
        k: int,
        learning_rate: float,
        optimiser: Optimiser = "signum",
        auxk_alpha: float = 0.0,
    ) -> None:
        from sparsify import SparseCoder, SparseCoderConfig

        torch.manual_seed(budget.seed)
        self._coder = SparseCoder(
            budget.d_model, SparseCoderConfig(num_latents=budget.width, k=k), dtype=torch.float32
        )
        self._alpha, self._dead_after = auxk_alpha, budget.dead_after_steps
        self._silent_F = torch.zeros(budget.width, dtype=torch.long)
        self._optimiser, self._scheduler = self._made(budget, optimiser, learning_rate)
        self._begun = False

    def _made(self, budget: Budget, optimiser: Optimiser, rate: float) -> tuple[Any, Any]:
        if optimiser == "adam":
            from transformers import get_linear_schedule_with_warmup

            adam = torch.optim.Adam(self._coder.parameters(), lr=rate)
            return adam, get_linear_schedule_with_warmup(adam, budget.warmup_steps, budget.steps)
        from schedulefree import ScheduleFreeWrapper
        from sparsify.sign_sgd import SignSGD

        signum = ScheduleFreeWrapper(SignSGD(self._coder.parameters(), lr=rate), momentum=0.95)
        signum.train()
        return signum, None

    def step(self, rows_BD: Float[np.ndarray, "B D"]) -> None:
        """Take one step."""
        coder, x_BD = self._coder, torch.from_numpy(rows_BD)
        if not self._begun:
            coder.b_dec.data = x_BD.mean(0)
            self._begun = True
        coder.set_decoder_norm_to_unit_norm()
        dead_F = self._silent_F > self._dead_after if self._alpha > 0 else None
        out = coder(x_BD, dead_mask=dead_F)
        (out.fvu + self._alpha * out.auxk_loss).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        self._optimiser.step()
        self._optimiser.zero_grad()
        if self._scheduler is not None:
            self._scheduler.step()
        self._silent_F += 1
        self._silent_F[out.latent_indices.flatten()] = 0

    def sae(self) -> Sae:
        """What the library would save: of Signum the averaged weights."""
        if self._scheduler is None:
            self._optimiser.eval()
        coder = self._coder
        W_enc = coder.encoder.weight.T
        tensors = {
            "W_enc": W_enc,
            "W_dec": coder.W_dec,
            "b_enc": coder.encoder.bias - coder.b_dec @ W_enc,
            "b_dec": coder.b_dec,
            "threshold": torch.zeros(()),
        }
        return on_raw_rows(tensors, scale=1.0, k=coder.cfg.k)

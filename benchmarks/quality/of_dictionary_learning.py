"""dictionary_learning's JumpReLU and Matryoshka BatchTopK trainers, on rows of unit mean square.

That is how its own buffer scales activations. Each runs its own `update`. Needs the extra `bench`.

Legend: B rows of a batch, D width of the tap.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from jaxtyping import Float

from benchmarks.quality.trainer import Budget, on_raw_rows
from sae_train.inference.sae import Sae


class _OnScaledRows:
    """`update` of a trainer, given x / C."""

    _trainer: Any
    _subtracts_b_dec: bool  # before the encoder

    def __init__(self, budget: Budget) -> None:
        torch.manual_seed(budget.seed)
        self._scale, self._step = budget.input_scale, 0

    def step(self, rows_BD: Float[np.ndarray, "B D"]) -> None:
        """Take one step; the library is given x / C."""
        self._trainer.update(self._step, torch.from_numpy(rows_BD / np.float32(self._scale)))
        self._step += 1

    def sae(self) -> Sae:
        """What was trained, acting on rows as they are stored.

        A BatchTopK's threshold is the library's own: a moving average of the smallest activation
        that a batch selected.
        """
        ae = self._trainer.ae
        names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
        tensors = {name: getattr(ae, name) for name in names}
        if self._subtracts_b_dec:
            tensors["b_enc"] = ae.b_enc - ae.b_dec @ ae.W_enc
        return on_raw_rows(tensors, scale=self._scale)


def _shared(budget: Budget) -> dict[str, Any]:
    return {
        "steps": budget.steps,
        "activation_dim": budget.d_model,
        "dict_size": budget.width,
        "layer": 0,
        "lm_name": "",
        "seed": budget.seed,
        "warmup_steps": budget.warmup_steps,
        "decay_start": budget.steps - budget.decay_steps,
    }


class JumpRelu(_OnScaledRows):
    """`JumpReluTrainer`: its loss is |x - x̂|² + penalty · (mean L0 / target - 1)²."""

    _subtracts_b_dec = False

    def __init__(
        self,
        budget: Budget,
        *,
        target_l0: float,
        learning_rate: float,
        bandwidth: float,
        sparsity_penalty: float = 1.0,
        b_dec_D: Float[np.ndarray, " D"] | None = None,
    ) -> None:
        """`b_dec_D`: where b_dec starts, on raw rows; the library's own start is 0."""
        super().__init__(budget)
        self._trainer = JumpReluTrainer(
            **_shared(budget),
            lr=learning_rate,
            bandwidth=bandwidth,
            sparsity_penalty=sparsity_penalty,
            sparsity_warmup_steps=budget.sparsity_warmup_steps,
            target_l0=target_l0,
        )
        if b_dec_D is not None:
            self._trainer.ae.b_dec.data = torch.from_numpy(b_dec_D / self._scale).float()


class Matryoshka(_OnScaledRows):
    """`MatryoshkaBatchTopKTrainer`, its constants for dead latents and threshold fitted to the run.

    Its defaults, 10 million rows and 1000 steps, are longer than the run.
    """

    _subtracts_b_dec = True

    def __init__(
        self,
        budget: Budget,
        *,
        k: int,
        learning_rate: float,
        fractions: tuple[float, ...],
        auxk_alpha: float = 1 / 32,
    ) -> None:
        super().__init__(budget)
        self._trainer = MatryoshkaBatchTopKTrainer(
            **_shared(budget),
            k=k,
            lr=learning_rate,
            group_fractions=list(fractions),
            auxk_alpha=auxk_alpha,
            threshold_start_step=budget.steps - budget.decay_steps,
            threshold_beta=0.95,
        )
        self._trainer.dead_feature_threshold = budget.dead_after_steps * budget.batch_size

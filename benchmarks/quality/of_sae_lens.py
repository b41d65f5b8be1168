"""SAELens' JumpReLU and Matryoshka BatchTopK SAEs by its `SAETrainer`, on rows of mean norm √D.

That is its `expected_average_only_in`, which scales the rows itself. Needs the extra `bench`.

Legend: B rows of a batch, D width of the tap.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.training.sae_trainer import SAETrainer

from benchmarks.quality.trainer import Budget, on_raw_rows
from sae_train.inference.sae import Sae

Batches = Iterator[Float[np.ndarray, "B D"]]


class _SaeLens:
    """`SAETrainer.step` on one of its training SAEs.

    Args:
        norms: batches from which it estimates the rows' mean norm.
        b_dec_D: where b_dec starts, on raw rows; the library's own start is 0.
    """

    def __init__(
        self,
        budget: Budget,
        sae: Any,
        *,
        learning_rate: float,
        beta1: float,
        norms: Batches,
        b_dec_D: Float[np.ndarray, " D"] | None = None,
    ) -> None:
        settings = SAETrainerConfig(
            total_training_samples=budget.steps * budget.batch_size,
            train_batch_size_samples=budget.batch_size,
            lr=learning_rate,
            lr_end=learning_rate / 10,  # as its runner sets it; its constant schedule ignores it
            lr_warm_up_steps=budget.warmup_steps,
            lr_decay_steps=budget.decay_steps,
            adam_beta1=beta1,
            dead_feature_window=budget.dead_after_steps,  # its default is longer than the run
            logger=LoggingConfig(log_to_wandb=False),
        )
        self._sae = sae
        self._trainer = SAETrainer(
            cfg=settings, sae=sae, data_provider=map(torch.from_numpy, norms)
        )
        self._trainer.activation_scaler.estimate_scaling_factor(
            d_in=budget.d_model,
            data_provider=self._trainer.data_provider,
            n_batches_for_norm_estimate=16,
        )
        factor = self._trainer.activation_scaler.scaling_factor
        assert factor is not None
        self._scale = 1.0 / float(factor)
        if b_dec_D is not None:
            self._sae.b_dec.data = torch.from_numpy(b_dec_D / self._scale).float()

    def step(self, rows_BD: Float[np.ndarray, "B D"]) -> None:
        """Take one step; the library scales the rows itself."""
        self._trainer.step(torch.from_numpy(rows_BD))
        self._trainer.n_training_steps += 1

    def sae(self) -> Sae:
        """What the library would save, acting on rows as they are stored.

        A BatchTopK is saved as a JumpReLU with the library's own threshold: a moving average of
        the smallest activation that a batch selected.
        """
        saved = {name: one.detach().clone() for name, one in self._sae.state_dict().items()}
        self._sae.process_state_dict_for_saving_inference(saved)
        names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
        tensors = {name: saved[name] for name in names}
        if self._sae.cfg.apply_b_dec_to_input:
            tensors["b_enc"] = tensors["b_enc"] - tensors["b_dec"] @ tensors["W_enc"]
        return on_raw_rows(tensors, scale=self._scale)


def _shared(budget: Budget) -> dict[str, Any]:
    torch.manual_seed(budget.seed)  # the weights are drawn where the SAE is made
    return {
        "d_in": budget.d_model,
        "d_sae": budget.width,
        "normalize_activations": "expected_average_only_in",
    }


class JumpRelu(_SaeLens):
    """Its loss is |x - x̂|² + coefficient · L0, or with a target (its `quadratic` mode) the square.

    The square is Gemma Scope 2's, coefficient · (2 / target) (L0 - target)² of each row.
    """

    def __init__(
        self,
        budget: Budget,
        *,
        coefficient: float,
        learning_rate: float,
        bandwidth: float,
        threshold: float,
        beta1: float = 0.9,
        target_l0: float | None = None,
        ste_to_input: bool = False,
        norms: Batches,
        b_dec_D: Float[np.ndarray, " D"] | None = None,
    ) -> None:
        config = JumpReLUTrainingSAEConfig(
            **_shared(budget),
            l0_coefficient=coefficient,
            l0_warm_up_steps=budget.sparsity_warmup_steps,
            jumprelu_bandwidth=bandwidth,
            jumprelu_init_threshold=threshold,
            jumprelu_sparsity_loss_mode="step" if target_l0 is None else "quadratic",
            jumprelu_ste_to_input=ste_to_input,
            target_l0=target_l0,
        )
        sae = JumpReLUTrainingSAE(config)
        own = {"learning_rate": learning_rate, "beta1": beta1, "norms": norms, "b_dec_D": b_dec_D}
        super().__init__(budget, sae, **own)


class Matryoshka(_SaeLens):
    """Its Matryoshka BatchTopK: k active latents a row in the mean of a batch.

    The threshold's average begins at 0; it follows faster than by default, as the run is short.
    """

    def __init__(
        self,
        budget: Budget,
        *,
        k: int,
        learning_rate: float,
        fractions: tuple[float, ...],
        aux_coefficient: float = 1.0,
        beta1: float = 0.9,
        norms: Batches,
        b_dec_D: Float[np.ndarray, " D"] | None = None,
    ) -> None:
        widths = np.cumsum([int(one * budget.width) for one in fractions[:-1]]).tolist()
        config = MatryoshkaBatchTopKTrainingSAEConfig(
            **_shared(budget),
            k=k,
            matryoshka_widths=[*widths, budget.width],
            aux_loss_coefficient=aux_coefficient,
            topk_threshold_lr=0.05,
        )
        sae = MatryoshkaBatchTopKTrainingSAE(config)
        own = {"learning_rate": learning_rate, "beta1": beta1, "norms": norms, "b_dec_D": b_dec_D}
        super().__init__(budget, sae, **own)

"""Other libraries' JumpReLU trainers behind one face: a step on raw rows, and the SAE in the end.

Each runs its own training code with the settings that its authors expose; what it trains on is
scaled as its own documentation says. Needs the extra `bench`.

Legend: B rows of a batch, D model width, F latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from jaxtyping import Float
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

from sae_train.inference.sae import Sae


@dataclass(frozen=True)
class Budget:
    """What every trainer gets: sizes, steps, and the schedule's lengths in steps."""

    d_model: int
    width: int
    batch_size: int
    steps: int
    warmup_steps: int
    sparsity_warmup_steps: int
    decay_steps: int
    input_scale: float  # C: the root of the rows' mean squared norm
    seed: int = 0


class Trainer(Protocol):
    """One library's trainer."""

    def step(self, rows_BD: Float[np.ndarray, "B D"]) -> None:
        """One optimiser step on raw rows."""

    def sae(self) -> Sae:
        """What was trained, on raw rows."""


class DictionaryLearning:
    """`JumpReluTrainer` of dictionary_learning, on rows of unit mean square (its own scaling).

    Its loss is |x - x̂|² + penalty · (mean L0 / target - 1)².
    """

    def __init__(
        self,
        budget: Budget,
        *,
        target_l0: float,
        learning_rate: float,
        bandwidth: float,
        b_dec_D: Float[np.ndarray, " D"] | None = None,
    ) -> None:
        torch.manual_seed(budget.seed)
        self._scale, self._step = budget.input_scale, 0
        self._trainer = JumpReluTrainer(
            steps=budget.steps,
            activation_dim=budget.d_model,
            dict_size=budget.width,
            layer=0,
            lm_name="",
            seed=budget.seed,
            lr=learning_rate,
            bandwidth=bandwidth,
            warmup_steps=budget.warmup_steps,
            sparsity_warmup_steps=budget.sparsity_warmup_steps,
            decay_start=budget.steps - budget.decay_steps,
            target_l0=target_l0,
        )
        if b_dec_D is not None:
            self._trainer.ae.b_dec.data = torch.from_numpy(b_dec_D / self._scale).float()

    def step(self, rows_BD: Float[np.ndarray, "B D"]) -> None:
        """Take one step; the library is given x / scale."""
        self._trainer.update(self._step, torch.from_numpy(rows_BD / np.float32(self._scale)))
        self._step += 1

    def sae(self) -> Sae:
        """What was trained, acting on rows as they are stored."""
        ae = self._trainer.ae
        return _raw(
            {name: getattr(ae, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")},
            scale=self._scale,
        )


class SaeLens:
    """`SAETrainer` of SAELens with its JumpReLU SAE, on rows whose mean norm is √D.

    That is its `expected_average_only_in`; its `step` loss is |x - x̂|² + coefficient · L0.
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
        decoder_init_norm: float = 0.1,
        norms: Iterator[Float[np.ndarray, "B D"]],
        b_dec_D: Float[np.ndarray, " D"] | None = None,
    ) -> None:
        torch.manual_seed(budget.seed)
        config = JumpReLUTrainingSAEConfig(
            d_in=budget.d_model,
            d_sae=budget.width,
            normalize_activations="expected_average_only_in",
            l0_coefficient=coefficient,
            l0_warm_up_steps=budget.sparsity_warmup_steps,
            jumprelu_bandwidth=bandwidth,
            jumprelu_init_threshold=threshold,
            decoder_init_norm=decoder_init_norm,
        )
        settings = SAETrainerConfig(
            total_training_samples=budget.steps * budget.batch_size,
            train_batch_size_samples=budget.batch_size,
            lr=learning_rate,
            lr_end=learning_rate / 10,  # as its runner sets it; its constant schedule ignores it
            lr_warm_up_steps=budget.warmup_steps,
            lr_decay_steps=budget.decay_steps,
            adam_beta1=beta1,
            logger=LoggingConfig(log_to_wandb=False),
        )
        self._sae: Any = JumpReLUTrainingSAE(config)
        self._trainer = SAETrainer(
            cfg=settings, sae=self._sae, data_provider=map(torch.from_numpy, norms)
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
        """What was trained, acting on rows as they are stored."""
        names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
        tensors = {name: getattr(self._sae, name) for name in names}
        if self._sae.cfg.apply_b_dec_to_input:
            tensors["b_enc"] = tensors["b_enc"] - tensors["b_dec"] @ tensors["W_enc"]
        return _raw(tensors, scale=self._scale)


def _raw(tensors: dict[str, torch.Tensor], *, scale: float) -> Sae:
    """An SAE on rows of x / scale as one on x: biases and threshold grow by the scale."""
    host = {name: tensor.detach().numpy().astype(np.float32) for name, tensor in tensors.items()}
    for name in ("b_enc", "b_dec", "threshold"):
        host[name] = host[name] * np.float32(scale)
    return Sae(**host)

"""What is to be measured: one SAE, in one model, on one text.

Legend: B sequences of a batch, S position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from activation_cache.config import ModelConfig
from activation_cache.gemma.taps import Tap
from activation_cache.storage.files import StoragePath
from activation_cache.text.token_table import TokenTable
from sae_train.config.run import Config, EvaluationConfig
from sae_train.evaluate.result import FORMAT_VERSION, Evaluation
from sae_train.inference.sae import Sae


@dataclass(frozen=True)
class Job:
    """One SAE to evaluate.

    Attributes:
        model, table, sequences: the model it is measured in, and the sequences that go through.
        record: the settings as the evaluation will hold them.
        label: of an evaluation elsewhere than in the run's own model and text; None of its own.
        masked: runs of token ids that count for nothing, such as the prefix of a user's turn.
        compared: measured only to stand beside another precision.
    """

    folder: StoragePath
    config: Config
    settings: EvaluationConfig
    step: int
    sae: Sae
    model: ModelConfig
    table: TokenTable
    sequences: range
    record: dict[str, Any]
    fingerprints: dict[str, str]
    label: str | None = None
    masked: tuple[tuple[int, ...], ...] = ()
    compared: bool = False

    @property
    def tap(self) -> Tap:
        """What the SAE reads."""
        return self.config.sae.tap

    @property
    def target(self) -> Tap:
        """What it predicts, and what is replaced: of an SAE, what it reads."""
        return self.config.sae.target_tap

    @property
    def loss_sequences(self) -> int:
        """Sequences that the losses are measured on: as many as are read, at most."""
        wanted = self.settings.loss_sequences or self.settings.sequences
        return min(wanted, self.settings.sequences)

    @property
    def importance_sequences(self) -> int:
        """Sequences that importance is measured on: those of the losses, at most."""
        return min(self.settings.importance_sequences, self.loss_sequences)

    def is_current(self, evaluation: Evaluation | None) -> bool:
        """Would the evaluation there is come out the same again?"""
        return (
            evaluation is not None
            and evaluation.format_version == FORMAT_VERSION
            and evaluation.settings == self.record
            and self.fingerprints.items() <= evaluation.fingerprints.items()
        )


def covered(
    tokens_BS: Int[np.ndarray, "B S"], runs: Sequence[Sequence[int]]
) -> Bool[np.ndarray, "B S"]:
    """Which tokens are part of one of these runs of ids, wherever it stands in its sequence."""
    inside_BS = np.zeros(tokens_BS.shape, bool)
    for run in runs:
        if len(run) > tokens_BS.shape[1]:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(tokens_BS, len(run), axis=1)
        begins = (windows == np.asarray(run)).all(axis=-1)
        for offset in range(len(run)):
            inside_BS[:, offset : offset + begins.shape[1]] |= begins
    return inside_BS

"""A job: one SAE to measure, in one model, on one text.

Legend: B sequences of a batch, S position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from activation_cache.config import ModelConfig
from activation_cache.gemma.taps import Tap
from activation_cache.storage.files import StoragePath
from activation_cache.text.token_table import TokenTable
from sae_train.config.run import Config, EvaluationConfig
from sae_train.evaluate.held_out_rows import HeldOutRows
from sae_train.evaluate.result import FORMAT_VERSION, Evaluation
from sae_train.inference.sae import Sae


@dataclass(frozen=True)
class Job:
    """One SAE to evaluate.

    Attributes:
        folder, config, step: the run, and the step of the checkpoint.
        model: the model it is measured in.
        table, sequences: the tokens, and which sequences of them are measured.
        record: the settings as evaluation.json will hold them.
        label: names an extra evaluation, in another model or on other text; None for the run's own.
        masked: token sequences excluded from the metrics, such as the prefix of a user's turn.
        compared: measured only for the comparison of precisions.
        rows: of a run on imported rows, those held out, which `table` is then too: no model reads
            anything, and there are no losses.

    The SAE's products, and the model's if it is float32, are made at `sae.precision`.
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
    rows: HeldOutRows | None = None

    @property
    def tap(self) -> Tap:
        """What the SAE reads."""
        return self.config.sae.tap

    @property
    def target(self) -> Tap:
        """What it predicts and replaces; for an SAE, what it reads."""
        return self.config.sae.target_tap

    @property
    def loss_sequences(self) -> int:
        """How many sequences the losses are measured on: at most all that are read."""
        if self.rows is not None:
            return 0
        wanted = self.settings.loss_sequences or self.settings.sequences
        return min(wanted, self.settings.sequences)

    @property
    def importance_sequences(self) -> int:
        """How many sequences importance is measured on: at most those of the losses."""
        return min(self.settings.importance_sequences, self.loss_sequences)

    def is_current(self, evaluation: Evaluation | None) -> bool:
        """Would this job give the same numbers as the evaluation that exists?"""
        return (
            evaluation is not None
            and evaluation.format_version == FORMAT_VERSION
            and evaluation.settings == self.record
            and evaluation.precision == self.sae.precision
            and self.fingerprints.items() <= evaluation.fingerprints.items()
        )

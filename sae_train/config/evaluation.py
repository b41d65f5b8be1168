"""The sections `evaluation` and `probe` of the YAML: what is measured, and with which data.

Numbers come from the Gemma Scope paper (arXiv 2408.05147, section 4) unless said otherwise.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from activation_cache.config import (
    FilePath,
    ModelConfig,
    PositiveSmallCount,
    Section,
    SmallCount,
)
from activation_cache.language_model.names import model_name
from activation_cache.precision import PrecisionChoice


class EvaluationText(Section):
    """The text of an extra evaluation, all of it held out; keys as in `text`."""

    source: Annotated[list[FilePath], Field(min_length=1)]
    field: str = "text"
    subset_field: str | None = None
    sequence_length: Annotated[SmallCount, Field(ge=2)] = 1024


class ExtraEvaluationConfig(Section):
    """An extra evaluation: in another model, on other text, or both.

    `label` names the files written; without it, the model's name does.
    """

    label: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
    model: ModelConfig | None = None  # None: the run's own
    text: EvaluationText | None = None  # None: the held-out text of the run's store
    sequences: PositiveSmallCount | None = None  # None: evaluation.sequences
    masked_text: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _differs(self) -> ExtraEvaluationConfig:
        if self.model is None and self.text is None:
            raise ValueError("give a model, a text or both: else it is the run's own evaluation")
        if self.model is None and self.label is None:
            raise ValueError("text without a model needs a label, after which the file is called")
        if self.model is not None and self.model.precision != "auto":
            raise ValueError(
                f"model.precision is {self.model.precision}, but evaluation.precision says how the "
                "products of every evaluation are made: leave model.precision out"
            )
        return self

    @property
    def called(self) -> str:
        """The label, as given or made from the model's name."""
        if self.label is not None:
            return self.label
        assert self.model is not None
        name = model_name(self.model.weights).rpartition("/")[2]
        return re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip("._-")


class EvaluationConfig(Section):
    """How many held-out sequences are measured, and how many of them in the spliced model."""

    sequences: PositiveSmallCount = 2048
    loss_sequences: PositiveSmallCount | None = None  # None: all of `sequences`
    importance_sequences: SmallCount = 64  # of them, for the gradients of appendix C.3; 0: none
    sequences_per_batch: PositiveSmallCount = 8
    # How the products of SAE and language model are made where their weights are float32.
    precision: PrecisionChoice = "float32"
    compare_precision: bool = False  # SAE and model in float32 and in bfloat16 (section 4.7)
    masked_text: list[str] = Field(default_factory=list)  # excluded from the metrics
    also: list[ExtraEvaluationConfig] = Field(default_factory=list)

    @model_validator(mode="after")
    def _labels_differ(self) -> EvaluationConfig:
        labels = [entry.called for entry in self.also]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"also has {twice[0]} twice: give each entry a label of its own")
        return self

    @model_validator(mode="after")
    def _compares_with_float32(self) -> EvaluationConfig:
        if self.compare_precision and self.precision != "float32":
            raise ValueError(
                "compare_precision measures SAE and model in float32 beside bfloat16, and "
                f"precision is {self.precision}: set precision to float32, or compare_precision "
                "to false"
            )
        return self

    def recorded(self, entry: ExtraEvaluationConfig | None = None) -> dict[str, Any]:
        """The settings that evaluation.json holds: of `also` only the extra evaluation's own.

        Of `precision` they tell what isn't float32: there are evaluations without the key.
        """
        own = self.model_dump(mode="json", exclude={"also"})
        if self.precision == "float32":
            del own["precision"]
        return own if entry is None else own | {"also": entry.model_dump(mode="json")}


class ProbeConfig(Section):
    """What `sae probe` reads and fits; the defaults are sae-probes' protocol, with three splits.

    `datasets` null means ten of sae-probes' data sets with short prompts, and of a folder `data`
    all that are in it.
    """

    data: FilePath | None = None  # a folder of .csv files; None: those of the package sae-probes
    datasets: Literal["all"] | Annotated[list[str], Field(min_length=1)] | None = None
    k: Annotated[list[PositiveSmallCount], Field(min_length=1)] = [1, 2, 5, 16]  # noqa: RUF012
    splits: Annotated[PositiveSmallCount, Field(le=100)] = 3  # into training and test rows
    rows: Annotated[PositiveSmallCount, Field(ge=200)] = 5000  # the first of a data set
    max_tokens: Annotated[PositiveSmallCount, Field(ge=2)] = 1024  # the last of a prompt, with BOS

    @field_validator("k")
    @classmethod
    def _rising(cls, k: list[int]) -> list[int]:
        if sorted(set(k)) != k:
            raise ValueError(f"probe.k {k} must rise: give {sorted(set(k))}")
        return k

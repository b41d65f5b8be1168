"""The section `train.sparsity` of the YAML: the penalties, a class each, and their union."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from activation_cache.config import (
    NonNegative32,
    Positive32,
    PositiveSmallCount,
    Section,
    SmallCount,
)


class FrequencyPenalty(Section):
    """A further penalty on latents that fire often: λ ω² / `scale` for each, ω its frequency.

    With `penalty: l0` and the same λ the two make λ Σ ω (1 + ω / scale), the form of GDM's
    progress update on high-frequency latents (2025), which used 0.1 and 0.01.
    """

    scale: Positive32 = 0.1
    coefficient: NonNegative32 | None = None  # None: the coefficient of the penalty above it


class L0Penalty(Section):
    """Gemma Scope's penalty: coefficient times L0, per token."""

    penalty: Literal["l0"] = "l0"
    coefficient: NonNegative32
    warmup_steps: SmallCount = 10_000
    frequency: FrequencyPenalty | None = None


class TargetL0Penalty(Section):
    """A quadratic penalty on the distance of L0 from `target`.

    `batch_mean`: coefficient * (mean L0 / target - 1)^2, the JumpReLU paper's (arXiv 2407.14435,
    also dictionary_learning's). `per_token`: coefficient * (2 / target) * (L0 - target)^2 for
    each token, Gemma Scope 2's equation 5 as printed.
    """

    penalty: Literal["target_l0"]
    target: Annotated[Positive32, Field(ge=1)]
    form: Literal["batch_mean", "per_token"] = "batch_mean"
    coefficient: NonNegative32 = 1.0
    warmup_steps: SmallCount = 10_000
    frequency: FrequencyPenalty | None = None

    @model_validator(mode="after")
    def _frequency_has_a_coefficient(self) -> TargetL0Penalty:
        # The coefficient here weighs a squared distance, not active latents: it can't serve both.
        if self.frequency is not None and self.frequency.coefficient is None:
            raise ValueError(
                "with penalty target_l0 frequency.coefficient must be given: try 1e-3, about "
                "what an active latent costs with penalty l0"
            )
        return self


class MatchL0Penalty(Section):
    """Coefficient times L0, the coefficient steered so that the mean L0 comes to `target`.

    `coefficient` is where it starts; docs/recipes.md has the controller and what it reached.
    """

    penalty: Literal["match_l0"]
    target: Annotated[Positive32, Field(ge=1)]
    coefficient: Positive32 = 1e-3
    warmup_steps: SmallCount = 10_000
    settle_steps: PositiveSmallCount | None = None  # None: a fiftieth of the run
    frequency: FrequencyPenalty | None = None


class L1Penalty(Section):
    """Coefficient times the L1 norm of the latents: of a ReLU SAE, weighted by the norms of the
    decoder's rows; of a Gated SAE, taken of the gate. Both in `relu` and `gated`.
    """

    penalty: Literal["l1"]
    coefficient: NonNegative32
    warmup_steps: SmallCount = 10_000


class NoPenalty(Section):
    """Nothing: TopK and BatchTopK are sparse by selection."""

    penalty: Literal["none"]
    coefficient: ClassVar[float] = 0.0
    warmup_steps: ClassVar[int] = 0


Sparsity = Annotated[
    L0Penalty | TargetL0Penalty | MatchL0Penalty | L1Penalty | NoPenalty,
    Field(discriminator="penalty"),
]

"""The config of one run: a class per section of the YAML, with Gemma Scope's values as defaults.

Numbers come from the Gemma Scope paper (arXiv 2408.05147, section 3) unless said otherwise.
`sae_train.config.file` reads a file, overrides a value and writes the resolved config. The same
YAML may hold three sections more, `sweep`, `launch` and `rollout`: `launch.config.job` adds them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from activation_cache.config import (
    LARGEST_INT32,
    CacheConfig,
    Fraction,
    Location,
    MeshConfig,
    ModelConfig,
    NonNegative32,
    Positive32,
    PositiveCount,
    PositiveSmallCount,
    Section,
    Seed,
    SmallCount,
    TextConfig,
)
from activation_cache.precision import Precision, PrecisionChoice
from sae_train.config import end_to_end, rolling
from sae_train.config.end_to_end import EndToEndConfig
from sae_train.config.evaluation import EvaluationConfig, ProbeConfig
from sae_train.config.latents import LatentsConfig
from sae_train.config.matryoshka import check_shares
from sae_train.config.row_origin import rows_mistakes, without_model
from sae_train.config.sae import SaeConfig
from sae_train.config.sparsity import MatchL0Penalty, Sparsity, TargetL0Penalty
from sae_train.recipe import fill
from sae_train.recipe.formulas import BATCH_SIZE, Name

logger = logging.getLogger(__name__)

# Sections of the same YAML of which a run knows nothing.
COMMAND_SECTIONS = ("sweep", "launch", "rollout")


class LearningRateConfig(Section):
    """Cosine warm-up from `warmup_from * peak`, constant, then an optional linear decay.

    Gemma Scope states no decay; `decay_steps` counts back from the last step. Biases have
    `bias_multiplier` times the rate.
    """

    peak: Positive32 = 7e-5
    warmup_steps: SmallCount = 1000
    warmup_from: Fraction = 0.1
    decay_steps: SmallCount = 0
    decay_to: Fraction = 0.0
    bias_multiplier: NonNegative32 = 1.0


class AdamConfig(Section):
    """Adam. With β₁ = 0, Gemma Scope's, there is no first moment, and steps may be sparse."""

    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.0
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    epsilon: Positive32 = 1e-8


class WandbConfig(Section):
    """Where Weights & Biases shows the run's metrics; training never depends on it."""

    project: Annotated[str, Field(min_length=1)]
    entity: str | None = None  # None: the account's own
    name: str | None = None  # None: the run's `name`
    group: str | None = None
    tags: list[str] = Field(default_factory=list)
    mode: Literal["online", "offline"] | None = None  # None: WANDB_MODE, or online


class TrainConfig(Section):
    """The optimisation: batch, budget, seed, schedules, penalty."""

    # What fills the keys that aren't given, and those it filled: written, not read.
    recipe: Name | None = None
    recipe_chose: list[str] = Field(default_factory=list)
    batch_size: PositiveSmallCount = BATCH_SIZE
    tokens: PositiveCount
    seed: Seed = 0
    data_seed: Seed | None = None  # of the order of batches; None: `seed` is that too
    learning_rate: LearningRateConfig = LearningRateConfig()
    adam: AdamConfig = AdamConfig()
    sparsity: Sparsity
    # How products are made (docs/numerics.md); weights, sums and comparisons stay float32.
    precision: PrecisionChoice = "auto"  # float32 on CPUs, bfloat16 on accelerators
    gradient_clip: Positive32 | None = None  # global norm; Gemma Scope clips nothing
    end_to_end: EndToEndConfig | None = None  # a last phase, through the language model
    dead_after_tokens: PositiveCount = 10_000_000  # a latent silent for so long counts as dead
    # What a step's gradients are made from (docs/performance.md): products of whole matrices, pairs
    # of a row and an active latent where there are few, or one of the two by the SAE's shape.
    step: Literal["auto", "dense", "sparse"] = "auto"
    sparse_capacity: PositiveSmallCount | None = None  # None: `path_choice.capacity_per_row`
    kernels: Literal["xla", "pallas"] = "xla"  # what the sparse step is compiled from
    stacked: bool = False  # one compiled program for members of a cohort with the same step
    log_every_steps: PositiveSmallCount = 100
    tensorboard: bool = False
    wandb: WandbConfig | None = None

    @field_validator("sparsity", mode="before")
    @classmethod
    def _default_penalty(cls, sparsity: Any) -> Any:
        """A section without `penalty` means Gemma Scope's."""
        if isinstance(sparsity, dict) and "penalty" not in sparsity:
            return {"penalty": "l0", **sparsity}
        return sparsity

    @property
    def has_momentum(self) -> bool:
        """Does Adam keep a first moment?"""
        return self.adam.beta1 > 0

    @property
    def has_whole_gradients(self) -> bool:
        """Does a dense step make all gradients before it updates anything?"""
        return self.has_momentum or self.gradient_clip is not None

    @property
    def steps(self) -> int:
        """Optimiser steps: the token budget in whole batches, at least one."""
        return max(1, self.tokens // self.batch_size)

    @property
    def end_to_end_steps(self) -> int:
        """The last so many steps go through the language model."""
        if self.end_to_end is None:
            return 0
        return max(1, self.end_to_end.tokens // self.batch_size)

    def is_end_to_end(self, *, step: int) -> bool:
        """Does the step that turns `step` done steps into `step + 1` go through the model?"""
        return step >= self.steps - self.end_to_end_steps

    @property
    def order_seed(self) -> int:
        """The seed of the order in which rows are read."""
        return self.seed if self.data_seed is None else self.data_seed


class CheckpointConfig(Section):
    """How often the training state is saved and how many saves are kept."""

    every_steps: PositiveSmallCount = 5000
    keep: PositiveSmallCount = 3
    # The precision of checkpoints that a run may go on from at another one.
    accept_precision: Precision | None = None


class Config(Section):
    """One run: what training, evaluation, release and report read.

    Sections in `COMMAND_SECTIONS` are left out, so that one YAML serves everybody: users write
    them into theirs, and the command writes them into the folders of its runs.
    """

    name: Annotated[str, Field(min_length=1)]
    model: ModelConfig
    text: TextConfig
    cache: CacheConfig
    sae: SaeConfig
    train: TrainConfig
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    latents: LatentsConfig = LatentsConfig()
    probe: ProbeConfig = ProbeConfig()
    output: Location

    @property
    def harvest_mesh(self) -> tuple[str, MeshConfig]:
        """The mesh of the language model while harvesting, after the key that gives it."""
        return ("mesh", self.mesh) if self.cache.mesh is None else ("cache.mesh", self.cache.mesh)

    @property
    def steps_on_rows(self) -> int:
        """The steps that read rows; for thresholds per latent the last ones too."""
        through_model = 0 if self.sae.threshold_per_latent else self.train.end_to_end_steps
        return max(1, self.train.steps - through_model)

    @model_validator(mode="before")
    @classmethod
    def _with_recipe(cls, values: Any) -> Any:
        return fill.filled(values)

    @model_validator(mode="before")
    @classmethod
    def _without_command_sections(cls, values: Any) -> Any:
        foreign = [key for key in COMMAND_SECTIONS if key not in cls.model_fields]
        if not isinstance(values, dict) or not any(key in values for key in foreign):
            return values
        logger.debug("a run's config leaves out %s, which are the command's", " and ".join(foreign))
        return {key: value for key, value in values.items() if key not in foreign}

    @model_validator(mode="before")
    @classmethod
    def _of_imported_rows(cls, values: Any) -> Any:
        return without_model(values)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        mistakes = [
            *rows_mistakes(
                self.sae,
                model=self.model,
                text=self.text,
                cache=self.cache,
                through_model=self.train.end_to_end is not None,
            ),
            *_check_target(self.train.sparsity, width=self.sae.width),
            *_check_penalty(self.sae, self.train.sparsity),
            *_check_step(self.sae, self.train),
            *_check_revival(self.sae, self.train),
            *_check_recipe(self.sae, self.train),
            *_check_limits(self.train, self.mesh),
            *rolling.mistakes(
                self.cache, batch_size=self.train.batch_size, steps=self.steps_on_rows
            ),
            *end_to_end.mistakes(
                self.train.end_to_end,
                sae=self.sae,
                tokens=self.train.tokens,
                batch_size=self.train.batch_size,
                text=self.text,
                mesh=self.mesh,
            ),
            *_check_divisible("train.batch_size", self.train.batch_size, "data", self.mesh.data),
            *_check_divisible("sae.width", self.sae.width, "model", self.mesh.model),
            *check_shares(tuple(end for end, _ in self.sae.groups), self.mesh),
        ]
        if self.train.tensorboard and "://" in self.output:
            mistakes.append(
                f"train.tensorboard writes event files, which grow, and objects of a bucket can't "
                f"(output is {self.output}): set it to false; metrics.jsonl has every number"
            )
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self


# Each rule that several keys share yields a line for every breach of it.
def _check_target(sparsity: Sparsity, *, width: int) -> Iterator[str]:
    if isinstance(sparsity, TargetL0Penalty | MatchL0Penalty) and sparsity.target > width:
        yield (
            f"train.sparsity.target {sparsity.target:g} is above sae.width {width}: no more "
            f"latents can be active than there are; choose a target from 1 to {width}"
        )


def _check_penalty(sae: SaeConfig, sparsity: Sparsity) -> Iterator[str]:
    jumprelu = ("l0", "target_l0", "match_l0")
    fitting = {"jumprelu": jumprelu, "relu": ("l1",), "gated": ("l1",)}
    expected = fitting.get(sae.architecture, ("none",))
    if sparsity.penalty not in expected:
        yield (
            f"train.sparsity.penalty {sparsity.penalty} does not go with sae.architecture "
            f"{sae.architecture}: use {' or '.join(expected)}"
        )


def _check_step(sae: SaeConfig, train: TrainConfig) -> Iterator[str]:
    if train.step == "sparse" and sae.architecture != "jumprelu":
        yield (
            f"train.step sparse is for jumprelu, and sae.architecture is {sae.architecture}: set "
            "train.step to auto or dense, which take the dense path"
        )
    elif train.step == "sparse" and train.has_momentum:
        yield (
            f"train.step sparse leaves latents without a gradient as they are, and with "
            f"train.adam.beta1 {train.adam.beta1:g} these move too: set train.adam.beta1 to 0, or "
            "train.step to auto or dense"
        )
    elif train.kernels == "pallas" and train.step != "sparse":
        yield (
            "train.kernels pallas is for the sparse step, and sae.architecture is "
            f"{sae.architecture} and train.step {train.step}: set train.kernels to xla, or "
            "sae.architecture to jumprelu and train.step to sparse"
        )


def _check_revival(sae: SaeConfig, train: TrainConfig) -> Iterator[str]:
    dead_after = -(-train.dead_after_tokens // train.batch_size)
    if sae.revive_coefficient and dead_after >= train.steps:
        yield (
            f"sae.revive_coefficient {sae.revive_coefficient:g} has nothing to revive: a latent "
            f"counts as dead after train.dead_after_tokens {train.dead_after_tokens}, {dead_after} "
            f"steps, and the run has {train.steps}. Set train.dead_after_tokens to a tenth of "
            f"train.tokens {train.tokens}, or sae.revive_coefficient to 0"
        )


def _check_recipe(sae: SaeConfig, train: TrainConfig) -> Iterator[str]:
    if train.recipe is not None:
        if found := fill.mistake(train.recipe, architecture=sae.architecture):
            yield found
    elif train.recipe_chose:
        yield (
            "train.recipe_chose lists what train.recipe chose, and there is no train.recipe: leave "
            "it out"
        )


def _check_limits(train: TrainConfig, mesh: MeshConfig) -> Iterator[str]:
    """What is counted in 32 bits though no key has it."""
    if train.steps > LARGEST_INT32:
        yield (
            f"train.tokens {train.tokens} in batches of {train.batch_size} are {train.steps} "
            f"steps, and at most {LARGEST_INT32} can be counted: lower train.tokens or raise "
            "train.batch_size"
        )
    places = train.batch_size * (train.sparse_capacity or 0) // (mesh.data * mesh.model)
    if places > LARGEST_INT32:
        yield (
            f"train.sparse_capacity {train.sparse_capacity} for {train.batch_size} rows are "
            f"{places} places for active pairs on each device, and at most {LARGEST_INT32} can be "
            "counted: lower train.sparse_capacity, or leave it out"
        )


def _check_divisible(name: str, value: int, axis: str, size: int) -> Iterator[str]:
    if value % size:
        divisors = [d for d in range(1, 65) if value % d == 0]
        near = sorted(divisors, key=lambda d: abs(math.log(d / size)))[:4]
        yield (
            f"{name} {value} is not divisible by mesh axis '{axis}' (size {size}): "
            f"use {', '.join(map(str, sorted(near)))}"
        )
